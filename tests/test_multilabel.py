"Several labels a picture, from a made chest set in its real layout to an INT8 answer, command by command"
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from fastcore.xtras import modified_env

from phoenix import cli
from phoenix.data.mimics import make_mimic
from phoenix.data.organs import label_matrix
from phoenix.deploy.package import load_package, sigmoid
from phoenix.evaluate.multilabel import label_scores, label_thresholds
from phoenix.settings import PhoenixError
from phoenix.train.folds import check_out_of_fold, load_out_of_fold, seen_by

FEW = dict(model="simple_cifar_net", size=32, epochs=3)


@pytest.fixture(scope="module")
def way(tmp_path_factory):
    "Trained, exported and quantised as a user types it"
    at = tmp_path_factory.mktemp("labels")
    make_mimic("padchest", at/"raw", groups=40, size=40)
    places = {f"PHOENIX_{k}": str(v) for k, v in dict(RUNS_DIR=at/"runs", CACHE_DIR=at/"cache", THREADS=1, BATCH_SIZE=8,
                                                       BOOTSTRAPS=100, LR=.005).items()}
    with modified_env(**places):
        cli.split_make(at/"raw", at/"split.json")
        trained = cli.train(at/"raw", at/"split.json", weights="balanced", **FEW)
        model = cli.Path(trained.data["model"])
        cli.export(model, at/"raw", at/"split.json")
        int8 = cli.quantize(model, at/"raw", at/"split.json", images=32)
        held = cli._held(at/"raw", at/"split.json") # read once for all tests
        yield SimpleNamespace(at=at, set=(at/"raw", at/"split.json"), model=model, int8=int8, scores=trained.data, held=held)


def side_of(way, name):
    manifest, cert = way.held
    rows = cli._rows(manifest, cert, name)
    return rows, label_matrix(rows.label, manifest.classes)


def test_the_model_folder_says_labels_and_keeps_thresholds_of_the_validation_side(way):
    package, (rows, marks) = load_package(way.model), side_of(way, "valid")
    probs = package.probs([way.at/"raw"/p for p in rows.path], "fp32")
    cut = label_thresholds(probs, marks)
    assert (package.task, len(package.threshold)) == ("labels", 14)
    for own, k in zip(package.threshold, range(14)): assert (own is None) == np.isnan(cut[k])
    np.testing.assert_allclose([t for t in package.threshold if t is not None], cut[~np.isnan(cut)], atol=1e-6)
    card = (way.model/"card.md").read_text()
    assert "any number of them" in card and "abstains" not in card and "SYNTHETIC" in card


def test_evaluation_is_the_weights_own_and_unknown_labels_count_nowhere(way):
    package, (rows, marks) = load_package(way.model), side_of(way, "test")
    assert np.isnan(marks).any()
    said = cli.evaluate(way.model, *way.set, bootstraps=50)
    x = package.images([way.at/"raw"/p for p in rows.path])
    want = label_scores(sigmoid(package.logits(x, "fp32")), marks, package.classes,
                        [np.nan if t is None else t for t in package.threshold])
    assert said.data["macro"] == pytest.approx(want["macro"])
    assert {k: v["known"] for k, v in said.data["per_label"].items()} == dict(
        zip(package.classes, np.isfinite(marks).sum(0)))
    assert said.data["intervals"]["macro_auc"]["low"] <= want["macro"]["auc"] <= said.data["intervals"]["macro_auc"]["high"]
    assert said.data["looks"] == 2 and way.scores["scores"]["test"]["auc"] == pytest.approx(want["macro"]["auc"], abs=1e-6)


def test_predictions_name_each_label_that_reaches_its_own_threshold(way):
    package, (rows, _) = load_package(way.model), side_of(way, "test")
    files = [way.at/"raw"/p for p in rows.path[:12]]
    said = cli.predict(way.model, files, runtime="fp32").data["answers"]
    for a in said:
        want = [c for c, t in zip(package.classes, package.threshold) if t is not None and a["probs"][c] >= t]
        assert (a["present"], a["label"], a["abstained"]) == (want, None, False)
    assert not np.allclose([sum(a["probs"].values()) for a in said], 1), "labels do not exclude each other"
    assert len({len(a["present"]) for a in said}) > 1, "some pictures show more labels than others"


def test_int8_is_certified_label_by_label(way):
    c = way.int8.data
    assert c["task"] == "labels" and set(c["label_agreement"]) <= set(load_package(way.model).classes)
    assert c["ok"] and way.int8.code == 0, c["reasons"]
    assert json.loads((way.model/"parity.json").read_text())["int8"]["auc_change"] == c["auc_change"]
    rows, _ = side_of(way, "test")
    files, package = [way.at/"raw"/p for p in rows.path], load_package(way.model)
    a, b = (package.called(package.probs(files, r)) for r in ("fp32", "int8"))
    there = [t is not None for t in package.threshold]
    assert (a == b)[:, there].mean() == pytest.approx(c["agreement"])


def test_folds_keep_the_unknown_and_never_ask_a_network_about_its_own(way):
    once = FEW | dict(epochs=1)
    done = cli.cross_validation(*way.set, way.at/"folds", folds=3, loss="focal", **once)
    oof = check_out_of_fold(load_out_of_fold(way.at/"folds/out_of_fold.csv"))
    manifest, cert = way.held
    inside = sorted(cert.paths("train") + cert.paths("valid"))
    assert oof.task == "labels" and list(oof.table.path) == inside
    texts = manifest.table.set_index("path").label.loc[inside]
    np.testing.assert_array_equal(oof.targets, label_matrix(texts, manifest.classes))
    assert not seen_by(oof)[np.arange(len(oof)), oof.folds].any()
    assert set(done.data["scores"]) == {"macro_auc", "macro_ap", "macro_ece"}
    again = cli.cross_validation(*way.set, way.at/"folds", folds=3, loss="focal", **once)
    assert again.data == done.data
    with pytest.raises(PhoenixError, match="loss was .*focal.* and is .*cross_entropy"):
        cli.cross_validation(*way.set, way.at/"folds", folds=3, **once)


def test_parts_without_a_meaning_for_several_labels_say_so(way):
    from phoenix.deploy.clinical import fit_decision, judge_prepared
    from phoenix.deploy.registry import models_add
    from phoenix.evaluate.folds import summarise_folds
    from phoenix.evaluate.parts import take_subject
    from phoenix.train.ensembles import align
    oof = load_out_of_fold(way.at/"folds/out_of_fold.csv")
    package, store = load_package(way.model), str(way.at/"s.db")
    (manifest, cert), copied = way.held, shutil.copytree(way.model, way.at/"copied")
    asked = {"do not exclude": [lambda: summarise_folds(oof), lambda: align([oof, oof]),
                                lambda: fit_decision(package, [], [], []),
                                lambda: judge_prepared(package, None, np.zeros((1, 32, 32), np.float32)),
                                lambda: models_add(str(way.model), "chest", store=store),
                                lambda: cli.qat(way.model, *way.set, way.at/"aware"),
                                lambda: cli.report_models(*way.set, [way.model, copied], way.at/"two", effort="brief")],
             "class order must be": [lambda: take_subject("x", None, package.classes[::-1], package.images, manifest, cert)],
             "share of right answers": [lambda: cli.parameter_search(*way.set, way.at/"search", trials=1, **FEW)]}
    for why, calls in asked.items():
        for call in calls:
            with pytest.raises(PhoenixError, match=why): call()


def test_the_report_has_what_that_of_one_class_has_and_says_what_it_lacks(way):
    "Looks, checklist, refusals and provenance from the same call; the table, the page and the command agree"
    package, (rows, _) = load_package(way.model), side_of(way, "test")
    looks = next((way.at/"runs/vaults").iterdir())
    before = len((looks/"ledger.jsonl").read_text().splitlines())
    said = cli.report_models(*way.set, [way.model], way.at/"report", effort="brief").data
    told = json.loads((way.at/"report/report.json").read_text())
    assert [s["title"] for s in told["sections"]] == ["Data", "Split proof (certified)", "Test set", "Controls without a picture",
                                                      "Looks at the test set", "Reporting checklist", "Provenance"]
    parts = {s["title"]: s for s in told["sections"]}
    assert parts["Looks at the test set"]["numbers"]["looks"] == before, "the report is one look more; the first line is the seal"
    assert parts["Reporting checklist"]["numbers"]["answered"] >= 15
    for sentence in ("synthetic", "Nothing is known about attacks", "heat maps", "No control with shuffled labels", "looked at"):
        assert any(sentence in s for s in told["cannot_claim"]), sentence
    head = told["headline"][0]
    assert (head["name"], head["value"]["method"]) == ("macro AUC", "BCa")
    assert head["value"]["value"] == pytest.approx(next(iter(said["macro_auc"].values())), abs=1e-12)
    table = pd.read_csv(next((way.at/"report/tables").glob("test-set-headlines-in-full.csv")))
    assert set(table.measure) == {f"{a}{m}" for a in ("", "macro_") for m in ("auc", "ap", "f1", "ece")} and len(table) == 4*15
    answers = pd.read_csv(way.at/"report/predictions.csv", keep_default_na=False).set_index("path").answer
    cut = np.array([np.nan if t is None else t for t in package.threshold])
    probs = package.probs([way.at/"raw"/p for p in rows.path], "fp32")
    called = label_matrix(answers[rows.path], package.classes)
    clear = ~np.isnan(cut) & (np.abs(probs - cut) > 1e-4)
    np.testing.assert_array_equal(called[clear], (probs >= cut)[clear])
    assert np.isnan(called[:, np.isnan(cut)]).all()


def test_each_look_is_counted_and_says_the_area(way):
    door = next((way.at/"runs/vaults").iterdir())
    found = cli.vault_verify(door, way.at/"runs")
    assert found.code == 0 and found.data["looks"] >= 1 and "macro_auc" in found.data["entries"][0]
    table = pd.DataFrame(found.data["entries"])
    assert table.macro_auc.between(0, 1).all()


def test_a_second_engine_and_the_pipeline_answer_as_the_folder_does(way):
    from phoenix.data.pixels import read_pixels
    from phoenix.deploy.pipeline import check_pipeline, export_pipeline
    from phoenix.deploy.runtimes import certify_engine
    package, (rows, _) = load_package(way.model), side_of(way, "test")
    files = [way.at/"raw"/p for p in rows.path[:8]]
    found = certify_engine(package, package.images(files), "fp32", "openvino")
    assert found["ok"] and found["same_class"] == 1
    whole = export_pipeline(package, way.at/"whole.onnx")
    said = check_pipeline(package, whole, [(read_pixels(f).grey >> 8).astype(np.uint8) for f in files]) # a pipeline takes 8 bits
    assert said["ok"], said
    assert way.held[0].task == "labels"
