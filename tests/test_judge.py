"The report in one call: from a model folder to the page, and nothing fitted to the test side"
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from phoenix.cli import app
from phoenix.data.duplicates import find_pairs, scan
from phoenix.data.phantom import make_phantom
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
from phoenix.models.zoo import create_model
from phoenix.records import write_json
from phoenix.train.folds import OutOfFold, save_out_of_fold
from phoenix.train.learner import train_classifier

test_vault.__test__ = False # pytest takes the name for that of a test

TINY = judging.Effort(50, "pgd", dict(steps=2, restarts=1, queries=5), (2/255,), (5,), 4, 3, 40, 60, ("gradcam",), 3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A phantom with masks, its split, two model folders in the runs that made them, and a control"
    root = tmp_path_factory.mktemp("judge")
    make_phantom(root / "raw", patients=30, masks=True)
    manifest = scan(root / "raw")
    certificate = make_split(manifest, find_pairs(manifest, progress=False), rule="grouped", seed=1)
    certificate.save(root / "split.json")
    preprocess = Preprocess(size=(32, 32))
    for name, how in {"run-1": dict(seed=1), "run-2": dict(seed=2), "control": dict(seed=1, shuffle_labels=True)}.items():
        t = train_classifier(manifest, certificate, model="neurosnake_tiny_ca", preprocess=preprocess, epochs=1, run_dir=root / name,
                             progress=False, **how)
        save_package(root / name / "model", model_name="neurosnake_tiny_ca", model_args=dict(n_classes=4),
                     classes=manifest.classes, state_dict=t.learner.model.state_dict(), preprocess=preprocess,
                     metrics=scores(t.test.probs, t.test.targets, t.test.classes), certificate_sha256=certificate.sha256,
                     run_hash=name, threshold=.8, synthetic=True, published=False)
        write_json(root / name / "parameters.json", how)
    (root / "odd/stripes").mkdir(parents=True)
    for k in range(3):
        Image.fromarray((np.indices((64, 64))[0] // (k + 2) % 2 * 255).astype(np.uint8)).save(root / f"odd/stripes/{k}.png")
    return root, manifest, certificate


@pytest.fixture(scope="module")
def reports(place):
    "Typed as a command: a page of one network with all that can be handed in, and two networks with their comparison"
    root, manifest, certificate = place
    words = ["report", str(manifest.root), "split.json", "run-1/model"]
    more = ["--masks", "raw_truth/tumour", "--strangers", "odd", "--control", "control"]
    with pytest.MonkeyPatch.context() as m:
        m.chdir(root)
        m.setitem(judging.EFFORTS, "quick", TINY)
        for out, typed in dict(one=more, two=["run-2/model"]).items():
            done = CliRunner().invoke(app, [*words, *typed, "--effort", "quick", "--output-dir", out])
            assert done.exit_code == 0, done.output
    return {k: json.loads((root / f"{k}/report.json").read_text()) for k in ("one", "two")}


def section(report, title): return next(s for s in report["sections"] if s["title"] == title)


def test_report_of_one_and_of_two(place, reports):
    "One page, then two and their comparison; every look is counted"
    root, told = place[0], reports["one"]
    titles = {s["title"] for s in told["sections"]}
    assert {"Looks at the test set", "Reporting checklist", "Doubt and abstention", "Shortcuts"} <= titles
    assert "synthetic" in told["stamps"] and (root / "one/predictions.csv").exists()
    n = "neurosnake_tiny_ca"
    assert {p.name for p in (root / "two").iterdir()} >= {f"{n}-run-1", f"{n}-run-2", "report.html", "differences.csv"}
    assert f'href="{n}-run-1/report.html"' in (root / "two/report.html").read_text()
    looked = json.loads((root / f"two/{n}-run-2/report.json").read_text())
    assert any("looked at 3 times" in s for s in looked["cannot_claim"])


def test_masks_strangers_and_a_control_are_on_the_page(place, reports):
    "What was handed in is asked about, and what was not is said to be missing"
    root, _, _ = place
    one, two = reports["one"], json.loads((root / "two/neurosnake_tiny_ca-run-1/report.json").read_text())
    def column(r, title, table, name):
        t = section(r, title)["tables"][table]
        return [row[t["columns"].index(name)] for row in t["rows"]]
    assert "stripes" in column(one, "Strangers", 0, "kind") and "stripes" not in column(two, "Strangers", 0, "kind")
    assert any("beyond chance" in c for c in section(one, "Explanations put to the test")["tables"][0]["columns"])
    control = section(one, "Negative control")
    assert "linear models trained on shuffles" in control["text"][0]
    refusal = "No control with shuffled labels was trained"
    assert not any(refusal in s for s in one["cannot_claim"]) and any(refusal in s for s in two["cannot_claim"])
    attacked = "Attacks and scanner faults"
    assert [len(section(r, attacked)["tables"][1]["rows"]) for r in (one, two)] == [7, 8], "with another network transfer is checked"


def test_several_networks_have_curves_and_costs(place, reports):
    "Parameters are counted, seconds and losses come from the logs, and what is the same for all has no front"
    both = section(reports["two"], "Comparison")
    costs = both["tables"][-1]
    assert costs["columns"] == ["model", "parameters", "training_seconds"] and len({r[1] for r in costs["rows"]}) == 1
    logs = [sum(pd.read_csv(place[0] / f"run-{k}/history.csv").seconds) for k in (1, 2)]
    assert [r[2] for r in costs["rows"]] == pytest.approx(logs, rel=1e-3)
    assert "Training loss." in [f["caption"] for f in both["figures"]] and "Score against training seconds." in [f["caption"] for f in both["figures"]]
    assert "Parameters are the same for all: no front." in both["text"] and not any("No log" in t for t in both["text"])


def test_a_wrong_control_is_refused_before_a_look(place, monkeypatch):
    "True labels, another split, another network"
    root, manifest, _ = place
    monkeypatch.chdir(root)
    monkeypatch.setattr("phoenix.cli._look", lambda *_, **__: pytest.fail("a look was spent"))
    def refused(control):
        done = CliRunner().invoke(app, ["report", str(manifest.root), "split.json", "run-1/model", "--control", control])
        assert done.exit_code == 2
        return done.output
    assert "train --shuffle-labels" in refused("run-2")
    for name, change in dict(split=dict(certificate_sha256="0"*64), net=dict(model_name="plain_tiny_none")).items():
        old = load_package(root / "control/model")
        net = create_model("plain_tiny_none", 4) if name == "net" else old.model()
        made = dict(model_name="neurosnake_tiny_ca", certificate_sha256=old.info["certificate_sha256"]) | change
        save_package(root / f"control-{name}/model", model_args=dict(n_classes=4), classes=old.classes, preprocess=old.preprocess,
                     state_dict=net.state_dict(), metrics=dict(accuracy=.25), run_hash="c", threshold=.8, synthetic=True, published=False,
                     **made)
        write_json(root / f"control-{name}/parameters.json", dict(shuffle_labels=True))
    assert "on the split that judges" in refused("control-split") and "of a network that is judged" in refused("control-net")


@pytest.fixture(scope="module")
def pages(place, reports):
    "The judge's page, the page above two networks, and a comparison over folds from the command"
    root = place[0]
    table = judging._as_out_of_fold(take_subject("a", *_of(root), place[1], place[2])).table
    classes = place[1].classes
    for name, (model, skill) in dict(snake=("neurosnake_tiny_ca", 3.), plain=("plain_tiny_none", 1.5)).items():
        noise = np.random.default_rng(int(skill)).normal(size=(len(table), 4))
        logits = pd.DataFrame(skill*np.eye(4)[table.target] + noise, columns=[f"logit {c}" for c in classes])
        t = table.drop(columns=logits.columns).assign(fold=np.arange(len(table)) % 3, group=np.arange(len(table)))
        t = t.assign(seen=[" ".join(str(j) for j in range(3) if j != f) for f in t.fold]).join(logits)
        save_out_of_fold(OutOfFold(t, classes), root / f"folds-{name}/out_of_fold.csv")
        write_json(root / f"folds-{name}/folds.json", dict(model=model, model_options={}))
        for k in range(3): shutil.copytree(root / f"run-{1 + (name == 'plain')}", root / f"folds-{name}/fold{k}", ignore=shutil.ignore_patterns("model"))
    typed = ["compare", f"snake={root}/folds-snake", f"plain={root}/folds-plain", "--output-dir", str(root / "compared"), "--json"]
    done = CliRunner().invoke(app, typed)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert "2 points" in said["verdicts"][0] and "DeLong" in said["verdicts"][1]
    assert [c["parameters"] > 0 and c["training_seconds"] > 0 for c in said["costs"]] == [True, True]
    return dict(judged=root / "one/report.html", two=root / "two/report.html", compared=root / "compared/report.html")


def _of(root):
    package = load_package(root / "run-1/model")
    return package.model(), package.classes, package.images


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", ["judged", "two", "compared"])
def test_a_report_in_a_browser(browser, pages, kind, width):
    "Nothing is wider than the screen, every picture is there with words, nothing comes from outside, nothing is complained of"
    page = browser.new_page(viewport=dict(width=width, height=900))
    said, asked = [], []
    page.on("console", lambda m: said.append(m.text))
    page.on("pageerror", lambda e: said.append(str(e)))
    page.on("request", lambda r: asked.append(r.url))
    page.goto(pages[kind].as_uri())
    if os.environ.get("PAGE_SHOTS"): page.screenshot(path=f"{os.environ['PAGE_SHOTS']}/{kind}-{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the screen"
    assert page.locator("img").count() >= 8 and page.locator("img").count() == page.locator("img[alt]:not([alt=''])").count()
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)"), "every picture is loaded"
    assert not said and all(u.startswith(("file:", "data:")) for u in asked)
    assert page.get_by_role("heading", level=1).count() == 1
    assert page.get_by_role("heading", name="What this does not show").bounding_box()["width"] <= width
    page.close()


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
