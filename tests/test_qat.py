"""Quantisation-aware training against the files it stands for, network by network."""
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from phoenix.deploy.export import export_onnx
from phoenix.deploy.qat import AwareLayer, AwareNetwork, export_aware, quantised_places
from phoenix.deploy.quantize import quantize_int8, run_logits
from phoenix.models.zoo import create_model

slow = pytest.mark.slow
NAMES = [*(pytest.param(n, marks=slow) for n in (
    'timm/test_efficientnet', 'neurosnake_tiny_ca', 'neurosnake_tiny_vit', 'neurosnake_tiny_kan', 'neurosnake_tiny_ca_od', 'plain_tiny_se', 'cnn', 'resnet18',
    'mobilenetv3_small_100', 'densenet121', 'convnext_atto'))]


def patterns(n, seed, size=64):
    "Coarse random patterns of random strength, in [0, 1]"
    r = np.random.default_rng(seed)
    x = r.random((n, 1, size//8, size//8)).repeat(8, 2).repeat(8, 3)
    return (x*r.random((n, 1, 1, 1))).astype(np.float32)


def used(name):
    "A network whose norms have seen data, all of whose biases differ from zero"
    torch.manual_seed(0)
    net = create_model(name, 4)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
            nn.init.normal_(m.bias, std=.1)
        elif getattr(m, 'bias', None) is not None: nn.init.normal_(m.bias, std=.1)  # one of zeros is left out of a file
    with torch.no_grad():
        for p in net.parameters():  # equal constants are one constant in a file: norms and layer scales as after a training
            if p.ndim == 1 and (p == p[0]).all(): p.mul_(1 + .1*torch.randn(p.shape))
        for i in range(2): net(torch.from_numpy(patterns(8, i)))
    return net.eval()


def form(path):
    "What a file is but for its numbers"
    g = onnx.load(path).graph
    return ([(n.op_type, n.name, list(n.input), list(n.output), [str(a) for a in n.attribute]) for n in g.node],
            sorted((t.name, t.data_type, list(t.dims)) for t in g.initializer))


def inside(path, x):
    "node → what it reads and what it makes, in the 8-bit file executed as it is written"
    model = onnx.load(path)
    nodes = {n.name: (n.input[0], n.output[0]) for n in model.graph.node if n.op_type in ('Conv', 'Gemm', 'MatMul')}
    there = {o.name for o in (*model.graph.output, *model.graph.input)}
    for t in sorted({t for pair in nodes.values() for t in pair} - there):
        model.graph.output.append(onnx.helper.make_tensor_value_info(t, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    values = dict(zip([o.name for o in session.get_outputs()], session.run(None, {'images': x}))) | {'images': x}
    return {n: (values[a], values[b]) for n, (a, b) in nodes.items()}


@pytest.mark.parametrize('name', NAMES)
def test_every_node_is_simulated_and_the_file_has_the_form_of_ptq(name, tmp_path):
    """Each layer, given what the file's node reads, makes what the node makes, within rounding of floats.

    Node by node, because a value on the border of two steps may fall to either side, and in an untrained network
    such flips grow from layer to layer; the whole network is held to half of what rounding costs it."""
    x, net = patterns(16, 9), used(name)
    aware = AwareNetwork(net, x)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():  # as if it had been trained
        for p in aware.parameters(): p.mul_(1 + .02*torch.randn(p.shape, generator=g))
        for r in aware.ranges: r.high.mul_(.9)
    export_aware(aware, tmp_path/'a.onnx', tmp_path/'aware.onnx')
    export_onnx(net, tmp_path/'b.onnx', size=64)
    quantize_int8(tmp_path/'b.onnx', tmp_path/'ptq.onnx', x)
    assert form(tmp_path/'aware.onnx') == form(tmp_path/'ptq.onnx')
    places, values, raw = quantised_places(tmp_path/'a.onnx'), inside(tmp_path/'aware.onnx', x), {}
    layers = [m for m in aware.modules() if isinstance(m, AwareLayer) and m.place]
    assert {m.place for m in layers} == set(places)
    for m in layers:
        m.ranges[1].register_forward_pre_hook(lambda r, args, m=m: raw.__setitem__(m.place.node, args[0]))
        aware.known.clear()
        with torch.no_grad(): m(torch.from_numpy(values[m.place.node][0].copy()))
        want, got = values[m.place.node][1], raw[m.place.node].numpy()
        assert want.shape == got.shape and np.abs(want - got).max() < 1e-4*np.abs(want).max() + 1e-6, m.place
    with torch.no_grad(): here = aware(torch.from_numpy(x)).numpy()
    there, plain = (run_logits(tmp_path/f, x) for f in ('aware.onnx', 'a.onnx'))
    noise = [float(np.sqrt(np.square(there - o).mean())) for o in (here, plain)]
    print(name, 'file to simulation', noise[0], 'to float', noise[1])
    assert noise[0] < .5*noise[1]
