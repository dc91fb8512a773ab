"Duplicates on whole sets: the counts of FINDINGS, time, order, views, and no other randomness"
import io
import time

import imagehash
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from phoenix.data.acquire import build_manifest
from phoenix.data.duplicates import DuplicateError, bonds, by_hash, byte_copies, cluster, find_pairs, label_conflicts, leak_counts, plot_doubtful, signatures, _candidates
from phoenix.data.hashes import VIEWS, hamming_search, phash, thumbnail, turn, view_hashes
from phoenix.data.phantom import Faults, make_phantom, phantom_slice
from phoenix.data.pixels import read_pixels
from phoenix.data.registration import IDENTITY, agreement, verdict
from phoenix.data.splits import SplitError, certify, verify_certificate


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


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    "Six heads in two splits; the first also cropped, framed, turned by 5° and cropped while mirrored, in the other split"
    root = tmp_path_factory.mktemp("spoilt")
    heads = [phantom_slice("glioma", p, 2, size=256).image for p in range(6)]
    for k, head in enumerate(heads): save(root, f"Training/glioma/head{k}.png", head)
    one = heads[0]
    save(root, "Testing/glioma/crop.png", one[20:250, 26:256])
    save(root, "Testing/glioma/framed.png", np.pad(one, ((30, 0), (0, 44)), constant_values=255))
    save(root, "Testing/glioma/mirrored.png", np.ascontiguousarray(one[:230, 13:243][:, ::-1]))
    save(root, "Testing/glioma/turned.png", np.asarray(Image.fromarray(one).rotate(5, Image.Resampling.BICUBIC)))
    manifest = build_manifest(root, progress=False)
    return manifest, find_pairs(manifest, progress=False), find_pairs(manifest, depth="thorough", progress=False)


def partner(pairs, name):
    "The row of head0 with a spoilt copy, and whether head0 stands first"
    row = pairs[pairs.a.str.endswith(f"{name}.png") & pairs.b.str.endswith("head0.png")]
    assert len(row) == 1
    return row.iloc[0]


def test_a_thorough_search_finds_what_no_hash_finds(spoilt):
    manifest, quick, deep = spoilt
    for name in ("crop", "framed", "mirrored", "turned"):
        row = partner(deep, name)
        assert row.confirmed and row.detail >= .94 and .5 < row.overlap <= 1
    assert not any(quick.confirmed & quick.b.str.endswith("head0.png") & quick.a.str.contains("crop|framed|mirrored"))
    sure = deep[deep.confirmed]
    assert not (sure.a.str.contains("head[1-5]") | sure.b.str.contains("head[1-5]")).any()
    assert set(deep[deep.kind == "registered"].reason) == {"registration"}


def test_the_map_of_a_pair_says_what_was_done(spoilt):
    deep = spoilt[2]
    crop, framed, mirrored, turned = (partner(deep, n) for n in ("crop", "framed", "mirrored", "turned"))
    assert abs(crop.scale - 256/230) < .02 and abs(crop.angle) < .5 and crop.view == "upright"
    assert abs(framed.scale - 256/np.sqrt(286*300)) < .02
    assert mirrored.view == "mirror" and abs(mirrored.scale - 256/230) < .02
    assert abs(turned.angle - 5) < .5 and abs(turned.scale - 1) < .02
    centre = (20 + 115 - 128)/256*100*256/230 # the middle of the window lies below the middle of the head
    assert abs(crop.shift_y + centre) < 1


def test_the_map_turns_round_with_the_names(tmp_path):
    head = phantom_slice("glioma", 0, 2, size=256).image
    for name in ("a", "z"): save(tmp_path, f"glioma/{name}.png", head)
    save(tmp_path, "glioma/m.png", np.ascontiguousarray(np.rot90(head[:230, 13:243])))
    pairs = find_pairs(build_manifest(tmp_path, progress=False), depth="thorough", progress=False)
    there, back = (pairs[(pairs.a == f"glioma/{a}.png") & (pairs.b == f"glioma/{b}.png")].iloc[0] for a, b in ("am", "mz"))
    assert (there.view, back.view) == ("rot90", "rot270")
    assert abs(there.scale - 230/256) < .02 and abs(back.scale - 256/230) < .02
    assert abs(there.shift_x) > 3 and abs(back.shift_x) < 1 and abs(back.shift_y) > 3


def test_a_picture_with_little_texture_has_no_detail():
    spot = np.zeros((128, 128), np.float32)
    spot[40:60, 40:60] = np.random.Generator(np.random.Philox(1)).integers(0, 255, (20, 20))
    seen = agreement(spot, spot, IDENTITY)
    assert seen.aligned > .999 and seen.detail == 0 and verdict(seen) == "different"


def test_leak_counts_apart_what_registration_adds(spoilt, planted):
    manifest, quick, deep = spoilt
    narrow, wide = leak_counts(manifest, quick), leak_counts(manifest, deep)
    assert {k: wide[k] for k in narrow if k != "by_class"} == {k: v for k, v in narrow.items() if k != "by_class"}
    assert narrow["confirmed"] + wide["registered"] == 4 and wide["neighbour"] == 0 and "registered" not in narrow
    manifest, _, quick = planted
    deep = find_pairs(manifest, depth="thorough", progress=False)
    same = leak_counts(manifest, deep)
    assert all(same[k] == v for k, v in leak_counts(manifest, quick).items() if k != "by_class")
    pair = lambda t: set(zip(t.a, t.b))
    assert pair(quick[quick.confirmed]) <= pair(bonds(deep)[bonds(deep).confirmed])
    assert pair(deep[by_hash(deep)]) == pair(quick[quick.confirmed])
    assert not (deep.confirmed & (deep.kind == "neighbour")).any()


def test_a_thorough_search_does_not_depend_on_order(spoilt):
    manifest, _, deep = spoilt
    shuffled = type(manifest)(manifest.root, manifest.table.sample(frac=1, random_state=3), manifest.source)
    pd.testing.assert_frame_equal(deep, find_pairs(shuffled, depth="thorough", progress=False))
    upright = find_pairs(manifest, depth="thorough", views="upright", progress=False)
    assert set(upright.view) == {"upright"} and not upright.a.str.contains("mirrored").any()


@pytest.mark.parametrize("depth", ["fast", "thorough"])
def test_pictures_without_a_head_join_nothing(tmp_path, depth):
    rng = np.random.Generator(np.random.Philox(8))
    wide = (np.arange(300)[None]*np.ones((5, 1))).astype(np.uint8)
    odd = dict(black=np.zeros((64, 64), np.uint8), black2=np.zeros((65, 64), np.uint8), grey=np.full((40, 70), 128, np.uint8), wide=wide,
               tiny=rng.integers(0, 255, (8, 8)).astype(np.uint8), tiny2=rng.integers(0, 255, (8, 8)).astype(np.uint8),
               one=np.full((1, 1), 7, np.uint8), deep=rng.integers(0, 65535, (90, 50)).astype(np.uint16),
               deep2=np.full((90, 50), 40000, np.uint16))
    for name, grey in odd.items(): save(tmp_path, f"glioma/{name}.png", grey)
    manifest = build_manifest(tmp_path, progress=False)
    pairs = find_pairs(manifest, depth=depth, progress=False)
    assert not bonds(pairs).confirmed.any()


def test_a_certificate_of_a_thorough_search_is_searched_thoroughly_again(spoilt):
    manifest, quick, deep = spoilt
    root, paths = manifest.root, pd.Series(manifest.table.path.to_numpy(), index=manifest.table.path)
    side = paths.map(lambda p: "test" if "head5" in p else "train")
    cert = certify(manifest, deep, side, "by hand")
    done = verify_certificate(cert, root)
    assert done.ok and done.counts["registered_across"] == 0, done.reasons
    leak = side.where(~side.index.str.contains("crop"), "test")
    with pytest.raises(SplitError, match="two sides"): certify(manifest, deep, leak, "by hand")
    blind = verify_certificate(certify(manifest, quick, leak, "by hand", dict(depth="thorough")), root)
    assert not blind.ok and any(r.startswith("registered pictures stand on two sides") and "crop" in r for r in blind.reasons)
    open_one = certify(manifest, deep, leak, "published")
    assert open_one.proof["registered_across"] >= 1 and verify_certificate(open_one, root).ok


def test_the_doubtful_are_those_nearest_to_the_threshold(spoilt):
    manifest, quick, deep = spoilt
    axes = plot_doubtful(manifest, deep, 1)
    nearest = deep.loc[(deep.detail - .94).abs().idxmin()]
    assert f"{nearest.detail:.3f}" in axes.child_axes[1].get_title()
    with pytest.raises(DuplicateError, match="thorough"): plot_doubtful(manifest, quick)


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


@pytest.mark.slow
@pytest.mark.data
def test_a_thorough_search_of_sartaj_keeps_the_counts(real_data):
    manifest = build_manifest(real_data / "sartajbhuvaji", progress=False)
    leak = leak_counts(manifest, find_pairs(manifest, depth="thorough", progress=False))
    assert [leak[k] for k in ("bytes", "pixels", "near", "confirmed")] == [88, 251, 262, 260]
    assert leak["registered"] > 0
