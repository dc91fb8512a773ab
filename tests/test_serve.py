"A server in a process of its own: what it answers, to whom, and that it loses nothing. The long fire is in test_fire.py"
import asyncio
import io
import json
import os
import re
import signal
import subprocess
import time
import zipfile
from types import SimpleNamespace

import httpx
import nibabel
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from phoenix.data.mimics import make_mimic
from phoenix.data.pixels import read_pixels
from phoenix.deploy.package import load_package
from phoenix.deploy.serve import ACCESS, _add_facts
from phoenix.deploy.store import open_store
from serving import Server, add_reference, answered, heads, picture, png, post, raw, save_model, users


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("models")/"model")
    add_reference(folder)
    return folder


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    options = "plan=Plan(None, None), queue=4, door=DoorLimits(body_mb=1, body_s=1, header_s=1), follow_s=.4, notice_s=.5"
    with Server(tmp_path_factory.mktemp("server"), model, options) as s: yield s.wait()


def series(n):
    "A zip of a DICOM series of `n` slices with a bright square"
    from pydicom import dcmread
    from phoenix.deploy.engine import _example_dicom
    out, uid = io.BytesIO(), "1.2.826.0.1.3680043.8.498.1"
    with zipfile.ZipFile(out, "w") as z:
        for k in range(n):
            ds, part = dcmread(io.BytesIO(_example_dicom(np.pad(np.full((24, 24), 90, np.uint8), 8)))), io.BytesIO()
            ds.SeriesInstanceUID, ds.ImagePositionPatient, ds.InstanceNumber = uid, [0, 0, 3*k], k + 1
            ds.save_as(part, enforce_file_format=True)
            z.writestr(f"{k}.dcm", part.getvalue())
    return out.getvalue()


def get(server, path, **kw): return httpx.get(server.url + path, headers=server.headers(), timeout=30, **kw)


def test_the_answer_is_the_package_s_own(server, model, tmp_path):
    (tmp_path/"a.png").write_bytes(picture())
    expected, = load_package(model).predict([tmp_path/"a.png"], "fp32")
    said = post(server).json()
    assert said["answers"][0]["probs"] == pytest.approx(expected.probs, abs=1e-12) and said["answers"][0]["label"] == expected.label
    assert said["model"]["version"] == "model@1" and said["notice"] and len(said["trace_id"]) == 32
    trace = "0af7651916cd43dd8448eb211c80319c"
    assert post(server, traceparent=f"00-{trace}-b7ad6b7169203331-01").headers["x-trace-id"] == trace


def test_forms_volumes_and_archives(server):
    volume = np.zeros((40, 40, 6), np.int16)
    volume[8:32, 8:32, 1:5] = 300
    nifti = nibabel.Nifti1Image(volume, np.diag([1., 1., 3., 1.])).to_bytes()
    said = post(server, nifti, "/v1/predict?slices=3").json()["answers"]
    assert [a["slice"] for a in said] == [1, 3, 4]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for k in range(2): z.writestr(f"{k}.jpg", picture(patient=k, format="JPEG"))
    assert len(post(server, out.getvalue()).json()["answers"]) == 2
    assert [a["slice"] for a in post(server, series(5), "/v1/predict?slices=2").json()["answers"]] == [1, 3]
    form = httpx.post(server.url + "/v1/predict", files={"file": ("name-of-a-patient.png", picture())}, timeout=30,
                      headers={"X-API-Key": server.key}).json()
    assert form["answers"] == post(server).json()["answers"]
    assert "name-of-a-patient" not in server.log.read_text()


@pytest.mark.parametrize("data, kind, status", [
    (b"<svg/>", "image/png", 415), (b"", "image/png", 422), (picture()[:200], "image/png", 422), (picture(), "text/html", 415),
    (picture(), "", 415), (b"PK\3\4" + bytes(50), "application/zip", 422), (bytes(2**20 + 1), "image/png", 413)])
def test_what_can_t_be_used_is_refused_by_its_kind(server, data, kind, status):
    said = post(server, data, **{"Content-Type": kind})
    assert said.status_code == status and said.json()["error"]["message"] and said.json()["error"]["trace_id"]


def test_every_route_denies_by_default(server):
    "Each route of the table with no key, a wrong key and keys without its scope: 0 unintended answers"
    from phoenix.deploy.keys import Keyring
    keyring = Keyring(open_store(str(server.store)))
    narrow = {s: keyring.add("other", [s]).reveal() for s in ("read", "predict", "metrics", "admin")}
    bad = ["", "Bearer", "Bearer phx_aaaaaaaaaaaa_" + "0"*64, "Basic YTpi", f"Bearer {server.key}x", f"Bearer {server.key[:-1]}"]
    wrong = []
    with httpx.Client(base_url=server.url, timeout=30) as c:
        for (method, path), access in [*ACCESS.items(), (("GET", "/docs"), None), (("TRACE", "/v1/predict"), None)]:
            def ask(key): return c.request(method, path.replace("{id}", "0"*32), headers={"Authorization": key} if key else {}).status_code
            if access and access.scope is None: continue
            wrong += [(method, path, k) for k in bad if ask(k) != 401]
            if access: wrong += [(method, path, s) for s, key in narrow.items() if s != access.scope and ask(f"Bearer {key}") != 403]
    assert not wrong
    assert httpx.post(server.url + "/v1/predict", content=picture(), headers={"Authorization": f"Bearer {narrow['predict']}",
                      "Content-Type": "image/png"}, timeout=30).status_code == 200


def test_slow_lying_endless_and_huge(server):
    head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\nContent-Type: image/png\r\n".encode()
    assert raw(server.port, b"GET / HTT", timeout=5) == b""
    assert b" 431 " in raw(server.port, b"GET / HTTP/1.1\r\nx: " + b"y"*20000)
    assert b" 408 " in raw(server.port, head + b"Content-Length: 5000\r\n\r\nabc")
    assert b" 413 " in raw(server.port, head + b"Content-Length: 99999999\r\n\r\nabc")
    assert b" 400 " in raw(server.port, head + b"Content-Length: -1\r\n\r\nabc")
    chunk = b"10000\r\n" + bytes(2**16) + b"\r\n"
    assert b" 413 " in raw(server.port, head + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk]*40)
    assert post(server).status_code == 200


def test_full_says_429_at_once_and_a_kill_loses_nothing(server):
    "More callers than the queue holds while the model process is killed: 200 or 429 with Retry-After, never anything else"
    async def fire():
        seen = []
        work = asyncio.ensure_future(users(server, 12, 2.5, picture(), seen=seen))
        await answered(seen)
        for pid in server.model_pids(): os.kill(pid, signal.SIGKILL)
        return await work
    seen = asyncio.run(fire())
    kinds = {s for s, _, _ in seen}
    assert {200} <= kinds <= {200, 429}, kinds
    assert server.wait() and post(server).status_code == 200
    text = get(server, "/metrics").text
    assert 'phoenix_worker_deaths{pool="model"}' in text and 'phoenix_refusals_total{kind="full"}' in text


def test_batches(server):
    job = httpx.post(server.url + "/v1/batch", files=[("files", (f"{k}", picture(patient=k))) for k in range(3)] +
                     [("files", ("x", b"no picture"))], headers={"X-API-Key": server.key}, timeout=30)
    assert job.status_code == 202
    end = time.monotonic() + 60
    while (said := get(server, f"/v1/batch/{job.json()['id']}").json())["state"] != "done" and time.monotonic() < end: time.sleep(.1)
    assert [len(r.get("answers", [])) for r in said["results"]] == [1, 1, 1, 0] and said["results"][3]["error"]["kind"] == "unsupported"
    assert get(server, "/v1/batch/" + "0"*32).status_code == 404
    cancelled = httpx.delete(server.url + f"/v1/batch/{job.json()['id']}", headers=server.headers()).json()
    assert cancelled["state"] == "done"


def test_a_challenger_serves_without_a_restart_and_the_way_back(server, tmp_path):
    from phoenix.deploy.registry import Registry
    registry = Registry(open_store(str(server.store)))
    two = registry.register(str(save_model(tmp_path/"two", weight=2.)), "model")
    assert get(server, "/v1/drift").json()["model@1"]["watched"]
    before = post(server).json()
    said = httpx.post(server.url + "/v1/models/promote", params={"number": two.number, "why": "test"}, headers=server.headers(), timeout=60)
    assert said.status_code == 200 and said.json()["champion"]["number"] == two.number
    after = post(server).json()
    assert "holds no reference" in get(server, "/v1/drift").json()["model@2"]["reason"]
    assert after["model"]["version"] == "model@2" and after["answers"][0]["probs"] != before["answers"][0]["probs"]
    registry.rollback("model", who="test", why="test")
    end = time.monotonic() + 30
    while post(server).json()["model"]["version"] != "model@1" and time.monotonic() < end: time.sleep(.1)
    assert post(server).json()["answers"] == before["answers"]


def decoded(server): return float(re.search(r'^phoenix_worker_jobs{pool="decode"} (\S+)', get(server, "/metrics").text, re.M)[1])


def watched(server, pictures):
    "The alerts of a drift window that these 8 pictures fill"
    def drift(): return get(server, "/v1/drift").json()["model@1"]
    for k in range(-drift()["waiting"] % 8): post(server, png(heads([2000 + k])[0]))
    before, jobs = settled(drift, lambda d: d["waiting"] == 0)["windows"], decoded(server)
    for x in pictures: post(server, png(x))
    seen = settled(drift, lambda d: d["windows"] == before + 1)
    assert decoded(server) - jobs == len(pictures), "a picture goes to the decoder once, watched or not"
    assert len(seen["judged"]) == seen["windows"] and set(seen["judged"][-1]["p"]) == {"embedding", "classes", "contract"}
    return set(seen["alerting"])


def settled(look, ok, seconds=20):
    "What is seen as soon as it is as expected"
    end = time.monotonic() + seconds
    while not ok(seen := look()) and time.monotonic() < end: time.sleep(.05)
    assert ok(seen), seen
    return seen


def test_drift_is_seen_by_the_server(server, tmp_path):
    "Pictures like the reference raise no alert; inverted and brighter ones and another organ do, in metrics and log too"
    new = heads(range(3000, 3008))
    make_mimic("nih14", tmp_path/"chest", groups=10, pictures=1, size=64)
    chests = [read_pixels(p).grey for p in sorted((tmp_path/"chest").rglob("*.png"))][:8]
    brighter = [np.clip(x*1.5 + 40, 0, 255).astype(np.uint8) for x in new]
    assert watched(server, new) == set()
    assert "contract" in watched(server, [255 - x for x in new]) and watched(server, brighter) and watched(server, chests)
    gauges = settled(lambda: get(server, "/metrics").text, lambda t: 'phoenix_drift_alerting{kind="embedding",version="model@1"} 1.0' in t)
    assert 'phoenix_drift_reference{version="model@1"} 1.0' in gauges
    told, = [m["drift"] for m in get(server, "/v1/models").json()["open"] if m["version"] == "model@1"]
    assert told["watched"] and told["alerts"] >= 3 and "class mix" in told["kinds"]
    lines = [json.loads(x) for x in server.log.read_text().splitlines() if '"phoenix.drift"' in x]
    assert len(lines) == told["alerts"] and all(x["version"] == "model@1" and x["p"] <= .01/3 and x["level"] == "WARNING" for x in lines)


def test_drift_is_told_as_of_one_moment():
    "A window that is judged while the answer is made is in neither its count nor its list"
    async def thread(f, *args):
        service.drift = {"m@1": dict(windows=3)} # the monitor goes on meanwhile
        return f(*args)
    monitor = SimpleNamespace(windows=lambda last: [dict(number=k) for k in range(3)])
    service = SimpleNamespace(served={"m": SimpleNamespace(name="m@1"), "n": SimpleNamespace(name="n@1")}, thread=thread,
                              monitors={"m@1": monitor}, drift={"m@1": dict(windows=2), "n@1": dict(watched=False)})
    _add_facts(app := FastAPI(), service)
    told = TestClient(app).get("/v1/drift").json()
    assert told == {"m@1": dict(windows=2, judged=[dict(number=0), dict(number=1)]), "n@1": dict(watched=False, judged=[])}


def test_curl_examples(server, tmp_path):
    "The commands that the docs show, with this server's address and key"
    (tmp_path/"slice.png").write_bytes(picture())
    auth = ["-H", f"Authorization: Bearer {server.key}"]
    def curl(*args): return json.loads(subprocess.run(["curl", "-sf", *auth, *args], cwd=tmp_path, capture_output=True, check=True, timeout=60).stdout)
    raw_body = curl("-H", "Content-Type: image/png", "--data-binary", "@slice.png", f"{server.url}/v1/predict")
    form = curl("-F", "file=@slice.png", f"{server.url}/v1/predict")
    assert raw_body["answers"] == form["answers"] and curl(f"{server.url}/v1/models")["champion"]


def kept(server, id):
    "The results of a batch so far, as they lie in the store"
    with open_store(str(server.store)).read() as c:
        return dict(tuple(r) for r in c.exec_driver_sql(f"SELECT n, result FROM phoenix_batch_results WHERE id = '{id}'"))


def send_batch(server, n, of=3):
    "A batch of `n` files, by turns of so many pictures, under names that must not be kept"
    data = [picture(patient=k) for k in range(of)]
    files = [("files", (f"name-of-a-patient-{k}.png", data[k % of])) for k in range(n)]
    said = httpx.post(server.url + "/v1/batch", files=files, headers={"X-API-Key": server.key}, timeout=30)
    assert said.status_code == 202, said.text
    return said.json()["id"]


def ended(server, id, seconds=120):
    return settled(lambda: get(server, f"/v1/batch/{id}").json(), lambda b: b["state"] not in ("queued", "running"), seconds)


def images_used(server):
    with open_store(str(server.store)).read() as c:
        return c.exec_driver_sql("SELECT coalesce(sum(images), 0) FROM phoenix_usage").scalar()


def spooled(server): return [p for p in server.store.with_name("s.db.spool").rglob("*") if p.is_file() and p.name != "lock"]


def test_a_killed_server_goes_on_with_its_batch(server):
    "SIGKILL of server and children in the middle: what was answered stays as it was, the rest is answered, all of it is counted once"
    single = [post(server, picture(patient=k)).json()["answers"] for k in range(3)]
    get(server, "/v1/usage")
    before, id = images_used(server), send_batch(server, 90)
    first = settled(lambda: kept(server, id), lambda r: len(r) >= 4)
    server.kill()
    first, left = kept(server, id), len(spooled(server))
    assert 4 <= len(first) < 90 and 90 - len(first) <= left <= 91 - len(first)
    done = ended(server.start().wait(), id)
    assert done["state"] == "done" and [r["file"] for r in done["results"]] == list(range(90))
    assert [r["answers"] for r in done["results"]] == [single[k % 3] for k in range(90)]
    assert {n: r for n, r in kept(server, id).items() if n in first} == first, "what was answered is not answered anew"
    assert images_used(server) - before == 90 and settled(lambda: spooled(server), lambda f: not f) == []
    assert not any(b"name-of-a-patient" in p.read_bytes() for p in server.store.parent.rglob("*") if p.is_file())


@pytest.mark.slow
def test_batches_over_kills_terms_and_another_server(model, tmp_path):
    "Three SIGKILLs, one SIGTERM, then a server that is not started again and another that takes over; the key is charged once"
    options = "plan=Plan(None, None, key_quota=1000)"
    with Server(tmp_path, model, options) as one:
        id = send_batch(one.wait(), 300)
        for seen in (20, 60, 100):
            settled(lambda: kept(one, id), lambda r: len(r) >= seen, 60)
            one.kill()
            before = kept(one, id)
            one.start().wait()
            assert {n: r for n, r in kept(one, id).items() if n in before} == before
        assert one.stop() == 0 and len(kept(one, id)) < 300, "a server that ends leaves the batch for the next"
        one.start().wait()
        with Server(tmp_path, options=options, key=one.key) as two:
            two.wait()
            settled(lambda: kept(one, id), lambda r: len(r) >= 140, 60)
            one.kill()
            done = ended(two, id)
            assert [len(r["answers"]) for r in done["results"]] == [1]*300 and images_used(two) == 300 and not spooled(two)
            with open_store(str(two.store)).read() as c:
                assert c.exec_driver_sql("SELECT used FROM phoenix_quotas WHERE subject LIKE 'key %'").scalar() == 1


@pytest.mark.slow
def test_batches_expire_and_are_cancelled_over_a_restart(model, tmp_path):
    "What expired while nobody served is gone at the next start, from store and disk; a cancelled batch stays cancelled"
    with Server(tmp_path, model, "plan=Plan(None, None), engine=EngineOptions(delay_ms=100)") as s:
        gone, cancelled = send_batch(s.wait(), 500), send_batch(s, 200)
        settled(lambda: kept(s, cancelled), lambda r: len(r) >= 3)
        state = httpx.delete(f"{s.url}/v1/batch/{cancelled}", headers=s.headers()).json()
        assert state["state"] == "cancelled" and 3 <= len(state["results"]) < 200
        s.kill()
        s.start().wait()
        assert get(s, f"/v1/batch/{cancelled}").json() == state and get(s, f"/v1/batch/{gone}").json()["state"] == "running"
        s.kill()
        with open_store(str(s.store)).write("batches") as c: c.exec_driver_sql("UPDATE phoenix_batches SET expires = expires - 3600")
        s.start().wait()
        assert [get(s, f"/v1/batch/{k}").status_code for k in (gone, cancelled)] == [404, 404]
        assert settled(lambda: spooled(s), lambda f: not f) == [] == list(kept(s, gone))


def test_sigterm_answers_what_it_accepted(server):
    "The last test of this server: callers get an answer, 429, 503 or no connection, the exit is clean, the log is whole"
    async def fire():
        seen = []
        work = asyncio.ensure_future(users(server, 4, 3, picture(), seen=seen))
        await answered(seen, 6)
        server.process.send_signal(signal.SIGTERM)
        return await work
    kinds = {x for x, _, _ in asyncio.run(fire())}
    assert {200} <= kinds <= {200, 429, 503, "ConnectError"}, kinds
    assert server.process.wait(60) == 0
    said = [json.loads(x) for x in server.log.read_text().splitlines()]
    answered_ = sum(x.get("status") == 200 and x.get("route") == "/v1/predict" for x in said)
    from phoenix.deploy.audit import AuditLog
    log = AuditLog(open_store(str(server.store)))
    chain = log.verify()
    assert chain.ok and chain.entries >= answered_ > 0
    assert sum(e["event"] == "predict" and e["status"] == 200 for e in log.tail(10_000)) == answered_
