"What the phantom's notebook cannot hold: fresh processes, interrupted writes, and properties over many patients"
import csv
import hashlib
import io
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict

import imagehash
import numpy as np
import pytest
from PIL import Image

import phoenix.data.phantom as phantom
from phoenix.data.phantom import CLASSES, Faults, PhantomError, make_phantom, phantom_slice

MAKE = """
import sys
from phoenix.data.phantom import Faults, make_phantom
make_phantom(sys.argv[1], patients=8, slices=4, size=40, faults=Faults.some(2), masks=True)
"""


def tree_hash(folder):
    "One hash over names and bytes of every file below a folder"
    h = hashlib.sha256()
    for p in sorted(x for x in folder.rglob("*") if x.is_file()):
        h.update(p.relative_to(folder).as_posix().encode() + b"\0" + p.read_bytes())
    return h.hexdigest()


def test_same_bytes_in_fresh_processes(tmp_path):
    hashes = set()
    for i, seed in enumerate(("0", "1", "4242")):
        env = dict(os.environ, PYTHONHASHSEED=seed, OMP_NUM_THREADS=str(1 + i % 2), OPENBLAS_NUM_THREADS=str(1 + i % 2))
        done = subprocess.run([sys.executable, "-c", MAKE, str(tmp_path / str(i) / "set")], env=env, capture_output=True,
                              text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        hashes.add(tree_hash(tmp_path / str(i)))
    assert len(hashes) == 1
    make_phantom(tmp_path / "other" / "set", patients=8, slices=4, size=40, seed=43, faults=Faults.some(2), masks=True)
    assert tree_hash(tmp_path / "other") not in hashes


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    "A phantom with four faults of every kind"
    root = tmp_path_factory.mktemp("phantom") / "set"
    return root, make_phantom(root, patients=16, slices=4, size=48, faults=Faults.some(4))


def test_every_fault_is_planted_as_often_as_asked(faulty):
    root, truth = faulty
    assert Counter(p["kind"] for p in truth["planted"]) == {k: v for k, v in asdict(Faults.some(4)).items() if v}
    assert truth == json.loads((root / "truth.json").read_text(encoding="utf-8"))
    rows = list(csv.DictReader(open(root / "manifest.csv", encoding="utf-8")))
    files = {p.relative_to(root).as_posix() for p in root.rglob("image_*")}
    assert len(rows) == len(files) == truth["files"] == 64 + 4 * 10 and {r["file"] for r in rows} == files
    sources = [p["twin"] for p in truth["planted"] if p["twin"]] + [p["file"] for p in truth["planted"] if p["kind"] == "wrong_extension"]
    assert len(set(sources)) == len(sources), "each fault has a picture of its own"


def test_labels_folders_and_split(faulty):
    root, truth = faulty
    for r in csv.DictReader(open(root / "manifest.csv", encoding="utf-8")):
        assert r["file"].split("/")[1] == r["label"] and r["label"] in CLASSES
    split = Counter(i["file"].split("/")[0] for i in truth["images"])
    assert split == {"Training": 48, "Testing": 16}
    for p in truth["planted"]:
        if p["twin"]:
            assert (p["label"] != p["twin_label"]) == (p["kind"] == "label_conflicts")


def test_corrupt_blank_and_wrong_extension(faulty):
    root, truth = faulty
    of = {k: [root / p["file"] for p in truth["planted"] if p["kind"] == k] for k in ("corrupt", "blank", "wrong_extension")}
    for f in of["corrupt"]:
        with pytest.raises((OSError, SyntaxError)):
            with Image.open(io.BytesIO(f.read_bytes())) as im: im.load()
    assert all(np.ptp(np.asarray(Image.open(f))) == 0 for f in of["blank"])
    assert all(f.suffix == ".jpg" and f.read_bytes()[:4] == b"\x89PNG" for f in of["wrong_extension"])
    broken = {p["file"] for p in truth["planted"] if p["kind"] == "corrupt"}
    for f in root.rglob("image_*"):
        if f.relative_to(root).as_posix() not in broken: Image.open(f).load()


def test_an_interrupted_set_leaves_nothing(tmp_path, monkeypatch):
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(phantom, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        make_phantom(tmp_path / "set", patients=4, slices=1, size=32)
    assert list(tmp_path.iterdir()) == []


def test_too_many_faults_write_nothing(tmp_path):
    with pytest.raises(PhantomError, match="as many Training pictures"):
        make_phantom(tmp_path / "set", patients=4, slices=2, size=32, faults=Faults(turned=5))
    assert list(tmp_path.iterdir()) == []


def test_every_patient_has_a_visible_tumour():
    for p in range(80):
        label = CLASSES[p % 4]
        for k in (0, 3):
            s = phantom_slice(label, p, k, size=64)
            assert s.brain.mean() > .2 and s.image.std() > 10
            assert not (s.tumour & ~s.brain).any()
            assert (s.tumour.sum() >= 12) == (label != "no_tumor"), f"{label} of patient {p}, slice {k}: {s.tumour.sum()} pixels"


def test_no_two_slices_are_copies_by_accident():
    "Planted copies are the only ones: no other pair is both near in pHash and correlated over 0.95"
    images = [phantom_slice(CLASSES[p % 4], p, k, size=96).image for p in range(24) for k in range(3)]
    bits = np.array([imagehash.phash(Image.fromarray(x)).hash.ravel() for x in images])
    small = np.array([np.asarray(Image.fromarray(x).resize((64, 64), Image.Resampling.BOX), float).ravel() for x in images])
    near = (bits[:, None] != bits[None]).sum(-1) <= 5
    i, j = np.nonzero(np.triu(near & (np.corrcoef(small) > .95), 1))
    assert not len(i), f"{len(i)} pairs, such as {i[0]} and {j[0]}"
