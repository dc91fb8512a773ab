"""Export and quantisation, where too heavy for a notebook; parity of every network stands in test_models."""
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from phoenix.deploy.export import check_parity, export_onnx, make_session
from phoenix.deploy.quantize import float_nodes, quantised_nodes, quantize_int8, run_logits, weight_errors
from phoenix.models.zoo import create_model


def patterns(n, size, seed=0, c=1):
    "Coarse random patterns of random strength, in [0, 1]"
    r = np.random.default_rng(seed)
    h, w = (size, size) if isinstance(size, int) else size
    x = r.random((n, c, -(-h//8), -(-w//8))).repeat(8, 2).repeat(8, 3)[:, :, :h, :w]
    return (x*r.random((n, 1, 1, 1))).astype(np.float32)


def used(name, size=64, n_classes=4, c=1):
    "A network whose norms and offsets have seen data"
    torch.manual_seed(0)
    net = create_model(name, n_classes, c)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.momentum = None  # plain average: norms fit the data at once
    with torch.no_grad():
        for i in range(3): net(torch.from_numpy(patterns(8, size, i, c)))
    return net


@pytest.mark.parametrize('name', ['neurosnake_small_ca', *(pytest.param(n, marks=pytest.mark.slow)
                                                            for n in ('plain_tiny_ca', 'resnet18'))])
def test_int8_stays_close(name, tmp_path):
    net, images = used(name), patterns(24, 64, 9)
    fp32, int8 = export_onnx(net, tmp_path/'m.onnx', size=64), tmp_path/'q.onnx'
    done = quantize_int8(fp32, int8, images)
    a, b = run_logits(fp32, images), run_logits(int8, images)
    noise, signal = np.sqrt(((a-b)**2).mean()), np.sqrt(((a-a.mean(0))**2).mean())
    assert signal > .02 and noise < .75*signal  # untrained: .20 to .57 over eight draws; a wrapped cast is far above 1
    assert max(weight_errors(fp32, int8).values()) < .011
    assert not set(quantised_nodes(int8)) & set(float_nodes(fp32))
    if name != 'plain_tiny_ca': assert done['size_ratio'] <= .3


def test_rectangles_channels_and_fixed_batch(tmp_path):
    net = used('neurosnake_tiny_none', (40, 72), 2, 3)
    path = export_onnx(net, tmp_path/'m.onnx', size=(40, 72), c_in=3, free='none')
    assert make_session(path).get_inputs()[0].shape == [1, 3, 40, 72]
    assert check_parity(net, path, patterns(3, (40, 72), 4, 3), batches=(1,)).ok


def test_bytes_do_not_depend_on_history_or_random_state(tmp_path):
    net = used('neurosnake_tiny_none', 32)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = export_onnx(net, tmp_path/'a.onnx', size=32).read_bytes()
    assert torch.equal(before, torch.get_rng_state())
    b = export_onnx(net, tmp_path/'b.onnx', size=32).read_bytes()
    assert a == b
    assert b'.py' not in a


def test_a_wrong_file_is_not_parity(tmp_path):
    net = used('cnn', 32)
    path = export_onnx(net, tmp_path/'m.onnx', size=32)
    model = onnx.load(path)
    for t in model.graph.initializer:
        if len(t.dims) == 4: t.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(t)*1.05, t.name))
    onnx.save(model, path)
    assert not check_parity(net, path, patterns(4, 32)).ok


def test_running_a_file_needs_no_torch(tmp_path):
    path = export_onnx(used('cnn', 32), tmp_path/'m.onnx', size=32)
    code = ("import sys, numpy as np, onnxruntime as ort\n"
            f"s = ort.InferenceSession({str(path)!r})\n"
            "print(s.run(None, {'images':np.zeros((2,1,32,32),np.float32)})[0].shape, 'torch' in sys.modules)")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ['(2,', '4)', 'False']


@pytest.mark.slow
def test_neurosnake_learns_unseen_drawings():
    "Wave, stroke, arc or ellipse, anywhere and at any angle: the network generalises from 1,200 drawings"
    cv2 = pytest.importorskip('cv2')
    r = np.random.default_rng(0)

    def drawing(kind, side=64):
        a, t, turn, at = np.zeros((side, side), np.float32), np.linspace(-18, 18, 60), r.uniform(0, np.pi), r.integers(22, side-22, 2)
        if kind == 3: cv2.ellipse(a, at.tolist(), r.integers(6, 14, 2).tolist(), 0, 0, 360, 1., 2)
        else:
            u = (5*np.sin(t/4+r.uniform(0, 6)), 0*t, (t/6)**2-4)[kind]
            xy = np.stack([t*np.cos(turn)-u*np.sin(turn), t*np.sin(turn)+u*np.cos(turn)], 1)+at
            cv2.polylines(a, [xy.astype(np.int32)], False, 1., 2)
        return (.375 + a*r.uniform(.3, .6) + r.normal(0, .05, a.shape)).clip(0, 1)

    y = torch.arange(1600) % 4
    x = torch.from_numpy(np.stack([drawing(int(k)) for k in y])).float()[:, None]
    torch.manual_seed(0)
    net, steps = create_model('neurosnake_tiny', 4), 8*37
    opt = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=.02)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, total_steps=steps)
    for _ in range(8):
        for rows in torch.randperm(1184).split(32):
            loss = F.cross_entropy(net(x[rows]), y[rows], label_smoothing=.1)
            opt.zero_grad(); loss.backward(); opt.step(); sched.step()
    with torch.no_grad(): right = (net.eval()(x[1200:]).argmax(1) == y[1200:]).float().mean().item()
    assert right > .9, right
