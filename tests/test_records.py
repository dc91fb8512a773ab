"What a notebook can't hold about records: killed writers, a full disk, killed runs, changed bytes"
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from phoenix.records import RecordError, Run, read_json, verify_run, whole_file, write_bytes


def child(code, *args):
    "Start a fresh interpreter on `code`; its output is piped"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


WRITER = """
import sys
from phoenix.records import write_text
write_text(sys.argv[1], "a"*3_000_000)
print("ready", flush=True)
while True:
    for mark in "ba": write_text(sys.argv[1], mark*3_000_000)
"""


def test_killed_writer_leaves_the_old_content_or_the_new(tmp_path):
    path, pick, seen = tmp_path/"state.txt", random.Random(0), set()
    for _ in range(10):
        writer = child(WRITER, path)
        assert writer.stdout.readline() == "ready\n"
        time.sleep(pick.uniform(0, .1))
        writer.kill()
        writer.communicate()
        content = path.read_text()
        assert content in ("a"*3_000_000, "b"*3_000_000), f"half a file: {len(content)} letters"
        seen.add(content[0])
    assert seen == {"a", "b"}, "kills never fell between the writes: the test shows nothing"


FULL = """
import resource, sys
from phoenix.records import write_bytes, write_json
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for write in (lambda: write_bytes(sys.argv[1], b"n"*1_000_000), lambda: write_json(sys.argv[1], ["n"]*200_000)):
    try: write()
    except OSError as e: print(type(e).__name__, e.errno)
    else: print("no error")
"""


def test_full_disk_keeps_the_old_file(tmp_path):
    path = write_bytes(tmp_path/"weights.bin", b"old")
    out, err = child(FULL, path).communicate(timeout=60)
    assert out.split("\n")[:2] == ["OSError 27", "OSError 27"], (out, err)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["weights.bin"], "the broken part is removed"


def test_a_library_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path/"x.onnx"):
        pass
    assert not list(tmp_path.iterdir())


def test_new_files_have_ordinary_permissions(tmp_path):
    (tmp_path/"plain").write_bytes(b"")
    assert write_bytes(tmp_path/"x", b"").stat().st_mode == (tmp_path/"plain").stat().st_mode


KILLED = """
import os, signal, sys
from phoenix.records import Run
run = Run.start("demo", sys.argv[1])
run.cell(2, 3)
run.record(loss=1.)
print(run.path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_run_names_its_cell(tmp_path):
    dead = child(KILLED, tmp_path)
    out, _ = dead.communicate(timeout=60)
    assert dead.returncode == -signal.SIGKILL
    verdict = verify_run(out.strip())
    assert (verdict.ok, verdict.state, verdict.reasons) == (False, "killed", ["killed in cell 2 of 3"])
    assert read_json(f"{out.strip()}/metrics.json") == {"loss": 1.}


SEALING = """
import os, signal, sys
import phoenix.records as r
run = r.Run.start("demo", sys.argv[1])
print(run.path, flush=True)
real = r.write_json
def write(path, x):
    if path.name == "seal.json": os.kill(os.getpid(), signal.SIGKILL)
    return real(path, x)
r.write_json = write
run.seal()
"""


def test_killed_while_sealing_is_not_sealed(tmp_path):
    out, _ = child(SEALING, tmp_path).communicate(timeout=60)
    assert verify_run(out.strip()).reasons == ["killed while it was sealed"]


def test_a_live_run_is_seen_from_another_process(tmp_path):
    run = Run.start("demo", tmp_path)
    run.cell(1, 2)
    code = "import sys; from phoenix.records import verify_run, Run\nprint(verify_run(sys.argv[1]).reasons)\nRun.open(sys.argv[1]).seal()"
    out, err = child(code, run.path).communicate(timeout=60)
    assert "not sealed: running in cell 1 of 2" in out
    assert "RecordError" in err and "process that started it" in err


def sealed(root):
    run = Run.start("demo", root, {"seed": 1})
    run.record(accuracy=.5)
    run.file("figures", "roc.png").write_bytes(b"\x89PNG")
    run.seal()
    return run.path


NAMES = ["run.json", "metrics.json", "parameters.json", "provenance.json", "stamps.json", "figures/roc.png"]


@pytest.mark.parametrize("name", NAMES)
def test_one_changed_bit_breaks_the_seal(tmp_path, name):
    path = sealed(tmp_path)
    assert verify_run(path).ok and verify_run(path).evidence
    data = bytearray((path/name).read_bytes())
    data[-2] ^= 1
    (path/name).write_bytes(data)
    verdict = verify_run(path)
    assert not verdict.ok and not verdict.evidence and verdict.state in ("broken", "damaged")


def test_every_file_is_sealed(tmp_path):
    path = sealed(tmp_path)
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert set(read_json(path/"seal.json")["files"]) == files - {"seal.json"} == set(NAMES)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}', '{"files": {}, "evidence": true, "reasons": []}'])
def test_a_forged_seal_is_never_ok(tmp_path, content):
    path = sealed(tmp_path)
    (path/"seal.json").write_text(content)
    assert not verify_run(path).ok


@pytest.mark.parametrize("stamp", ["note_synthetic", "note_published_split"])
def test_stamped_runs_are_no_evidence(tmp_path, stamp):
    run = Run.start("demo", tmp_path)
    getattr(run, stamp)()
    run.seal()
    verdict = verify_run(run.path)
    assert verdict.ok and not verdict.evidence and len(verdict.reasons) == 1
    with pytest.raises(RecordError, match="is sealed"):
        getattr(run, stamp)()


def test_records_hold_no_private_path(tmp_path):
    text = "".join(p.read_text() for p in Run.start("demo", tmp_path).path.glob("*.json"))
    assert os.path.expanduser("~") not in text and os.uname().nodename not in json.loads(text[:0] or '""')
    assert str(tmp_path) not in text
