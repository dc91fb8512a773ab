"Thumbnails and hashes are Pillow's and imagehash's, value for value; flat pictures and EXIF turns"
import imagehash
import numpy as np
import pytest
from PIL import Image

from phoenix.data import hashes, pixels
from phoenix.data.acquire import build_manifest
from phoenix.data.audit import audit
from phoenix.data.duplicates import find_pairs, look_at, scan, signatures
from phoenix.data.hashes import VIEWS, _plan, hash_files, hash_thumbnails, is_flat, phash, thumbnail, turn, view_hashes
from phoenix.data.overlap import union
from phoenix.data.phantom import make_phantom, phantom_slice
from phoenix.data.splits import make_split, verify_certificate
from phoenix.keys import rng

FILTERS = ((32, Image.Resampling.LANCZOS), (64, Image.Resampling.BILINEAR), (32, Image.Resampling.BOX))


def pictures(n):
    "Square pictures of every temper: noise, edges that overshoot, a gradient, few levels, nearly black"
    g = rng(0, "test.hashes", index=n)
    noise = g.integers(0, 256, (n, n)).astype(np.uint8)
    ramp = np.add.outer(np.arange(n), np.arange(n))*255//(2*n - 2)
    return [noise, noise//128*255, ramp.astype(np.uint8), noise//64*80, (noise > 250).astype(np.uint8), noise//2 + 127,
            np.kron(noise[:n//16, :n//16]//128*255, np.ones((16, 16), np.uint8))]


@pytest.mark.parametrize("n", [256, 288, 512, 640])
@pytest.mark.parametrize("side,method", FILTERS[:2])
def test_planned_thumbnails_are_pillows(n, side, method):
    assert _plan(n, side, method), "the plan must hold for this Pillow, else thumbnails are slow"
    for grey in pictures(n):
        assert (thumbnail(grey, side, method) == np.asarray(Image.fromarray(grey).resize((side, side), method))).all()


@pytest.mark.parametrize("shape", [(512, 511), (300, 300), (31, 33), (1, 900), (255, 255), (256, 1024)])
def test_other_thumbnails_are_left_to_pillow(shape):
    grey = rng(0, "test.hashes").integers(0, 256, shape).astype(np.uint8)
    for side, method in FILTERS:
        assert (thumbnail(grey, side, method) == np.asarray(Image.fromarray(grey).resize((side, side), method))).all()


def test_a_pillow_that_rounds_otherwise_is_not_imitated(monkeypatch):
    "A plan that does not give this Pillow's values is not used"
    true = hashes._weights
    monkeypatch.setattr(hashes, "_weights", lambda *a: np.round(true(*a)*2**10)*2.**-10)
    _plan.cache_clear()
    try:
        assert _plan(512, 32, Image.Resampling.LANCZOS) is None
        grey = pictures(512)[0]
        assert (thumbnail(grey, 32) == np.asarray(Image.fromarray(grey).resize((32, 32), Image.Resampling.LANCZOS))).all()
    finally: _plan.cache_clear()


def test_sixteen_bits_are_hashed_after_the_stretch():
    deep = (pictures(256)[2].astype(np.uint16) << 4) + 100
    assert (thumbnail(deep, 32) == thumbnail(((deep - deep.min())*(255/np.ptp(deep)) + .5).astype(np.uint8), 32)).all()


def test_files_are_hashed_as_imagehash_does(tmp_path):
    files = []
    for k, grey in enumerate([*pictures(256)[:3], phantom_slice("glioma", 1, 2, size=512).image, pictures(512)[0][:200]]):
        for mode, kind in (("L", "jpg"), ("RGB", "jpg"), ("RGB", "png")):
            files.append(tmp_path / f"{k}{mode}.{kind}")
            Image.fromarray(grey).convert(mode).save(files[-1])
    found, again = hash_files(files, progress=False), hash_files(iter(files), workers=1, progress=False)
    assert [f"{h:016x}" for h in found.hashes[:, 0].tolist()] == [str(imagehash.phash(Image.open(f))) for f in files]
    assert (found.hashes == again.hashes).all() and found.sha256 == again.sha256 and not found.problems
    manifest = {r.path: r.sha256 for r in build_manifest(folder_of(files, tmp_path / "set"), progress=False).table.itertuples()}
    assert [manifest[f"yes/{f.name}"] for f in files] == list(found.sha256)


def folder_of(files, root):
    "The files as one class folder"
    (root / "yes").mkdir(parents=True)
    for f in files: (root / "yes" / f.name).write_bytes(f.read_bytes())
    return root


@pytest.mark.data
def test_real_files_are_hashed_as_imagehash_does(real_data):
    files = sorted((real_data / "sartajbhuvaji/Testing").rglob("*.jpg"))[::3]
    found = hash_files(files, progress=False)
    assert [f"{h:016x}" for h in found.hashes[:, 0].tolist()] == [str(imagehash.phash(Image.open(f))) for f in files]
    assert not found.flat.any()


def test_flat_pictures_are_flagged_and_others_are_not():
    flat = [np.full((64, 64), v, np.uint8) for v in (0, 1, 128, 255)] + [np.tile(np.arange(64, dtype=np.uint8)*3, (64, 1))]
    shown = [phantom_slice(label, p, 1).image for label in ("glioma", "no_tumor") for p in range(4)] + pictures(64)[:1]
    small = np.stack([thumbnail(x, 32) for x in flat + shown])
    hashed, flags = hash_thumbnails(small, block=3)
    assert flags.tolist() == [True]*5 + [False]*9 == is_flat(small).tolist()
    assert len(set(hashed[1:4, 0].tolist())) == 1, "constant pictures hash alike"
    assert (hashed == np.stack([view_hashes(x) for x in flat + shown])).all()
    assert [h.shape for h in hash_thumbnails(small[:0])] == [(0, 16), (0,)]


def test_flat_pictures_join_nothing(tmp_path):
    for k in range(40): Image.fromarray(np.full((60 + k, 64), 5*k, np.uint8)).save(folder(tmp_path) / f"{k:02}.png")
    Image.fromarray(phantom_slice("glioma", 1, 2).image).save(folder(tmp_path) / "head.png")
    manifest = scan(tmp_path, progress=False)
    assert len(manifest.looks) == 41
    assert not len(find_pairs(manifest, progress=False))


def folder(root):
    (root / "yes").mkdir(exist_ok=True)
    return root / "yes"


@pytest.mark.parametrize("tag", range(2, 9))
def test_a_copy_that_an_exif_tag_turns_is_found(tmp_path, tag):
    head, other = (phantom_slice("glioma", p, 2).image for p in (1, 3))
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.fromarray(head).save(folder(tmp_path) / "a.png")
    Image.fromarray(other).save(folder(tmp_path) / "b.png")
    Image.fromarray(head).save(tmp_path / "yes/tagged.jpg", quality=92, exif=exif)
    manifest = build_manifest(tmp_path, progress=False)
    pairs = find_pairs(manifest, progress=False)
    sure = pairs[pairs.confirmed]
    assert list(zip(sure.a, sure.b)) == [("yes/a.png", "yes/tagged.jpg")]
    shown = {2: "mirror", 3: "rot180", 4: "mirror rot180", 6: "rot270", 8: "rot90"}
    assert sure.view.iloc[0] == shown[tag] if tag in shown else "mirror rot" in sure.view.iloc[0]
    tagged = hash_files([tmp_path / "yes/tagged.jpg"], progress=False).hashes[0, 0]
    best = np.ascontiguousarray(turn(head, sure.view.iloc[0]))
    assert np.bitwise_count(tagged ^ phash(best)) <= 2


def test_one_pass_is_two_passes(tmp_path):
    for k, label in enumerate(("glioma", "no_tumor")):
        Image.fromarray(phantom_slice(label, k, 2).image).save(folder(tmp_path) / f"{k}.png")
        Image.fromarray(phantom_slice(label, k, 2).image).save(folder(tmp_path) / f"{k}.bmp")
    (tmp_path / "yes/broken.png").write_text("<html>")
    manifest, plain = scan(tmp_path, progress=False), build_manifest(tmp_path, progress=False)
    marks, two = (signatures(m, progress=False) for m in (manifest, plain))
    assert manifest.table.equals(plain.table) and marks.paths == two.paths and len(marks) == 2
    assert (marks.hashes == two.hashes).all() and (marks.thumbs == two.thumbs).all()
    assert len(VIEWS) == marks.hashes.shape[1]


@pytest.fixture
def decoded(monkeypatch):
    "How many pictures were decoded since it was last emptied"
    seen, decode = [], pixels._decode
    monkeypatch.setattr(pixels, "_decode", lambda *a: seen.append(1) or decode(*a))
    return seen


def times(decoded):
    "The count, and begin anew"
    n = len(decoded)
    decoded.clear()
    return n


@pytest.mark.parametrize("depth", ["fast", "thorough"])
def test_a_job_decodes_each_file_once_and_its_verifier_once(tmp_path, decoded, depth):
    make_phantom(tmp_path / "set", patients=16, slices=2, size=64)
    times(decoded)
    manifest = scan(tmp_path / "set", depth=depth, progress=False)
    audit(manifest)
    certificate = make_split(manifest, find_pairs(manifest, depth=depth, progress=False), fractions=(.6, 0, .4))
    assert times(decoded) == len(manifest.table) == 32
    assert verify_certificate(certificate, tmp_path / "set").ok and times(decoded) == 32


def test_a_folder_that_is_acquired_is_decoded_once(tmp_path, decoded):
    options = dict(patients=6, slices=2, size=64, progress=False)
    first = scan("phantom", tmp_path / "set", **options)
    assert times(decoded) == len(first.looks) == 12
    again = scan("phantom", tmp_path / "set", **options)
    assert len(find_pairs(again, progress=False)) == len(find_pairs(first, progress=False)) and times(decoded) == 12


def test_looks_that_do_not_go_deep_enough_are_made_anew(tmp_path, decoded):
    make_phantom(tmp_path / "set", patients=6, slices=2, size=64)
    plain = build_manifest(tmp_path / "set", look=np.mean, progress=False)
    shallow = build_manifest(tmp_path / "set", look=look_at("fast"), progress=False)
    times(decoded)
    want = signatures(plain, depth="thorough", progress=False)
    assert times(decoded) == 12 == len(want.portraits)
    shallow.looks.pop(shallow.table.pixels_sha256[0])
    assert (signatures(shallow, progress=False).hashes == want.hashes).all() and times(decoded) == 1
    assert len(signatures(shallow, depth="thorough", progress=False).portraits) == 12 == times(decoded)


def test_a_union_keeps_what_was_seen_of_its_sets(tmp_path, decoded):
    for k, name in enumerate(("one", "two")): make_phantom(tmp_path / name, patients=4, slices=2, size=64, seed=k)
    sets = {name: scan(tmp_path / name, progress=False) for name in ("one", "two")}
    whole = union(sets, tmp_path / "both")
    times(decoded)
    find_pairs(whole, progress=False)
    assert times(decoded) == 0
