"The report in one call: from a model folder to the page, and nothing fitted to the test side"
import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from phoenix.cli import app
from phoenix.data.duplicates import find_pairs, scan
from phoenix.data.preprocess import Preprocess
from phoenix.data.splits import make_split
from phoenix.deploy.package import load_package, save_package
from phoenix.evaluate import judge as judging
from phoenix.evaluate.compare import compare
from phoenix.evaluate.folds import summarise_folds
from phoenix.evaluate.metrics import MetricError, scores
from phoenix.evaluate.parts import _sets, _told, headline_section, take_subject
from phoenix.evaluate.report import calibration_section, evaluation_section
from phoenix.evaluate.statistics import bootstrap
from phoenix.evaluate.vault import predictions_of, test_vault
from phoenix.train.learner import train_classifier

test_vault.__test__ = False # pytest takes the name for that of a test

TINY = judging.Effort(50, "pgd", dict(steps=2, restarts=1, queries=5), (2/255,), (5,), 4, 3, 40, 60, ("gradcam",), 3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A phantom, its split and two model folders"
    root = tmp_path_factory.mktemp("judge")
    manifest = scan("phantom", root / "raw", patients=30)
    certificate = make_split(manifest, find_pairs(manifest, progress=False), rule="grouped", seed=1)
    certificate.save(root / "split.json")
    preprocess = Preprocess(size=(32, 32))
    for seed in (1, 2):
        t = train_classifier(manifest, certificate, model="neurosnake_tiny_ca", preprocess=preprocess, epochs=1, seed=seed,
                             progress=False)
        save_package(root / f"run-{seed}/model", model_name="neurosnake_tiny_ca", model_args=dict(n_classes=4),
                     classes=manifest.classes, state_dict=t.learner.model.state_dict(), preprocess=preprocess,
                     metrics=scores(t.test.probs, t.test.targets, t.test.classes), certificate_sha256=certificate.sha256,
                     run_hash=f"run-{seed}", threshold=.8, synthetic=True, published=False)
    return root, manifest, certificate


def test_report_of_one_and_of_two(place, monkeypatch):
    "Typed as a command: one page, then two and their comparison; every look is counted"
    root, manifest, certificate = place
    monkeypatch.chdir(root)
    monkeypatch.setitem(judging.EFFORTS, "quick", TINY)
    words = ["report", str(manifest.root), "split.json", "run-1/model"]
    one = CliRunner().invoke(app, [*words, "--effort", "quick", "--output-dir", "one"])
    assert one.exit_code == 0, one.output
    told = json.loads((root / "one/report.json").read_text())
    titles = {s["title"] for s in told["sections"]}
    assert {"Looks at the test set", "Reporting checklist", "Doubt and abstention", "Shortcuts"} <= titles
    assert "synthetic" in told["stamps"] and (root / "one/predictions.csv").exists()
    two = CliRunner().invoke(app, [*words, "run-2/model", "--effort", "quick", "--output-dir", "two"])
    assert two.exit_code == 0, two.output
    n = "neurosnake_tiny_ca"
    assert {p.name for p in (root / "two").iterdir()} >= {f"{n}-run-1", f"{n}-run-2", "report.html", "differences.csv"}
    assert f'href="{n}-run-1/report.html"' in (root / "two/report.html").read_text()
    looked = json.loads((root / f"two/{n}-run-2/report.json").read_text())
    assert any("looked at 3 times" in s for s in looked["cannot_claim"])


def test_one_model_and_test_set_have_one_interval_in_every_room(place, monkeypatch):
    "Page, calibration, look, command, comparison, folds and lesson: the same ends, to the last bit where sums are whole numbers"
    root, manifest, certificate = place
    monkeypatch.chdir(root)
    package = load_package(root / "run-1/model")
    subject = take_subject("a", package.model(), package.classes, package.images, manifest, certificate)
    t, probs, tables = subject.test, subject.probs(), judging._as_out_of_fold(subject)
    section = headline_section(subject)
    page = section.numbers["headlines"].query("source == 'all' and `class` == ''").set_index("measure")
    top = {h.name: h.value for h in judging._top(section.numbers["headlines"], subject)}
    ends = {m: page.loc[m, ["value", "low", "high"]].tolist() for m in ("accuracy", "macro_f1", "macro_recall", "macro_auc", "ece")}
    assert (page.loc["accuracy", "method"], page.loc["accuracy", "n_groups"]) == ("BCa", len(set(t.units)))
    def same(interval, m): assert [interval.value, interval.low, interval.high] == pytest.approx(ends[m], abs=0 if m != "ece" else 1e-12)
    same(top["accuracy"], "accuracy"), same(top["expected calibration error"], "ece")
    other = evaluation_section(probs, t.targets, t.units, package.classes).numbers["intervals"]
    for m in ("accuracy", "macro_f1", "macro_recall", "macro_auc"): same(other[m], m)
    error = calibration_section(probs, t.targets, t.units).tables[0].frame.iloc[0]
    assert [error.ECE, error.ECE_low, error.ECE_high] == pytest.approx(ends["ece"], abs=1e-12)
    vault = test_vault(certificate, manifest, root / "elsewhere", classes=package.classes)
    look = vault.look(predictions_of(t.rows.path, probs, package.classes), "test", "the same interval")
    for m, i in look.intervals.items(): assert [i[k] for k in ("value", "low", "high")] == ends[m] and i["method"] == "BCa"
    scores = compare({"a": [tables], "b": [tables]}, n_train=9).scores.query("model == 'a'").set_index("score")
    for m in scores.index: assert scores.loc[m, ["mean", "low", "high"]].tolist() == ends[m]
    for m in ("accuracy", "macro_f1", "macro_auc"): same(summarise_folds(tables, m).interval, m)
    shuffle = np.random.default_rng(0).permutation(len(t))
    same(bootstrap("macro_auc", probs[shuffle], t.targets[shuffle], t.units[shuffle].astype(str)), "macro_auc")


def test_nothing_is_fitted_to_the_test_side(place):
    "Other labels on the test side change the scores, and no map, threshold or set"
    root, manifest, certificate = place
    package = load_package(root / "run-1/model")
    subject = take_subject("a", package.model(), package.classes, package.images, manifest, certificate)
    turned = replace(subject, test=replace(subject.test, targets=(subject.test.targets + 1) % 4))
    for a, b in zip(_told(subject)[0].values(), _told(turned)[0].values()):
        np.testing.assert_array_equal(a, b)
    assert _sets(subject, .1, 50)["size"].iloc[0] == _sets(turned, .1, 50)["size"].iloc[0]
    assert subject.wrong.mean() != turned.wrong.mean()


def test_refuses_another_split_and_another_network(place):
    "The certificate must speak of the manifest, the classes must be the network's"
    root, manifest, certificate = place
    package = load_package(root / "run-1/model")
    ask = dict(images=package.images, manifest=manifest)
    with pytest.raises(MetricError, match="must speak of this manifest"):
        take_subject("a", package.model(), package.classes, certificate=replace(certificate, manifest_sha256="0"), **ask)
    with pytest.raises(MetricError, match="the network knows"):
        take_subject("a", package.model(), package.classes[:3], certificate=certificate, **ask)
