"The audit on sets that a lesson would not hold: many faults, nothing readable, every kind once"
import io
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from phoenix.data.acquire import build_manifest
from phoenix.data.audit import AUDIT_KINDS, AuditLimits, attribute_accuracy, audit, plot_counts, plot_sizes
from phoenix.data.phantom import Faults, make_phantom

DAMAGED = {"truncated", "corrupt", "not_an_image", "empty"}


def png(array, format="PNG"):
    b = io.BytesIO()
    Image.fromarray(array).save(b, format)
    return b.getvalue()


def noise(seed, size=16, low=0, high=256):
    return np.random.Generator(np.random.Philox(seed)).integers(low, high, (size, size), dtype="uint8")


def build(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return build_manifest(root, progress=False)


@pytest.mark.parametrize("seed", [1, 2])
def test_every_planted_fault_and_no_other(tmp_path, seed):
    truth = make_phantom(tmp_path / "set", patients=24, slices=3, size=48, seed=seed, faults=Faults.some(4))
    planted, result = pd.DataFrame(truth["planted"]), audit(build_manifest(tmp_path / "set", progress=False))

    def files(*kinds): return set(planted[planted.kind.isin(kinds)].file)
    def found(*kinds): return {f.path for k in kinds for f in result.of(k)}
    assert found(*DAMAGED) == files("corrupt") and found("blank") == files("blank")
    assert found("wrong_extension") == files("wrong_extension")
    groups = {k: [{f.path, *f.others} for f in result.of(k)] for k in ("label_conflict", "duplicate_bytes", "duplicate_pixels")}
    for p in planted[planted.kind == "label_conflicts"].itertuples(): assert any({p.file, p.twin} <= g for g in groups["label_conflict"])
    for p in planted[planted.kind == "byte_copies"].itertuples(): assert any({p.file, p.twin} <= g for g in groups["duplicate_bytes"])
    again = planted[(planted.kind == "reencoded") & ~planted.variant.str.contains("jpeg")]
    for p in again.itertuples(): assert any({p.file, p.twin} <= g for g in groups["duplicate_pixels"])
    planted_groups = [g for g in groups["label_conflict"] if not g & files("blank")] # equal blanks contradict each other too
    assert len(planted_groups) == 4 and len(again) and result.exit_code == 1
    json.dumps(result.to_dict())


def test_each_kind_can_be_found(tmp_path):
    a, two = png(noise(1)), io.BytesIO()
    Image.fromarray(noise(2)).save(two, "TIFF", save_all=True, append_images=[Image.fromarray(noise(3))])
    bad = bytearray(png(noise(4)))
    bad[-20] ^= 1
    files = {"Training/glioma/a.png": a, "Testing/glioma/b.png": a, "Testing/no_tumor/c.png": a, "Training/no_tumor/d.bmp": png(noise(1), "BMP"),
             "Training/glioma/e.png": b"", "Training/glioma/f.png": b"<html>", "Training/glioma/g.png": a[:-30], "Training/glioma/h.png": bytes(bad),
             "Training/glioma/i.gif": png(noise(5), "GIF"), "Training/glioma/j.tif": two.getvalue(), "Training/glioma/k.jpg": png(noise(6)),
             "Training/glioma/l.png": png(noise(7, high=1)), "Training/glioma/m.png": png(noise(8, low=100, high=112)),
             "Training/pituitary/n.png": png(noise(9)), "pred/o.png": a, "notes.txt": b"x"}
    result = audit(build(tmp_path / "set", files))
    missing = set(AUDIT_KINDS) - set(result.counts())
    assert missing == {"missing", "one_class", "too_large", "patient_leak", "some_patients", "unexpected_count", "synthetic", "shortcut",
                       "drift_changed", "drift_missing", "drift_extra", "unchecked"}
    order = [f.severity for f in result.findings]
    assert order == sorted(order, key=["error", "warning", "info"].index)
    assert set(result.table().columns) >= {"kind", "severity", "path", "message", "hint"}
    assert all(f.message and f.hint and "\n" not in f.message + f.hint for f in result.findings)


def test_patients_and_missing_files(tmp_path):
    csv = "file,label,patient\nTraining/yes/a.png,yes,p1\nTesting/yes/b.png,yes,p1\nTraining/no/c.png,no,\nTraining/no/gone.png,no,p2\n"
    m = build(tmp_path / "s", {"Training/yes/a.png": png(noise(1)), "Testing/yes/b.png": png(noise(2)),
                               "Training/no/c.png": png(noise(3)), "manifest.csv": csv.encode()})
    result = audit(m)
    assert {"patient_leak", "some_patients", "missing", "split_without_class"} <= set(result.counts()) and result.exit_code == 1
    assert "1 of 2 patients" in result.of("patient_leak")[0].message


def test_a_set_without_one_readable_picture(tmp_path):
    m = build(tmp_path / "s", {"glioma/a.png": b"", "no/b.png": b"<html>"})
    result = audit(m)
    assert set(result.counts()) == {"empty", "not_an_image", "one_class", "no_patients"} and result.exit_code == 1
    with pytest.raises(ValueError, match="readable"): plot_sizes(m)
    plot_counts(m)


def test_the_audit_depends_on_content_only(tmp_path):
    m = build(tmp_path / "s", {f"{c}/{k}.png": png(noise(k % 7)) for c in ("glioma", "no") for k in range(9)})
    first = audit(m)
    m.table = m.table.sample(frac=1, random_state=1)
    assert audit(m).to_dict() == first.to_dict()
    assert first.manifest_sha256 == m.sha256 and audit(m, limits=AuditLimits(few=1)).of("few_images") == []


@pytest.mark.parametrize("k", [2, 4])
def test_useless_attributes_stay_at_chance(k):
    rng = np.random.Generator(np.random.Philox(5))
    labels, halves = pd.Series(np.arange(1000) % k), pd.Series(rng.random(1000) < .5)
    for values in (np.zeros(1000), np.arange(1000), rng.integers(0, 3, 1000), rng.integers(0, 60, 1000)):
        acc, chance = attribute_accuracy(pd.Series(values), labels, halves)
        assert abs(acc - chance) < .07 and chance == 1 / k
    assert attribute_accuracy(labels * 7, labels, halves)[0] == 1
