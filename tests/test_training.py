"What training promises across processes: kills, full disks, seeds, budgets"
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training_process import OPTIONS, digest, everything, toy

PROCESS = Path(__file__).with_name("training_process.py")


def start(*args, hashseed="0", **env):
    "Start a command of training_process.py on one thread"
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONHASHSEED=hashseed, **env)
    return subprocess.Popen([sys.executable, PROCESS, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=env)


def run(*args, **kw):
    "The words of the last line that a command prints"
    return lines(*args, **kw)[-1]


def lines(*args, timeout=600, **kw):
    "The words of each line that commands print"
    process = start(*args, **kw)
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return [line.split() for line in out.strip().splitlines()]


@pytest.fixture(scope="module")
def straight():
    "The toy's training, never interrupted, in a process of its own"
    return run("train", "-")


def test_kill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    "25 kills; some must hit a half-written file, else the test proves nothing"
    _, times, _, torn, _, epoch = run("kill_while_saving", tmp_path)
    assert int(times) == 25 and int(torn) >= 3 and int(epoch) > 25, (torn, epoch)


def test_a_full_disk_keeps_both_generations(tmp_path):
    assert run("full_disk", tmp_path) == ["kept", "5", "2"]


@pytest.mark.parametrize("limit", [1000, pytest.param(100, marks=pytest.mark.slow)])
def test_a_full_disk_in_training(limit, tmp_path, straight):
    "No room for the checkpoint, or not even for the log: one sentence, and the resumed training ends in the same bytes"
    assert run("full_disk_in_training", tmp_path, limit) == straight


@pytest.mark.parametrize("code, room", [("ENOSPC", "MB are free"), ("EDQUOT", "your quota leaves less")])
@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_full_disk_by_the_name_the_system_gives_it(where, code, room, tmp_path, monkeypatch):
    "No space or no quota, told by the write or only by the sync: both generations stay whole, and the resumed bytes are the same"
    import errno
    import re
    from fastai.callback.core import Callback
    from phoenix.train import checkpoints
    from phoenix.train.checkpoints import CheckpointError, previous_generation, read_checkpoint
    from phoenix.train.learner import fit
    number, sync, written, synced = getattr(errno, code), os.fsync, [], []

    class Full:
        "A checkpoint's file on a disk that is full after half of it, or that says so at the sync"
        def __init__(self, *args): self.file = open(*args)
        def __enter__(self): return self
        def __exit__(self, *error): self.file.close()
        def __getattr__(self, name): return getattr(self.file, name)

        def write(self, raw):
            written.append(self.file.write(raw if where == "fsync" else raw[:len(raw) // 2]))
            if where == "write": raise OSError(number, os.strerror(number))
            synced.append(self.file.fileno())

    def refuse(fd):
        if fd in synced: raise OSError(number, os.strerror(number))
        sync(fd)

    class Fill(Callback):
        def before_epoch(self):
            if self.epoch != 3: return
            monkeypatch.setattr(checkpoints, "open", Full, raising=False)
            monkeypatch.setattr(os, "fsync", refuse)
    whole, first, second = (toy(p, average="ema", ema_decay=.9) for p in (None, tmp_path, tmp_path))
    straight = everything(whole, fit(whole, 6, lr=.01, progress=False))
    first.add_cb(Fill())
    with pytest.raises(CheckpointError) as e: fit(first, 6, lr=.01, progress=False)
    monkeypatch.undo()
    assert len(written) == 1 and written[0] > 1000, "a part was written before the refusal"
    assert re.search(rf"last.safetensors could not be written \({os.strerror(number)}\): it needs \d+\.\d MB, and .*{room}; make "
                     "room and start again with resume, the last good checkpoint is still there", str(e.value)), e.value
    last = tmp_path/"checkpoints/last.safetensors"
    assert [read_checkpoint(p).state["epoch"] for p in (last, previous_generation(last))] == [3, 2]
    assert not list(last.parent.glob(".*")), "nothing half written is left"
    assert everything(second, fit(second, 6, lr=.01, resume=True, progress=False)) == straight


def test_seeds_give_the_same_bytes_in_a_fresh_process(straight, tmp_path):
    "Whatever hash seed, run folder or earlier draws; and in this process too"
    from phoenix.train.learner import fit
    assert run("draws_first", tmp_path, hashseed="77") == straight
    learn = toy()
    fit(learn, 6, lr=.01, progress=False)
    assert digest(learn) == straight[1]
    other = toy(seed=43)
    fit(other, 6, lr=.01, progress=False)
    assert digest(other) != straight[1]


def test_a_classifier_gives_the_same_bytes_anywhere(tmp_path):
    "Two fresh processes: workers 0 and 2, another hash seed, order of files, locale, time zone and cache"
    here = run("classifier", tmp_path, 0)
    other = dict(LC_ALL="C", LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", TZ="Asia/Kathmandu")
    (tmp_path/"cache").rename(tmp_path/"first cache")
    assert run("classifier", tmp_path, 2, "shuffled", hashseed="5", **other) == here


def test_kills_of_workers_terms_and_points(tmp_path):
    "In forked processes: kill points for 0 and 2 workers, a killed reader, SIGTERM, and workers 0, 1, 2 and 4"
    folders = [tmp_path/n for n in "abcde"]
    for f in folders: f.mkdir()
    said = lines("kills", folders[0], 2, 0, 11, "--", "kills", folders[1], 1, 2, 12, "--", "worker_killed", folders[2],
                 "--", "terminated", folders[3], "--", "workers_agree", folders[4], 0, 1, 2, 4)
    assert [w[0] for w in said] == ["killed", "killed", "lost", "ended", "found"]
    assert said[0][1] == "2" and said[1][1] == "1"
    assert int(said[2][1]) == 2 and int(said[2][2]) >= 2, "the state between two batches was saved when the reader died"
    assert len(said[4]) == 5 and len(set(said[4][1:])) == 1 and len(said[4][1]) == 128


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_25_kill_points_over_a_fold_boundary(workers, tmp_path):
    "Average, schedule, shuffling and two folds; each point drawn by key, a third of them killed twice"
    killed = run("kills", tmp_path, 25, workers, 42, timeout=3000)
    assert killed[:2] == ["killed", "25"]
    assert {"after_replace", "half_of_a_checkpoint", "before_validation_batch", "between_folds"} <= set(killed), killed


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(OPTIONS) - {"ema"}))
def test_kill_points_of_options(name, tmp_path):
    "Accumulation, one cycle, plateau, equal means, half precision, mixtures and sharpness-aware steps, killed by SIGKILL"
    assert run("kills", tmp_path, 14, 0, 5, name, timeout=3000)[:2] == ["killed", "14"]


@pytest.mark.parametrize("name", [*sorted(OPTIONS), pytest.param("compiled", marks=pytest.mark.slow)])
def test_options_resume_to_the_same_bytes(name, tmp_path):
    """Broken off in training and in validation, and asked to end in a validation, where an equal mean has its point already

    Adan's compiled step is chosen by name, takes its steps, and the run tells it from the other."""
    from fastai.callback.core import Callback
    from phoenix.train.learner import TrainError, fit
    from phoenix.train.optimizers import Adan
    how, plan = (OPTIONS | dict(compiled=(dict(opt="adan_compiled"), {})))[name]

    class Stop(Callback):
        order = 99
        def __init__(self, place): self.place = place
        def before_batch(self):
            if (self.epoch, self.iter, self.training) != self.place[:3]: return
            if self.place[3] == "breaks": raise KeyboardInterrupt
            self.checkpoint_writer.asked.append(signal.SIGTERM)

    def go(folder, stop=None, resume=False):
        learn = toy(folder, shuffle=True, **how)
        if stop: learn.add_cb(Stop(stop))
        history = fit(learn, 4, lr=.01, warmup_epochs=1, resume=resume, save_seconds=1e-9, progress=False, **plan)
        assert learn.choices["opt"] == how.get("opt", "adan")
        if isinstance(learn.opt.opt, Adan): assert learn.opt.opt.compiled == (name == "compiled")
        return everything(learn, history)
    straight = go(None)
    for i, stop in enumerate([(1, 4, True, "breaks"), (2, 1, False, "breaks"), (2, 0, False, "asks")]):
        with pytest.raises((KeyboardInterrupt, SystemExit)): go(tmp_path/str(i), stop)
        assert go(tmp_path/str(i), resume=True) == straight, stop
    if name != "compiled": return
    how = {}
    with pytest.raises(TrainError, match="opt was adan_compiled and is adan"): go(tmp_path/"0", resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_kill_points_of_a_classifier(workers, tmp_path):
    "The real loader with augmentation, killed at four moments"
    assert run("classifier_killed", tmp_path, workers, 4, 3, timeout=3000)[:2] == ["killed", "4"]


def test_another_configuration_is_refused_by_its_name(tmp_path):
    "Network, loss, optimizer, data, average: one sentence each, and nothing is changed on the disk"
    from phoenix.train.learner import TrainError, fit
    from phoenix.train.losses import CrossEntropy
    fit(toy(tmp_path), 1, progress=False)
    before = {p: p.read_bytes() for p in (tmp_path/"checkpoints").iterdir()}

    def other(**kw):
        learn = toy(tmp_path, **kw.pop("learner", {}))
        for k, v in kw.pop("choices", {}).items(): learn.choices[k] = v
        return learn, kw
    for name, kw in (("seed was 42 and is 43", dict(learner=dict(seed=43))),
                     ("average was none and is ema", dict(learner=dict(average="ema"))),
                     ("opt was adan and is adamw", dict(learner=dict(opt="adamw"))),
                     ("certificate was None and is abc", dict(choices=dict(certificate="abc"))),
                     ("lr was 0.001 and is 0.5", dict(lr=.5)), ("warmup_epochs was 5 and is 2", dict(warmup_epochs=2))):
        learn, options = other(**kw)
        with pytest.raises(TrainError, match=name) as e: fit(learn, 1, resume=True, progress=False, **options)
        assert str(e.value).count("restore them, or train in a new folder") == 1
    learn, _ = other()
    learn.loss_func = CrossEntropy(temperature=True)
    learn.choices = learn.choices | {"loss.label_smoothing": 0.}
    with pytest.raises(TrainError, match="loss.label_smoothing was 0.1 and is 0.0"):
        fit(learn, 1, resume=True, progress=False)
    assert before == {p: p.read_bytes() for p in (tmp_path/"checkpoints").iterdir()}


def test_a_callback_with_a_state_must_come_again(tmp_path):
    "A state that nobody takes, or a new callback without one, is refused by name"
    from fastai.callback.core import Callback
    from phoenix.train.learner import TrainError, fit

    class Counts(Callback):
        def before_fit(self): self.n = 0
        def after_step(self): self.n += 1
        def state_dict(self): return dict(n=self.n)
        def load_state_dict(self, state): self.n = state["n"]

    class Stop(Callback):
        def before_batch(self):
            if (self.epoch, self.iter) == (1, 2): raise KeyboardInterrupt
    first, counts = toy(tmp_path), Counts()
    first.add_cb(counts).add_cb(Stop())
    with pytest.raises(KeyboardInterrupt): fit(first, 2, save_seconds=1e-9, progress=False)
    with pytest.raises(TrainError, match="counts is in the checkpoint only"): fit(toy(tmp_path), 2, resume=True, progress=False)
    second = toy(tmp_path).add_cb(counts)
    fit(second, 2, resume=True, progress=False)
    assert counts.n == 2 * 8


def test_a_damaged_newest_generation_is_passed_over_and_said(tmp_path, capsys):
    "The older one continues to the same bytes, the damaged one is kept under another name, and both generations are whole"
    from fastai.callback.core import Callback
    from phoenix.train.checkpoints import previous_generation, read_checkpoint
    from phoenix.train.learner import fit
    from phoenix.train.log import read_progress

    class Stop(Callback):
        def before_epoch(self):
            if self.epoch == 3: raise KeyboardInterrupt
    whole, first, second = (toy(p, average="ema", ema_decay=.9) for p in (None, tmp_path, tmp_path))
    straight = everything(whole, fit(whole, 4, lr=.01, progress=False))
    first.add_cb(Stop())
    with pytest.raises(KeyboardInterrupt): fit(first, 4, lr=.01, progress=False)
    last = tmp_path/"checkpoints/last.safetensors"
    raw = bytearray(last.read_bytes())
    raw[-7] ^= 1
    last.write_bytes(raw)
    kept = previous_generation(last).read_bytes()
    previous = []

    class Saves(Callback):
        order = 81
        def after_epoch(self): previous.append(previous_generation(last).read_bytes())
    second.add_cb(Saves())
    assert everything(second, fit(second, 4, lr=.01, resume=True, progress=False)) == straight
    assert previous[0] == kept, "the first save must leave the good generation where it is"
    said = "resuming from last.previous.safetensors: last.safetensors must be a whole checkpoint"
    assert said in capsys.readouterr().err and said in read_progress(tmp_path).notes[0]
    assert [read_checkpoint(p).state["epoch"] for p in (last, previous_generation(last))] == [4, 3]
    assert (tmp_path/"checkpoints/last.damaged.safetensors").read_bytes() == raw


@pytest.mark.parametrize("stop", [(1, 2), (1, 5)])
def test_an_accumulated_gradient_is_never_cut_in_two(stop, tmp_path):
    "Steps of three batches, a callback without a state: checkpoints fall after steps only, and a resume is exact"
    from fastai.callback.core import CancelBatchException, Callback
    from phoenix.train.checkpoints import read_checkpoint
    from phoenix.train.learner import fit

    class Three(Callback):
        order, run_valid = 8, False
        def before_step(self):
            if (self.iter + 1) % 3 and self.iter + 1 < self.n_iter: raise CancelBatchException

    class Stop(Callback):
        order = 99
        def before_batch(self):
            if (self.epoch, self.iter) == stop: raise KeyboardInterrupt
    whole, first, second = (toy(p, average="ema", ema_decay=.9) for p in (None, tmp_path, tmp_path))
    for learn in (whole, first, second): learn.add_cb(Three())
    straight = everything(whole, fit(whole, 3, lr=.01, progress=False))
    first.add_cb(Stop())
    with pytest.raises(KeyboardInterrupt): fit(first, 3, lr=.01, save_seconds=1e-9, progress=False)
    state = read_checkpoint(tmp_path/"checkpoints/last.safetensors").state
    assert (state["epoch"], state["batch"]) == (1, stop[1] // 3 * 3)
    assert everything(second, fit(second, 3, lr=.01, resume=True, progress=False)) == straight


def test_the_clock_saves_inside_an_epoch(tmp_path):
    "About every second of a slow epoch, and never twice in one second"
    from phoenix.train.checkpoints import read_checkpoint
    from phoenix.train.learner import CheckpointWriter, fit
    places, save = [], CheckpointWriter.save

    def noted(self):
        places.append((time.perf_counter(), self.place))
        save(self)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(CheckpointWriter, "save", noted)
        fit(toy(tmp_path, slow=.1), 1, save_seconds=.25, progress=False)
    inside = [(t, place) for t, place in places if place[0] == 0]
    assert len(inside) >= 2 and places[-1][1] == (1, 0)
    assert all(b - a >= .25 for (a, _), (b, _) in zip(inside, inside[1:]))
    assert read_checkpoint(tmp_path/"checkpoints/last.safetensors").state["batch"] == 0


def test_kill_and_resume_gives_the_same_bytes(tmp_path, straight):
    "SIGKILL in the middle of the fourth epoch, then resume in a fresh process"
    process = start("train", tmp_path, .02)
    history, deadline = tmp_path/"history.csv", time.monotonic() + 180
    while not (history.exists() and len(history.read_text().splitlines()) == 4) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(.005)
    time.sleep(.03)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert run("train", tmp_path, 0, "resume") == straight


def test_early_stop_restores_the_best_weights(tmp_path):
    "Weights, batch statistics and temperature are those of the best checkpoint, not of the last"
    import torch
    from phoenix.train.checkpoints import read_checkpoint
    from phoenix.train.learner import fit
    learn = toy(tmp_path)
    history = fit(learn, 40, lr=.3, warmup_epochs=0, patience=2, min_delta=0., progress=False)
    assert history.stopped == "patience" and history.best is not history.rows[-1]
    best, last = (read_checkpoint(tmp_path/"checkpoints"/f"{n}.safetensors") for n in ("best", "last"))
    for kind, module in (("model", learn.model), ("loss", learn.loss_func)):
        assert all(torch.equal(v, best.weights(kind)[k]) for k, v in module.state_dict().items())
    assert not all(torch.equal(v, last.weights()[k]) for k, v in learn.model.state_dict().items())
    assert best.state["epoch"] == history.best["epoch"] and last.state["epoch"] == len(history)


def test_the_budget_holds_over_a_resume(tmp_path):
    "1.2 seconds for both parts together, where one epoch takes 0.8; the second stops at a batch boundary and validates all"
    from fastai.callback.core import Callback
    from phoenix.train.learner import fit

    class Stop(Callback):
        order = 100
        def before_epoch(self):
            if self.epoch == 1: raise KeyboardInterrupt

    first, took = toy(tmp_path, slow=.1), -time.perf_counter()
    first.add_cb(Stop())
    with pytest.raises(KeyboardInterrupt): fit(first, 100, seconds=1.2, progress=False)
    took += time.perf_counter()
    second, again = toy(tmp_path, slow=.1), -time.perf_counter()
    history = fit(second, 100, seconds=1.2, resume=True, progress=False)
    again += time.perf_counter()
    assert history.stopped == "seconds" and len(history) == 2
    assert took + again < 1.6, (took, again)
    assert all(0 < r["valid_loss"] < 10 and abs(r["accuracy"] * 80 - round(r["accuracy"] * 80)) < 1e-6 for r in history.rows)


def test_global_random_state_is_left_alone():
    import random
    import numpy as np
    import torch
    from phoenix.train.learner import fit

    def states(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    learn = toy()
    before = states()
    fit(learn, 2, progress=False)
    learn.validate()
    learn.get_preds()
    assert states() == before


def test_trainings_answers_and_attacks_hold_one_heap():
    "Freed memory stays with the process while they work (`steady_heap`), and no longer"
    import torch
    from fastai.callback.core import Callback
    from phoenix import settings
    from phoenix.train.attacks import pgd
    seen = []

    class Look(Callback):
        def after_batch(self): seen.append(len(settings._held))

    class Net(torch.nn.Linear):
        def forward(self, x):
            seen.append(len(settings._held))
            return super().forward(x.flatten(1))
    learn = toy().add_cb(Look())
    for work in (lambda: learn.fit(1), learn.validate, learn.get_preds,
                 lambda: pgd(Net(4, 2), torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.long), eps=.01, steps=1)):
        seen.clear()
        with learn.no_bar(), learn.no_logging(): work()
        assert seen and min(seen) > 0 and not settings._held


# what a setting of a training is called in the record of a run
RECORDED = {"seed": ("seed", 7), "size": ("preprocess.size", 48), "batch_size": ("batch_size", 6), "epochs": ("epochs", 1),
            "seconds": ("seconds", 600.), "lr": ("lr", .002), "weight_decay": ("weight_decay", .03), "patience": ("patience", 3),
            "warmup_epochs": ("warmup_epochs", 1), "min_delta": ("min_delta", .002), "clip_norm": ("clip_norm", .5),
            "label_smoothing": ("loss.label_smoothing", .05), "model": ("model", "plain_tiny_none")}
ELSEWHERE = {"threads", "hamming", "correlation", "fractions", "folds", "threshold", "bootstraps", "calibration_images",
             "max_megapixels", "runs_dir", "cache_dir", "data_dir", "log_level"}


def test_every_setting_of_a_training_reaches_its_record(tmp_path, monkeypatch):
    "From the environment through the command's own steps to what a resumed run is held to; flags too, and a search is stronger"
    from types import SimpleNamespace
    from phoenix.cli import _recipe, _trained, training
    from phoenix.data.acquire import build_manifest
    from phoenix.data.duplicates import find_pairs
    from phoenix.data.phantom import make_phantom
    from phoenix.data.splits import make_split
    from phoenix.settings import Settings
    from phoenix.train.checkpoints import read_checkpoint
    from phoenix.train.search import SPACE, training_options
    assert set(RECORDED) | ELSEWHERE == set(Settings.model_fields) and not set(RECORDED) & ELSEWHERE
    defaults = Settings()
    for name, (_, value) in RECORDED.items():
        assert getattr(defaults, name) != value
        monkeypatch.setenv(f"PHOENIX_{name.upper()}", str(value))
    for name, value in dict(CACHE_DIR=tmp_path/"cache", THREADS=1).items(): monkeypatch.setenv(f"PHOENIX_{name}", str(value))
    make_phantom(tmp_path/"phantom", patients=24, slices=1, size=64, seed=3)
    manifest = build_manifest(tmp_path/"phantom", progress=False)
    split = make_split(manifest, find_pairs(manifest, progress=False), fractions=(.6, .2, .2))
    s, how = training(balanced=True, loss="calibration")
    trained = _trained(SimpleNamespace(path=tmp_path/"run"), manifest, split, s, how, 1)
    plan = read_checkpoint(tmp_path/"run/checkpoints/last.safetensors").state["plan"]
    wanted = {place: [value]*2 if name == "size" else value for name, (place, value) in RECORDED.items()}
    wanted |= {"balanced": True, "loss": "CalibrationLoss", "loss.strength": 1.}
    assert {k: plan.get(k) for k in wanted} == wanted
    assert trained.dls.train.balanced and trained.learner.clip_norm.max_norm == .5 and trained.learner.loss_func.label_smoothing == .05
    drawn = training_options(_recipe(s), dict(label_smoothing=.01, lr=.1))
    assert "label_smoothing" in SPACE and (drawn["label_smoothing"], drawn["lr"], drawn["clip_norm"]) == (.01, .1, .5)


@pytest.mark.slow
def test_closing_the_notebook_loses_no_output(tmp_path, straight):
    "The page's channels are closed in mid-training; the kernel goes on, and log, history and weights are those of the whole run"
    import pandas as pd
    from jupyter_client import KernelManager
    from phoenix.train.log import read_progress
    history, done = tmp_path/"run/history.csv", tmp_path/"digest.txt"
    cell = f"""import sys
sys.path.insert(0, {str(PROCESS.parent)!r})
from pathlib import Path
from training_process import digest, toy
from phoenix.train.learner import fit
learn = toy(Path({str(history.parent)!r}), slow=.1)
fit(learn, 6, lr=.01)
Path({str(done)!r}).write_text(digest(learn))"""
    def wait(there):
        deadline = time.monotonic() + 300
        while not there():
            assert time.monotonic() < deadline and manager.is_alive()
            time.sleep(.01)
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(tmp_path), env=dict(os.environ, OMP_NUM_THREADS="1"))
    try:
        client = manager.client()
        client.start_channels()
        client.wait_for_ready(timeout=300)
        client.execute(cell)
        wait(lambda: history.exists() and len(history.read_text().splitlines()) >= 3)
        client.stop_channels()
        left = len(pd.read_csv(history))
        wait(done.exists)
    finally: manager.shutdown_kernel(now=True)
    assert 2 <= left < 6, "the channels were closed in mid-training"
    progress = read_progress(history.parent)
    assert (progress.state, progress.why, [r["epoch"] for r in progress.rows]) == ("over", "epochs", list(range(6)))
    assert list(pd.read_csv(history).epoch) == list(range(6)) and done.read_text() == straight[1]


@pytest.mark.slow
def test_another_terminal_redraws_the_curves(tmp_path):
    "`phoenix watch` beside a training, its screen a terminal of its own: epoch after epoch, and it ends with the training"
    import pty
    import threading
    from phoenix.train.learner import fit
    ours, theirs = pty.openpty()
    env = dict(os.environ, OMP_NUM_THREADS="1", TERM="xterm", COLUMNS="100", LINES="40")
    watch = subprocess.Popen([sys.executable, "-c", "from phoenix.cli import app; app()", "watch", tmp_path, "--every", ".1"],
                             stdout=subprocess.PIPE, stderr=theirs, text=True, env=env)
    os.close(theirs)
    screen = []

    def read():
        try:
            while block := os.read(ours, 4096): screen.append(block.decode(errors="replace"))
        except OSError: return # the terminal is gone with its process
    reader = threading.Thread(target=read)
    reader.start()
    fit(toy(tmp_path, slow=.15), 6, progress=False)
    out, _ = watch.communicate(timeout=60)
    reader.join(timeout=10)
    drawn = "".join(screen)
    assert watch.returncode == 0 and "epoch 6 of 6, over (epochs)" in out
    seen = [k for k in range(7) if f"epoch {k} of 6, running" in drawn]
    assert len(seen) >= 3 and "\x1b[" in drawn, "it redraws, and does not only print the end"
