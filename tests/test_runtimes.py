"""Exported networks on real and attacked pictures, in both engines and at every batch size; pipelines on real pictures."""
import csv
import subprocess
import sys

import numpy as np
import pytest
import torch

from phoenix.data.phantom import phantom_slice
from phoenix.data.pixels import read_pixels
from phoenix.data.preprocess import Preprocess
from phoenix.deploy.certificate import certify
from phoenix.deploy.engines import ENGINES, open_network
from phoenix.deploy.export import check_parity, export_onnx, fused_census, idle_nodes, node_census
from phoenix.deploy.package import add_runtime, load_package, save_package
from phoenix.deploy.pipeline import check_pipeline, export_pipeline
from phoenix.deploy.quantize import quantize_int8
from phoenix.deploy.runtimes import certify_engine
from phoenix.models.zoo import create_model
from phoenix.train.attacks import pgd

BATCHES, CLASSES = (1, 7, 32), ("glioma", "meningioma", "no_tumor", "pituitary")


def phantoms(n, size=96):
    "Grey pictures and their classes"
    return [phantom_slice(CLASSES[i % 4], i, 0, size=size).image for i in range(n)], np.arange(n) % 4


def reals(root, n):
    "Real grey pictures, spread over the classes, and their classes"
    names = {"glioma": 0, "meningioma": 1, "notumor": 2, "pituitary": 3}
    rows = list(csv.DictReader(open(root/"clean4/manifest.csv")))
    rows = [rows[i] for i in np.linspace(0, len(rows)-1, n).astype(int)]
    return [read_pixels(root/"clean4"/r["file"]).grey for r in rows], np.array([names[r["label"]] for r in rows])


def prepared(greys, size):
    "Pictures as a network takes them"
    p = Preprocess(size=(size, size))
    return np.stack([p(g) for g in greys])[:, None].astype(np.float32)/np.float32(255)


def trained(name, x, y, steps):
    "A network that was trained for a few steps, so that its answers differ and an attack has something to climb"
    torch.manual_seed(0)
    net = create_model(name, 4)
    optimiser = torch.optim.AdamW(net.parameters(), 5e-3)
    for i in range(steps):
        at = np.random.default_rng(i).choice(len(x), min(16, len(x)), replace=False)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(net(torch.from_numpy(x[at])), torch.from_numpy(y[at])).backward()
        optimiser.step()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.momentum = None
    with torch.no_grad():
        for i in range(0, min(len(x), 64), 16): net(torch.from_numpy(x[i:i+16]))
    return net.eval()


def attacked(net, x, y, steps):
    "PGD at 4/255, a batch at a time"
    parts = [pgd(net, torch.from_numpy(x[i:i+25]), torch.from_numpy(y[i:i+25]), eps=4/255, steps=steps,
                 indices=list(range(i, min(i+25, len(x))))) for i in range(0, len(x), 25)]
    return torch.cat(parts).numpy()


def hold(net, x, y, steps, path):
    "Clean and attacked pictures through both engines: logits within 1e-4, the same class, at every batch size"
    path, bad = export_onnx(net, path, size=x.shape[2]), attacked(net, x, y, steps)
    assert 2/255 < np.abs(bad - x).max() < 4.01/255
    found = {}
    for kind, pictures in (("clean", x), ("attacked", bad)):
        for engine in ENGINES:
            parity = check_parity(net, path, pictures, batches=BATCHES, engine=engine)
            found[kind, engine] = max(parity.difference.values())
            assert parity.ok and parity.images == len(x), (kind, engine, parity)
    with torch.no_grad(): logits = net(torch.from_numpy(x[:32])).numpy()
    assert np.ptp(logits, axis=0).max() > .02, "answers that do not differ prove nothing"
    print({k: f"{v:.1e}" for k, v in found.items()})
    return path


def test_both_engines_answer_like_the_network_on_phantoms_clean_and_attacked(tmp_path):
    greys, y = phantoms(9)
    x = prepared(greys, 32)
    path = hold(trained("neurosnake_tiny_ca", x, y, 15), x, y, 2, tmp_path/"m.onnx")
    assert not idle_nodes(path) and "BatchNormalization" not in node_census(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["neurosnake_small_ca", "plain_tiny_ca", "resnet18"])
def test_both_engines_on_500_real_and_500_attacked_pictures(name, real_data, tmp_path):
    greys, y = reals(real_data, 500)
    x = prepared(greys, 96)
    hold(trained(name, x, y, 20), x, y, 3, tmp_path/"m.onnx")


def folder_of(net, name, x, y, size, tmp_path):
    "A model folder with float and 8-bit files, and OpenVINO's certificates"
    save_package(tmp_path/"m", model_name=name, model_args=dict(n_classes=4), state_dict=net.state_dict(), classes=CLASSES,
                 preprocess=Preprocess(size=(size, size)), certificate_sha256="c"*64, run_hash="r"*64,
                 metrics={"accuracy": .5}, threshold=.5, synthetic=True, published=False)
    path = export_onnx(net, tmp_path/"net.onnx", size=size)
    add_runtime(tmp_path/"m", "fp32", path, check_parity(net, path, x))
    quantize_int8(path, tmp_path/"int8.onnx", x)
    add_runtime(tmp_path/"m", "int8", tmp_path/"int8.onnx", certify(path, tmp_path/"int8.onnx", x, y))
    return {k: certify_engine(load_package(tmp_path/"m"), x, k) for k in ("fp32", "int8")}


@pytest.mark.slow
def test_pipelines_and_8_bits_on_real_pictures(real_data, tmp_path):
    "The whole graph answers as the Python way does, in float and in 8 bits, in both engines; 8 bits keep classes in OpenVINO"
    greys, y = reals(real_data, 200)
    x = prepared(greys, 128)
    net = trained("neurosnake_tiny_ca", x, y, 20)
    certificates = folder_of(net, "neurosnake_tiny_ca", x, y, 128, tmp_path)
    print(certificates)
    assert all(c["ok"] for c in certificates.values())
    package = load_package(tmp_path/"m")
    some = greys + phantoms(16, 300)[0] + [np.ascontiguousarray(g[:, 30:]) for g in phantoms(8, 200)[0]]
    for runtime in ("fp32", "int8"):
        path = export_pipeline(package, tmp_path/f"{runtime}.pipeline.onnx", runtime, temperature=1.3)
        found = check_pipeline(package, path, some, runtime, temperature=1.3)
        print(runtime, found)
        assert found["same_class"] == 1 and (runtime == "int8" or found["ok"])
    batch = np.stack([g for g in greys if g.shape == (256, 256)][:5])[:, None]
    session = open_network(tmp_path/"fp32.pipeline.onnx")
    alone = np.concatenate([session.run(None, {"image": b[None]})[0] for b in batch])
    assert np.abs(session.run(None, {"image": batch})[0] - alone).max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["neurosnake_small_ca", "plain_small_ca", "resnet18", "densenet121", "mobilenetv3_large_100",
                                  "efficientnet_b0"])
def test_graphs_are_simple(name, tmp_path):
    "No norm, no node that passes its input on; activations go into convolutions when the runtime opens the file"
    path = export_onnx(create_model(name, 4).eval(), tmp_path/"m.onnx", size=64)
    census = node_census(path)
    print(name, census, fused_census(path))
    assert not idle_nodes(path) and "BatchNormalization" not in census
    assert fused_census(path).get("Relu", 0) < max(census.get("Relu", 0), 1)


SIGNALLED = """
import os, signal, sys
import numpy as np
from phoenix.deploy.engines import OpenVinoSession
signal.signal(signal.SIGCHLD, lambda *a: None)  # any handler of Python's runs on the alternative stack
kept = []
for n in range(6):
    kept.append(OpenVinoSession(sys.argv[1]))
    for shape in (32, 64, 96): kept[-1].run(None, {'images': np.zeros((1, 1, shape, shape), np.float32)})
    if n % 2: del kept[0]
    os.kill(os.getpid(), signal.SIGCHLD)
kept.clear()
junk = [bytearray(2**14) for _ in range(4096)]
for _ in range(50): os.kill(os.getpid(), signal.SIGCHLD)
print('alive')
"""


def test_a_signal_finds_its_stack_after_openvino_sessions_have_gone(tmp_path):
    "OpenVINO sets the stack of signal handlers for as long as its core lives: many cores left a stack that was freed"
    net = export_onnx(create_model("plain_tiny_ca", 4).eval(), tmp_path/"n.onnx", size=32, free="size", c_in=1)
    name = open_network(net).get_inputs()[0].name
    done = subprocess.run([sys.executable, "-c", SIGNALLED.replace("'images'", repr(name)), str(net)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["alive"]), done.stderr[-2000:]
