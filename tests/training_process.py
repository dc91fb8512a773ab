"""What tests/test_training.py runs in processes of its own: python training_process.py COMMAND FOLDER …"""
import builtins
import hashlib
import json
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


class Wait(nn.Module):
    "A layer that takes its time in training"
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds if self.training else 0)
        return x


def toy(folder=None, slow=0., workers=0, fold=0, shuffle=False, **kw):
    "A small learner with dropout and batch statistics on numbers made from a key; two folds of them"
    from phoenix.keys import seeded, torch_generator
    from phoenix.train.learner import make_learner
    from phoenix.train.losses import CrossEntropy
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from torch.utils.data import TensorDataset

    y = torch.arange(200) % 4
    x = 2 * torch.eye(8)[:4][y] + torch.randn(200, 8, generator=torch_generator(1, "toy"))
    if fold: x, y = x.roll(80, 0), y.roll(80)
    x = x.view(-1, 1, 2, 4) # images, for what mixes them
    sets = TensorDataset(x[:120], y[:120]), TensorDataset(x[120:], y[120:])
    with seeded(kw.get("seed", 42)):
        net = nn.Sequential(Wait(slow), nn.Flatten(), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.3),
                            nn.Linear(16, 4))
    dls = DataLoaders(*(DataLoader(s, bs=16, num_workers=workers, shuffle=shuffle and s is sets[0]) for s in sets),
                      device="cpu")
    return make_learner(dls, net, loss=CrossEntropy(temperature=True), run_dir=folder, **kw)


def digest(learn):
    "sha256 of every weight and buffer, and of the loss's temperature"
    tensors = [*learn.model.state_dict().values(), *learn.loss_func.state_dict().values()]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


def everything(learn, history):
    "sha256 of weights, buffers, average, moments and metrics: all but the seconds"
    state = learn.opt.state_dict()
    tensors = [v for _, s in sorted(state["state"].items()) for _, v in sorted(s.items()) if torch.is_tensor(v)]
    tensors += learn.weight_average.average.state_dict().values() if hasattr(learn, "weight_average") else []
    rows = [{k: v for k, v in r.items() if k != "seconds"} for r in history.rows]
    plain = json.dumps([rows, history.best["epoch"], history.stopped, state["param_groups"]])
    whole = digest(learn).encode() + plain.encode() + b"".join(t.numpy().tobytes() for t in tensors)
    return hashlib.sha256(whole).hexdigest()


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


# Kills


class Moments:
    "Counts moments of a training, also inside a save, and kills the process at one of them"
    def __init__(self, at=0):
        self.at, self.n, self.names = at, 0, []

    def __call__(self, name):
        self.n += 1
        self.names.append(name)
        if self.n == self.at: os.kill(os.getpid(), signal.SIGKILL)

    def around(self, module, name):
        "A moment before and one after each call of a function"
        do = getattr(module, name)

        def call(*args, **kw):
            self(f"before {name}")
            out = do(*args, **kw)
            self(f"after {name}")
            return out
        setattr(module, name, call)

    def opened(self, path, mode="r", *args, **kw):
        "An opened checkpoint that is written in two halves, with a moment between them"
        f = builtins.open(path, mode, *args, **kw)
        if "w" not in mode: return f
        write = f.write

        class Halves:
            def __enter__(s): return s
            def __exit__(s, *a): f.close()
            def __getattr__(s, name): return getattr(f, name)

            def write(s, raw):
                write(raw[:len(raw) // 2])
                f.flush()
                self("half of a checkpoint")
                return write(raw[len(raw) // 2:])
        return Halves()

    def install(self):
        "Put moments into saving and stepping; gives the callback that puts them into the loop"
        from fastai.callback.core import Callback
        from phoenix.train import checkpoints
        for name in ("fsync", "replace"): self.around(os, name)
        checkpoints.open = self.opened
        moments = self

        class Loop(Callback):
            order = 89
            def before_fit(self): moments("before fit")
            def before_epoch(self): moments("before epoch")
            def before_batch(self): moments(f"before {'training' if self.training else 'validation'} batch")
            def after_backward(self): moments("after backward")
            def after_step(self): moments("after step")
            def after_batch(self): moments("after batch")
            def after_epoch(self): moments("after epoch")
            def after_fit(self): moments("after fit")
        return Loop


OPTIONS = dict(ema=(dict(average="ema", ema_decay=.9), {}),
               accumulated=(dict(average="ema", ema_decay=.9, accumulate=3, mixing="mixup"), dict(schedule="one_cycle")),
               equal=(dict(average="swa", swa_start=.31, precision="bf16"), {}),
               halves=(dict(precision="fp16", accumulate=2, mixing="cutmix", average="swa", swa_start=.31),
                       dict(schedule="plateau", plateau_patience=1, min_delta=9.)),
               sharp=(dict(sam=.05, opt="sgd"), dict(schedule="hold"))) # of `make_learner`, and of `fit`


def two_folds(folder, resume, workers=0, every=0., kill=0, name="ema"):
    "Two folds of the toy, each resumed where it was; their digest, and the moments that were counted"
    from phoenix.train.learner import fit
    moments, out = Moments(kill), []
    loop = moments.install()
    for fold in (0, 1):
        learn = toy(Path(folder)/f"fold{fold}", workers=workers, fold=fold, shuffle=True, **OPTIONS[name][0])
        learn.add_cb(loop())
        history = fit(learn, 3, lr=.01, warmup_epochs=1, resume=resume, save_seconds=every, progress=False, **OPTIONS[name][1])
        out.append(everything(learn, history))
        moments("between folds")
    return ("-".join(out), moments)


def forked(f, *args):
    "What a function gives in a forked process: its text, or -9 when that was killed"
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        sys.stdout = sys.stderr = builtins.open(os.devnull, "w")
        try: os.write(write, str(f(*args)).encode())
        except BaseException as e: os.write(write, f"{type(e).__name__}: {e}".encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as f: text = f.read()
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else text


def kills(folder, points, workers, seed, name="ema"):
    "Kill two folds at moments drawn from a seed, once or twice, resume, and compare every byte"
    import random
    import phoenix.train.learner  # noqa: F401 (once, for all the forked processes)
    folder, workers, draw = Path(folder), int(workers), random.Random(int(seed))
    straight, moments = {}, {}
    for every in (0., 1e-9):
        def whole(): return two_folds(folder/f"whole{every}", False, workers, every, 0, name)
        counted = forked(lambda: "\n".join([(w := whole())[0], *w[1].names]))
        straight[every], *moments[every] = counted.split("\n")
    assert len(set(straight.values())) == 1 and all(moments.values()), straight
    hit, kinds = [], sorted({n for names in moments.values() for n in names})
    draw.shuffle(kinds) # every kind of moment has its turn, at an occurrence that is drawn; the worst one first
    kinds.sort(key=lambda n: n != "half of a checkpoint")
    for k in range(int(points)):
        every, kind = (0., 1e-9)[draw.random() < .7], kinds[k % len(kinds)]
        at = draw.choice([i for i, n in enumerate(moments[every], 1) if n == kind])
        place, again = folder/f"kill{k}", draw.random() < .3
        hit.append(kind)
        got = forked(lambda: two_folds(place, False, workers, every, at, name)[0])
        assert got == -signal.SIGKILL, (at, got)
        if again: # the resumed one is killed too, wherever that is; it may have ended before
            at = draw.randint(1, len(moments[every]))
            got = forked(lambda: two_folds(place, True, workers, every, at, name)[0])
        got = forked(lambda: two_folds(place, True, workers, every, 0, name)[0])
        assert got == straight[every], f"kill {k} at moment {at} ({hit[-1]}): {got} is not {straight[every]}"
    print("killed", len(hit), "kinds", len(set(hit)), *sorted({h.replace(" ", "_") for h in hit}))


def classifier(folder, workers, shuffled=""):
    "One short training of a NeuroSnake on a phantom with augmentation, in fp32 on one thread"
    from phoenix.data.phantom import make_phantom
    root = Path(folder)/"phantom"
    if not root.exists(): make_phantom(root, patients=24, slices=1, size=64)
    if shuffled: root = another_order(root, Path(folder)/"another order")
    t = of_phantom(root, Path(folder)/"cache", workers=int(workers))
    print("digest", digest(t.learner), hashlib.sha256(t.test.logits.tobytes()).hexdigest())


def another_order(root, copy):
    "The same files, made in another order, so that a folder lists them in another one"
    import shutil
    if not copy.exists():
        for p in sorted((p for p in root.rglob("*") if p.is_file()), key=lambda p: p.name[::-1], reverse=True):
            (copy/p.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(p, copy/p.relative_to(root))
    scandir, listdir = os.scandir, os.listdir

    class Backwards:
        def __init__(self, found): self.found = iter(found)
        def __enter__(self): return self
        def __exit__(self, *a): return None
        def __iter__(self): return self
        def __next__(self): return next(self.found)
        def close(self): return None
    os.scandir = lambda *a: Backwards(sorted(scandir(*a), key=lambda e: e.name[::-1]))
    os.listdir = lambda *a: sorted(listdir(*a), key=lambda n: n[::-1])
    return copy


def of_phantom(root, cache, workers=0, epochs=2, cbs=(), **kw):
    "A training of the smallest NeuroSnake on a phantom"
    from phoenix.data.acquire import build_manifest
    from phoenix.data.augment import Augment
    from phoenix.data.duplicates import find_pairs
    from phoenix.data.preprocess import Preprocess
    from phoenix.data.splits import certify, group_rows, split_grouped
    from phoenix.train.learner import train_classifier
    manifest = build_manifest(root, progress=False)
    pairs = find_pairs(manifest, progress=False)
    sides = split_grouped(manifest, group_rows(manifest, pairs), fractions=(.5, .25, .25))
    return train_classifier(manifest, certify(manifest, pairs, sides, "grouped"), model="neurosnake_tiny_ca",
                            epochs=epochs, preprocess=Preprocess(size=(48, 48)), augment=Augment.default(48),
                            batch_size=6, cache_dir=cache, workers=workers, progress=False, **kw)


def workers_agree(folder, *counts):
    "The same training for several numbers of workers, each in a forked process"
    import phoenix.train.learner  # noqa: F401
    from phoenix.data.phantom import make_phantom
    make_phantom(Path(folder)/"phantom", patients=24, slices=1, size=64)

    def one(n):
        t = of_phantom(Path(folder)/"phantom", Path(folder)/"cache", workers=n, epochs=1)
        return digest(t.learner) + hashlib.sha256(t.test.logits.tobytes()).hexdigest()
    print("found", *(forked(one, int(n)) for n in counts))


def classifier_killed(folder, workers, points, seed):
    "Kill the training of a classifier between batches and inside of them, and resume it"
    import random
    import phoenix.train.learner  # noqa: F401
    from phoenix.data.phantom import make_phantom
    folder, draw = Path(folder), random.Random(int(seed))
    make_phantom(folder/"phantom", patients=24, slices=1, size=64)

    def one(run, resume, kill=0):
        from phoenix.train import learner
        moments = Moments(kill)
        loop, make = moments.install(), learner.make_learner

        def with_moments(*args, **kw):
            learn = make(*args, **kw)
            learn.add_cb(loop())
            return learn
        with_moments.__signature__ = __import__("inspect").signature(make)
        learner.make_learner = with_moments
        t = of_phantom(folder/"phantom", folder/"cache", int(workers), run_dir=folder/run, resume=resume, average="ema", ema_decay=.9,
                       save_seconds=1e-9)
        return everything(t.learner, t.history), moments.n
    straight, n = forked(lambda: " ".join(map(str, one("whole", False)))).split()
    for k in range(int(points)):
        at = draw.randint(1, int(n))
        assert forked(lambda: one(f"kill{k}", False, at)[0]) == -signal.SIGKILL, at
        got = forked(lambda: one(f"kill{k}", True)[0])
        assert got == straight, (at, got, straight)
    print("killed", points, "of", n)


def worker_killed(folder):
    "A process that reads batches is killed; the training says so, and resumed it is the same"
    import psutil
    import phoenix.train.learner  # noqa: F401
    from fastai.callback.core import Callback
    from phoenix.train.checkpoints import read_checkpoint
    from phoenix.train.learner import TrainError, fit

    class KillReader(Callback):
        order = 99
        def after_batch(self):
            if (self.epoch, self.iter, self.training) == (2, 1, True): # three batches are not even asked for yet
                for child in psutil.Process().children(): child.send_signal(signal.SIGKILL)
                time.sleep(.2)

    def go(place, resume, *cbs):
        learn = toy(place and Path(folder)/place, workers=2, average="ema", ema_decay=.9)
        for cb in cbs: learn.add_cb(cb)
        try: return everything(learn, fit(learn, 4, lr=.01, resume=resume, progress=False))
        except TrainError as e: return f"TrainError: {e}"
    straight, lost = forked(go, None, False), forked(go, "run", False, KillReader())
    state = read_checkpoint(Path(folder)/"run/checkpoints/last.safetensors").state
    assert "must stay alive" in lost and "start again with resume" in lost, lost
    assert forked(go, "run", True) == straight and "in a run_dir" in forked(go, None, False, KillReader())
    print("lost", state["epoch"], state["batch"])


def terminated(folder):
    "SIGTERM in the middle of a training: it saves between two batches, and resumed it is the same"
    import phoenix.train.learner  # noqa: F401
    from phoenix.train.checkpoints import read_checkpoint
    from phoenix.train.learner import fit
    place = Path(folder)/"run"

    def go(run, resume, slow=0.):
        learn = toy(run, slow, workers=2, average="ema", ema_decay=.9)
        return everything(learn, fit(learn, 4, lr=.01, resume=resume, progress=False))

    def send():
        mine = os.getpid()
        child = os.fork()
        if not child:
            log, deadline = place/"log.jsonl", time.monotonic() + 120
            while time.monotonic() < deadline and not (log.exists() and b'"epoch": 1' in log.read_bytes()): time.sleep(.01)
            os.kill(mine, signal.SIGTERM)
            os._exit(0)
        return go(place, False, .05)
    straight, ended = forked(go, None, False), forked(send)
    assert ended == "SystemExit: 143", ended
    state = read_checkpoint(place/"checkpoints/last.safetensors").state
    assert state["epoch"] >= 1 and state["batch"] > 0, (state["epoch"], state["batch"])
    assert forked(go, place, True) == straight
    print("ended", state["epoch"], state["batch"])


def state_of(n):
    "A model, an optimizer with moments and a state, all filled with `n`"
    model = nn.Linear(400, 400)
    opt = torch.optim.Adam(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    opt.zero_grad()
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
        except CheckpointError as e:
            assert "could not be written" in str(e) and "last good checkpoint" in str(e), e
            assert "it needs 1.9 MB" in str(e) and "MB are free" in str(e), e
        else: raise AssertionError("a checkpoint of 2 MB went into 200 kB")
    assert (whole(newest_checkpoint(path)[0]), whole(previous_generation(path))) == (2, 1)
    assert sorted(p.name for p in path.parent.iterdir()) == ["last.previous.safetensors", "last.safetensors"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    save_checkpoint(path, *state_of(5))
    print("kept", whole(path), whole(previous_generation(path)))


def full_disk_in_training(folder, limit):
    "The disk fills up during a training; with room again the resumed training is the one that never stopped"
    from fastai.callback.core import Callback
    from phoenix.train.checkpoints import CheckpointError
    from phoenix.train.learner import fit

    class Fill(Callback):
        def before_epoch(self):
            if self.epoch == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))

    learn = toy(Path(folder))
    learn.add_cb(Fill())
    try: fit(learn, 6, lr=.01, progress=False)
    except CheckpointError as e: assert "could not be written" in str(e) and "start again with resume" in str(e), e
    else: raise AssertionError("the checkpoint went into 1 kB")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    train(folder, resume="resume")


if __name__ == "__main__": # several commands, with -- between them, share the time of the imports
    commands = [c.split("\n") for c in "\n".join(sys.argv[1:]).split("\n--\n")]
    for name, *args in commands: globals()[name](*args)
