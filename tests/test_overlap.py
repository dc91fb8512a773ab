"Sets side by side: the union read from the bytes, hostile folders, and the real pair of sets of which one was made from the other"
from dataclasses import replace

import pandas as pd
import pytest

from phoenix.data.acquire import build_manifest
from phoenix.data.duplicates import find_pairs
from phoenix.data.overlap import OverlapError, compatible, conflicts, link_set, overlap_table, twins, union
from phoenix.data.phantom import make_phantom
from phoenix.data.splits import group_rows, make_split, verify_certificate


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "Two phantoms of other heads, with authors' folds and patients that are called alike"
    at, made = tmp_path_factory.mktemp("two"), {}
    for name, seed in (("left", 1), ("right", 2)):
        make_phantom(at/name, patients=16, slices=2, size=64, seed=seed)
        table = pd.read_csv(at/name/"manifest.csv").rename(columns=dict(patient="series"))
        table.assign(fold=[f"{10*(int(s[1:])//4) + 10}" for s in table.series]).to_csv(at/name/"manifest.csv", index=False)
        made[name] = build_manifest(at/name, progress=False)
    return at, made


def test_folds_and_series_of_two_sets_do_not_meet(two, tmp_path):
    _, made = two
    u = union(made, tmp_path/"u")
    assert sorted(u.table.fold.unique()) == list(range(1, 9)), "folds are numbered on"
    assert u.table.series.str.split("/").str[0].tolist() == u.table.path.str.split("/").str[0].tolist()
    groups = group_rows(u, find_pairs(u, progress=False))
    sides = groups.groupby(groups).apply(lambda g: g.index.str.split("/").str[0].nunique())
    assert sides.max() == 1, "no group joins two sets that share nothing"


def test_a_union_is_what_its_folder_holds(two, tmp_path):
    _, made = two
    u = union(made, tmp_path/"u")
    again = build_manifest(tmp_path/"u", source=u.source, progress=False)
    assert again.sha256 == u.sha256 and u.synthetic and u.source == "left + right"
    for name, m in made.items():
        mine = u.table[u.table.path.str.startswith(f"{name}/")]
        assert mine.pixels_sha256.tolist() == m.table.pixels_sha256.tolist()
        assert mine.split.tolist() == m.table.split.tolist()


def test_other_heads_share_nothing_and_a_certificate_spans_them(two, tmp_path):
    _, made = two
    u = union(made, tmp_path/"u")
    pairs = find_pairs(u, progress=False)
    table = overlap_table(u, pairs)
    assert table.twins[table.set_a != table.set_b].sum() == 0
    assert len(twins(u, pairs[:0])) == 0 and overlap_table(u, pairs[:0]).twins.sum() == 0
    assert verify_certificate(make_split(u, pairs), tmp_path/"u").ok


def test_a_link_that_leads_elsewhere_breaks_the_certificate(two, tmp_path):
    at, made = two
    u = union(made, tmp_path/"u")
    cert = make_split(u, find_pairs(u, progress=False))
    (tmp_path/"u/left").unlink()
    (tmp_path/"u/left").symlink_to(at/"right", target_is_directory=True)
    assert not verify_certificate(cert, tmp_path/"u").ok


def test_a_disk_without_links_is_said_so(two, tmp_path, monkeypatch):
    _, made = two
    def refuse(*a, **k): raise OSError(1, "Operation not permitted")
    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    with pytest.raises(OverlapError, match="takes links, got Operation not permitted"): union(made, tmp_path/"u")


@pytest.mark.parametrize("name", ["../up", "a b", "", "glioma_tumor", "Train", "no"])
def test_names_that_would_mean_something_are_refused(two, tmp_path, name):
    _, made = two
    with pytest.raises(OverlapError, match="no class and no split"):
        union({name: made["left"], "right": made["right"]}, tmp_path/"u")
    assert not (tmp_path/"u").exists()


def test_labels_of_another_grain_agree_and_kinds_do_not():
    kinds = ["glioma", "meningioma", "pituitary"]
    assert all(compatible("tumor", k) and compatible(k, "yes") and not compatible(k, "no_tumor") for k in kinds)
    assert not any(compatible(a, b) for a in kinds for b in kinds if a != b)
    assert not compatible("tumor", "no_tumor")


def test_conflicts_need_a_confirmed_pair(two):
    _, made = two
    m = made["left"]
    a, b = m.table[m.table.label == "glioma"].path.iloc[0], m.table[m.table.label == "no_tumor"].path.iloc[0]
    row = dict(a=a, b=b, kind="near", distance=0, view="upright", score=1., confirmed=True, upright=0)
    assert len(conflicts(m, pd.DataFrame([row]))) == 1
    assert len(conflicts(m, pd.DataFrame([row | dict(confirmed=False)]))) == 0
    same = replace(m, table=m.table.assign(label="tumor"))
    assert len(conflicts(same, pd.DataFrame([row]))) == 0


def test_a_table_that_names_absent_files_is_a_problem_not_a_crash(two, tmp_path):
    at, _ = two
    m = link_set(at/"left", pd.DataFrame(dict(file=["Training/no.png"], label=["yes"])), tmp_path/"s", source="mine")
    assert m.source == "mine" and m.table.problem[0].startswith("missing")


@pytest.mark.slow
@pytest.mark.data
def test_the_popular_set_was_made_from_chengs(real_data, tmp_path):
    made = {n: build_manifest(real_data/n, progress=False) for n in ("sartajbhuvaji", "clean4")}
    u = union(made, tmp_path/"u")
    pairs = find_pairs(u, progress=False)
    found = twins(u, pairs)
    split = u.table.set_index("path").split
    mine = found[(found.set_a == "sartajbhuvaji") & (found.set_b == "clean4") & (found.label != "no_tumor")]
    counts = mine.path.map(split).value_counts()
    assert counts["Training"] > 1800 and counts["Testing"] < 30, "Training's tumours are Cheng's, Testing's mostly are not"
    assert len(conflicts(u, pairs, across="within")) == 8
