"From volumes to a raw folder that acquire reads, by patient, whole or not at all, and the command that does it"
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

import phoenix.data.slices as module
from phoenix.cli import app
from phoenix.data.acquire import build_manifest
from phoenix.data.pixels import PixelError, read_pixels
from phoenix.data.slices import SliceError, export_slices, png16, slices_of
from phoenix.data.volumes import VolumeError, make_volume, read_nifti, take_slice
from phoenix.settings import PhoenixError

R, A, S = np.mgrid[-36:37:3., -45:46:3., -36:37:6.]
HEAD = ((R / 30) ** 2 + (A / 40) ** 2 + (S / 33) ** 2 < 1) * (400 + 2 * A)
GRID = np.array([[3., 0, 0, -36], [0, 3, 0, -45], [0, 0, 6, -36], [0, 0, 0, 1]])
SALT = "a secret of the tests, 0123456789"


def volume(path, add=0, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.rint(np.where(HEAD > 0, HEAD + add, 0)).astype("int16") if data is None else data, GRID), path)


@pytest.fixture
def source(tmp_path):
    for k, name in enumerate(("glioma/Anna01_visit1", "glioma/Anna01_visit2", "healthy/Bert02_visit1", "healthy/Carl03_visit1")):
        volume(tmp_path / f"in/{name}.nii.gz", k)
    return tmp_path / "in"


def tree(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_acquire_reads_the_folder_as_it_is(source, tmp_path):
    made = export_slices(source, tmp_path / "out", patient=r"[A-Z][a-z]+\d+", n=4)
    m = build_manifest(tmp_path / "out", progress=False)
    assert (made.volumes, made.patients, made.slices) == (4, 3, {"glioma": 8, "healthy": 8})
    assert len(m.readable) == len(m.table) == 16 and m.classes == ["glioma", "no_tumor"] and not m.leftovers and m.has_patients
    t = m.table
    assert t.patient.nunique() == 3 and t.series.nunique() == 4 and set(t.plane) == {"axial"} and set(t.bits) == {16}
    assert t.groupby("series").patient.nunique().max() == 1 and t.groupby("patient").series.nunique().max() == 2
    words = " ".join([*map(str, t.values.ravel()), *tree(tmp_path / "out")])
    assert not any(w in words for w in ("Anna", "Bert", "Carl", "visit"))


def test_the_pixels_are_the_voxels(source, tmp_path):
    export_slices(source, tmp_path / "out", plane="axial")
    t = build_manifest(tmp_path / "out", progress=False).table
    v = {x.data.sum(): x for x in (read_nifti(p) for p in source.rglob("*.nii.gz"))}
    for _, rows in t.groupby("series"):
        best = [x for x in v.values() if all(np.array_equal(read_pixels(tmp_path / "out" / r.path).grey, take_slice(x, "axial", int(r.slice_index)))
                                             for r in rows.itertuples())]
        assert len(best) == 1
        assert all(float(r.slice_mm) == -36 + 6 * int(r.slice_index) for r in rows.itertuples())


def test_the_same_twice_and_under_a_secret(source, tmp_path):
    for name in "ab": export_slices(source, tmp_path / name, n=2)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    export_slices(source, tmp_path / "c", n=2, salt=SALT, patient=r"[A-Z][a-z]+\d+")
    shutil.rmtree(source / "healthy")
    export_slices(source, tmp_path / "d", n=2, salt=SALT, patient=r"[A-Z][a-z]+\d+")
    c, d = (build_manifest(tmp_path / x, progress=False).table for x in "cd")
    assert set(d.patient) < set(c.patient) and len(set(d.patient)) == 1
    with pytest.raises(PhoenixError, match="16 bytes"): export_slices(source, tmp_path / "e", salt="short")
    assert not (tmp_path / "e").exists()


def test_pixels_are_made_square_and_floats_keep_their_scale(tmp_path):
    volume(tmp_path / "in/x/a.nii", data=(HEAD / 7 - 3).astype("float32"))
    export_slices(tmp_path / "in", tmp_path / "out", plane="coronal", n=3)
    t = build_manifest(tmp_path / "out", progress=False).table
    assert set(t.pixel_mm) == {"3.0"} and set(zip(t.width, t.height)) == {(25, 26)}
    v = read_nifti(tmp_path / "in/x/a.nii")
    x = next(slices_of(v, "coronal", indices=[int(t.slice_index[0])]))
    back = read_pixels(tmp_path / "out" / t.path[0]).grey * float(t.scale[0]) + float(t.offset[0])
    np.testing.assert_allclose(back, x.image, atol=float(t.scale[0]))


@pytest.mark.parametrize(("change", "said"), [
    (lambda s: (s / "glioma/Anna01_visit1.nii.gz").write_bytes(b"\x1f\x8b cut"), "NIfTI file 1 of 4"),
    (lambda s: shutil.copy(s / "glioma/Anna01_visit1.nii.gz", s / "healthy/Dora.nii.gz"), "is a copy"),
    (lambda s: volume(s / "loose.nii.gz"), "lies in none"),
    (lambda s: shutil.rmtree(s / "glioma") or shutil.rmtree(s / "healthy"), "this has none")])
def test_a_bad_source_leaves_nothing(source, tmp_path, change, said):
    change(source)
    with pytest.raises(SliceError, match=said) as e: export_slices(source, tmp_path / "out")
    assert not any(w in str(e.value) for w in ("Anna", "Dora"))
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_an_interrupt_leaves_nothing(source, tmp_path, monkeypatch):
    calls = []
    def stop(path, data):
        calls.append(path)
        if len(calls) == 5: raise KeyboardInterrupt
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    monkeypatch.setattr(module, "write_bytes", stop)
    with pytest.raises(KeyboardInterrupt): export_slices(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_an_occupied_folder_is_not_touched(source, tmp_path):
    (tmp_path / "out").mkdir()
    export_slices(source, tmp_path / "out", n=1)
    before = tree(tmp_path / "out")
    with pytest.raises(SliceError, match="occupied"): export_slices(source, tmp_path / "out", n=2)
    assert tree(tmp_path / "out") == before
    for wrong in (dict(plane="oblique"), dict(labels="mask"), dict(labels="guess"), dict(mask="x"), dict(patient="no match")):
        with pytest.raises(SliceError): export_slices(source, tmp_path / "new", **wrong)
    with pytest.raises(SliceError, match="asked for"): list(slices_of(make_volume(HEAD, GRID), n=99))
    with pytest.raises(SliceError): export_slices(tmp_path / "nowhere", tmp_path / "new")
    black = make_volume(np.zeros((9, 9, 9)), GRID)
    assert not list(slices_of(black)) and read_pixels(png16(black.data[0])).grey.max() == 0


def test_labels_by_mask(tmp_path):
    for k in range(2):
        volume(tmp_path / f"in/p{k}_T1.nii.gz", k)
        volume(tmp_path / f"in/p{k}_mask.nii.gz", data=((np.hypot(R - 9, A) < 10) & (abs(S) < 7)).astype("uint8"))
    made = export_slices(tmp_path / "in", tmp_path / "out", labels="mask", mask="T1=mask")
    assert made.slices["tumor"] == 6 and made.slices["no_tumor"] > 6 and made.patients == 2
    t = build_manifest(tmp_path / "out", progress=False).table
    assert set(t[t.label == "tumor"].slice_mm) == {"-6.0", "0.0", "6.0"}
    made = export_slices(tmp_path / "in", tmp_path / "big", labels="mask", mask="T1=mask", least_mm2=1e4)
    assert "tumor" not in made.slices and made.left_out["mask too small to say"] == 6
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), "uint8"), GRID), tmp_path / "in/p1_mask.nii.gz")
    with pytest.raises(SliceError, match="shape of its volume"): export_slices(tmp_path / "in", tmp_path / "x", labels="mask", mask="T1=mask")


def test_dicom_series_and_the_command(tmp_path):
    pytest.importorskip("pydicom")
    from test_dicom import dataset, saved
    stored = np.rint(HEAD).astype("uint16")
    for series, patient, add in (("1.2.3.1", "MRN-1", 0), ("1.2.3.2", "MRN-1", 1), ("1.2.3.3", "MRN-2", 2)):
        for k in range(stored.shape[2]):
            raw = saved(dataset(np.where(stored[:, :, k].T > 0, stored[:, :, k].T + add, 0).astype("uint16"), position=(0, 0, 6 * k), PixelSpacing=[3, 3],
                                SeriesInstanceUID=series, PatientID=patient))
            folder = tmp_path / "in/glioma"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"IM{hash((series, k)) % 10 ** 9}").write_bytes(raw)
    (tmp_path / "salt").write_text(SALT + "\n")
    args = ["data", "slices", str(tmp_path / "in"), "--output-dir", str(tmp_path / "out"), "--per-volume", "3", "--salt-file", str(tmp_path / "salt"), "--json"]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["volumes"], said["patients"], said["slices"]) == (3, 2, {"glioma": 9})
    t = build_manifest(tmp_path / "out", progress=False).table
    assert sorted(t.groupby("patient").series.nunique()) == [1, 2] and set(t.patient.str.len()) == {17}
    assert b"MRN" not in b"".join(tree(tmp_path / "out").values()) and CliRunner().invoke(app, args).exit_code == 2
    again = CliRunner().invoke(app, [*args[:4], str(tmp_path / "numbered"), "--plane", "sagittal", "--per-volume", "1"])
    assert again.exit_code == 0 and "9 slices" not in again.output and "glioma  3" in again.output
    assert set(build_manifest(tmp_path / "numbered", progress=False).table.patient) == {"p0001", "p0002"}
    missing = CliRunner().invoke(app, [*args[:4], str(tmp_path / "none"), "--salt-file", str(tmp_path / "nowhere")])
    assert missing.exit_code == 2 and "openssl" in missing.output
    with pytest.raises(PixelError, match="phoenix data slices"): read_pixels(next((tmp_path / "in/glioma").iterdir()))


@pytest.mark.data
def test_pgbm_becomes_slices_of_two_patients(real_data, tmp_path):
    if not (real_data / "pgbm").is_dir(): pytest.skip("pgbm is absent")
    made = export_slices(real_data / "pgbm", tmp_path / "out", labels="mask", mask="Scan_T1=Mask", patient=r"^\d+", n=3)
    t = build_manifest(tmp_path / "out", progress=False).table
    assert (made.volumes, made.patients) == (4, 2) and made.slices == {"no_tumor": 12, "tumor": 12}
    assert t.patient.nunique() == 2 and set(t.label) == {"tumor", "no_tumor"} and set(t.bits) == {16}
    assert any("spacing may be lost" in d for d in made.doubts)
    with pytest.raises(VolumeError): read_nifti(tmp_path / "out/manifest.csv")
