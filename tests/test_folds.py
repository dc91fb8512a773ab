"Cross-validations and searches that are killed, resumed and shared by processes"
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution

from phoenix.data.acquire import build_manifest
from phoenix.data.duplicates import find_pairs
from phoenix.data.phantom import make_phantom
from phoenix.data.preprocess import Preprocess
from phoenix.train.ensembles import train_members
from phoenix.train.folds import FoldError, cross_validate, fold_certificates
from phoenix.train.learner import TrainError, train_classifier
from phoenix.train.search import fold_evaluator, nested_search, open_study, search, trial_table

MODEL = dict(model="neurosnake_tiny_none", preprocess=Preprocess(size=(32, 32)), epochs=3, batch_size=6, lr=4e-3, warmup_epochs=1,
             progress=False)


def forked(work):
    "A process of its own that does `work`, as its process number"
    if child := os.fork(): return child
    code = 1
    try:
        torch.set_num_threads(1)
        work()
        code = 0
    finally: os._exit(code)


def ended(child):
    "How the process ended: its status, or minus the signal"
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_when(there):
    "Kill this process, as by kill -9, as soon as `there()`"
    def watch():
        while not there(): time.sleep(.001)
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=watch, daemon=True).start()


def lines(path): return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A small set and its three folds"
    folder = tmp_path_factory.mktemp("folds")
    make_phantom(folder/"phantom", patients=24, slices=1, size=64, seed=3)
    manifest = build_manifest(folder/"phantom", progress=False)
    return manifest, fold_certificates(manifest, find_pairs(manifest, progress=False), n=3), dict(MODEL, cache_dir=folder/"cache")


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    "A cross-validation that was never interrupted"
    manifest, certificates, job = data
    folder = tmp_path_factory.mktemp("straight")
    cross_validate(manifest, certificates, run_dir=folder, **job)
    return folder


def test_the_command_compares_what_the_folds_left(straight, tmp_path):
    "A network against itself: no difference, one page, and the two tables are two seeds"
    from phoenix.cli import compare_networks
    from phoenix.records import read_json
    found = compare_networks([f"a={straight}", f"a={straight}", f"b={straight/'out_of_fold.csv'}"], tmp_path/"page")
    row = found.data["paired"][0]
    assert (row["model"], row["against"], row["difference"], row["low"], row["high"]) == ("a", "b", 0, 0, 0)
    assert "no difference is shown" in found.data["verdicts"][0]
    assert {f.name for f in (tmp_path/"page").iterdir()} >= {"report.html", "report.json", "differences.csv"}
    rows = read_json(tmp_path/"page/report.json")["sections"][0]["numbers"]["cells"]["rows"]
    assert sorted((r[0], r[1]) for r in rows) == [("a", 0)]*3 + [("a", 1)]*3 + [("b", 0)]*3


def test_what_was_begun_on_another_split_is_refused(data, straight, tmp_path):
    "Folds and a single training, with a certificate that differs in nothing but the split; the folders stay as they are"
    manifest, certificates, job = data
    def held(folder): return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    before = held(straight)
    with pytest.raises(FoldError, match="certificates was .* and is"):
        cross_validate(manifest, certificates[::-1], run_dir=straight, resume=True, **job)
    assert held(straight) == before
    how = job | dict(epochs=1, run_dir=tmp_path/"one")
    train_classifier(manifest, certificates[0], **how)
    before = held(tmp_path/"one")
    with pytest.raises(TrainError, match=f"certificate was {certificates[0].sha256} and is {certificates[1].sha256}"):
        train_classifier(manifest, certificates[1], resume=True, **how)
    assert held(tmp_path/"one") == before


POINTS = [(1, "history.csv", 3), (0, "history.csv", 2), (1, "out_of_fold.csv", 1), (2, "checkpoints/last.safetensors", 0),
          (2, "history.csv", 4)]


@pytest.mark.parametrize("fold,name,n", [POINTS[0], *(pytest.param(*p, marks=pytest.mark.slow) for p in POINTS[1:])])
def test_a_killed_cross_validation_goes_on_at_its_fold_and_epoch(data, straight, tmp_path, fold, name, n):
    "Killed when a fold's file has n lines; resumed, the predictions and histories are those of the run never killed"
    manifest, certificates, job = data
    mark = tmp_path/f"fold{fold}"/name

    def work():
        kill_when(lambda: lines(mark) >= n if n else mark.exists())
        cross_validate(manifest, certificates, run_dir=tmp_path, **job)
    assert ended(forked(work)) == -signal.SIGKILL
    done = {p: p.stat().st_mtime_ns for p in tmp_path.glob("fold*/out_of_fold.csv")}
    assert len(done) in (fold, fold + 1) and not (tmp_path/"out_of_fold.csv").exists()
    before = pd.read_csv(tmp_path/f"fold{fold}/history.csv") if lines(tmp_path/f"fold{fold}/history.csv") else None
    cross_validate(manifest, certificates, run_dir=tmp_path, resume=True, **job)
    assert (tmp_path/"out_of_fold.csv").read_bytes() == (straight/"out_of_fold.csv").read_bytes()
    assert all(p.stat().st_mtime_ns == t for p, t in done.items()), "what was done is not done again"
    for k in range(3):
        a, b = (pd.read_csv(f/f"fold{k}/history.csv").drop(columns="seconds") for f in (tmp_path, straight))
        pd.testing.assert_frame_equal(a, b)
    saved = (tmp_path/f"fold{fold}/checkpoints/last.previous.safetensors").exists()
    if before is not None and saved:
        kept = pd.read_csv(tmp_path/f"fold{fold}/history.csv").seconds.iloc[:len(before) - 1]
        assert list(kept) == list(before.seconds.iloc[:-1]), "finished epochs are kept, not repeated"


SPACE = dict(x=FloatDistribution(0, 1), kind=CategoricalDistribution(["a", "b"]))


@dataclass
class Toy:
    accuracy: float


def toy(params, folder, wait=.02):
    "Three folds whose accuracy is known"
    for k in range(3):
        time.sleep(wait)
        yield Toy(1 - (params["x"] - .3)**2 - .1*(params["kind"] == "b") + .001*k)


def shared(folder, trials=14, seed=42):
    "Work on a search, and write down which process took which trial"
    def evaluate(params, place):
        with open(Path(folder)/f"{os.getpid()}.txt", "a") as f: f.write(f"{place.name}\n")
        yield from toy(params, place)
    search(folder, evaluate, steps=3, trials=trials, space=SPACE, seed=seed)


def test_two_processes_share_a_search(tmp_path):
    "Each trial is tried once, no parameters twice, both processes work, and there are as many trials as asked for"
    children = [forked(lambda: shared(tmp_path)) for _ in range(2)]
    assert [ended(c) for c in children] == [0, 0]
    table = trial_table(search(tmp_path, toy, steps=3, trials=14, space=SPACE))
    assert len(table) == 14 and set(table.state) <= {"COMPLETE", "PRUNED"}
    assert not table.x.duplicated().any()
    took = [(tmp_path/f"{c}.txt").read_text().split() for c in children]
    assert min(map(len, took)) >= 3 and sorted(took[0] + took[1]) == [f"trial{k:04d}" for k in range(14)]


def test_a_killed_search_is_the_one_that_never_stopped(tmp_path):
    "Killed in the middle of its fourth trial: the same parameters and values, in the same order"
    whole = search(tmp_path/"whole", lambda p, f: toy(p, f, 0), steps=3, trials=9, space=SPACE)

    def work():
        kill_when(lambda: (tmp_path/"killed/trial0003").exists())
        def evaluate(params, place):
            place.mkdir()
            yield from toy(params, place)
        search(tmp_path/"killed", evaluate, steps=3, trials=9, space=SPACE)
    assert ended(forked(work)) == -signal.SIGKILL
    again = search(tmp_path/"killed", lambda p, f: toy(p, f, 0), steps=3, trials=9, space=SPACE)
    rows = [(t.params, t.values, t.state) for t in again.trials if t.state.name != "FAIL"]
    assert len(again.trials) == 10 and again.trials[3].state.name == "FAIL"
    first = [(t.params, t.values, t.state) for t in whole.trials]
    assert rows == first, "the killed trial is tried again with its parameters, and those after it are as they would have been"


def test_the_usual_space():
    "Bounds of the protocol's search, section 1.19, with Adan in Adam's place"
    from phoenix.train.search import SPACE as usual
    assert (usual["lr"].low, usual["lr"].high, usual["lr"].log) == (1e-5, 1e-2, True)
    assert (usual["dropout"].low, usual["dropout"].high) == (0, .5)
    assert usual["batch_size"].choices == (8, 16, 32, 64) and usual["opt"].choices == ("adan", "adamw", "sgd")


@pytest.mark.slow
def test_a_front_of_accuracy_latency_and_calibration(tmp_path, monkeypatch):
    "The command searches for all three at once; the front is what no other trial beats in all, with a file for each"
    from phoenix.cli import parameter_search, split_make
    from phoenix.data.acquire import acquire
    from phoenix.evaluate.tests import pareto
    acquire("phantom", tmp_path/"raw", patients=24, seed=3, progress=False)
    split_make(tmp_path/"raw", tmp_path/"split.json")
    for name, value in dict(CACHE_DIR=tmp_path/"cache", RUNS_DIR=tmp_path/"runs", BATCH_SIZE=8, THREADS=1).items():
        monkeypatch.setenv(f"PHOENIX_{name}", str(value))
    found = parameter_search(tmp_path/"raw", tmp_path/"split.json", tmp_path/"search", trials=4, parameters="lr,dropout",
                             objectives="accuracy,latency,calibration", sampler="nsga2", model="plain_tiny_none", epochs=1, size=32)
    table = pd.read_csv(tmp_path/"search/trials.csv")
    assert len(table) == 4 and table[["accuracy", "latency_ms", "ece"]].notna().all(axis=None) and (table.latency_ms > 0).all()
    best = pareto(table[["accuracy", "latency_ms", "ece"]].to_numpy()*[1, -1, -1])
    assert sorted(b["number"] for b in found.data["best"]) == sorted(table.number[best]) and len(found.data["files"]) == len(found.data["best"])


@pytest.mark.slow
def test_a_killed_trial_goes_on_at_its_fold(data, tmp_path):
    "A search of trainings, killed in the second fold of its second trial"
    manifest, certificates, job = data
    space, how = dict(lr=FloatDistribution(1e-3, 1e-2, log=True)), dict(job, epochs=2)
    del how["lr"]
    whole = search(tmp_path/"whole", fold_evaluator(manifest, certificates, **how), steps=3, trials=2, space=space)

    def work():
        kill_when(lambda: lines(tmp_path/"killed/trial0001/fold1/history.csv") >= 2)
        search(tmp_path/"killed", fold_evaluator(manifest, certificates, **how), steps=3, trials=2, space=space)
    assert ended(forked(work)) == -signal.SIGKILL
    first = (tmp_path/"killed/trial0001/fold0/out_of_fold.csv").stat().st_mtime_ns
    again = search(tmp_path/"killed", fold_evaluator(manifest, certificates, **how), steps=3, trials=2, space=space)
    assert (tmp_path/"killed/trial0001/fold0/out_of_fold.csv").stat().st_mtime_ns == first
    assert [(t.params, t.values) for t in again.trials if t.state.name == "COMPLETE"] == [(t.params, t.values) for t in whole.trials]


@pytest.mark.slow
def test_a_killed_nested_search_is_the_one_that_never_stopped(data, tmp_path):
    "Two outer folds of three trials, killed in the second one's search and resumed; summed up over the outer folds, by group"
    from phoenix.evaluate.folds import summarise_folds
    manifest, certificates, job = data
    space = dict(lr=FloatDistribution(1e-3, 1e-2, log=True), label_smoothing=FloatDistribution(0, .2))
    how = {k: v for k, v in job.items() if k != "lr"} | dict(epochs=1, batch_size=4, warmup_epochs=0, space=space, inner=3, trials=3)
    def go(place): return nested_search(manifest, certificates[:2], tmp_path/place, **how)
    whole = go("whole")

    def work():
        kill_when(lambda: (tmp_path/"killed/outer1/trial0001/fold0/out_of_fold.csv").exists())
        go("killed")
    assert ended(forked(work)) == -signal.SIGKILL
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/"killed").rglob("out_of_fold.csv")}
    assert len(before) == 3*3 + 1 + 4, "the whole first outer fold, and four inner folds of the second one's search"
    again = go("killed")
    assert all(p.stat().st_mtime_ns == t for p, t in before.items()), "what was done is not done again"
    assert len(again.chosen) == 2 and (again.chosen, again.values) == (whole.chosen, whole.values)
    pd.testing.assert_frame_equal(again.predictions.table, whole.predictions.table)
    for k, chosen in enumerate(again.chosen):
        study = open_study(tmp_path/f"killed/outer{k}", space=space, about=dict(outer=certificates[k].sha256))
        tried = [(t.values[0], t.params) for t in study.trials if t.values]
        assert len(tried) == 3 and chosen == max(tried, key=lambda t: t[0])[1]
    found = summarise_folds(again.predictions, n=200)
    assert found.values == pytest.approx(again.values) and found.mean == pytest.approx(sum(again.values)/2)
    assert found.spread == pytest.approx(abs(again.values[0] - again.values[1])/2**.5)
    assert found.interval.low <= found.interval.value <= found.interval.high
    assert found.interval.n_groups == len(set(again.predictions.groups)) >= 12


@pytest.mark.slow
def test_what_a_search_found_is_what_an_experiment_runs(tmp_path):
    "phoenix search writes the file, phoenix run -f takes it, and the run trains with it"
    from notebooks import NBS
    from phoenix.cli import parameter_search, split_make
    from phoenix.data.acquire import acquire
    from phoenix.experiments import read_parameters, run_experiment
    from phoenix.records import read_json, verify_run
    acquire("phantom", tmp_path/"raw", patients=24, seed=3, progress=False)
    split_make(tmp_path/"raw", tmp_path/"split.json")
    monkey = pytest.MonkeyPatch()
    with monkey.context() as m:
        m.chdir(NBS.parent)
        for name, value in dict(CACHE_DIR=tmp_path/"cache", RUNS_DIR=tmp_path/"runs", BATCH_SIZE=8, THREADS=1).items():
            m.setenv(f"PHOENIX_{name}", str(value))
        found = parameter_search(tmp_path/"raw", tmp_path/"split.json", tmp_path/"search", trials=2, parameters="lr,opt,dropout",
                                 model="plain_tiny_none", epochs=1, size=32, experiment="11_folds")
        given = read_parameters([], found.data["files"][0])
        run = run_experiment(NBS/"experiments/11_folds.ipynb", given, tmp_path/"runs", show="nothing")
    assert verify_run(run).ok
    best, metrics = found.data["best"][0], read_json(run/"metrics.json")
    assert metrics["options"]["lr"] == best["lr"] and metrics["options"]["opt"] == best["opt"]
    assert metrics["options"]["model_options"] == {"dropout": best["dropout"]}
    assert len(metrics["folds"]) == 3 and metrics["accuracy"]["n_groups"] >= 20


@pytest.mark.slow
def test_members_trained_side_by_side_are_those_of_one_process(data, tmp_path):
    "Two seeds at once give the predictions that each gives here; called again, nothing is trained or timed anew"
    manifest, certificates, job = data
    certificate, job = certificates[0], {k: v for k, v in job.items() if k != "progress"}
    members = {f"seed{s}": dict(seed=s) for s in (1, 2)}
    spent = train_members(manifest, certificate, members, run_dir=tmp_path/"apart", **job)
    assert all(s["cpu_s"] > 0 and s["wall_s"] > 0 for s in spent.values())
    for name, own in members.items():
        here = train_classifier(manifest, certificate, run_dir=tmp_path/"here"/name, progress=False, **own, **job)
        apart = train_classifier(manifest, certificate, run_dir=tmp_path/"apart"/name, progress=False, resume=True, **own, **job)
        assert (apart.test.logits == here.test.logits).all()
    assert train_members(manifest, certificate, members, run_dir=tmp_path/"apart", **job) == spent
    with pytest.raises(TrainError, match="must have the settings it began with"):
        train_members(manifest, certificate, dict(seed1=dict(seed=1)), run_dir=tmp_path/"apart", **job | dict(lr=1e-3))
