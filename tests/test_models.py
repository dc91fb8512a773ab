"Every network by name: what it costs, what learns in it, and the way into a model folder, an ONNX file and back"
import numpy as np
import pytest
import torch
from torch import nn

from phoenix.data.preprocess import Preprocess
from phoenix.deploy.export import check_parity, export_onnx, node_census, sampling_nodes
from phoenix.deploy.package import add_runtime, load_package, save_package
from phoenix.keys import seeded
from phoenix.models.neurosnake import count_cost, describe, family_names
from phoenix.models.zoo import CNNS, ZOO, create_model, model_names

SIDE = 64
FIXED = {"vit_base_patch16_224", "vit_large_patch16_224"}  # these take one size of picture
TINY = [n for n in family_names() if "_tiny_" in n]
CHEAP = ["neurosnake_tiny_ca_op", "neurosnake_tiny_ca_od"]  # cheaper offsets
QUICK = [*TINY, *CHEAP, *CNNS, "neurosnake_small_ca", "plain_small_ca"]
SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in model_names() if n not in QUICK]
EXPENSIVE = {"Loop", "Scan", "If", "GridSample", "DeformConv", "BatchNormalization"}


def patterns(n, c=1, side=SIDE, seed=0):
    "Coarse random patterns of random strength, in [0, 1]"
    r = np.random.default_rng(seed)
    return (r.random((n, c, side//8, side//8)).repeat(8, 2).repeat(8, 3)*r.random((n, 1, 1, 1))).astype(np.float32)


def side_of(name): return 224 if name.removeprefix("timm/") in FIXED else SIDE


def built(name, **how):
    """A network whose norms have seen data, and the arguments that make it

    The norms meet the data half way: fitted to a handful of values per channel, an untrained EfficientNet divides by
    spreads near zero, and its own logits in single and in double precision are 3e-4 apart."""
    args = dict(n_classes=3, c_in=1) | how
    with seeded(1): net = create_model(name, **args)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms: m.momentum = .5
    with torch.no_grad():
        for i in range(4 if norms else 0):
            net(torch.from_numpy(patterns(8, args["c_in"]*args.get("slices", 1), side_of(name), i)))
    return net.eval(), args


def saved(net, name, args, folder):
    "The model folder of a network"
    return save_package(folder, model_name=name, model_args=args, state_dict=net.state_dict(), classes=list("abc"),
                        preprocess=Preprocess(size=(SIDE, SIDE)), certificate_sha256="c"*64, run_hash="r"*64,
                        metrics={"accuracy": .5}, threshold=.5, synthetic=True, published=False)


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_a_saved_network_is_the_same_network(name, tmp_path):
    net, args = built(name)
    saved(net, name, args, tmp_path/"m")
    package = load_package(tmp_path/"m", classes=list("abc"))
    x = torch.from_numpy(patterns(3, side=side_of(name), seed=5))
    with torch.no_grad(): a, b = net(x), package.model()(x)
    assert torch.equal(a, b) and np.ptp(a.numpy(), axis=0).max() > 1e-3
    assert package.info["parameters"] == sum(v.numel() for v in net.state_dict().values())


@pytest.mark.parametrize("name, how", [("neurosnake_tiny_ca", dict(c_in=3)), ("neurosnake_tiny_se_vit_k5_s34", dict(slices=5)),
                                       ("neurosnake_tiny_kan", dict(hidden=(12, 8), widths=(16, 24, 32, 48))),
                                       ("neurosnake_tiny_ca", dict(offsets="depth")),
                                       ("resnet18", dict(slices=3)), ("cnn", dict(widths=(8, 16)))])
def test_arguments_come_back_too(name, how, tmp_path):
    net, args = built(name, **how)
    saved(net, name, args, tmp_path/"m")
    package = load_package(tmp_path/"m")
    x = torch.from_numpy(patterns(2, package.info["pixels"]["channels"], seed=5))
    with torch.no_grad(): assert torch.equal(net(x), package.model()(x))


EXPORTED = ["neurosnake_small_ca", "neurosnake_tiny_ca_vit", "plain_tiny_se_kan", *CHEAP]


@pytest.mark.parametrize("name", [*EXPORTED, *[pytest.param(n, marks=pytest.mark.slow) for n in model_names() if n not in EXPORTED]])
def test_an_exported_network_answers_like_its_weights(name, tmp_path):
    "Weights to a folder, from there to ONNX and into the folder, and its session against the network: within 1e-4"
    net, args = built(name)
    saved(net, name, args, tmp_path/"m")
    images = patterns(32, side=side_of(name), seed=9)
    path = export_onnx(load_package(tmp_path/"m").model(), tmp_path/"net.onnx", size=side_of(name))
    parity = check_parity(net, path, images, batches=(1, 4, 32) if side_of(name) == SIDE else (1, 4))
    assert parity.ok, parity
    assert {p.name for p in tmp_path.iterdir()} == {"m", "net.onnx"}, "no second weight file"
    package = add_runtime(tmp_path/"m", "fp32", path, parity)
    logits = package.logits(images, "fp32")
    with torch.no_grad(): assert np.abs(logits - net(torch.from_numpy(images)).numpy()).max() < 1e-4
    assert np.ptp(logits, axis=0).max() > .02, "logits that do not depend on the image prove nothing"
    assert bool(sampling_nodes(path)) == name.startswith("neurosnake")
    if not name.startswith("timm"): assert not EXPENSIVE & set(node_census(path)), node_census(path)


@pytest.mark.parametrize("name", [*TINY, *CHEAP])
def test_every_parameter_hears_from_the_loss(name):
    with seeded(2): net = create_model(name, 2, 3).train()
    x = torch.from_numpy(patterns(4, 3))
    with seeded(3): nn.functional.cross_entropy(net(x), torch.tensor([0, 1, 0, 1])).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


@pytest.mark.parametrize("name", [*TINY, *CHEAP, *CNNS, *[f"timm/{n}" for n in ZOO]])
def test_depth_is_a_partition_and_freezing_follows_it(name):
    with torch.device("meta"): net = create_model(name, 4)
    groups, names = net.depth_groups(), {n for n, _ in net.named_parameters()}
    flat = [n for g in groups for n in g]
    assert len(flat) == len(names) and set(flat) == names and len(groups) >= 4
    left = net.freeze(-1)
    free = {n for n, p in net.named_parameters() if p.requires_grad}
    assert free == set(groups[-1]) and left == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert any(n.partition("backbone.")[2].startswith(("fc", "classifier", "head")) or n.startswith("head") for n in free)
    assert net.freeze(0) == sum(p.numel() for p in net.parameters())


PUBLISHED = {"resnet50": 25_557_032, "resnet101": 44_549_160, "efficientnet_b0": 5_288_548, "efficientnet_b4": 19_341_616,
             "vit_base_patch16_224": 86_567_656, "vit_large_patch16_224": 304_326_632}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_seven_configurations_build(name):
    "With real weights; the gate builds them without memory, in the zoo's notebook"
    net = create_model(name, 1000, 3).eval()
    assert sum(p.numel() for p in net.parameters()) == PUBLISHED[name]
    with torch.no_grad(): assert net(torch.rand(1, 3, 224, 224)).shape == (1, 1000)


# billions of multiply-adds that torchvision's documentation states, at 224 pixels
STATED = {"resnet18": 1.81, "resnet50": 4.09, "resnet101": 7.80, "efficientnet_b0": .39, "densenet121": 2.83, "vgg16": 15.47,
          "vit_base_patch16_224": 17.56, "vit_large_patch16_224": 61.55}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ("resnet18", "vgg16", "vit_base_patch16_224") else pytest.mark.slow)
                                  for n in STATED])
def test_multiply_adds_are_the_published_ones(name):
    with torch.device("meta"): net = create_model(name, 1000, 3)
    parameters, macs = count_cost(net)
    assert parameters == sum(p.numel() for p in net.parameters()) and round(macs/1e9, 2) == STATED[name]
    table = describe(net)
    assert table.macs[:-1].sum() == macs == table.macs.iloc[-1]


def test_the_zoo_is_whole():
    assert len(set(model_names())) == 54 + len(CNNS) + len(ZOO)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_snake_is_the_plain_one(backend, monkeypatch):
    "torch.compile takes plain indexing, in one graph: values and all gradients to 1e-5, and the fast rows are not entered"
    from phoenix.models.snake import FORMULATIONS, DynamicSnakeConv
    with seeded(0): layer, x = DynamicSnakeConv(4, 6, 5), torch.randn(2, 4, 9, 7)

    def told(net):
        z = x.clone().requires_grad_()
        net.zero_grad()
        y = net(z)
        y.square().sum().backward()
        return [y.detach(), z.grad, *(p.grad.clone() for p in layer.parameters())]
    want = told(layer)
    torch.compiler.reset()
    monkeypatch.setitem(FORMULATIONS, "rows", None)
    for a, b in zip(want, told(torch.compile(layer, backend=backend, fullgraph=True))):
        assert (a - b).abs().max() <= 1e-5*max(1, a.abs().max())
