"""What tests/test_training.py runs in processes of its own: python training_process.py COMMAND FOLDER …"""
import hashlib
import os
import resource
import signal
import sys
import time
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
import torch  # noqa: E402
from torch import nn  # noqa: E402

torch.set_num_threads(1)


def toy(folder=None, slow=0., **kw):
    "A small learner with dropout and batch statistics on numbers made from a key"
    from phoenix.keys import seeded, torch_generator
    from phoenix.train.learner import make_learner
    from phoenix.train.losses import CrossEntropy
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from torch.utils.data import TensorDataset

    class Wait(nn.Module):
        def forward(self, x):
            time.sleep(slow if self.training else 0)
            return x

    y = torch.arange(200) % 4
    x = 2 * torch.eye(8)[:4][y] + torch.randn(200, 8, generator=torch_generator(1, "toy"))
    sets = TensorDataset(x[:120], y[:120]), TensorDataset(x[120:], y[120:])
    with seeded(kw.get("seed", 42)):
        net = nn.Sequential(Wait(), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.3), nn.Linear(16, 4))
    dls = DataLoaders(*(DataLoader(s, bs=16) for s in sets), device="cpu")
    return make_learner(dls, net, loss=CrossEntropy(temperature=True), run_dir=folder, **kw)


def digest(learn):
    "sha256 of every weight and buffer, and of the loss's temperature"
    tensors = [*learn.model.state_dict().values(), *learn.loss_func.state_dict().values()]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


def train(folder, slow="0", resume=""):
    "Train the toy, print the digest"
    from phoenix.train.learner import fit
    learn = toy(None if folder == "-" else Path(folder), float(slow))
    history = fit(learn, 6, lr=.01, resume=resume == "resume", progress=False)
    print("digest", digest(learn), len(history), history.stopped)


def draws_first(folder):
    "The same training in a process that has used its global generators"
    import random
    import numpy as np
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    random.random(), np.random.rand(7), torch.rand(100)
    train(folder)


def classifier(folder, workers):
    "One short training of a NeuroSnake on a phantom with augmentation, in fp32 on one thread"
    from phoenix.data.acquire import build_manifest
    from phoenix.data.augment import Augment
    from phoenix.data.duplicates import find_pairs
    from phoenix.data.phantom import make_phantom
    from phoenix.data.preprocess import Preprocess
    from phoenix.data.splits import certify, group_rows, split_grouped
    from phoenix.train.learner import train_classifier
    root = Path(folder)/"phantom"
    if not root.exists(): make_phantom(root, patients=24, slices=1, size=64)
    manifest = build_manifest(root, progress=False)
    pairs = find_pairs(manifest, progress=False)
    sides = split_grouped(manifest, group_rows(manifest, pairs), fractions=(.5, .25, .25))
    t = train_classifier(manifest, certify(manifest, pairs, sides, "grouped"), model="neurosnake_tiny_ca", epochs=2,
                         preprocess=Preprocess(size=(48, 48)), augment=Augment.default(48), batch_size=6,
                         cache_dir=Path(folder)/"cache", workers=int(workers), progress=False)
    print("digest", digest(t.learner), hashlib.sha256(t.test.logits.tobytes()).hexdigest())


def state_of(n):
    "A model, an optimizer with moments and a state, all filled with `n`"
    model = nn.Linear(400, 400)
    opt = torch.optim.Adam(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    for t in [*model.state_dict().values(), *(v for s in opt.state.values() for v in s.values())]:
        t.fill_(n)
    return model, opt, dict(epoch=n)


def whole(path):
    "The epoch of a checkpoint whose every number belongs to that epoch"
    from phoenix.train.checkpoints import read_checkpoint
    c = read_checkpoint(path)
    assert all((t == c.state["epoch"]).all() for t in c.tensors.values()), "two epochs in one file"
    return c.state["epoch"]


def kill_while_saving(folder, times="25"):
    "Kill a process with SIGKILL at moments spread over its saving; each time a whole checkpoint is left"
    from phoenix.train.checkpoints import newest_checkpoint, save_checkpoint
    path, epoch, torn = Path(folder)/"last.safetensors", 0, 0
    save_checkpoint(path, *state_of(0))
    for k in range(int(times)):
        child = os.fork()
        if not child:
            while True:
                epoch += 1
                save_checkpoint(path, *state_of(epoch))
        time.sleep(.05 + .0137 * k)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        torn += bool(list(path.parent.glob(".*.part")))
        found, damaged = newest_checkpoint(path)
        assert not damaged, damaged
        assert whole(found) >= epoch, (found, whole(found), epoch)
        epoch = whole(found)
    print("killed", times, "torn", torn, "epoch", epoch)


def full_disk(folder):
    "A file-size limit stands for a full disk: the save fails in one sentence, both generations stay"
    from phoenix.train.checkpoints import CheckpointError, newest_checkpoint, previous_generation, save_checkpoint
    path = Path(folder)/"last.safetensors"
    for n in (1, 2): save_checkpoint(path, *state_of(n))
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    for n in (3, 4):
        try: save_checkpoint(path, *state_of(n))
        except CheckpointError as e: assert "could not be written" in str(e) and "last good checkpoint" in str(e), e
        else: raise AssertionError("a checkpoint of 2 MB went into 200 kB")
    assert (whole(newest_checkpoint(path)[0]), whole(previous_generation(path))) == (2, 1)
    assert sorted(p.name for p in path.parent.iterdir()) == ["last.previous.safetensors", "last.safetensors"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    save_checkpoint(path, *state_of(5))
    print("kept", whole(path), whole(previous_generation(path)))


def full_disk_in_training(folder):
    "The disk fills up during a training; with room again the resumed training is the one that never stopped"
    from fastai.callback.core import Callback
    from phoenix.train.checkpoints import CheckpointError
    from phoenix.train.learner import fit

    class Fill(Callback):
        def before_epoch(self):
            if self.epoch == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    learn = toy(Path(folder))
    learn.add_cb(Fill())
    try: fit(learn, 6, lr=.01, progress=False)
    except CheckpointError as e: assert str(e).startswith("last.safetensors could not be written"), e
    else: raise AssertionError("the checkpoint went into 1 kB")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    train(folder, resume="resume")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
