"What training promises across processes: kills, full disks, seeds, budgets"
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training_process import digest, toy

PROCESS = Path(__file__).with_name("training_process.py")


def start(*args, hashseed="0"):
    "Start a command of training_process.py on one thread"
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONHASHSEED=hashseed)
    return subprocess.Popen([sys.executable, PROCESS, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=env)


def run(*args, **kw):
    "The last line that a command prints"
    process = start(*args, **kw)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out.strip().splitlines()[-1].split()


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


def test_a_full_disk_in_training(tmp_path, straight):
    "The error is one sentence, and the resumed training ends in the same bytes"
    assert run("full_disk_in_training", tmp_path) == straight


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


def test_a_classifier_gives_the_same_bytes_for_any_number_of_workers(tmp_path):
    "NeuroSnake, augmentation, dropout and cache, in two fresh processes: weights and test logits"
    assert run("classifier", tmp_path, 0) == run("classifier", tmp_path, 2, hashseed="5")


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
    assert best.state["epoch"] == history.best["epoch"] and last.state["epoch"] == len(history) - 1


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
