"A whole report as a browser would meet it: parsed, nothing loaded from outside, nothing lost, nothing executed"
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from phoenix.evaluate.metrics import softmax
from phoenix.evaluate.report import (
    STAMPS, Headline, ReportData, calibration_section, control_section, data_section, deploy_section, evaluation_section,
    examples_section, gap_section, leak_section, limits, plain, provenance_section, render, split_section, thumbnail,
    training_section, write_report)
from phoenix.evaluate.statistics import bootstrap

EVIL = '<script>alert(1)</script>'
CLASSES = [EVIL, '"><img src=http://evil.example/x onerror=alert(2)>', "no_tumor' & co", "pituitary"]
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    "Every tag with its attributes, the text, and whether tags are balanced"

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open, self.unbalanced = [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID: self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag: self.unbalanced.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] != "style": self.text.append(data)

    def all(self, name): return [a for t, a in self.tags if t == name]


def predictions():
    g = np.random.default_rng(0)
    groups = np.repeat(np.arange(24), 4)
    targets = groups % 4
    logits = 2.*np.eye(4)[targets] + np.repeat(g.normal(size=(24, 4)), 4, axis=0) + .5*g.normal(size=(96, 4))
    return softmax(logits), targets, groups, g.integers(0, 255, (96, 32, 32)).astype(np.uint8)


@pytest.fixture(scope="module")
def data():
    probs, targets, groups, images = predictions()
    history = pd.DataFrame(dict(epoch=[0, 1], train_loss=[1.3, .9], valid_loss=[1.2, float("inf")], accuracy=[.4, np.nan]))
    table = pd.DataFrame(dict(label=np.array(CLASSES)[targets], split="Training", problem=""))
    finding = dict(kind="corrupt", severity="error", path=EVIL, message=f"{EVIL} is cut short", hint="fetch it again")
    pairs = [thumbnail(images[0], images[1], caption=EVIL, alt=EVIL)]
    sections = [
        data_section(table, pd.DataFrame([finding])),
        leak_section(dict(testing=9, by_class={EVIL: dict(bytes=3)}), gallery=pairs, text=[EVIL]),
        split_section("published", EVIL, dict(train=3), dict(edges_across=7), sha256="ab"*32, verified=False),
        training_section(history),
        evaluation_section(probs, targets, groups, CLASSES, n=200),
        calibration_section(probs, targets, groups, scaled=softmax(2*np.log(probs)), n=200),
        examples_section(images, probs, targets, CLASSES, n=3),
        gap_section((probs, targets, None), (probs, targets, groups), n=200),
        control_section(probs, targets, groups),
        deploy_section(pd.DataFrame(dict(session=[EVIL], p50_ms=[9.5])), parity=dict(ok=True), int8=dict(agreement=.99)),
        provenance_section(dict(python="3.11", packages=dict(numpy="2.4")), manifest_sha256="cd"*32)]
    headline = [Headline(EVIL, bootstrap("accuracy", probs, targets, groups, n=200), "%", EVIL), Headline("size", 5.25, "MB")]
    return ReportData(f"Report of {EVIL}", EVIL, ["synthetic", "published", EVIL], headline, sections,
                      limits(synthetic=True, published=True, patients=False, n_groups=24))


@pytest.fixture(scope="module")
def page(data): return Page(render(data))


def test_html_is_well_formed(page):
    assert not page.unbalanced and not page.open
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"] for a in page.all("a")} <= {f"#{i}" for i in ids}, "every link leads to a place on the page"


def test_nothing_is_loaded_from_outside(page, data):
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            value = attrs.get(name)
            assert value is None or value.startswith(("data:image/", "#")), f"{tag} {name}={value[:40]}"
    css = re.search(r"<style>(.*?)</style>", render(data), re.S).group(1)
    assert "url(" not in css and "@import" not in css
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "script-src" not in policy


def test_no_markup_comes_from_the_data(page):
    names = {t for t, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "form", "link"}
    assert not [a for _, a in page.tags for k in a if k.startswith("on")], "no event handler"
    assert "".join(page.text).count(EVIL) >= 8, "the hostile name is shown as text wherever it was given"


def test_accessible(page):
    assert page.all("html")[0]["lang"] == "en" and page.all("title") and len(page.all("h1")) == 1
    assert all(a.get("alt", "").strip() for a in page.all("img")) and len(page.all("img")) > 12
    levels = [int(t[1]) for t, _ in page.tags if re.fullmatch("h[1-6]", t)]
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:])), "no heading level is skipped"
    assert all(a.get("scope") for a in page.all("th"))
    assert all(a.get("aria-label") for a in page.all("table"))
    assert "width=device-width" in next(a["content"] for a in page.all("meta") if a.get("name") == "viewport")


def luminance(colour):
    colour = colour if len(colour) == 7 else "#" + "".join(2*c for c in colour[1:])
    rgb = np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)])/255
    return np.where(rgb <= .04045, rgb/12.92, ((rgb + .055)/1.055)**2.4) @ [.2126, .7152, .0722]


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + .05)/(low + .05)


def test_contrast_in_light_and_dark(data):
    css = re.search(r"<style>(.*?)</style>", render(data), re.S).group(1)
    schemes = [dict(re.findall(r"--(\w+):(#\w+)", block)) for block in re.findall(r":root\{([^}]*)\}", css)]
    assert len(schemes) == 3, "light, dark and print"
    for c in schemes:
        for front, back in (("text", "bg"), ("soft", "bg"), ("link", "bg"), ("warn", "warnbg"), ("stamp", "stampbg")):
            assert contrast(c[front], c[back]) >= 4.5, (front, back)


def test_stamps_warnings_and_limits_are_on_the_page(page):
    text = " ".join(page.text)
    for sentence in (*STAMPS.values(), "Verification from the bytes FAILED.", "outside the band of chance",
                     "Patients are unknown", "What this does not show"):
        assert sentence in text, sentence


def test_json_is_what_was_given(data, tmp_path):
    path = write_report(tmp_path, data)
    said = json.loads((tmp_path/"report.json").read_text(), parse_constant=lambda x: pytest.fail(f"{x} is not JSON"))
    assert path == tmp_path/"report.html" and said == plain(data)
    assert said["headline"][0]["value"] == plain(data.headline[0].value)
    assert said["headline"][0]["value"]["low"] == data.headline[0].value.low, "unrounded"
    confusion = next(s for s in said["sections"] if s["title"] == "Test set")["numbers"]["scores"]["confusion"]
    assert np.sum(confusion) == 96
    assert said["sections"][3]["tables"][0]["rows"][-1][3] == "inf", "a diverged loss is reported, not lost"


def test_same_data_same_bytes(data, page):
    assert render(data) == render(data)
    probs, targets, groups, _ = predictions()
    a, b = (evaluation_section(probs, targets, groups, CLASSES, n=50) for _ in range(2))
    assert plain(a) == plain(b), "figures have no time stamp and no random id"


def test_report_does_not_touch_global_state():
    import matplotlib as mpl
    import matplotlib.pyplot as plt
    probs, targets, groups, _ = predictions()
    before, figures, draws = dict(mpl.rcParams), plt.get_fignums(), np.random.get_state()[1].copy()
    evaluation_section(probs, targets, groups, CLASSES, n=50)
    assert dict(mpl.rcParams) == before and plt.get_fignums() == figures
    assert (np.random.get_state()[1] == draws).all()
