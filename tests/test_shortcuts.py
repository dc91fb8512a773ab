"Probes on what a lesson has no room for: damaged files, planted confounds in a report, controls at chance, the real set"
import io
import json

import numpy as np
import pytest
from PIL import Image

from phoenix.data.acquire import build_manifest
from phoenix.data.duplicates import find_pairs
from phoenix.data.phantom import Faults, make_phantom
from phoenix.data.shortcuts import (
    CONTROLS, control_set, encoder_features, file_parts, head_regions, image_quality, probe_encoder, probe_region,
    probe_table, region_features, run_probes)
from phoenix.data.splits import group_rows
from phoenix.evaluate.report import ReportData, shortcut_section, write_report


def encoded(kind="JPEG", mode="L", **how):
    buffer = io.BytesIO()
    Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32)).convert(mode).save(buffer, kind, **how)
    return buffer.getvalue()


@pytest.mark.parametrize("data", [encoded(), encoded(mode="RGB", progressive=True), encoded("PNG")])
def test_a_damaged_file_never_stops_the_encoder_probe(data):
    whole = encoder_features(data)
    for n in (0, 1, 2, 3, 8, 9, 12, 20, 25, 33, 40, len(data)//2):
        assert set(encoder_features(data[:n])) <= set(whole)
    g = np.random.default_rng(0)
    for _ in range(200):
        x = bytearray(data)
        for at in g.integers(0, min(len(x), 400), 3): x[at] = g.integers(256)
        try: encoder_features(bytes(x))
        except (IndexError, KeyError) as e: pytest.fail(f"{type(e).__name__} on a mutant")


def test_what_encoders_sign_with():
    rgb = {q: encoder_features(encoded(mode="RGB", quality=q)) for q in (50, 95)}
    assert rgb[50]["table 0 sum"] > rgb[95]["table 0 sum"] and rgb[50]["table 1 sum"] > rgb[95]["table 1 sum"]
    full, half = (encoder_features(encoded(mode="RGB", subsampling=s))["sampling"] for s in (0, 2))
    assert (full, half) == (0x11, 0x22)
    assert "frame C2" in encoder_features(encoded(mode="RGB", progressive=True))
    assert encoder_features(encoded(comment=b"made by x"))["FE made by x"] == 1
    assert encoder_features(encoded(optimize=True))["standard Huffman"] == 0 < encoder_features(encoded())["standard Huffman"]
    assert [n for n, _ in file_parts(encoded("PNG", dpi=(72, 72)))] == ["IHDR", "pHYs", "IDAT", "IEND"]


@pytest.mark.parametrize("shape", [(9, 9), (200, 40), (40, 200)])
@pytest.mark.parametrize("fill", ["zeros", "noise", "ramp"])
def test_regions_of_pictures_without_a_head(shape, fill):
    x = dict(zeros=np.zeros(shape), noise=np.random.default_rng(0).integers(0, 256, shape),
             ramp=np.linspace(0, 255, shape[0]*shape[1]).reshape(shape))[fill].astype(np.uint8)
    assert set(np.unique(head_regions(x))) <= {0, 1, 2, 3}
    assert all(np.isfinite(list(v.values())).all() for v in region_features(x).values())
    assert set(image_quality(x)) == {"snr", "contrast", "sharpness"}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    at = tmp_path_factory.mktemp("clean")/"set"
    make_phantom(at, patients=40, slices=2, size=64, seed=3)
    return build_manifest(at, progress=False)


def test_a_phantom_without_a_confound_stays_at_chance(clean):
    for p in run_probes(clean):
        assert p.interval[0] <= p.chance <= p.interval[1] and not p.red, p


def planted(folder, **faults):
    make_phantom(folder, patients=40, slices=2, size=64, seed=3, faults=Faults(**faults))
    return folder


def test_planted_confounds_are_found_each_by_its_probe(tmp_path):
    border = probe_table(run_probes(build_manifest(planted(tmp_path/"b", border_shortcut=True), progress=False),
                                    targets=("tumour",))).set_index("name")
    assert border.accuracy["4-pixel border"] >= .99 and border.red["4-pixel border"]
    assert not border.red[["size, mode, format", "encoder", "skull"]].any()
    for p in planted(tmp_path/"e").rglob("*.png"):
        if "no_tumor" in str(p): Image.open(p).save(p, dpi=(72, 72))
    program = probe_encoder(build_manifest(tmp_path/"e", progress=False))
    assert program.accuracy >= .99 and program.red


def test_a_planted_background_turns_the_report_red(tmp_path):
    for p in planted(tmp_path/"h").rglob("*.png"):
        if "no_tumor" in str(p): continue
        x = np.asarray(Image.open(p)).astype(int)
        where = np.asarray(Image.fromarray(head_regions(x.astype(np.uint8))).resize((64, 64), Image.Resampling.NEAREST))
        inner = np.pad(np.ones((56, 56), bool), 4)
        Image.fromarray(np.where((where == 1) & inner, np.minimum(x + 12, 255), x).astype(np.uint8)).save(p)
    found = probe_region(build_manifest(tmp_path/"h", progress=False), "background")
    assert found.accuracy >= .99 and found.red
    page = write_report(tmp_path/"report.html", ReportData("Set", sections=[shortcut_section(probe_table([found]))]))
    said = json.loads(page.with_suffix(".json").read_text())
    assert said["red"] is True and "Background alone names the tumour in 100.0 %" in said["sections"][0]["alarms"][0]
    html = page.read_text()
    assert html.index('class="alarm"') < html.index("<main>"), "the alarm stands above everything else"


def test_a_clean_set_leaves_the_report_as_it_is(clean, tmp_path):
    section = shortcut_section(probe_table(run_probes(clean, targets=("tumour",))))
    page = write_report(tmp_path/"report.html", ReportData("Set", sections=[section]))
    assert json.loads(page.with_suffix(".json").read_text())["red"] is False
    assert 'class="alarm"' not in page.read_text()


def test_controls_leave_what_they_say(clean, tmp_path):
    from sklearn.ensemble import ExtraTreesClassifier
    from phoenix.data.pixels import read_pixels
    from phoenix.evaluate.statistics import chance_band
    groups = clean.table.patient.to_numpy()
    test = np.isin(groups, sorted(set(groups))[::3])
    for kind in CONTROLS:
        m = control_set(clean, tmp_path/kind, kind, side=24)
        assert m.table.label.tolist() == clean.table.label.tolist() and m.table.patient.tolist() == groups.tolist()
        x = np.stack([read_pixels(m.root/p).grey.ravel() for p in m.table.path])
        y = m.table.label.to_numpy()
        guess = ExtraTreesClassifier(50, random_state=0).fit(x[~test], y[~test]).predict(x[test])
        shares = np.unique(y[test], return_counts=True)[1]/test.sum()
        if kind != "histogram": assert (guess == y[test]).mean() in chance_band(len(set(groups[test])), 4, shares=shares)
    assert len({x.tobytes() for x in np.sort(x, axis=1)}) == 1


@pytest.mark.data
def test_size_and_encoder_tell_the_popular_sets_classes(real_data):
    m = build_manifest(real_data/"sartajbhuvaji", progress=False)
    groups = group_rows(m, find_pairs(m, progress=False))
    found = {p.name: p for p in run_probes(m, split="Training", targets=("tumour",), groups=groups)}
    assert found["size, mode, format"].accuracy >= .93 and found["encoder"].accuracy >= .96
    assert all(p.red for p in found.values())
