"Splits and certificates: every way to tamper is named, the verifier is other code, the same split in every process"
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

from phoenix.data.acquire import build_manifest
from phoenix.data.duplicates import find_pairs
from phoenix.data.phantom import Faults, make_phantom
from phoenix.data.splits import (Certificate, SplitError, certify, drop_crossings, group_rows, make_split, prove,
                                 split_column, split_folds, split_grouped, split_published, verify_certificate)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    "Three sets of the same pictures (with patients, plain class folders, with folds), their manifests and pairs"
    base = tmp_path_factory.mktemp("splits")
    make_phantom(base / "patients", patients=24, slices=2, size=64, faults=Faults(byte_copies=2, mirrored=2, turned=2))
    for name in ("plain", "folds"):
        shutil.copytree(base / "patients", base / name)
        (base / name / "truth.json").unlink()
        (base / name / "manifest.csv").unlink()
    table = pd.read_csv(base / "patients/manifest.csv")
    number = {p: 1 + i % 4 for i, p in enumerate(sorted(set(table.patient)))}
    table.assign(fold=table.patient.map(number))[["file", "label", "fold"]].to_csv(base / "folds/manifest.csv", index=False)
    out = {}
    for name in ("patients", "plain", "folds"):
        manifest = build_manifest(base / name, progress=False)
        out[name] = manifest, find_pairs(manifest, progress=False)
    return out


@pytest.fixture
def certified(made):
    manifest, pairs = made["patients"]
    return manifest, pairs, make_split(manifest, pairs)


def copy_of(manifest, tmp_path):
    "A copy of a set that may be spoilt"
    return shutil.copytree(manifest.root, tmp_path / "set")


def reasons(cert, root, word):
    "The reasons of a refusal, which must hold a word"
    done = verify_certificate(cert, root)
    assert not done.ok and not done
    assert any(word in r for r in done.reasons), done.reasons
    return done.reasons


def forge(manifest, assignment, **changes):
    "A certificate by somebody who hides every duplicate and signs anew"
    blind = pd.DataFrame(columns=["a", "b", "kind", "distance", "view", "score", "confirmed"]).astype({"confirmed": bool})
    return replace(certify(manifest, blind, assignment, "mine"), **changes)


def test_untouched_sets_verify(made):
    for name, rule in (("patients", "grouped"), ("plain", "grouped"), ("patients", "published"), ("folds", "author")):
        manifest, pairs = made[name]
        cert = make_split(manifest, pairs, rule=rule)
        done = verify_certificate(cert, manifest.root)
        assert done.ok, done.reasons
        assert done.counts["edges_across"] == cert.proof["edges_across"]
        assert (cert.proof["edges_across"] > 0) == (rule == "published")


def test_a_moved_file(made, tmp_path):
    manifest, pairs = made["plain"]
    cert, root = make_split(manifest, pairs), copy_of(manifest, tmp_path)
    path = cert.paths("train")[0]
    other = path.replace("Training", "Testing").replace("image_", "moved_")
    (root / path).rename(root / other)
    assert reasons(cert, root, "is missing")[0].startswith(other.split("/")[0])
    reasons(cert, root, f"{path} is missing")
    reasons(cert, root, f"{other} is new")


def test_a_moved_file_of_a_set_with_a_table(certified, tmp_path):
    manifest, _, cert = certified
    root = copy_of(manifest, tmp_path)
    path = cert.paths("train")[0]
    (root / path).rename(root / "elsewhere.png")
    reasons(cert, root, f"{path} is missing")


def test_a_changed_byte(certified, tmp_path):
    manifest, _, cert = certified
    root, path = copy_of(manifest, tmp_path), cert.paths("test")[0]
    data = bytearray((root / path).read_bytes())
    data[len(data) // 2] ^= 1
    (root / path).write_bytes(data)
    reasons(cert, root, f"{path} has other bytes")


def test_a_changed_byte_that_still_decodes(made, tmp_path):
    root = copy_of(made["plain"][0], tmp_path)
    for path in (root / "Training/glioma").iterdir():
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    manifest = build_manifest(root, progress=False)
    cert = make_split(manifest, find_pairs(manifest, progress=False))
    path = next(p for p in sorted(cert.files) if p.endswith("bmp"))
    data = bytearray((root / path).read_bytes())
    data[-1] ^= 1
    (root / path).write_bytes(data)
    reasons(cert, root, f"{path} has other bytes")


def test_an_edited_json(certified, tmp_path):
    manifest, _, cert = certified
    file = cert.save(tmp_path / "split.json")
    text = file.read_text()
    path = cert.paths("test")[0]
    for old, new in ((f'"{path}": "test"', f'"{path}": "train"'), ('"certified"', '"published"'), ('"seed": 42', '"seed": 43')):
        file.write_text(text.replace(old, new, 1))
        assert file.read_text() != text
        reasons(file, manifest.root, "sha256 does not fit")
    for broken in ("{}", "[]"):
        file.write_text(broken)
        reasons(file, manifest.root, "fields of a split certificate")
    file.write_text(text[:1000])
    assert not verify_certificate(file, manifest.root)


def test_an_edited_and_newly_signed_assignment(certified):
    manifest, _, cert = certified
    path = cert.paths("test")[0]
    edited = replace(cert, assignment=cert.assignment | {path: "train"})
    assert edited.sha256 != cert.sha256
    for word in ("one group stands on two sides", "counts of the certificate", "where rule 'grouped' puts them"):
        found = reasons(edited, manifest.root, word)
    members = sorted(p for p, g in cert.groups.items() if g == cert.groups[path])
    told = ", ".join(f"{p} ({edited.assignment[p]})" for p in members[:6])
    assert f"one group stands on two sides: {told}" in found and f"1 files are not where rule 'grouped' puts them, first {path}" in found


def test_whole_groups_exchanged(certified):
    manifest, _, cert = certified
    swap = dict(train="test", test="train")
    edited = replace(cert, assignment={p: swap.get(s, s) for p, s in cert.assignment.items()},
                     counts={swap.get(s, s): c for s, c in cert.counts.items()})
    moved = sorted(p for p, s in cert.assignment.items() if s in swap)
    assert reasons(edited, manifest.root, "where rule") == [f"{len(moved)} files are not where rule 'grouped' puts them, first {moved[0]}"]


def test_groups_torn_and_joined_in_one_number(certified):
    manifest, _, cert = certified
    sizes = pd.Series(cert.groups).value_counts()
    torn, (one, other) = sizes.index[0], sizes.index[-2:]
    first = min(p for p, g in cert.groups.items() if g == torn)
    groups = {p: one if g == other else g for p, g in cert.groups.items()} | {first: other}
    assert len(set(groups.values())) == len(sizes)
    reasons(replace(cert, groups=groups), manifest.root, "not the components")


def test_more_crossings_than_are_listed(made, tmp_path):
    root, files = tmp_path / "many", sorted(made["plain"][0].root.rglob("*.png"))
    unlike = {im.tobytes(): im for im in map(Image.open, files)}
    for side in ("Training", "Testing"):
        (root / side / "glioma").mkdir(parents=True)
        for i, im in enumerate(list(unlike.values())[:24]): im.save(root / side / f"glioma/{i}.png")
    manifest = build_manifest(root, progress=False)
    found = reasons(forge(manifest, split_published(manifest)), root, "more pairs of pictures")
    said = [r for r in found if r.startswith("the same picture")]
    assert len(said) == 20 and len(set(said)) == 20
    across = prove(manifest, find_pairs(manifest, progress=False), split_published(manifest))["edges_across"]
    assert found[-1] == f"and {across - 20} more pairs of pictures stand on two sides"


@pytest.mark.parametrize("changes,word", [
    (dict(edges=[]), "not the components"),
    (dict(kind="published"), "does not go with rule"),
    (dict(left_out={"Training/glioma/image_0000.png": "x"}), "neither or both"),
    (dict(manifest_sha256="0" * 64), "another sha256")])
def test_edited_and_newly_signed_fields(certified, changes, word):
    manifest, _, cert = certified
    reasons(replace(cert, **changes), manifest.root, word)
    for groups in ({p: i for i, p in enumerate(cert.groups)}, dict.fromkeys(cert.groups, 0)):
        reasons(replace(cert, groups=groups), manifest.root, "not the components")


def test_hidden_edges_do_not_hide_pictures(made):
    manifest, pairs = made["plain"]
    side = split_published(manifest)
    cert = forge(manifest, side)
    assert cert.kind == "certified" and cert.proof["edges_across"] == 0
    found = reasons(cert, manifest.root, "the same picture stands on two sides")
    true = prove(manifest, pairs, side)["edges_across"]
    assert len(found) == min(true, 20) + (true > 20)


def test_a_weak_search_of_the_certificate_does_not_weaken_the_verifier(made, tmp_path):
    manifest, pairs = made["plain"]
    cert, root = make_split(manifest, pairs), copy_of(manifest, tmp_path)
    source, target = next(p for p in cert.paths("train") if p.endswith("png")), cert.paths("test")[0]
    grey = np.asarray(Image.open(root / source)).astype(float)
    for slope in np.arange(.05, .8, .05): # a gradient over the picture, ever steeper
        Image.fromarray((grey * np.linspace(1, 1 - slope, len(grey))[:, None]).astype(np.uint8)).save(root / target, "PNG")
        spoilt = build_manifest(root, source=manifest.source, progress=False)
        near = find_pairs(spoilt, progress=False)
        near = near[(near.a == min(source, target)) & (near.b == max(source, target)) & near.confirmed & (near.distance > 0)]
        if len(near): break
    assert len(near)
    weak = forge(spoilt, pd.Series(cert.assignment))
    weak = replace(weak, parameters=weak.parameters | dict(hamming=0, correlation=.9999))
    reasons(weak, root, f"stands on two sides: {min(source, target)}")


@pytest.mark.parametrize("change", [ImageOps.mirror, ImageOps.invert, lambda im: im.rotate(90), lambda im: im.resize((90, 90))])
def test_a_planted_copy_is_seen_by_the_verifier(made, tmp_path, change):
    manifest, pairs = made["plain"]
    cert, root = make_split(manifest, pairs), copy_of(manifest, tmp_path)
    source, target = next(p for p in cert.paths("train") if p.endswith("png")), cert.paths("test")[0]
    change(Image.open(root / source)).save(root / target, "PNG")
    spoilt = build_manifest(root, source=manifest.source, progress=False)
    forged = forge(spoilt, pd.Series(cert.assignment))
    reasons(forged, root, f"stands on two sides: {min(source, target)}")


def test_a_swapped_fold(made, tmp_path):
    manifest, pairs = made["folds"]
    cert, root = make_split(manifest, pairs, rule="author"), copy_of(manifest, tmp_path)
    table = pd.read_csv(root / "manifest.csv")
    one, other = (table.index[table.fold == k][0] for k in (1, 4))
    table.loc[[one, other], "fold"] = [4, 1]
    table.to_csv(root / "manifest.csv", index=False)
    reasons(cert, root, f"{table.file[one]} has label and fold")


def test_the_command_says_whose_word_the_folds_are(made, tmp_path):
    from phoenix.cli import split_make
    root = copy_of(made["folds"][0], tmp_path)
    said = {r: split_make(root, tmp_path / "split.json", rule=r).data["patients"] for r in ("author", "pictures")}
    assert "their authors' word" in said["author"] and "see --patients" in said["pictures"]


def test_no_validation_folds_means_none(made):
    "An empty choice trains on all that is not tested; without a choice the last of them validates"
    manifest, pairs = made["folds"]
    usual, without = (make_split(manifest, pairs, rule="author", **kw) for kw in ({}, dict(valid_folds=())))
    assert usual.paths("valid") and not without.paths("valid") and without.parameters["valid_folds"] == []
    assert set(without.paths("train")) >= {*usual.paths("train"), *usual.paths("valid")}
    assert verify_certificate(without, manifest.root).ok


def test_a_swapped_fold_in_the_certificate(made):
    manifest, pairs = made["folds"]
    cert = make_split(manifest, pairs, rule="author")
    fold = {p: f[2] for p, f in cert.files.items()}
    a, b = (next(p for p in cert.assignment if fold[p] == k) for k in (1, 4))
    edited = replace(cert, assignment=cert.assignment | {a: "test", b: "train"})
    for word in ("fold 1 stands on two sides: test, train", "where rule 'column' puts them"): reasons(edited, manifest.root, word)


def test_a_changed_label_and_a_changed_patient(certified, tmp_path):
    manifest, _, cert = certified
    root = copy_of(manifest, tmp_path)
    table = pd.read_csv(root / "manifest.csv", dtype=str)
    table.assign(patient=["p9999", *table.patient[1:]]).to_csv(root / "manifest.csv", index=False)
    for r in reasons(cert, root, "patients or sources were changed"): assert "p9999" not in r
    table.assign(label=[{"glioma": "no_tumor"}.get(table.label[0], "glioma"), *table.label[1:]]).to_csv(root / "manifest.csv", index=False)
    reasons(cert, root, "has label and fold")


def test_no_folder_and_no_picture(certified, tmp_path):
    _, _, cert = certified
    assert not verify_certificate(cert, tmp_path / "nowhere").ok
    (tmp_path / "empty").mkdir()
    assert not verify_certificate(cert, tmp_path / "empty").ok


def test_a_set_may_be_renamed_and_moved(certified, tmp_path):
    manifest, _, cert = certified
    assert verify_certificate(cert, shutil.copytree(manifest.root, tmp_path / "another name")).ok


def test_the_verifier_uses_nothing_of_the_search(certified, monkeypatch):
    manifest, _, cert = certified
    def never(*a, **k): raise AssertionError("the verifier called the search")
    from phoenix.data import duplicates, hashes, search
    for module, names in ((hashes, ("phash", "view_hashes", "thumbnail_hashes", "_low", "_pack", "turn", "thumbnail", "hamming_search")),
                          (search, ("near_pairs", "near_queries", "_search")),
                          (duplicates, ("find_pairs", "scan", "correlation", "turn", "thumbnail", "signatures", "near_queries"))):
        for name in names: monkeypatch.setattr(module, name, never)
    assert verify_certificate(cert, manifest.root).ok


def test_no_path_and_no_patient_in_the_file(certified, tmp_path):
    manifest, _, cert = certified
    text = cert.save(tmp_path / "split.json").read_text()
    assert str(manifest.root) not in text and str(tmp_path) not in text and os.path.expanduser("~") + "/" not in text
    for patient in set(manifest.table.patient) - {""}: assert patient not in text
    assert not any(p.startswith("/") for p in json.loads(text)["files"])
    assert Certificate.load(tmp_path / "split.json") == cert


def test_row_order_changes_nothing(made):
    manifest, pairs = made["patients"]
    mixed = type(manifest)(manifest.root, manifest.table.sample(frac=1, random_state=1), manifest.source, manifest.synthetic)
    again = make_split(mixed, pairs.sample(frac=1, random_state=2))
    first = make_split(manifest, pairs)
    assert sorted(map(tuple, again.edges)) == sorted(map(tuple, first.edges))
    assert replace(again, edges=first.edges).sha256 == first.sha256
    pd.testing.assert_series_equal(split_folds(mixed, group_rows(mixed, pairs)), split_folds(manifest, group_rows(manifest, pairs)))


def test_the_same_certificate_in_every_process(certified):
    manifest, _, cert = certified
    code = ("import sys; from phoenix.data.acquire import build_manifest; from phoenix.data.duplicates import find_pairs; "
            "from phoenix.data.splits import make_split; m = build_manifest(sys.argv[1], progress=False); "
            "c = make_split(m, find_pairs(m, progress=False)); assert 'torch' not in sys.modules; print(c.sha256)")
    for seed in ("1", "2"):
        out = subprocess.run([sys.executable, "-c", code, str(manifest.root)], env=dict(os.environ, PYTHONHASHSEED=seed),
                             capture_output=True, text=True, check=True)
        assert out.stdout.strip() == cert.sha256


def test_proportions_of_many_random_sets():
    from phoenix.data.splits import _deal
    for k in range(20):
        rng = np.random.Generator(np.random.Philox(k))
        counts = np.zeros((rng.integers(60, 200), 4), dtype=int)
        counts[np.arange(len(counts)), np.arange(len(counts)) % 4] = rng.integers(1, 9, len(counts))
        counts[:5] += rng.integers(0, 3, (5, 4))
        table = np.concatenate([counts, counts.sum(axis=1, keepdims=True)], axis=1)
        side = _deal(table, (.7, .15, .15), np.argsort(-table[:, -1], kind="stable"))
        whole = counts.sum(axis=0) / counts.sum()
        for s, share in enumerate((.7, .15, .15)):
            part = counts[side == s]
            assert abs(part.sum() / counts.sum() - share) < .02
            assert np.abs(part.sum(axis=0) / part.sum() - whole).max() < .05


def test_dropping_keeps_every_test_row(made):
    manifest, pairs = made["folds"]
    column = split_column(manifest)
    with pytest.raises(SplitError, match="groups_across"): certify(manifest, pairs, column, "column")
    kept, dropped = drop_crossings(manifest, pairs, column)
    assert len(dropped) and (kept == "test").sum() == (column == "test").sum()
    cert = certify(manifest, pairs, kept, "column", dict(test_folds=[4], valid_folds=[3]))
    assert set(cert.left_out) == set(dropped.path)
    for r in dropped.itertuples(): assert cert.left_out[r.path].endswith(f"({r.twin_side})")


def test_folds_are_kept_whole_where_patients_are_unknown(made):
    manifest, pairs = made["folds"]
    groups = group_rows(manifest, pairs)
    fold = manifest.table.set_index("path").fold[groups.index]
    assert (groups.groupby(fold).nunique() == 1).all()
    with pytest.raises(SplitError, match="groups or more"): split_grouped(manifest, groups)
    mixed = split_grouped(manifest, pd.Series(range(len(groups)), index=groups.index))
    with pytest.raises(SplitError, match="folds_across"): certify(manifest, pairs.assign(confirmed=False), mixed, "mine")


def test_bad_assignments_are_refused(certified):
    manifest, pairs, cert = certified
    side = pd.Series(cert.assignment)
    with pytest.raises(SplitError, match="strange files"):
        certify(manifest, pairs, pd.concat([side, pd.Series({"none.png": "train"})]), "mine")
    whole = pd.Series(group_rows(manifest, pairs)).loc[side.index]
    group = whole[whole == whole.value_counts().index[0]].index.sort_values()
    assert len(group) > 2
    torn = side.where(side.index != group[-1], "else")
    with pytest.raises(SplitError, match=f"for example {group[0]} .{side[group[0]]}. with {group[-1]} .else.;"):
        certify(manifest, pairs, torn, "mine")
    with pytest.raises(SplitError, match="two or more sides"): certify(manifest, pairs, side.map(lambda s: "a"), "mine")
    with pytest.raises(SplitError, match="files of the manifest"): split_grouped(manifest, pd.Series({"none.png": 0}))
    with pytest.raises(SplitError, match="at least 2 folds"): split_folds(manifest, group_rows(manifest, pairs), 1)
    with pytest.raises(SplitError, match="between 0 and 1"): split_published(manifest, valid=1)


@pytest.mark.data
def test_sartaj_certified_and_published(real_data):
    manifest = build_manifest(real_data / "sartajbhuvaji", progress=False)
    pairs = find_pairs(manifest, progress=False)
    for rule, across in (("grouped", 0), ("published", None)):
        cert = make_split(manifest, pairs, rule=rule)
        start = time.process_time()
        done = verify_certificate(cert, manifest.root)
        assert time.process_time() - start < 100 # processor seconds; 60 s of two cores
        assert done.ok, done.reasons
        assert done.counts["edges_across"] == (cert.proof["edges_across"] if across is None else 0)
    labels = manifest.table.set_index("path").label
    side = pd.Series(make_split(manifest, pairs).assignment)
    share = pd.crosstab(side, labels[side.index], normalize="index")
    assert (share - labels.value_counts(normalize=True)).abs().max(axis=None) < .05


@pytest.mark.data
def test_clean4_folds_are_crossed_and_repaired(real_data):
    manifest = build_manifest(real_data / "clean4", progress=False)
    pairs = find_pairs(manifest, progress=False)
    table = manifest.table.set_index("path")
    sure = pairs[pairs.confirmed]
    crossing = sure[sure.a.map(table.fold) != sure.b.map(table.fold)]
    assert sorted(crossing.a.map(table.label).value_counts().to_dict().items()) == [("glioma", 1), ("no_tumor", 24)]
    cert = make_split(manifest, pairs, rule="author")
    assert all(cert.proof[k] == 0 for k in cert.proof if k.endswith("_across"))
    assert len(cert.left_out) and len(cert.paths("test")) == (table.fold == 4).sum()
    done = verify_certificate(cert, manifest.root)
    assert done.ok, done.reasons
