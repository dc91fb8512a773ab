"What the notebooks of bias and intensity cannot hold: volumes, threads, types, fresh processes, preprocessing as a whole"
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from phoenix.data.acquire import build_manifest
from phoenix.data.bias import BatchOptions, BiasError, N4Options, correct_batch, correct_n4, field_correlation, random_field
from phoenix.data.brain import BrainRefused, head_mask
from phoenix.data.phantom import CLASSES, make_phantom, phantom_slice
from phoenix.data.preprocess import Preprocess, PreprocessError

QUICK = N4Options(iterations=(30, 30))


def shells(shape):
    "A volume of two tissues in the ball that fills it"
    r = np.sqrt(sum(a**2 for a in np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")))
    return np.select([r < .5, r < .9], [120., 80.], 0.)


def test_n4_on_a_volume():
    u = shells((32, 36, 20))
    field = random_field(u.shape, strength=.15, index=2)
    found = correct_n4((u*field).astype(np.float32), u > 0, options=N4Options(shrink=2))
    assert found.image.shape == u.shape and field_correlation(found.field, field, u > 0) > .9
    inner = [np.std(x[u == 120])/np.mean(x[u == 120]) for x in (u*field, found.image)]
    assert inner[1] < .5*inner[0]


@pytest.mark.parametrize("dtype", (np.uint8, np.uint16, np.float32, np.int32))
def test_n4_takes_every_grey_type(dtype):
    s = phantom_slice("no_tumor", 1, 1, size=96)
    x = s.image.astype(dtype)
    found = correct_n4(x, options=QUICK)
    assert found.field.dtype == np.float32 and found.image.dtype == np.float32
    assert np.allclose(found.image*found.field, x, atol=.01)


def test_n4_keeps_the_threads_of_simpleitk():
    import SimpleITK as sitk
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(3)
    try:
        correct_n4(phantom_slice("glioma", 1, 1, size=64).image, options=QUICK)
        assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == 3
        with pytest.raises(BiasError):
            correct_n4(np.eye(64), np.eye(64) > 0, options=QUICK)
        assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == 3
    finally: sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


def test_batch_corrector_against_known_fields_and_its_own_batch():
    import torch
    some = [phantom_slice(CLASSES[k % 4], 50 + k, 1, size=160, contrast="T1-CE") for k in range(8)]
    x, m = (torch.as_tensor(np.stack(a))[:, None] for a in ([s.image for s in some], [head_mask(s.image) for s in some]))
    plain = correct_batch(x, m)[1]
    extra = np.stack([random_field((160, 160), index=k) for k in range(8)])
    both = correct_batch(x*torch.as_tensor(extra)[:, None], m)[1]
    r = [field_correlation((b/a)[0].numpy(), f, k[0].numpy()) for a, b, f, k in zip(plain, both, extra, m & (x > 0))]
    assert np.mean(r) > .9 and np.median(r) > .98, r
    assert torch.allclose(correct_batch(x[3:4], m[3:4])[1], plain[3:4], atol=1e-3)
    assert torch.allclose(correct_batch(x*3.5, m)[1], plain, atol=1e-3), "the scale of the images does not matter"
    wide = correct_batch(x[:2, :, :90], m[:2, :, :90], options=BatchOptions(order=2))[1]
    assert wide.shape == (2, 1, 90, 160) and wide.isfinite().all()


BYTES = """
import hashlib, sys
from phoenix.data.phantom import phantom_slice
from phoenix.data.preprocess import Preprocess
x = phantom_slice("glioma", 2, 1, size=120).image
for p in (Preprocess((64, 64)), Preprocess((64, 64), strip="keep", bias="n4", normalise="percentile")):
    print(p.digest, hashlib.sha256(p(x).tobytes()).hexdigest(), "torch" in sys.modules, "SimpleITK" in sys.modules)
"""


def test_same_bytes_in_fresh_processes_and_nothing_imported_before_it_is_used():
    outs = [subprocess.run([sys.executable, "-c", BYTES], env={"PYTHONHASHSEED": s}, capture_output=True, text=True,
                           timeout=120) for s in "03"]
    assert outs[0].returncode == 0, outs[0].stderr
    assert outs[0].stdout == outs[1].stdout
    plain, full = (line.split()[2:] for line in outs[0].stdout.splitlines())
    assert plain == ["False", "False"] and full == ["False", "True"]


def test_version_2_does_what_version_1_did():
    "The bytes of the default object, as version 1 made them"
    p, digest = Preprocess((96, 80)), hashlib.sha256()
    for k in range(8): digest.update(p(phantom_slice(CLASSES[k % 4], k, 1, size=150).image).tobytes())
    old = Preprocess((96, 80), version=1)
    assert old.spec() == {"size": [96, 80], "clip": 99.5, "clahe": False, "normalise": "zscore", "version": 1}
    assert digest.hexdigest() == "b192c2206f205976c10b7f51e122076e3d1f1671d1ef5bd19c922afdb5c4e4ba"
    assert (old(phantom_slice("glioma", 1, 1).image) == p(phantom_slice("glioma", 1, 1).image)).all()


def test_old_digest_is_the_published_one():
    assert Preprocess(version=1).digest == "d7a9f4b8e55cbcc593ee7a7061d2f8ab95c4048e7255fbbbfa726ce4f7641290"


@pytest.mark.parametrize("options", (dict(strip="keep"), dict(bias="n4"), dict(bias="batch"), dict(normalise="percentile"),
                                     dict(normalise="whitestripe"), dict(strip="keep", bias="batch", clahe=True)))
def test_every_option_on_odd_pictures(options):
    g = np.random.default_rng(0)
    pictures = [np.zeros((30, 40), np.uint8), np.full((30, 40), 9, np.uint16), np.full((1, 1), 7, np.uint8),
                g.integers(0, 2**16, (70, 50), dtype=np.uint16), phantom_slice("glioma", 1, 1, size=100).image]
    p = Preprocess((48, 40), **options)
    for x in pictures:
        before = x.copy()
        y = p(x)
        assert y.shape == (48, 40) and y.dtype == np.uint8 and (x == before).all()
    assert np.ptp(p(pictures[-1])) > 100
    assert Preprocess.from_spec(json.loads(json.dumps(p.spec()))) == p


def test_a_refused_slice_is_an_error_or_keeps_its_skull():
    noise = np.random.default_rng(0).integers(0, 256, (96, 96)).astype(np.uint8)
    with pytest.raises(BrainRefused): Preprocess((48, 48), strip="refuse")(noise)
    assert (Preprocess((48, 48), strip="keep")(noise) == Preprocess((48, 48))(noise)).all()


def test_landmarks_travel_and_are_asked_for():
    p = Preprocess((48, 48), strip="keep").with_nyul(phantom_slice(CLASSES[k % 4], k, 1).image for k in range(4))
    again = Preprocess.from_spec(json.loads(json.dumps(p.spec())))
    x = phantom_slice("pituitary", 9, 1).image
    assert again == p and again.digest == p.digest and (again(x) == p(x)).all()
    with pytest.raises(PreprocessError, match="only then"): Preprocess(nyul=p.nyul)


def test_processes_make_the_cache_that_threads_make(tmp_path):
    from phoenix.data.loaders import build_cache
    make_phantom(tmp_path/"raw", patients=4, size=64)
    manifest, p = build_manifest(tmp_path/"raw", progress=False), Preprocess((32, 32), bias="n4")
    one = build_cache(manifest, p, tmp_path/"a", progress=False)
    two = build_cache(manifest, p, tmp_path/"b", processes=2, progress=False)
    assert one.path.read_bytes() == two.path.read_bytes() and two.computed == len(two)
    assert build_cache(manifest, p, tmp_path/"a", processes=2, progress=False).computed == 0


def test_threads_take_turns():
    import SimpleITK as sitk
    from threading import Event, Thread
    from phoenix.data.bias import _one_thread
    count, entered, left, seen = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads, Event(), Event(), []

    def second():
        with _one_thread(sitk):
            entered.set()
            left.wait(5)
            seen.append(count())
    before, other = count(), Thread(target=second)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(3)
    try:
        with _one_thread(sitk):
            other.start()
            entered.wait(.3)
        left.set()
        other.join()
        assert seen == [1] and count() == 3
    finally: sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)
