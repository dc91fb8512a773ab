"The vault against its owner: every way to touch a ledger, looks from several processes, keys kept elsewhere"
import json
import multiprocessing
import stat

import numpy as np
import pandas as pd
import pytest

from phoenix.evaluate.metrics import MetricError
from phoenix.evaluate.vault import Vault, VaultError, predictions_of
from phoenix.records import Run, read_json, verify_run, write_json

NAMES = [f"p{i:02}/x.png" for i in range(40)]
CLASSES = ["glioma", "meningioma", "no_tumor"]
TRUTH = {n: CLASSES[i % 3] for i, n in enumerate(NAMES)}


def guess(k=0):
    probs = np.random.default_rng(k).random((len(NAMES), 3)) + .4*np.eye(3)[np.arange(len(NAMES)) % 3]
    return predictions_of(NAMES, probs/probs.sum(1, keepdims=True), CLASSES)


@pytest.fixture
def vault(tmp_path):
    v = Vault.seal(TRUTH, tmp_path/"v", groups={n: n[:2] for n in NAMES}, name="set")
    for k in range(4): v.look(guess(k), "me", f"look {k}", n=20)
    return v


def lines(vault): return (vault.path/"ledger.jsonl").read_text().splitlines(keepends=True)


def edited(rows, k, **change):
    "The rows with one entry changed, its own hash left as it was"
    return [*rows[:k], json.dumps(json.loads(rows[k]) | change) + "\n", *rows[k + 1:]]


TAMPER = dict(
    score=lambda r: edited(r, 2, scores=dict(accuracy=1., macro_f1=1.)), who=lambda r: edited(r, 1, who="you"),
    first=lambda r: edited(r, 0, pictures=1), hash=lambda r: edited(r, 4, hash="0"*64), middle=lambda r: r[:2] + r[3:],
    front=lambda r: r[1:], end=lambda r: r[:-1], swap=lambda r: [r[0], r[2], r[1], *r[3:]], twice=lambda r: [*r, r[-1]],
    torn=lambda r: [*r[:-1], r[-1][:50]], empty=lambda r: [], words=lambda r: [*r, "hello\n"], array=lambda r: [*r, "[1]\n"],
    all_but_first=lambda r: r[:1])


@pytest.mark.parametrize("how", TAMPER)
def test_every_touch_of_the_ledger_is_found_and_shuts_the_door(vault, how):
    (vault.path/"ledger.jsonl").write_text("".join(TAMPER[how](lines(vault))))
    found = vault.verify()
    assert not found.ok and found.reasons
    with pytest.raises(VaultError, match="must be whole"): vault.look(guess(9), "me", "after")


@pytest.mark.parametrize("head", ["{}", "[]", '{"looks": 4, "head": "0"}', '{"looks": 1, "head": "0"}', '{"looks": 9, "head": "0"}'])
def test_every_touch_of_the_head_is_found(vault, head):
    (vault.path/"head.json").write_text(head)
    assert not vault.verify().ok


def test_a_gone_ledger_is_no_empty_one(vault):
    (vault.path/"ledger.jsonl").unlink()
    assert "gone" in vault.verify().reasons[0]


def test_a_crash_between_the_two_writes_is_mended_by_the_next_look(vault):
    old = (vault.path/"head.json").read_bytes()
    vault.look(guess(7), "me", "the head is lost", n=20)
    (vault.path/"head.json").write_bytes(old)
    assert vault.verify().ok and vault.looks == 5
    assert vault.look(guess(8), "me", "and mended", n=20).number == 6
    assert read_json(vault.path/"head.json")["looks"] == 6


def test_a_rewritten_vault_is_betrayed_by_a_sealed_run(vault, tmp_path):
    run = Run.start("look", tmp_path/"runs")
    seen = vault.look(guess(5), "me", "with a witness", run=run, n=20)
    vault.look(guess(6), "me", "with a witness", run=run, n=20)
    run.seal()
    assert verify_run(run.path).ok and [r["looks"] for r in read_json(run.path/"looks.json")] == [5, 6]
    assert vault.verify(tmp_path/"runs").ok
    kept = lines(vault)[:5]
    (vault.path/"ledger.jsonl").write_text("".join(kept))
    write_json(vault.path/"head.json", dict(looks=4, head=json.loads(kept[-1])["hash"]))
    assert vault.verify().ok, "alone it cannot know"
    assert len(vault.verify(tmp_path/"runs").reasons) == 2
    vault.look(guess(9), "me", "another fifth", n=20)
    assert any(f"look {seen.number}" in r for r in vault.verify(tmp_path/"runs").reasons)


def test_receipts_of_another_vault_do_not_count(vault, tmp_path):
    other = Vault.seal(TRUTH, tmp_path/"w", name="other")
    other.look(guess(), "me", "elsewhere", run=Run.start("look", tmp_path/"runs"), n=20)
    assert vault.verify(tmp_path/"runs").ok


def look_many(path, start, n):
    for k in range(n): Vault(path).look(guess(start + k), f"process {start}", "at once", n=10)


def test_looks_of_several_processes_are_all_counted(tmp_path):
    vault = Vault.seal(TRUTH, tmp_path/"v")
    ctx = multiprocessing.get_context("fork")
    workers = [ctx.Process(target=look_many, args=(vault.path, 100*k, 5)) for k in range(3)]
    for w in workers: w.start()
    for w in workers: w.join(120)
    assert [w.exitcode for w in workers] == [0]*3
    found = vault.verify()
    assert found.ok and found.looks == 15
    assert found.table().who.value_counts().to_dict() == {f"process {100*k}": 5 for k in range(3)}


def test_labels_cannot_be_read_by_accident(vault):
    for p in vault.path.iterdir():
        text = p.read_bytes()
        assert b"x.png" not in text, p.name
        assert p.name == "ledger.jsonl" or b"glioma" not in text
    assert "glioma" not in repr(vault) + str(vault) + str(vars(vault))
    entries = [json.loads(x) for x in lines(vault)]
    assert entries[0]["classes"] == CLASSES and not any("glioma" in json.dumps(e) for e in entries[1:])
    assert stat.S_IMODE((vault.path/"key").stat().st_mode) == 0o600


def test_a_key_kept_elsewhere(tmp_path):
    vault = Vault.seal(TRUTH, tmp_path/"v", keep_key=False)
    assert not (tmp_path/"v/key").exists() and vault.look(guess(), "me", "with the key", n=20).number == 1
    with pytest.raises(VaultError, match="pass key="): Vault(tmp_path/"v").look(guess(), "me", "without", n=20)
    with pytest.raises(VaultError, match="must be the sealed ones"):
        Vault(tmp_path/"v", key=b"0"*32).look(guess(), "me", "with another", n=20)
    assert Vault(tmp_path/"v").verify().looks == 1, "the ledger can be read by anybody"


def test_exchanged_labels_are_refused(vault, tmp_path):
    other = Vault.seal({n: "glioma" for n in NAMES}, tmp_path/"w", classes=CLASSES)
    for name in ("labels.bin", "key"): (vault.path/name).write_bytes((other.path/name).read_bytes())
    with pytest.raises(VaultError, match="must be the sealed ones"): vault.look(guess(), "me", "all gliomas")


@pytest.mark.parametrize("bad", [
    lambda p: p[:1], lambda p: pd.concat([p, p[:1]]), lambda p: p.iloc[:, :2], lambda p: p[CLASSES[::-1]],
    lambda p: p.rename(index={NAMES[0]: "z"})])
def test_a_part_of_the_pictures_tells_nothing(vault, bad):
    with pytest.raises(VaultError, match="predict all of them"): vault.look(bad(guess()), "me", "a part")
    assert vault.looks == 4


def test_predictions_that_are_none_are_refused_and_not_counted(vault):
    with pytest.raises(MetricError): vault.look(guess()*np.nan, "me", "nothing")
    assert vault.looks == 4


def test_order_of_rows_and_of_seals_changes_nothing(vault):
    a, b = vault.look(guess(3), "me", "as it is", n=20), vault.look(guess(3)[::-1], "me", "reversed", n=20)
    assert a.scores == b.scores
    again = Vault.seal(dict(reversed(list(TRUTH.items()))), vault.path, groups={n: n[:2] for n in NAMES}, name="set")
    assert again.looks == 6
