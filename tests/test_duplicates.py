"Duplicates on whole sets: the counts of FINDINGS, time, order, views, and no other randomness"
import io
import time

import imagehash
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from phoenix.data.acquire import build_manifest
from phoenix.data.duplicates import DuplicateError, byte_copies, cluster, find_pairs, label_conflicts, leak_counts, signatures, _candidates
from phoenix.data.hashes import VIEWS, hamming_search, phash, thumbnail, turn, view_hashes
from phoenix.data.phantom import Faults, make_phantom
from phoenix.data.pixels import read_pixels


def save(folder, name, grey, **options):
    "Write one picture under a class folder"
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grey).save(path, **options)
    return name


def heads(n, size=96):
    "Smooth random pictures that resemble each other no more than chance"
    rng = np.random.Generator(np.random.Philox(5))
    for _ in range(n):
        small = rng.integers(0, 256, (9, 9)).astype(np.uint8)
        yield np.asarray(Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    "A phantom with every fault, its manifest, truth and pairs"
    root = tmp_path_factory.mktemp("planted") / "set"
    truth = make_phantom(root, patients=24, slices=3, faults=Faults.some(4))
    manifest = build_manifest(root, progress=False)
    return manifest, truth, find_pairs(manifest, progress=False)


def test_hash_is_imagehash_for_every_kind_of_picture(tmp_path):
    rng = np.random.Generator(np.random.Philox(2))
    for shape in ((31, 33), (64, 64), (400, 301), (9, 200)):
        grey = rng.integers(0, 256, shape).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(np.dstack([grey] * 3)).save(buffer, "JPEG", quality=60)
        read = read_pixels(buffer.getvalue()).grey
        assert f"{int(phash(read)):016x}" == str(imagehash.phash(Image.open(buffer)))


def test_views_are_hashes_of_the_turned_thumbnail():
    for grey in heads(20):
        small = thumbnail(grey, 32)
        oracle = [int(str(imagehash.phash(Image.fromarray(np.ascontiguousarray(turn(small, v))))), 16) for v in VIEWS]
        assert [int(h) for h in view_hashes(grey)] == oracle


@pytest.mark.parametrize("view", VIEWS)
def test_each_view_is_found_and_named(tmp_path, view):
    pictures = list(heads(6))
    for i, grey in enumerate(pictures): save(tmp_path, f"glioma/a{i}.png", grey)
    save(tmp_path, "glioma/z.png", np.ascontiguousarray(turn(pictures[3], view)))
    pairs = find_pairs(build_manifest(tmp_path, progress=False), progress=False)
    sure = pairs[pairs.confirmed]
    assert list(zip(sure.a, sure.b)) == [("glioma/a3.png", "glioma/z.png")]
    assert sure.view.iloc[0] == view and sure.score.iloc[0] > .999
    assert sure.kind.iloc[0] == ("bytes" if view == "upright" else "near")


def test_direction_of_a_quarter_turn_does_not_depend_on_names(tmp_path):
    grey = next(heads(1))
    for name, picture in (("a", grey), ("z", grey), ("m", np.ascontiguousarray(np.rot90(grey)))):
        save(tmp_path, f"glioma/{name}.png", picture)
    manifest = build_manifest(tmp_path, progress=False)
    pairs = find_pairs(manifest, progress=False)
    found = {(a[-5], b[-5]): v for a, b, v in zip(pairs.a, pairs.b, pairs.view)}
    assert found == {("a", "m"): "rot90", ("a", "z"): "upright", ("m", "z"): "rot270"}
    both_ways = _candidates(signatures(manifest, progress=False), 5, "all")
    assert [VIEWS[v] for v in both_ways.view] == ["rot90"]


def test_planted_copies_and_no_two_persons(planted):
    manifest, truth, pairs = planted
    sure = set(zip(pairs.a[pairs.confirmed], pairs.b[pairs.confirmed]))
    twins = {tuple(sorted((x["file"], x["twin"]))): x for x in truth["planted"] if x["twin"]}
    assert len(twins) >= 20
    assert [x for pair, x in twins.items() if pair not in sure] == []
    person = manifest.table.set_index("path").patient.to_dict()
    person |= {x["file"]: x["same_person_as"] for x in truth["planted"] if x["same_person_as"]}
    assert [pair for pair in sure if person[pair[0]] != person[pair[1]]] == []
    assert len(label_conflicts(manifest, pairs)) >= 3


def test_bytes_and_pixels_are_told_apart(planted):
    manifest, truth, pairs = planted
    kind = {(a, b): k for a, b, k in zip(pairs.a, pairs.b, pairs.kind)}
    for x in truth["planted"]:
        if x["kind"] == "byte_copies": assert kind[tuple(sorted((x["file"], x["twin"])))] == "bytes"
    table = manifest.table.set_index("path")
    for (a, b), k in kind.items():
        same = table.sha256[a] == table.sha256[b], table.pixels_sha256[a] == table.pixels_sha256[b]
        assert same == dict(bytes=(True, True), pixels=(False, True), near=(False, False))[k]


def test_blank_pictures_join_nothing(tmp_path):
    for i in range(3): save(tmp_path, f"glioma/{i}.png", np.zeros((40, 40), np.uint8))
    save(tmp_path, "glioma/grey.png", np.full((40, 40), 90, np.uint8))
    manifest = build_manifest(tmp_path, progress=False)
    pairs = find_pairs(manifest, progress=False)
    assert (pairs.kind == "bytes").sum() == 3 and not pairs.confirmed.any()
    assert len(set(cluster(manifest.table.path, pairs).values())) == 4


def test_rows_in_any_order_give_the_same_pairs_and_clusters(planted):
    manifest, _, pairs = planted
    shuffled = type(manifest)(manifest.root, manifest.table.sample(frac=1, random_state=3), manifest.source)
    again = find_pairs(shuffled, progress=False)
    pd.testing.assert_frame_equal(pairs, again)
    assert list(zip(pairs.a, pairs.b)) == sorted(zip(pairs.a, pairs.b))
    paths = list(manifest.readable.path)
    assert cluster(paths, pairs) == cluster(paths[::-1], pairs.sample(frac=1, random_state=1))


def test_cluster_equals_another_packages_components():
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    rng = np.random.Generator(np.random.Philox(9))
    names = [f"{i:03}" for i in range(200)]
    a, b = rng.integers(0, 200, (2, 150))
    pairs = pd.DataFrame(dict(a=[names[i] for i in a], b=[names[i] for i in b], confirmed=True))
    n, label = connected_components(coo_array((np.ones(150), (a, b)), shape=(200, 200)), directed=False)
    ours = cluster(names, pairs)
    assert len(set(ours.values())) == n == len({(ours[x], k) for x, k in zip(names, label)})


def test_search_equals_brute_force_in_any_blocks():
    rng = np.random.Generator(np.random.Philox(4))
    views, targets = rng.integers(0, 2**6, (70, 3), dtype=np.uint64), rng.integers(0, 2**6, 50, dtype=np.uint64)
    brute = {(i, j, v, (int(views[i, v]) ^ int(targets[j])).bit_count()) for i in range(70) for j in range(50) for v in range(3)}
    for block in (1, 7, 512):
        found = {(int(i), int(j), v, int(d)) for a, b, v, c in hamming_search(views, targets, hamming=2, block=block)
                 for i, j, d in zip(a, b, c)}
        assert found == {x for x in brute if x[3] <= 2}


def test_too_many_pairs_are_refused(planted, monkeypatch):
    monkeypatch.setattr("phoenix.data.duplicates._MOST_PAIRS", 10)
    with pytest.raises(DuplicateError, match="at most 10 pairs"): find_pairs(planted[0], progress=False)


def test_no_files_no_pairs(tmp_path):
    save(tmp_path, "glioma/one.png", np.zeros((9, 9), np.uint8))
    (tmp_path / "glioma/one.png").write_bytes(b"broken")
    manifest = build_manifest(tmp_path, progress=False)
    pairs = find_pairs(manifest, progress=False)
    assert len(pairs) == 0 and len(signatures(manifest, progress=False)) == 0
    assert leak_counts(manifest, pairs)["confirmed"] == 0


def test_global_random_state_is_untouched(planted):
    import random
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tobytes()
    find_pairs(planted[0], progress=False)
    assert before == (random.getstate(), np.random.get_state()[1].tobytes())


@pytest.mark.data
def test_the_counts_of_sartaj(real_data):
    manifest = build_manifest(real_data / "sartajbhuvaji", progress=False)
    start = time.process_time()
    pairs = find_pairs(manifest, progress=False)
    assert time.process_time() - start < 40 # processor seconds; 20 s of two idle cores
    leak = leak_counts(manifest, pairs)
    counts = {k: leak[k] for k in ("training", "testing", "bytes", "pixels", "near", "confirmed")}
    assert counts == dict(training=2870, testing=394, bytes=88, pixels=251, near=262, confirmed=260)
    by_class = {c: (v["near"], v["testing"]) for c, v in leak["by_class"].items()}
    assert by_class == dict(glioma=(20, 100), meningioma=(110, 115), no_tumor=(105, 105), pituitary=(27, 74))
    assert byte_copies(manifest) == dict(groups=166, redundant=237)
    assert len(label_conflicts(manifest, pairs)) == 8
    upright = leak_counts(manifest, find_pairs(manifest, views="upright", hamming=4, progress=False))
    assert (upright["near"], upright["confirmed"]) == (262, 260)
