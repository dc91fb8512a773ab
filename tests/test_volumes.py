"Volumes in every order, files cut and altered at every byte, headers that lie, and real heads the right way round"
import gzip
import tracemalloc
from itertools import permutations, product

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest

from phoenix.data.volumes import (VOLUME_KINDS, VolumeError, choose_slices, index_at, make_volume, nearest_axes, plot_planes,
                                  read_nifti, stack_slices, take_slice)
from phoenix.keys import rng
from phoenix.settings import PhoenixError

PLACE = np.arange(5 * 4 * 3, dtype="int16").reshape(5, 4, 3)
HOME = np.array([[1.5, 0, 0, -20], [0, 2, 0, 7], [0, 0, 4, 30], [0, 0, 0, 1.]])


def nifti(data=PLACE, affine=HOME, kind=nib.Nifti1Image, codes=(1, 1), **fields):
    "A file in memory, header fields overwritten at the end"
    im = kind(data, affine)
    im.set_sform(affine, codes[0])
    im.set_qform(affine, codes[1])
    raw, n = bytearray(im.to_bytes()), im.header.sizeof_hdr
    head = type(im.header)(bytes(raw[:n]), check=False)
    for k, x in fields.items(): head[k] = x
    return head.binaryblock + bytes(raw[n:])


def turned(angles):
    "A rotation about the three axes, degrees"
    out = np.eye(3)
    for k, angle in enumerate(np.radians(angles)):
        i, j = [a for a in range(3) if a != k]
        r = np.eye(3)
        r[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        out = r @ out
    return out


ORDERS = [(o, g) for o in permutations(range(3)) for g in product((1, -1), repeat=3)]


@pytest.mark.parametrize("angles", [(0, 0, 0), (12, -7, 20)], ids=["straight", "oblique"])
def test_all_48_orders_read_the_same(angles):
    home = HOME.copy()
    home[:3, :3] = turned(angles) @ home[:3, :3]
    for order, signs in ORDERS:
        data = PLACE.transpose(order)[tuple(slice(None, None, g) for g in signs)]
        a = home[:, [*order, 3]] * [*signs, 1]
        a[:3, 3] = home[:3, 3] + sum(home[:3, o] * (PLACE.shape[o] - 1) for o, g in zip(order, signs) if g < 0)
        v = read_nifti(nifti(np.ascontiguousarray(data), a))
        np.testing.assert_array_equal(v.data, PLACE)
        np.testing.assert_allclose(v.affine, home, atol=1e-4)
        np.testing.assert_allclose(v.spacing_mm, (1.5, 2, 4), rtol=1e-5)
        assert v.facts["stored_axes"] == "".join(nib.aff2axcodes(a))


def test_any_rotation_agrees_with_nibabel():
    "Two ways to choose the nearest axes, the same answer wherever each axis has one clear neighbour"
    draw, clear = rng(5, "rotations"), 0
    for _ in range(300):
        q, r = np.linalg.qr(draw.normal(size=(3, 3)))
        a = np.eye(4)
        a[:3, :3] = q * draw.uniform(.4, 6, 3)
        top = np.sort(np.abs(q), axis=0)
        if (top[2] - top[1]).min() < .1 or sorted(np.abs(q).argmax(0)) != [0, 1, 2]: continue
        clear += 1
        v = make_volume(PLACE, a)
        witness = nib.as_closest_canonical(nib.Nifti1Image(PLACE, a))
        np.testing.assert_array_equal(v.data, witness.get_fdata())
        np.testing.assert_allclose(v.affine, witness.affine, atol=1e-6)
    assert clear > 100


def test_a_voxel_keeps_its_place():
    a = np.eye(4)
    a[:3, :3] = turned((100, 40, -130)) * [2, 1, 3]
    v = make_volume(PLACE, a)
    order, signs = nearest_axes(a)
    for index in np.ndindex(PLACE.shape):
        new = [index[s] if g > 0 else PLACE.shape[s] - 1 - index[s] for s, g in zip(order, signs)]
        assert v.data[tuple(new)] == PLACE[index]
        np.testing.assert_allclose(v.affine @ [*new, 1], a @ [*index, 1], atol=1e-9)


def refusal(data, **k):
    "Kind of the refusal, or None"
    try: read_nifti(data, **k)
    except VolumeError as e:
        assert e.kind in VOLUME_KINDS and str(e)
        return e.kind


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_every_prefix_is_refused(kind):
    whole = nifti(kind=kind)
    assert refusal(whole) is None
    kinds = {refusal(whole[:n]) for n in range(len(whole))}
    assert None not in kinds and kinds <= {"empty", "truncated", "not_a_volume"}
    packed = gzip.compress(whole, mtime=0)
    kinds = {refusal(packed[:n]) for n in range(len(packed))}
    assert None not in kinds and kinds <= {"empty", "truncated", "corrupt", "not_a_volume"}


def test_every_altered_byte_of_a_gzip_is_refused_or_harmless():
    packed, refused = gzip.compress(nifti(), mtime=0), 0
    for k in range(len(packed)):
        bad = bytearray(packed)
        bad[k] ^= 1 << k % 8
        try: v = read_nifti(bytes(bad))
        except VolumeError: refused += 1
        else: np.testing.assert_array_equal(v.data, PLACE)
    assert refused > len(packed) - 12


def test_fuzzed_headers_end_in_a_volume_or_a_typed_refusal():
    draw, good = rng(3, "fuzz"), nifti(np.stack([PLACE, PLACE], 3))
    for k in range(600):
        bad = bytearray(good)
        for at in draw.integers(0, 352, int(draw.integers(1, 6))): bad[at] = int(draw.integers(0, 256))
        refusal(bytes(bad), frame=1)
        if k % 6 == 0: refusal(gzip.compress(bytes(bad), 1), frame=1)


def test_a_claim_takes_no_memory():
    head = nifti(dim=[3, 600, 600, 600, 1, 1, 1, 1])
    tracemalloc.start()
    for data in (head, gzip.compress(head)):
        with pytest.raises(VolumeError, match="can't with") as e: read_nifti(data)
        assert e.value.kind == "truncated"
    assert refusal(nifti(dim=[3, 30000, 30000, 30000, 1, 1, 1, 1])) == "too_large"
    assert refusal(nifti(kind=nib.Nifti2Image, dim=[3, 2 ** 40, 2 ** 40, 2, 1, 1, 1, 1])) == "too_large"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6, f"{peak / 1e6:.0f} MB for a header"
    assert refusal(nifti(), max_megavoxels=5e-5) == "too_large"


def test_what_follows_the_voxels():
    assert refusal(gzip.compress(nifti() + bytes(5000))) is None
    assert refusal(gzip.compress(nifti() + bytes(17 << 20), 1)) == "too_large"


@pytest.mark.parametrize(("fields", "kind"), [
    (dict(srow_x=[np.nan] * 4), "geometry"), (dict(srow_x=[0, 0, 0, 0]), "geometry"), (dict(quatern_b=7), "geometry"),
    (dict(pixdim=[1, 1.5, 2, 0, 0, 0, 0, 0]), "geometry"), (dict(pixdim=[1, 1.5, 2, 8, 0, 0, 0, 0]), "orientation"),
    (dict(xyzt_units=7), "corrupt"), (dict(datatype=2000), "corrupt"), (dict(datatype=1792), "unsupported"),
    (dict(scl_slope=2, scl_inter=np.inf), "corrupt"), (dict(vox_offset=0), "corrupt"), (dict(vox_offset=1e9), "corrupt"),
    (dict(scl_slope=1e38), "non_finite"), (dict(dim=[3, 0, 4, 3, 1, 1, 1, 1]), "corrupt"), (dict(dim=[9, 5, 4, 3, 1, 1, 1, 1]), "corrupt"),
    (dict(magic=b"ni1"), "unsupported"), (dict(magic=b""), "unsupported"), (dict(sform_code=0, qform_code=0), "orientation")])
def test_headers_that_cannot_be(fields, kind):
    assert refusal(nifti(**fields)) == kind


def test_trust_settles_a_contradiction():
    bad = nifti(pixdim=[1, 1.5, 2, 8, 0, 0, 0, 0])
    assert read_nifti(bad, trust="sform").spacing_mm == (1.5, 2, 4) and read_nifti(bad, trust="qform").spacing_mm == (1.5, 2, 8)
    assert "guess" in read_nifti(nifti(codes=(0, 0)), trust="pixdim").doubts[0]
    assert refusal(nifti(codes=(1, 0)), trust="qform") == "orientation" and refusal(nifti(), trust="me") == "orientation"
    assert read_nifti(nifti(codes=(0, 1))).facts["form"] == "qform"


def test_types_scaling_and_byte_order():
    for kind in ("u1", "i2", "u2", "i4", "u4", "f4", "f8", "i8"):
        for end in "<>":
            im = nib.Nifti1Image(PLACE.astype(kind), HOME, dtype=np.dtype(kind))
            if end == ">": im = nib.Nifti1Image(PLACE.astype(kind), HOME, im.header.as_byteswapped(">"), dtype=np.dtype(kind))
            im.header["scl_slope"], im.header["scl_inter"] = np.nan, np.nan
            np.testing.assert_array_equal(read_nifti(im.to_bytes()).data, PLACE)
    v = read_nifti(nifti(scl_slope=.5, scl_inter=-3))
    np.testing.assert_array_equal(v.data, PLACE * .5 - 3)
    assert (v.facts["slope"], v.facts["intercept"]) == (.5, -3)


def test_units_are_millimetres():
    assert read_nifti(nifti(affine=HOME * [[.001], [.001], [.001], [1]], xyzt_units=1)).spacing_mm == pytest.approx((1.5, 2, 4))
    assert read_nifti(nifti(affine=HOME * [[1000], [1000], [1000], [1]], xyzt_units=3)).spacing_mm == pytest.approx((1.5, 2, 4))
    assert refusal(nifti(affine=HOME * [[.001], [.001], [.001], [1]], xyzt_units=2)) == "geometry"


def test_frames_by_index(tmp_path):
    four = nifti(np.stack([PLACE + 100 * k for k in range(4)], 3))
    for data in (four, gzip.compress(four)):
        for k in range(4): np.testing.assert_array_equal(read_nifti(data, frame=k).data, PLACE + 100 * k)
        assert refusal(data) == refusal(data, frame=4) == refusal(data, frame=-1) == "frames"
    np.testing.assert_array_equal(read_nifti(nifti(PLACE[..., None])).data, PLACE)


def test_frames_that_are_not_wanted_take_no_memory():
    packed = gzip.compress(nifti(np.zeros((80, 80, 80, 60), "int8")), 1)
    tracemalloc.start()
    v = read_nifti(packed, frame=55)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert v.shape == (80, 80, 80) and peak < 22e6, f"{peak / 1e6:.0f} MB for half a megabyte of voxels"


def test_no_message_names_the_file(tmp_path):
    for name, data in (("Schmidt_Anna.nii", b""), ("Schmidt_Anna.nii.gz", nifti()[:200]), ("x_Schmidt.nii", b"text" * 200)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(VolumeError) as e: read_nifti(tmp_path / name)
        assert "Schmidt" not in str(e.value)
    with pytest.raises(VolumeError, match="regular file"): read_nifti(tmp_path)
    v = read_nifti(nifti(descrip=b"Schmidt Anna", db_name=b"Schmidt", intent_name=b"Schmidt"))
    assert "Schmidt" not in repr(v) + repr(v.facts)


def test_slices_do_not_depend_on_how_the_volume_was_stored():
    for order, signs in ORDERS[::7]:
        data = PLACE.transpose(order)[tuple(slice(None, None, g) for g in signs)]
        a = HOME[:, [*order, 3]] * [*signs, 1]
        v = make_volume(data, a)
        top_left = take_slice(v, "axial", 1)[0, 0]
        assert top_left == PLACE[-1, -1, 1], "right is at the left and the front is up"
        assert take_slice(v, "axial", 1, view="neurological")[0, 0] == PLACE[0, -1, 1]
        assert take_slice(v, "coronal", 2)[0, 0] == PLACE[-1, 2, -1] and take_slice(v, "sagittal", 3)[0, 0] == PLACE[3, -1, -1]


def test_wrong_questions_are_refused():
    v = make_volume(PLACE, HOME)
    for ask in (lambda: choose_slices(v, "axial", 2, by="mask"), lambda: choose_slices(v, "axial", 0), lambda: index_at(v, "axial", 1e3),
                lambda: stack_slices(v, "axial", 7), lambda: stack_slices(v, "axial", 0, edge="zero"), lambda: take_slice(v, "axial", 0, view="mine"),
                lambda: choose_slices(v, "axial", 1, mask=make_volume(PLACE[:4], HOME)), lambda: make_volume(PLACE[0], HOME),
                lambda: make_volume(PLACE.astype("complex64"), HOME), lambda: make_volume(PLACE, np.eye(3))):
        with pytest.raises(PhoenixError): ask()


def test_a_picture_has_true_proportions():
    wide = np.diag([1., 1, 6, 1])
    v = make_volume(np.zeros((30, 40, 5)) + np.arange(5), wide)
    for view, sides in (("radiological", "RL"), ("neurological", "LR")):
        ax = plot_planes(v, view=view)
        ax.figure.canvas.draw()
        axial, coronal, sagittal = ax.child_axes
        assert [t.get_text() for t in axial.texts[:2]] == list(sides) and [t.get_text() for t in sagittal.texts[:2]] == ["A", "P"]
        box = coronal.get_window_extent()
        assert box.width / box.height == pytest.approx(30 / 30, rel=.03)
        assert (axial.get_xlim()[0] > axial.get_xlim()[1]) == (view == "radiological")
        plt.close(ax.figure)


SCANS = ["heads/MNI152_T1_2mm", "heads/openms_patient01_study1_T1W", "heads/openms_patient03_study2_T1W", "pgbm/01/Pre_Scan_T1", "pgbm/02/Post_Scan_T1"]
MASKS = {"MNI152_T1_2mm": "MNI152_T1_2mm_Brain_Mask", "T1W": "brainmask"}


@pytest.mark.data
@pytest.mark.parametrize("name", SCANS)
def test_real_scans_as_nibabel_turns_them(real_data, name):
    path = real_data / f"{name}.nii.gz"
    if not path.is_file(): pytest.skip(f"{name} is absent")
    v, witness = read_nifti(path), nib.as_closest_canonical(nib.load(path))
    np.testing.assert_array_equal(v.data, witness.get_fdata().astype("float32"))
    np.testing.assert_allclose(v.affine, witness.affine, atol=1e-5)
    np.testing.assert_allclose(v.spacing_mm, nib.affines.voxel_sizes(witness.affine), atol=1e-5)


@pytest.mark.data
@pytest.mark.parametrize("name", SCANS[:3])
def test_the_face_is_in_front_and_below(real_data, name):
    "Anatomy as the witness: what is head and no brain (face, jaw, neck) lies in front of the brain's middle and below it"
    path = real_data / f"{name}.nii.gz"
    if not path.is_file(): pytest.skip(f"{name} is absent")
    old, new = next((o, n) for o, n in MASKS.items() if o in name)
    v, brain = read_nifti(path), read_nifti(real_data / f"{name.replace(old, new)}.nii.gz")
    assert v.shape == brain.shape
    inside = brain.data > .5
    lower = np.arange(v.shape[2]) < np.argwhere(inside)[:, 2].mean()
    head = (v.data > np.percentile(v.data, 99) * .15) & ~inside & lower
    where = lambda m: (np.argwhere(m) @ v.affine[:3, :3].T + v.affine[:3, 3]).mean(0)
    other, own = where(head), where(inside)
    assert other[1] > own[1] + 3 and other[2] < own[2] - 15, (other, own)
    assert abs(other[0] - own[0]) < 12
