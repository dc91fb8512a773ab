"Who is in each file: kept with the set, obeyed by splits, hashed without a trace, and never named in an error"
import json
import sys
import types
import zipfile

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from phoenix.data.acquire import acquire, build_manifest, keep_patients
from phoenix.data.audit import audit
from phoenix.data.duplicates import find_pairs
from phoenix.data.patients import CONVENTIONS, PatientError, find_patients, preview_patients, read_rule, write_patients
from phoenix.data.splits import make_split, verify_certificate

SALT = "a secret of this test"


def pictures(root, n=24, each=3):
    "n patients of some slices of noise, called by a hospital's way"
    g = np.random.Generator(np.random.Philox(4))
    for p in range(n):
        for k in range(each):
            f = root / ("no" if p % 2 else "glioma") / f"P{p:03d}_{k}.png"
            f.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(g.integers(0, 256, (16, 16), dtype="uint8")).save(f)
    return root


def test_a_rule_reaches_the_certificate(tmp_path):
    "Without a rule slices of one patient cross; with one, kept in the folder, none does, and verify agrees from the bytes alone"
    root = pictures(tmp_path / "set")
    assert audit(build_manifest(root, progress=False)).of("no_patients")
    m = keep_patients(root, read_rule("p"), progress=False)
    assert not audit(m).of("no_patients") and m.table.patient.nunique() == 24
    again = build_manifest(root, progress=False)
    cert = make_split(again, find_pairs(again), seed=1)
    side = pd.Series(cert.assignment).groupby(lambda p: p.split("/")[1].split("_")[0]).nunique()
    assert again.sha256 == m.sha256 and side.max() == 1 and cert.proof["patients_across"] == 0
    assert verify_certificate(cert, root).ok
    (root / "patients.csv").unlink()
    assert not verify_certificate(cert, root).ok, "another table of patients is another set"


def test_hashed_identifiers_leave_no_trace(tmp_path):
    root = pictures(tmp_path / "raw", 4)
    for f in sorted(root.rglob("*.png")): f.rename(f.with_name(f"{f.stat().st_ino}.png"))
    names = [f"{f.parent.name}/{f.name}" for f in sorted(root.rglob("*.png"))]
    (tmp_path / "table.csv").write_text("file,patient\n" + "".join(f"{n},MRN-{k // 3:06d}\n" for k, n in enumerate(names)))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as z:
        for n in names: z.write(root / n, n)
    m = acquire(tmp_path / "set.zip", tmp_path / "out", progress=False, patient_rule=read_rule(tmp_path / "table.csv", salt=SALT))
    m.save(tmp_path / "manifest.json")
    written = [p for p in [tmp_path / "manifest.json", *(tmp_path / "out").rglob("*")] if p.suffix in (".json", ".csv")]
    assert len(written) == 3 and m.table.patient.nunique() == 4
    assert not [p for p in written if "MRN-" in p.read_text() or SALT in p.read_text()]
    other = build_manifest(root, patient_rule=read_rule(tmp_path / "table.csv", salt=SALT + "!"), progress=False)
    assert not set(other.table.patient) & set(m.table.patient)
    assert json.loads((tmp_path / "out/metadata.json").read_text())["acquired"]["patients"]


def test_a_table_of_the_set_gives_way_to_a_rule_and_stays_under_folds(tmp_path):
    root = pictures(tmp_path / "set", 4, 2)
    files = sorted(f"{f.parent.name}/{f.name}" for f in root.rglob("*.png"))
    rows = "".join(f"{f},{f.split('/')[0]},old,{k % 2}\n" for k, f in enumerate(files))
    (root / "manifest.csv").write_text("file,label,patient,fold\n" + rows)
    assert set(build_manifest(root, progress=False).table.patient) == {"old"}
    by_rule = build_manifest(root, patient_rule=read_rule("p"), progress=False).table
    assert by_rule.patient.nunique() == 4 and list(by_rule.fold) == [k % 2 for k in range(8)]
    (tmp_path / "folds.csv").write_text("prefix,fold\n" + "".join(f"P{k:03d},{k + 5}\n" for k in range(4)))
    by_folds = build_manifest(root, patient_rule=read_rule(tmp_path / "folds.csv"), progress=False).table
    assert set(by_folds.patient) == {"old"} and set(by_folds.fold) == {5, 6, 7, 8}
    own = read_rule(root / "manifest.csv", salt=SALT)
    assert find_patients(own, files).patient.str.fullmatch("[0-9a-f]{16}").all(), "a column of the set itself can be hashed"


def test_a_wrapped_set_keeps_its_patients(tmp_path):
    pictures(tmp_path / "zip/brain_set/Training", 6)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as z:
        for f in sorted((tmp_path / "zip").rglob("*.png")): z.write(f, f.relative_to(tmp_path / "zip"))
    m = acquire(tmp_path / "set.zip", tmp_path / "out", progress=False, patient_rule=read_rule("p"))
    again = build_manifest(tmp_path / "out", progress=False)
    assert m.root == again.root == tmp_path / "out/brain_set" and again.sha256 == m.sha256 and again.has_patients
    assert acquire(tmp_path / "set.zip", tmp_path / "out", progress=False, patient_rule=read_rule("p")).sha256 == m.sha256


@pytest.mark.parametrize("name,text", [
    ("t.csv", "file,patient\na.png,SECRET1\na.png,SECRET2\n"), ("t.csv", "regex,patient\n[,SECRET1\n"),
    ("t.csv", "file,patient,fold\na.png,SECRET1,SECRET2\n"), ("t.csv", "file,patient\nb.png,SECRET1\n"),
    ("t.csv", "regex,patient\na,SECRET1\np,SECRET2\n"), ("t.csv", "prefix,patient\n,SECRET1\n"), ("t.txt", "SECRET1\nSECRET2\n"),
    ("t.csv", 'file,patient\n"a.png,SECRET1\n'), ("t.csv", "patient\nSECRET1\n"), ("t.mat", "SECRET1")])
def test_no_error_names_a_patient(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(PatientError) as e: find_patients(read_rule(tmp_path / name), ["a.png", "c/a.png", "d/p.png"])
    assert "SECRET" not in str(e.value) and "\n" not in str(e.value)


def test_a_matlab_73_file(tmp_path, monkeypatch):
    "Without h5py the way out is named; with it the vector is read, whatever else the file holds"
    path = tmp_path / "cvind.mat"
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(116) + bytes(8) + b"\x00\x02IM" + bytes(400))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(PatientError, match="pip install h5py"): read_rule(path)

    class Dataset(np.ndarray): pass

    class File(dict):
        def __init__(self, path): super().__init__(cvind=np.array([[1.], [5.], [5.]]).view(Dataset), other=np.zeros(7).view(Dataset))
        def __enter__(self): return self
        def __exit__(self, *a): pass
    monkeypatch.setitem(sys.modules, "h5py", types.SimpleNamespace(File=File, Dataset=Dataset))
    found = find_patients(read_rule(path), [f"{k}.png" for k in (1, 2, 3, 4)])
    assert list(found.fold) == ["1", "5", "5", ""]


def test_the_preview_counts_and_shows_no_identifier(tmp_path):
    (tmp_path / "t.csv").write_text("file,patient\na.png,SECRET\nb.png,SECRET\ngone.png,SECRET\n")
    seen = preview_patients(read_rule(tmp_path / "t.csv"), ["x/a.png", "x/b.png", "x/c.png", "x/d.png"])
    assert (seen.named, seen.patients, seen.largest, seen.unused) == (2, 1, 2, 1)
    assert "SECRET" not in str(seen) + repr(seen) and "not matched: 2 files, first x/c.png, x/d.png" in str(seen)


def test_conventions_compile_and_one_rule_is_one_digest():
    rules = {c: read_rule(c).digest for c in CONVENTIONS}
    assert len(set(rules.values())) == len(CONVENTIONS) and read_rule("p").digest == rules["p"] != read_rule("p", salt=SALT).digest


def test_odd_names_survive_the_table(tmp_path):
    names = ['a, b/P01 "x".png', "ä/P02_1.png", "  c/P03.png", "d/P04.png", "NA/P05.png"]
    for rule in ("p", "folder"):
        found = find_patients(read_rule(rule), names)
        write_patients(found, tmp_path)
        pd.testing.assert_frame_equal(find_patients(read_rule(tmp_path / "patients.csv"), names), found)
