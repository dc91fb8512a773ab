"Trainings on two processes against the same training on one"
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from devices_process import alone, furthest, job, phantom, together
from phoenix.train.checkpoints import read_checkpoint
from phoenix.train.devices import DeviceError, train_on_devices

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    return folder, phantom(folder)


@pytest.mark.parametrize("changes", [dict(opt="adan"), pytest.param(dict(opt="sgd"), marks=slow),
                                     pytest.param(dict(opt="adan", accumulate=2), marks=slow),
                                     pytest.param(dict(opt="adan", average="swa", swa_start=.4), marks=slow)], ids=str)
def test_two_processes_take_the_steps_of_one(data, changes, request):
    """Batch statistics, class weights, augmentation, clipping: all of it as in one process.

    In float64: Adan divides each gradient by its own size, so that in float32 the last bits of gradients near zero
    decide whole steps, on one process as on two."""
    (folder, data), name = data, "-".join(map(str, changes.values()))
    one = alone(job(folder, f"one-{name}", data, **changes))
    two = together(job(folder, f"two-{name}", data, **changes))
    assert furthest(two[0], two[1]) == 0, "all processes hold the same weights"
    print(name, furthest(one, two[0]))
    assert furthest(one, two[0]) < 1e-5
    rows = [read_checkpoint(folder/f"{n}-{name}/run/checkpoints/last.safetensors").state["rows"] for n in ("one", "two")]
    for a, b in zip(*rows):
        assert all(abs(a[k] - b[k]) < 1e-5 for k in ("train_loss", "valid_loss", "accuracy", "lr"))


@slow
@pytest.mark.parametrize("opt, eps", [("sgd", None), ("adan", 1e-3), ("adan", None)], ids=str)
def test_single_precision(data, opt, eps):
    """In float32: gradients to rounding, and the weights of optimizers that do not divide by rounding.

    Two halves are summed in another order than one whole: the first gradient, up to 3.4, differs by up to 2e-4, and one
    weight in eight has a gradient below 1e-6. SGD steps by the gradient, so nothing comes of it. Adan divides each
    gradient by its own size: where that is rounding, rounding decides the whole step. An epsilon above the rounding
    takes that away, and the weights agree again. Running variances of six values have rounding of their own.

    Without it the weights part by up to the length of all steps, and the training loss says whether it is still the same
    training: that of the first epoch is 7e-6 apart at most. It is .003 where each process weighs classes by its own share,
    .008 where each normalises by its own share, .014 where gradients are not averaged."""
    (folder, data), name = data, f"{opt}-{eps}"
    one = alone(job(folder, f"f1-{name}", data, opt=opt, lr=1e-3), torch.float32, eps)
    two = together(job(folder, f"f2-{name}", data, opt=opt, lr=1e-3), dtype=torch.float32, eps=eps)[0]
    learnt = [{k: v for k, v in w.items() if "running" not in k} for w in (one, two)]
    whole, *shares = (torch.load(folder/f) for f in (f"f1-{name}/gradient0.pt", f"f2-{name}/gradient0.pt",
                                                     f"f2-{name}/gradient1.pt"))
    rows = [read_checkpoint(folder/f"{n}-{name}/run/checkpoints/last.safetensors").state["rows"] for n in ("f1", "f2")]
    apart = [abs(a["train_loss"] - b["train_loss"]) for a, b in zip(*rows)]
    print("float32", name, furthest(*learnt), "with statistics", furthest(one, two), "training losses", apart)
    assert torch.equal(*shares) and (whole - shares[0]).abs().max() < 1e-4*whole.abs().max()
    assert apart[0] < 3e-4 and apart[1] < .01
    if opt == "sgd" or eps: assert furthest(*learnt) < 1e-5


@slow
def test_a_killed_training_goes_on_with_another_number_of_devices(data):
    "Two processes are killed in their second epoch; one process ends the training"
    folder, data = data
    straight = alone(job(folder, "straight", data))
    path = job(folder, "killed", data)
    together(path, kill_at=1)
    rows = read_checkpoint(folder/"killed/run/checkpoints/last.safetensors").state["rows"]
    assert len(rows) == 1
    assert furthest(straight, alone(path)) < 1e-5


@slow
def test_torchrun(data):
    "As a user starts it; a refusal in a worker reaches the caller as its sentence"
    folder, (manifest, certificate) = data
    how = dict(model="neurosnake_tiny_ca", epochs=2, batch_size=6, cache_dir=folder/"cache", warmup_epochs=0,
               run_dir=folder/"torchrun")
    done = train_on_devices(manifest, certificate, 2, **how)
    assert (len(done.history), done.history.stopped) == (2, "epochs")
    assert done.valid.accuracy == pytest.approx(done.history.best["accuracy"])
    with pytest.raises(DeviceError, match="folder of its own"): train_on_devices(manifest, certificate, 2, **how)
    again = train_on_devices(manifest, certificate, 1, resume=True, **how)
    assert (again.test.logits == done.test.logits).all()
    with pytest.raises(DeviceError, match="5 pictures do not divide by 2"):
        train_on_devices(manifest, certificate, 2, **(how | dict(batch_size=5, run_dir=folder/"odd")))


@slow
def test_the_command_trains_on_two_devices(tmp_path):
    "`phoenix train --devices 2`: a sealed run with a model, and one process speaks"
    from phoenix.cli import split_make, verify
    from phoenix.data.acquire import acquire
    acquire("phantom", tmp_path/"raw", patients=24, slices=1, size=64, seed=3, progress=False)
    split_make(tmp_path/"raw", tmp_path/"split.json")
    env = dict(os.environ, PHOENIX_RUNS_DIR=str(tmp_path/"runs"), PHOENIX_CACHE_DIR=str(tmp_path/"cache"), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", "from phoenix.cli import app; app()", "train", tmp_path/"raw", tmp_path/"split.json",
                           "--model", "plain_tiny_none", "--epochs", "2", "--size", "32", "--batch-size", "6", "--devices", "2",
                           "--json"], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert verify(Path(facts["run"])).data["state"] == "sealed" and (Path(facts["model"])/"model.safetensors").is_file()
    assert "epoch   2/2" in done.stderr and done.stderr.count("epoch   2/2") == 1, "one process speaks"
