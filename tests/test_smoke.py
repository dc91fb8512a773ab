"Each experiment with its defaults, through the command a user types, in a folder of its own"
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from notebooks import ROOT, experiments, tutorials

PHOENIX = str(Path(sys.executable).with_name("phoenix"))


def phoenix(*args, cwd):
    "Run the command line outside the checkout, on one thread"
    env = dict(os.environ, OMP_NUM_THREADS="1", MPLBACKEND="agg", PHOENIX_RUNS_DIR=str(cwd / "runs"), PHOENIX_CACHE_DIR=str(cwd / "cache"))
    return subprocess.run([PHOENIX, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def smokes():
    "Every experiment; those that time something, and the longest, run at night"
    long = ("explanations", "folds", "latency", "preprocess", "pretraining", "quantisation", "robustness", "serving")
    def late(nb): return nb.name[0] == "b" or nb.name[3:] in long
    return [pytest.param(nb, id=nb.name, marks=pytest.mark.slow if late(nb) else ()) for nb in experiments()]


@pytest.mark.parametrize("nb", smokes())
def test_smoke_run_is_sealed(nb, tmp_path):
    done = phoenix("run", str(nb.path), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    run = Path(said["run"])
    checked = json.loads(phoenix("verify", str(run), "--json", cwd=tmp_path).stdout)
    assert checked["state"] == "sealed" and checked["ok"]
    assert not json.loads((run / "seal.json").read_text())["evidence"], "a phantom run is no evidence"
    if nb.name == "13_organs": learned_something(said["metrics"])
    if nb.name == "01_quickstart":
        page = Path(said["report"]).read_text()
        assert "Synthetic images" in page and "<script" not in page
        predicted = phoenix("predict", str(run / "model"), str(next((run / "raw").rglob("*.png"))), "--runtime", "fp32", "--json", cwd=tmp_path)
        assert set(json.loads(predicted.stdout)["answers"][0]["probs"]) == {"glioma", "meningioma", "no_tumor", "pituitary"}


def learned_something(found):
    "Seven classes and fourteen labels: the whole interval lies above chance and above what shuffled labels give, and those end at chance"
    shuffled = {k: v if isinstance(v, float) else v["value"] for k, v in found["shuffled"].items()}
    above = {k: v["low"] > max(found["chance"][k], shuffled[k]) for k, v in found["measured"].items()}
    assert above == {"isic2018": True, "padchest": True}, found["summary"]
    assert found["chance"]["padchest"] == .5 and found["chance"]["isic2018"] > 1/7
    assert not any(k["shuffled"] for k in found["leaves_chance_behind"].values()), shuffled
    assert set(found["across"].values()) == {0}


def test_mistyped_parameter_is_refused(tmp_path):
    done = phoenix("run", str(ROOT / "nbs/experiments/01_quickstart.ipynb"), "-p", "epoch=3", cwd=tmp_path)
    assert done.returncode == 2 and "did you mean 'epochs'" in done.stderr


@pytest.mark.parametrize("command", ["doctor", "train", "watch", "folds", "search", "compare", "evaluate", "export", "quantize", "qat", "bench", "predict", "run", "verify",
                                     "data acquire", "data audit", "data duplicates", "data patients", "data slices", "split make",
                                     "split verify", "data shortcuts", "vault seal", "vault look", "vault verify"])
def test_help_has_an_example(command, tmp_path):
    done = phoenix(*command.split(), "--help", cwd=tmp_path)
    assert done.returncode == 0 and "Example: phoenix" in done.stdout.replace("\n", " ") and "--json" in done.stdout


def test_refusal_is_one_sentence(tmp_path):
    done = phoenix("verify", str(tmp_path / "nothing"), cwd=tmp_path)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize("nb", tutorials(), ids=lambda nb: nb.name)
def test_tutorial_exports_nothing(nb):
    assert not nb.module and not nb.exported
