"What a notebook can't hold about model folders: prediction without torch in a fresh process, damage, swaps, hostile lists"
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from PIL import Image

from phoenix.data.preprocess import Preprocess
from phoenix.deploy.package import FILES, LIMITS, PackageError, add_runtime, load_package, save_package, seal_of, verify_package
from phoenix.records import read_json, sha256_file, write_json

STATED = dict(model_name="mean", model_args={"c_in": 1}, classes=["bright", "dark"], preprocess=Preprocess(size=(32, 32)),
              certificate_sha256="c"*64, run_hash="r"*64, metrics={"accuracy": .75}, threshold=.8, synthetic=True, published=False)
FAIR = dict(ok=True, accuracy_fp32=.9, accuracy_int8=.9, accuracy_change_low=0., agreement=1., worst_class_change=0., limits=LIMITS)
WEIGHTS = {"w": np.array([[8., 0.]], np.float32)}


def network(path, scale=8.):
    "Logits (scale * mean, 0) as ONNX"
    make, f32 = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [make.make_node("GlobalAveragePool", ["image"], ["p"]), make.make_node("Flatten", ["p"], ["f"]),
             make.make_node("MatMul", ["f", "w"], ["logits"])]
    ends = [make.make_tensor_value_info(n, f32, s) for n, s in (("image", ["b", 1, "h", "w"]), ("logits", ["b", 2]))]
    graph = make.make_graph(nodes, "mean", ends[:1], ends[1:], [make.make_tensor("w", f32, [1, 2], [scale, 0.])])
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.fixture
def model(tmp_path):
    "A whole model folder with both runtimes"
    save_package(tmp_path/"model", state_dict=WEIGHTS, **STATED)
    for runtime in ("fp32", "int8"):
        add_runtime(tmp_path/"model", runtime, network(tmp_path/"n.onnx"), FAIR)
    return tmp_path/"model"


def rehash(folder):
    "Make the list of hashes true again, as someone would who changes a model on purpose"
    write_json(folder/"sha256.json", {"files": {n: sha256_file(folder/n) for n in FILES if (folder/n).exists()}})


PREDICT = """
import json, sys
sys.modules["torch"] = None
from phoenix.deploy.package import load_package
model, *paths = sys.argv[1:]
answers = load_package(model).predict(paths)
loaded = {m.partition(".")[0] for m in sys.modules if sys.modules[m] is not None}
assert not loaded & {"torch", "fastai", "timm", "pickle5"}, loaded
print(json.dumps([[a.label, a.probs, a.abstained, a.reason] for a in answers]))
"""


def fresh(model, *paths):
    "Predictions of a fresh process in which torch can't be imported"
    done = subprocess.run([sys.executable, "-c", PREDICT, model, *paths], capture_output=True, text=True, cwd="/", timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_predict_needs_no_torch(model, tmp_path):
    ramp = np.linspace(0, 255, 64*64).reshape(64, 64).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path/"ramp.png")
    (tmp_path/"broken.png").write_bytes((tmp_path/"ramp.png").read_bytes()[:60])
    (label, probs, abstained, reason), broken = fresh(model, tmp_path/"ramp.png", tmp_path/"broken.png")
    package = load_package(model)
    mean = package.images([tmp_path/"ramp.png"]).mean()
    assert probs["bright"] == pytest.approx(1/(1 + np.exp(-8*mean)), abs=1e-5) and sum(probs.values()) == pytest.approx(1)
    assert (label, abstained, reason) == (("bright", False, "") if probs["bright"] >= .8 else (None, True, reason))
    assert broken[0] is None and broken[2] and broken[3]


def test_a_real_network_from_weights_to_a_fresh_process(tmp_path):
    "Saved, exported, checked, packaged: the fresh process answers what torch answers"
    import torch

    from phoenix.data.phantom import CLASSES, phantom_slice
    from phoenix.deploy.export import check_parity, export_onnx, sampling_nodes
    from phoenix.keys import seeded
    from phoenix.models.zoo import create_model
    args = dict(n_classes=4, c_in=1)
    with seeded(1): net = create_model("neurosnake_tiny_ca", **args).eval()
    paths = [tmp_path/f"{c}.png" for c in CLASSES]
    for c, p in zip(CLASSES, paths): Image.fromarray(phantom_slice(c, 0, 0, size=64).image).save(p)
    package = save_package(tmp_path/"m", state_dict=net.state_dict(), **STATED | dict(
        model_name="neurosnake_tiny_ca", model_args=args, classes=list(CLASSES), threshold=0., preprocess=Preprocess(size=(64, 64))))
    x = package.images(paths)
    path = export_onnx(package.model(), tmp_path/"net.onnx", size=64)
    add_runtime(tmp_path/"m", "fp32", path, check_parity(package.model(), path, np.resize(x, (32, *x.shape[1:]))))
    with torch.no_grad(): expected = net(torch.from_numpy(x)).softmax(1).numpy()
    assert sampling_nodes(tmp_path/"m/model.onnx") == sampling_nodes(path) != [], "the network keeps its own metadata"
    assert np.abs(load_package(tmp_path/"m").probs(paths, "fp32") - expected).max() < 1e-4
    with pytest.raises(PackageError, match="must hold model.int8.onnx"):
        load_package(tmp_path/"m").predict(paths)


@pytest.mark.parametrize("name", [*FILES, "sha256.json"])
def test_one_flipped_bit_is_refused(model, name):
    assert set(verify_package(model)) == set(FILES)
    data = (model/name).read_bytes()
    for at in (0, len(data)//2, len(data) - 2):
        (model/name).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
        with pytest.raises(ValueError): load_package(model)
    (model/name).write_bytes(data)
    load_package(model)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(model, name):
    (model/name).unlink()
    with pytest.raises(PackageError, match=f"'{name}': 'missing'"): load_package(model)


@pytest.mark.parametrize("hashes", [{}, [], {"files": {}}, {"files": {"model.json": 1}}, {"files": 3},
                                    {"files": {"../x": "0", "model.json": "0", "model.safetensors": "0"}}])
def test_a_hostile_list_is_refused(model, hashes):
    write_json(model/"sha256.json", hashes)
    with pytest.raises(PackageError, match="must list"): load_package(model)


def test_pickles_have_no_place(model):
    (model/"model.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(PackageError, match="'model.pkl': 'not listed'"): load_package(model)
    write_json(model/"sha256.json", {"files": read_json(model/"sha256.json")["files"] | {"model.pkl": sha256_file(model/"model.pkl")}})
    with pytest.raises(PackageError, match="must list"): load_package(model)


def test_a_swapped_network_is_recognised_even_with_true_hashes(model, tmp_path):
    network(model/"model.int8.onnx", scale=-8.)
    rehash(model)
    with pytest.raises(PackageError, match="must be the network that was certified"): load_package(model).session("int8")
    parity = read_json(model/"parity.json")
    parity["int8"]["sha256"] = sha256_file(model/"model.int8.onnx")
    write_json(model/"parity.json", parity)
    rehash(model)
    with pytest.raises(PackageError, match="as it was sealed"): load_package(model).session("int8")
    parity["int8"]["seal"] = seal_of(parity["int8"])  # whoever knows how seals are made
    write_json(model/"parity.json", parity)
    rehash(model)
    with pytest.raises(PackageError, match="made from these weights"): load_package(model).session("int8")
    assert load_package(model).session("fp32")


@pytest.mark.parametrize("ok", [False, None, 1, "yes"])
def test_int8_runs_only_with_a_certificate_that_says_ok(model, ok, tmp_path):
    parity = read_json(model/"parity.json")
    parity["int8"]["ok"] = ok
    write_json(model/"parity.json", parity)
    rehash(model)
    with pytest.raises(PackageError, match="certificate that says ok"): load_package(model).predict([], "int8")


def test_turned_class_order_is_refused(model):
    with pytest.raises(PackageError, match="class order"): load_package(model, classes=["dark", "bright"])
    info = read_json(model/"model.json")
    write_json(model/"model.json", info | {"classes": ["dark", "bright"]})
    rehash(model)
    package = load_package(model)
    with pytest.raises(PackageError, match="one class order"): package.weights()
    with pytest.raises(PackageError, match="these weights and classes"): package.session("fp32")


def test_changed_preprocessing_is_refused(model):
    info = read_json(model/"model.json")
    write_json(model/"model.json", info | {"preprocess_digest": "0"*64})
    rehash(model)
    with pytest.raises(PackageError, match="Preprocessing must be"): load_package(model)


def test_a_file_changed_after_loading_is_not_used(model):
    package = load_package(model)
    network(model/"model.onnx", scale=-8.)
    with pytest.raises(PackageError, match="must not change while it is used"): package.session("fp32")


@pytest.mark.parametrize("change, why", [
    (dict(classes=["a"]), "two different names"), (dict(threshold=1.2), "threshold"), (dict(metrics={}), "metrics"),
    (dict(certificate_sha256=""), "certificate"), (dict(metrics={"per_class": {"dark": {}, "bright": {}}}), "in the order")])
def test_an_incomplete_model_is_not_saved(tmp_path, change, why):
    with pytest.raises(PackageError, match=why): save_package(tmp_path/"m", state_dict=WEIGHTS, **STATED | change)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    import phoenix.deploy.package as module

    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(OSError): save_package(tmp_path/"m", state_dict=WEIGHTS, **STATED)
    assert not list(tmp_path.iterdir())


def test_the_card_says_what_the_model_is_no_evidence_for(model, tmp_path):
    assert "SYNTHETIC DATA" in (model/"card.md").read_text() and "`int8`: certified" in (model/"card.md").read_text()
    save_package(tmp_path/"p", state_dict=WEIGHTS, **STATED | dict(synthetic=False, published=True, certificate_sha256=""))
    card = (tmp_path/"p/card.md").read_text()
    assert "PUBLISHED SPLIT" in card and "SYNTHETIC" not in card and "| accuracy | 0.75 |" in card


def test_a_copied_model_is_the_same_model(model, tmp_path):
    copy = load_package(shutil.copytree(model, tmp_path/"elsewhere"))
    assert copy.hashes == load_package(model).hashes
    text = "".join(p.read_text(errors="ignore") for p in model.iterdir())
    assert str(tmp_path) not in text and os.path.expanduser("~") not in text
