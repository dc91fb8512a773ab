"DICOM made here: series in every order, gaps, compressed syntaxes bit for bit, hostile files, and copies searched byte by byte"
import io
import logging
import struct
import sys
import warnings
from itertools import permutations, product

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")
from PIL import Image  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.uid import (ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, MRImageStorage,  # noqa: E402
                         RLELossless)

from phoenix.data.dicom import (DICOM_KINDS, DicomError, deidentify, find_series, patient_key, read_dataset,  # noqa: E402
                                read_frames, read_series, series_key)
from phoenix.data.volumes import VOLUME_KINDS  # noqa: E402
from phoenix.keys import rng  # noqa: E402
from phoenix.settings import PhoenixError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR")  # pydicom on what the tests write, not on what phoenix reads
SALT = "a secret of the tests, 0123456789"
WAVES = (np.add.outer(np.arange(40), np.arange(48)) ** 2 % 4096).astype("uint16")


def dataset(stored=WAVES, bits=12, signed=0, position=(0, 0, 0), turn=(1, 0, 0, 0, 1, 0), **changes):
    "One MR slice"
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, MRImageStorage
    ds.SOPClassUID, ds.SOPInstanceUID = MRImageStorage, f"1.2.3.4.{abs(hash(tuple(position))) % 10 ** 9}"
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.Modality = "1.2.3.77", "1.2.3.66", "MR"
    ds.PatientName, ds.PatientID = "Mustermann^Erika", "MRN-0042"
    ds.ImagePositionPatient, ds.ImageOrientationPatient = list(map(float, position)), list(map(float, turn))
    ds.PixelSpacing, ds.SliceThickness = [2, 1.5], 5
    (ds.Rows, ds.Columns), ds.SamplesPerPixel, ds.PhotometricInterpretation = stored.shape[-2:], 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = stored.dtype.itemsize * 8, bits, bits - 1, signed
    ds.PixelData = stored.tobytes()
    for k, v in changes.items(): setattr(ds, k, v)
    return ds


def saved(ds, **k):
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.save_as(out, enforce_file_format=True, **k)
    return out.getvalue()


def slices(n=6, step=5., **changes): return [saved(dataset(WAVES + k, position=(0, 0, step * k), **changes)) for k in range(n)]


def refusal(call, *args, **k):
    "Kind of the refusal, or None"
    try: call(*args, **k)
    except DicomError as e:
        assert e.kind in DICOM_KINDS | VOLUME_KINDS and str(e)
        return e.kind


def test_order_of_files_and_instance_numbers_play_no_part():
    files = [saved(dataset(WAVES + k, position=(0, 0, 5 * k), InstanceNumber=(7 * k + 3) % 6)) for k in range(6)]
    want = read_series(files)
    for seed in range(12):
        got = read_series([files[k] for k in rng(seed, "shuffle").permutation(6)])
        np.testing.assert_array_equal(got.data, want.data)
        np.testing.assert_array_equal(got.affine, want.affine)
    assert want.data[-1, -1].tolist() == [float(WAVES[0, 0]) + k for k in range(6)]


def test_every_scan_direction_gives_one_volume():
    "A labelled volume cut along each axis, with rows and columns in each direction: 48 scans, one result"
    place, spacing = np.arange(4 * 5 * 6, dtype="uint16").reshape(4, 5, 6), np.array([1., 2, 3])
    seen = 0
    for axes, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        data = place.transpose(axes)[tuple(slice(None, None, g) for g in signs)] # (column, row, slice) in RAS steps
        steps = np.eye(3)[:, list(axes)] * signs
        corner = np.array([0 if signs[axes.index(a)] > 0 else (place.shape[a] - 1) * spacing[a] for a in range(3)])
        lps = np.diag([-1, -1, 1])
        files = [saved(dataset(np.ascontiguousarray(data[:, :, k].T), 16, position=lps @ (corner + k * spacing[axes[2]] * steps[:, 2]),
                               turn=[*(lps @ steps[:, 0]), *(lps @ steps[:, 1])],
                               PixelSpacing=[spacing[axes[1]], spacing[axes[0]]])) for k in range(data.shape[2])]
        v = read_series(files[::-1] if seen % 2 else files)
        np.testing.assert_array_equal(v.data, place)
        np.testing.assert_allclose(v.affine, np.diag([*spacing, 1]), atol=1e-9)
        seen += 1
    assert seen == 48


def test_an_oblique_series_keeps_its_spacing():
    c, s = np.cos(.3), np.sin(.3)
    turn, normal = (1, 0, 0, 0, c, s), np.array([0, -s, c])
    v = read_series([saved(dataset(position=normal * 4 * k + [9, 8, 7], turn=turn)) for k in (2, 0, 1, 3)])
    assert v.spacing_mm == pytest.approx((1.5, 2, 4)) and not v.doubts
    v = read_series([saved(dataset(position=[0, k, 4 * k])) for k in range(4)])
    assert v.doubts[0].startswith("axes lean by 14.0"), "a tilted gantry is said"


@pytest.mark.parametrize("gone", [1, 2, 3, 4])
def test_a_missing_slice_is_named(gone):
    files = slices()
    with pytest.raises(DicomError, match=f"between {5 * gone - 5:.2f} and {5 * gone + 5:.2f} mm along the normal 1 missing") as e:
        read_series(files[:gone] + files[gone + 1:])
    assert e.value.kind == "gap"


@pytest.mark.parametrize(("odd", "kind"), [
    (dict(position=(0, 0, 10)), "doubled"), (dict(position=(0, 0, 12)), "uneven"), (dict(position=(0, 0, 45)), "gap"), (dict(position=(30, 0, 30)), "uneven"),
    (dict(position=(0, 0, 30), turn=(1, 0, 0, 0, 0, 1)), "mixed"), (dict(position=(0, 0, 30), PixelSpacing=[2, 1.1]), "mixed"),
    (dict(position=(0, 0, 30), stored=WAVES[:20]), "mixed"), (dict(position=(0, 0, 30), SeriesInstanceUID="1.2.3.78"), "mixed"),
    (dict(position=(0, 0, np.nan)), "geometry"), (dict(ImagePositionPatient=None), "geometry"), (dict(turn=(1, 0, 0, 1, 0, 0)), "geometry"),
    (dict(turn=(2, 0, 0, 0, 1, 0)), "geometry"), (dict(PixelSpacing=None), "geometry"), (dict(SeriesInstanceUID=""), "mixed")])
def test_one_odd_slice_stops_the_series(odd, kind):
    assert refusal(read_series, [*slices(), saved(dataset(**odd))]) == kind


def test_a_stated_distance_that_is_not_kept_is_a_doubt():
    assert "5.00 mm apart, the file says 2.50" in read_series(slices(SpacingBetweenSlices=2.5)).doubts[0]
    assert read_series(slices(SpacingBetweenSlices=5)).doubts == ()
    assert refusal(read_series, [saved(dataset(SliceThickness=None))]) == "geometry"


def gdcm_file(raw, name, tmp_path):
    "`raw` in another transfer syntax, written by GDCM"
    gdcm = pytest.importorskip("gdcm")
    (tmp_path / "in.dcm").write_bytes(raw)
    reader = gdcm.ImageReader()
    reader.SetFileName(str(tmp_path / "in.dcm"))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, name)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(tmp_path / "out.dcm"))
    assert writer.Write()
    return (tmp_path / "out.dcm").read_bytes()


SYNTAXES = ("JPEGLosslessProcess14", "JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless", "RLELossless", "ExplicitVRBigEndian",
            "DeflatedExplicitVRLittleEndian")


@pytest.mark.parametrize("name", SYNTAXES)
@pytest.mark.parametrize(("bits", "signed"), [(12, 0), (16, 0), (8, 0), (16, 1)])
def test_lossless_syntaxes_bit_for_bit(name, bits, signed, tmp_path):
    stored = (rng(bits, name).integers(0, 2 ** bits, (40, 48)) - signed * 2 ** (bits - 1)).astype(f"{'i' if signed else 'u'}{1 if bits == 8 else 2}")
    raw = gdcm_file(saved(dataset(stored, bits, signed)), name, tmp_path)
    ds = read_dataset(raw)
    assert name.replace("Process14_1", "").replace("Process14", "")[:6].upper() in ds.file_meta.TransferSyntaxUID.keyword.upper()
    np.testing.assert_array_equal(read_frames(raw)[0], stored)
    v = read_series(raw)
    np.testing.assert_array_equal(v.data[::-1, ::-1, 0].T, stored)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_encoders_of_pydicom_and_many_frames(syntax):
    stored = np.stack([WAVES, WAVES[::-1], WAVES // 2])
    ds = dataset(stored, NumberOfFrames=3)
    ds.compress(syntax)
    np.testing.assert_array_equal(read_frames(saved(ds)), stored)
    assert refusal(read_series, saved(ds)) == "doubled", "a classic multi-frame file has one position for all"


def test_jpeg_baseline_as_pillow_decodes_it():
    smooth = (128 + 100 * np.sin(np.add.outer(np.arange(40), np.arange(48)) / 9)).astype("uint8")
    out = io.BytesIO()
    Image.fromarray(smooth).save(out, "JPEG", quality=95)
    ds = dataset(smooth, 8)
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    ds.PixelData = encapsulate([out.getvalue()])
    ds["PixelData"].VR = "OB"
    got = read_frames(saved(ds))[0]
    assert np.abs(got - np.asarray(Image.open(out))).max() <= 1 and np.abs(got - smooth).max() < 8


def test_bombs_are_refused_before_a_decoder_runs(monkeypatch, tmp_path):
    import pydicom.pixels
    monkeypatch.setattr(pydicom.pixels, "pixel_array", lambda *a, **k: pytest.fail("the decoder ran"))
    ds = dataset()
    ds.compress(JPEG2000Lossless)
    ds.Rows = 41
    assert refusal(read_frames, saved(ds)) == "corrupt"
    small = io.BytesIO()
    Image.fromarray(np.zeros((40, 48), "uint8")).save(small, "JPEG")
    data = bytearray(small.getvalue())
    at = data.index(b"\xff\xc0")
    data[at + 5:at + 9] = struct.pack(">HH", 60000, 60000)
    ds = dataset(np.zeros((40, 48), "uint8"), 8)
    ds.file_meta.TransferSyntaxUID, ds.PixelData = JPEGBaseline8Bit, encapsulate([bytes(data)])
    ds["PixelData"].VR = "OB"
    with pytest.raises(DicomError, match="announces 60000×60000"): read_frames(saved(ds))
    assert refusal(read_frames, saved(dataset(Rows=65535, Columns=65535))) == "too_large"
    assert refusal(read_frames, saved(dataset(NumberOfFrames=10 ** 6))) == "too_large"
    assert refusal(read_series, slices(), max_megavoxels=.005) == "too_large"
    (tmp_path / "large").write_bytes(saved(dataset()))
    assert refusal(read_dataset, tmp_path / "large", max_megabytes=.001) == "too_large"


def test_prefixes_and_altered_bytes_end_typed():
    ds = dataset(RescaleSlope=2, RescaleIntercept=1, WindowCenter=100, WindowWidth=50)
    data, draw = saved(ds), rng(9, "fuzz")
    head = len(data) - WAVES.nbytes
    for n in [*range(0, head, 3), *range(head, len(data), 211)]: assert refusal(read_frames, data[:n]) is not None, n
    for k in range(400):
        bad = bytearray(data)
        for at in draw.integers(128, head, int(draw.integers(1, 5))): bad[at] = int(draw.integers(0, 256))
        refusal(read_series, bytes(bad), values=("rescaled", "windowed")[k % 2])
    compressed = dataset()
    compressed.compress(RLELossless)
    data = saved(compressed)
    for n in range(len(data) - 900, len(data) - 8, 97): assert refusal(read_frames, data[:n]) is not None


@pytest.mark.parametrize(("changes", "kind"), [
    (dict(SamplesPerPixel=3), "unsupported"), (dict(PhotometricInterpretation="PALETTE COLOR"), "unsupported"), (dict(HighBit=15), "unsupported"),
    (dict(BitsAllocated=12), "unsupported"), (dict(Rows=0), "corrupt"), (dict(PixelData=b"\0\0"), "truncated"), (dict(Columns=None), "corrupt"),
    (dict(WindowCenter=1, WindowWidth=0), "corrupt")])
def test_pictures_that_cannot_be(changes, kind):
    assert refusal(read_frames, saved(dataset(**changes)), values="windowed" if "WindowWidth" in changes else "rescaled") == kind


def test_windows_and_tables():
    ds = dataset(RescaleSlope=2, RescaleIntercept=-100, WindowCenter=[1000, 5], WindowWidth=[2000, 6])
    want = np.clip((WAVES * 2. - 100 - 999.5) / 1999 + .5, 0, 1)
    np.testing.assert_allclose(read_frames(saved(ds), values="windowed")[0], want, atol=1e-6)
    ds.PhotometricInterpretation = "MONOCHROME1"
    np.testing.assert_allclose(read_frames(saved(ds), values="windowed")[0], 1 - want, atol=1e-6)
    np.testing.assert_array_equal(read_frames(saved(ds))[0], (4095. - WAVES) * 2 - 100)
    np.testing.assert_array_equal(read_frames(saved(ds), values="stored")[0], 4095. - WAVES)
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4096, 0, 16], (65535 - np.arange(4096) * 16).astype("uint16").tobytes()
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "OW"
    got = read_frames(saved(dataset(VOILUTSequence=[table])), values="windowed")[0]
    np.testing.assert_allclose(got, (65535 - WAVES * 16.) / 65535, atol=1e-6)
    signed = np.array([[-2048, -1], [0, 2047]], "int16")
    np.testing.assert_array_equal(read_frames(saved(dataset(signed, 12, 1, PhotometricInterpretation="MONOCHROME1")))[0], -1 - signed)


def test_a_folder_of_several_series(tmp_path):
    for k, raw in enumerate(slices()): (tmp_path / f"IM{(5 * k) % 6}").write_bytes(raw)
    (tmp_path / "deep").mkdir()
    for k, raw in enumerate(slices(3, SeriesInstanceUID="1.2.3.99")): (tmp_path / "deep" / f"{k}.dcm").write_bytes(raw)
    (tmp_path / "README").write_text("no picture")
    found, others = find_series(tmp_path)
    assert sorted(map(len, found.values())) == [3, 6] and others == 1
    keys = {len(v): k for k, v in found.items()}
    assert read_series(tmp_path, series=keys[6]).shape == (48, 40, 6)
    with pytest.raises(DicomError, match="has 2, asked was None") as e: read_series(tmp_path)
    assert "1.2.3" not in str(e.value) and refusal(read_series, tmp_path / "deep") is None
    assert refusal(find_series, tmp_path / "README") == "missing" and series_key(read_dataset(slices(1)[0])) == keys[6]


def named(**more):
    "A slice in which the patient stands everywhere a scanner or a hospital writes"
    ds = dataset(PatientBirthDate="19610807", PatientSex="F", PatientAge="062Y", PatientWeight=61.5, PatientAddress="Musterweg 7", OtherPatientIDs="ALT-9931",
                 AccessionNumber="ACC55501", StudyID="STU7", StudyDate="20240301", StudyTime="101112", SeriesDate="20240301", AcquisitionDateTime="20240301101112",
                 ReferringPhysicianName="Hausarzt^Hugo", OperatorsName="Assistentin^Anna", InstitutionName="Charlottenhospital", StationName="CHAR-MR1",
                 StudyDescription="Schaedel Frau Mustermann", SeriesDescription="t1 Erika", ProtocolName="Kopf/Mustermann", ImageComments="Frau M. unruhig",
                 DeviceSerialNumber="SN4711", SoftwareVersions="for MUSTERMANN", ScanOptions="ERIKA", PatientComments="kommt wieder", **more)
    inner = Dataset()
    inner.PatientName, inner.ReferencedSOPInstanceUID, inner.RequestedProcedureDescription = "Mustermann^Erika", "1.2.3.4.55555", "Kopf von Erika"
    ds.ReferencedStudySequence, ds.RequestAttributesSequence = [inner], [inner]
    content = Dataset()
    content.FrameAcquisitionDateTime, content.FrameComments, content.StackID = "20240301101112", "Erika", "ERIKA"
    ds.PerFrameFunctionalGroupsSequence = [Dataset()]
    ds.PerFrameFunctionalGroupsSequence[0].FrameContentSequence = [content]
    for tag, vr, value in (((0x29, 0x10), "LO", "ACME MUSTER"), ((0x29, 0x1001), "UN", b"Mustermann private"), ((0x6000, 0x3000), "OW", b"Mustermann!!"),
                           ((0x5000, 0x2500), "LO", "Erika curve"), ((0x40, 0x275), "LO", "Mustermann")): ds.add_new(tag, vr, value)
    ds.file_meta.SourceApplicationEntityTitle, ds.preamble = "CHARLOTTE", b"Mustermann".ljust(128, b"\0")
    return ds


SECRETS = (b"muster", b"erika", b"mrn-0042", b"19610807", b"062y", b"61.5", b"alt-9931", b"acc55501", b"stu7", b"2024", b"1011", b"hugo", b"anna", b"charlotte",
           b"char-mr", b"schaedel", b"kopf", b"unruhig", b"sn4711", b"kommt", b"acme", b"1.2.3.", b"private")


@pytest.mark.parametrize("dates", ["remove", "shift"])
def test_no_identifier_is_left_in_any_byte(dates):
    raw = saved(named())
    assert all(s in raw.lower() for s in SECRETS), "the test's own file must hold what is searched for"
    copied = deidentify(read_dataset(raw), SALT, dates=dates)
    out = copied.to_bytes().lower()
    found = [s for s in SECRETS if s in out.replace(b"1.2.840", b"")]
    assert not found or (dates == "shift" and found == [b"2024"]), found
    again = read_dataset(copied.to_bytes())
    assert again.PatientIdentityRemoved == "YES" and again.LongitudinalTemporalInformationModified == ("MODIFIED" if dates == "shift" else "REMOVED")
    assert [c.CodeValue for c in again.DeidentificationMethodCodeSequence] == ["113100", "113107"][:1 + (dates == "shift")]
    assert "unknown" in again.DeidentificationMethod[1] and copied.burned_in == "unknown"
    assert again.PatientID == patient_key(read_dataset(raw), SALT) and again.preamble == bytes(128)
    assert {"StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "PatientBirthDate", "PatientSex", "StudyID"} <= set(again.dir())
    np.testing.assert_array_equal(read_frames(again), read_frames(read_dataset(raw)))
    assert copied.actions["private"] == 2 and copied.actions["removed"] > 15


def test_the_original_is_not_changed():
    ds = named()
    before = saved(ds)
    deidentify(ds, SALT)
    assert saved(ds) == before


def test_copies_of_a_series_are_still_a_series():
    files = slices()
    copies = [deidentify(read_dataset(f), SALT).to_bytes() for f in files]
    a, b = read_series(files), read_series(copies[::-1])
    np.testing.assert_array_equal(a.data, b.data)
    np.testing.assert_array_equal(a.affine, b.affine)
    uids = [str(read_dataset(c).SOPInstanceUID) for c in copies]
    assert len(set(uids)) == 6 and all(len(u) <= 64 and u.startswith("2.25.") for u in uids)
    assert all(read_dataset(c).file_meta.MediaStorageSOPInstanceUID == u for c, u in zip(copies, uids))
    other = deidentify(read_dataset(files[0]), SALT[::-1]).dataset
    assert other.SeriesInstanceUID != read_dataset(copies[0]).SeriesInstanceUID and other.PatientID != read_dataset(copies[0]).PatientID


def test_what_is_refused_by_the_copier():
    assert refusal(deidentify, dataset(BurnedInAnnotation="YES"), SALT) == refusal(deidentify, dataset(BurnedInAnnotation="maybe"), SALT) == "burned_in"
    assert deidentify(dataset(BurnedInAnnotation="NO"), SALT).burned_in == "no"
    overlay = dataset()
    overlay.add_new((0x6000, 0x0102), "US", 12)
    assert refusal(deidentify, overlay, SALT) == "burned_in"
    assert refusal(deidentify, dataset(), "short") == "secret" and refusal(deidentify, dataset(), SALT, dates="keep") == "unsupported"
    spoken = io.BytesIO()
    Image.fromarray(np.zeros((40, 48), "uint8")).save(spoken, "JPEG", comment=b"Mustermann, Erika")
    ds = dataset(np.zeros((40, 48), "uint8"), 8)
    ds.file_meta.TransferSyntaxUID, ds.PixelData = JPEGBaseline8Bit, encapsulate([spoken.getvalue()])
    ds["PixelData"].VR = "OB"
    assert refusal(deidentify, ds, SALT) == "burned_in"


def test_nothing_quotes_the_patient(caplog):
    "Values that are wrong in every way, and neither a warning, a log line nor an error repeats them"
    caplog.set_level(logging.DEBUG)
    raw = saved(dataset())
    wrong = raw.replace(b"1\\0\\0\\0\\1\\0", b"Mustermann").replace(b"1.0\\0.0\\0.0\\0.0\\1.0\\0.0", b"Mustermann^Erika is DSxyz ")
    strange = saved(dataset(SpecificCharacterSet="MUSTERMANN", PatientName="M\u00fcster"))
    assert wrong != raw
    caplog.clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        texts = []
        for call in (read_series, read_frames, lambda d: deidentify(read_dataset(d), SALT).to_bytes(), lambda d: patient_key(read_dataset(d), SALT)):
            for data in (wrong, strange, raw[:-50], raw.replace(b"MONOCHROME2 ", b"Mustermann X")):
                try: out = call(data)
                except PhoenixError as e:
                    texts.append(str(e))
                    assert e.__cause__ is None and (e.__suppress_context__ or e.__context__ is None)
                else: assert not isinstance(out, bytes) or b"Mustermann" not in out
    assert texts and not any("muster" in t.lower() for t in [*texts, *(str(w.message) for w in said), caplog.text])


def test_without_pydicom_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(PhoenixError, match=r"phoenix-mri\[dicom\]"): read_dataset(b"\0" * 200)


def shipped():
    "The DICOM files that pydicom ships inside its package; nothing is fetched"
    from pathlib import Path
    import pydicom.data
    return sorted(p for p in (Path(pydicom.data.__file__).parent / "test_files").rglob("*") if p.suffix.lower() in (".dcm", "") and p.is_file())


def test_files_of_many_makers_end_typed_and_agree_with_pydicom():
    read, refused, copied = 0, 0, 0
    for path in shipped():
        try: ds = read_dataset(path)
        except DicomError: refused += 1
        else:
            try: got = read_frames(ds, values="stored")
            except DicomError: refused += 1
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    want = pydicom.pixels.pixel_array(ds, raw=True).astype("float32")
                if ds.PhotometricInterpretation == "MONOCHROME2": np.testing.assert_array_equal(got, want.reshape(got.shape))
                read += 1
            words = [w.encode() for w in str(ds.get("PatientName", "")).replace("^", " ").split() if len(w) > 4]
            try: out = deidentify(ds, SALT).to_bytes()
            except DicomError: continue
            copied += 1
            head = out.split(b"\xe0\x7f\x10\x00")[0].lower()
            assert not any(w.lower() in head for w in words), path.name
    assert read + refused > 0 and (read >= 8 and copied >= 20 or len(shipped()) < 30), (read, refused, copied)


def test_simpleitk_puts_the_series_at_the_same_place(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    c, s = np.cos(.3), np.sin(.3)
    names = []
    for k in (3, 0, 2, 1):
        raw = saved(dataset(WAVES + k, position=np.array([0, -s, c]) * 4 * k + [9, -8, 7], turn=(1, 0, 0, 0, c, s), BodyPartExamined="BRAIN"))
        names.append(str(tmp_path / f"{k}.dcm"))
        (tmp_path / f"{k}.dcm").write_bytes(raw)
    im = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path)))
    v = read_series(names)
    for index in ((0, 0, 0), (47, 3, 1), (12, 39, 3)):
        mm = np.array(im.TransformIndexToPhysicalPoint(index)) * [-1, -1, 1]
        ours = np.rint(np.linalg.solve(v.affine, [*mm, 1])[:3]).astype(int)
        np.testing.assert_allclose((v.affine @ [*ours, 1])[:3], mm, atol=1e-4)
        assert v.data[tuple(ours)] == im.GetPixel(*index)
