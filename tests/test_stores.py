"Stores of the server on SQLite and PostgreSQL: several processes, restarts and kills, and the same behaviour on both"
import json
import os
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import numpy as np
import onnx
import pytest

from phoenix.data.preprocess import Preprocess
from phoenix.deploy.audit import AuditLog
from phoenix.deploy.batches import Batches, BatchError, BatchLimits, Spool
from phoenix.deploy.drift import DriftMonitor, make_reference
from phoenix.deploy.keys import KeyInfo, Keyring, KeyRefused
from phoenix.deploy.limits import Limiter, Plan, Rule, Usage
from phoenix.deploy.package import add_runtime, save_package
from phoenix.deploy.registry import Answers, Registry, RegistryError, State, Version
from phoenix.deploy.store import StoreError, open_store, sql

SERVER = os.environ.get("TEST_POSTGRES_URL", "")
PROCESS = Path(__file__).with_name("stores_process.py")
both = pytest.mark.parametrize("url", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True)


@pytest.fixture(scope="module")
def url(request, tmp_path_factory):
    "A new database of the kind"
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('store')/'serve.db'}"
        return
    if not SERVER:
        pytest.skip("no PostgreSQL server was found: TEST_POSTGRES_URL names none (.ci/services.sh starts one)")
    sa, name = sql(), f"phoenix_{uuid.uuid4().hex[:12]}"
    main = sa.create_engine(SERVER, isolation_level="AUTOCOMMIT")
    with main.connect() as c: c.exec_driver_sql(f"CREATE DATABASE {name}")
    os.environ["PHOENIX_SECRET"] = "5e"*32
    yield sa.engine.make_url(SERVER).set(database=name).render_as_string(hide_password=False)
    del os.environ["PHOENIX_SECRET"]
    with main.connect() as c: c.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    main.dispose()


@pytest.fixture
def store(url):
    made = open_store(url)
    yield made
    made.close()


@both
def test_processes_share_a_store(url):
    "stores_process.py forks writers, starts them anew and kills them"
    done = subprocess.run([sys.executable, str(PROCESS), url], capture_output=True, text=True, timeout=300,
                          env=dict(os.environ, PYTHONHASHSEED="7"))
    assert done.returncode == 0, done.stderr
    saw = json.loads(done.stdout)
    assert saw["count"] == 24, "no update is lost"
    assert 12 <= sum(saw["first"]) + saw["again"] <= 13, "two processes and a restart hold the rate of a key"
    assert 18 <= 12 + sum(saw["tenant"]) <= 19, "keys share the tenant's rate, of which the first took 12"
    assert sum(saw["quota"]) == 9, "and its quota"
    assert saw["chain"] == [True, 16], "two writers make one chain"
    assert saw["killed"]["ok"] and saw["killed"]["doomed"] >= 12, "a killed writer leaves a whole log"
    assert saw["killed"]["waited"] < 10, "and no lock"
    state = State("m", 1, *[Version("m", i, "", "", "fp32", "", 0.) for i in (1, 2)], .3, False, "the salt")
    assert [state.serving(f"key {i}").number for i in range(100)] == saw["arms"], "arms do not depend on the process"
    assert 15 < saw["arms"].count(2) < 45 and saw["hash"] != hash("seeded")


@both
def test_a_change_is_whole_or_not_at_all(store):
    t = store.table("test_whole", sql().Column("n", sql().Integer))
    with pytest.raises(ZeroDivisionError), store.write("whole") as c:
        c.execute(t.insert().values(n=1))
        1/0
    with store.read() as c: assert c.execute(sql().select(t)).all() == []
    with pytest.raises(StoreError, match="inside another"), store.write("a"), store.write("b"): ...
    with store.write("a"): ...


@both
def test_a_reader_sees_one_moment(store, url):
    t, other = store.table("test_still", sql().Column("n", sql().Integer)), open_store(url)
    with store.read() as c:
        assert c.execute(sql().select(t)).all() == []
        with other.write("still") as w: w.execute(t.insert().values(n=1))
        assert c.execute(sql().select(t)).all() == []
    with store.read() as c: assert c.execute(sql().select(t)).all() == [(1,)]


@both
def test_the_clock_and_the_secret(store, url):
    import time
    assert abs(store.now() - time.time()) < 60
    assert store.subkey("x") == open_store(url).subkey("x") != store.subkey("y")


def test_postgres_needs_its_secret_from_outside(monkeypatch):
    from phoenix.deploy.store import Store
    monkeypatch.delenv("PHOENIX_SECRET", raising=False)
    with pytest.raises(StoreError, match="64 hex digits"): Store("postgresql+psycopg://me@/db").subkey("keys")


@both
def test_keys_on_both(store, url):
    ring, other = Keyring(store), Keyring(open_store(url))
    new = ring.add("clinic", ["predict"])
    text = new.reveal()
    assert other.authorize(text, "predict").tenant == "clinic" and other.authenticate(text[:-1]) is None
    with pytest.raises(KeyRefused) as e: other.authorize(text, "admin")
    assert e.value.status == 403
    again = ring.rotate(new.key_id, overlap_s=0).reveal()
    assert other.authenticate(text) is None and other.authenticate(again)
    ring.revoke(other.authenticate(again).key_id)
    assert other.authenticate(again) is None and ring.authenticate(again) is None
    assert [type(k) for k in ring.list("clinic")] == [KeyInfo]*2
    with store.read() as c: rows = str(c.execute(sql().select(ring._keys)).all())
    assert not any(t[4:16] in rows or t[17:] in rows for t in (text, again)) and "$argon2id$" in rows


@both
def test_limits_and_usage_on_both(store):
    now = [1e9]
    limiter = Limiter(store, Plan(Rule(6, 60., burst=2), None, key_quota=3), clock=lambda: now[0])
    assert [limiter.take("z", "lab").ok for _ in range(3)] == [True, True, False]
    wait = limiter.take("z", "lab").retry_after_s
    now[0] += wait - .01
    assert not limiter.take("z", "lab").ok
    now[0] += .01
    assert limiter.take("z", "lab").ok, "Retry-After is neither too short nor too long"
    now[0] += 60
    assert limiter.take("z", "lab").reason == "key quota"
    now[0] -= 7200
    limiter.set_plan("lab", Plan(Rule(6, 60., burst=2), None))
    assert limiter.take("z", "lab").retry_after_s <= 10, "a clock that was set back shuts nobody out"
    usage = Usage(store)
    for images in (1, 2): usage.add("lab", "z", images=images, seconds=.5)
    assert [(r["requests"], r["images"], r["seconds"]) for r in usage.rows("lab")] == [(2, 3, 1.)]


@both
def test_threads_share_a_limiter(store):
    limiter, passed = Limiter(store, Plan(Rule(1, 3600., burst=15), None)), []
    def work(): passed.extend(limiter.take("threads", "many").ok for _ in range(8))
    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert (sum(passed), len(passed)) == (15, 32)


@both
def test_the_database_refuses_to_change_the_log(store):
    log = AuditLog(store)
    log.append("first", client="192.0.2.1")
    kept, t = log.receipt(), log._log
    for change in (t.delete(), t.update().values(text="")):
        with pytest.raises(sql().exc.DatabaseError, match="new rows only"), store.write("x") as c: c.execute(change)
    assert log.verify([kept]) and not log.verify([kept | dict(seal="0"*64)])


@both
def test_a_removed_line_is_found(store):
    log = AuditLog(store)
    log.extend([dict(event="a"), dict(event="b"), dict(event="c")])
    n = log.receipt()["entries"]
    with pytest.raises(ZeroDivisionError), store.write("x") as c:
        c.exec_driver_sql("ALTER TABLE phoenix_audit DISABLE TRIGGER USER" if store.kind == "postgresql"
                          else "DROP TRIGGER phoenix_audit_DELETE")
        c.execute(log._log.delete().where(log._log.c.n == n - 2))
        assert "entries were removed" in log._judge(c, ()).reasons[0]
        1/0
    assert log.verify().ok


def rows(n, seed, shift=0.):
    g = np.random.default_rng(seed)
    return g.normal(size=(n, 6)) + shift, np.eye(2)[g.integers(0, 2, n)], g.normal(size=(n, 2)) + shift


@both
def test_a_half_full_window_survives_a_restart(store, url):
    ref = make_reference(*rows(200, 0), classes=["a", "b"], names=("x", "y"), window=16, alpha=.05)
    assert DriftMonitor(store, ref, "m@1").add(*rows(10, 1)) == []
    again = DriftMonitor(open_store(url), ref, "m@1")
    assert again.status()["waiting"] == 10
    assert {a.kind for a in again.add(*rows(22, 2, shift=3.))} >= {"embedding", "contract"}
    assert (again.status()["windows"], again.status()["waiting"]) == (2, 0)
    other = make_reference(*rows(200, 5), classes=["a", "b"], names=("x", "y"), window=16, alpha=.05)
    assert DriftMonitor(store, other, "m@1").status()["windows"] == 0, "another reference begins anew"


@both
def test_batches_on_both(store, url, tmp_path):
    "Added in one process, gone on with in another; threads that answer at once are heard once, and their usage counted once"
    lab, limits = dict(tenant=f"lab {uuid.uuid4().hex[:8]}", key_id="k"), BatchLimits(batches=3, files=8)
    one = Batches(store, Spool(tmp_path/"spool"), "m", limits)
    id = one.add([b"%d" % k for k in range(6)], **lab)["id"]
    row, left = one.begin(id)
    assert left == [0, 1, 2, 3, 4, 5] and one.keep(row, 0, {"x": 0}, images=1)
    one.spool.close()
    two = Batches(open_store(url), Spool(tmp_path/"spool"), "m", limits)
    assert two.spool.take_over() == [id] and two.begin(id)[1] == [1, 2, 3, 4, 5]
    heard = []
    def answer(b, who): heard.extend(n for n in range(6) if b.keep(row, n, {"x": who}, images=1))
    threads = [threading.Thread(target=answer, args=(b, who)) for who, b in enumerate((one, two, one, two))]
    for t in threads: t.start()
    for t in threads: t.join()
    assert sorted(heard) == [1, 2, 3, 4, 5] and two.see(id, lab["tenant"])["state"] == "done"
    assert sum(u["images"] for u in Usage(store).rows(lab["tenant"])) == 6 and one.see(id, lab["tenant"]) == two.see(id, lab["tenant"])
    for _ in range(2): two.add([b"x"], **lab)
    with pytest.raises(BatchError, match="3 are kept"): two.add([b"x"], **lab)
    assert two.tidy() == 3 and id not in two.spool.here() and len(two.spool.here()) == 2
    with store.write("batches") as c: c.execute(one._batches.update().values(expires=0))
    assert two.tidy() == 0 and two.spool.here() == []
    with pytest.raises(BatchError, match="not expired"): two.see(id, lab["tenant"])


@pytest.mark.slow
@pytest.mark.data
def test_drift_on_real_images(real_data):
    "No drift between halves of one set beyond the stated rate; inversion and a softer scanner are found"
    import cv2
    from phoenix.data.pixels import read_pixels
    from phoenix.deploy.drift import _project, describe, input_facts, judge_window
    files = sorted((real_data/"sartajbhuvaji/Training").rglob("*.jpg"))
    g = np.random.default_rng(0)
    grey = [read_pixels(files[i]).grey for i in g.permutation(len(files))[:1200]]
    probs = np.eye(4)[g.integers(0, 4, len(grey))]

    def seen(images): return np.array([describe(x) for x in images]), np.array([input_facts(x) for x in images])

    def share(ref, e, p, f, n):
        z, broken = _project(ref.arrays, e), np.array([bool(ref.violations(x)) for x in f])
        found = [judge_window(ref, z[i], p[i].argmax(1), broken[i]) for i in (g.permutation(len(e))[:32] for _ in range(n))]
        return np.mean([min(x.values()) <= ref.alpha/3 for x in found])

    e, f = seen(grey)
    null, refs = [], []
    for _ in range(4):
        i = g.permutation(len(grey))
        a, b = i[:600], i[600:]
        refs.append(make_reference(e[a], probs[a], f[a], classes=list("abcd"), window=32, alpha=.05))
        null.append(share(refs[-1], e[b], probs[b], f[b], 150))
    new = [grey[k] for k in b[:200]]
    soft = [np.clip(255*(cv2.GaussianBlur(x, (0, 0), 1.2)/255.)**.8, 0, 255).astype(np.uint8) for x in new]
    shares = {k: share(refs[-1], *(lambda s: (s[0], probs[:200], s[1]))(seen(v)), 50)
              for k, v in dict(inverted=[255 - x for x in new], soft=soft).items()}
    print(f"alerts: null {null}, {shares}")
    assert np.mean(null) <= .05 + 3*np.sqrt(.05*.95/600) and min(shares.values()) > .95, (null, shares)


def folder(root, name, scale):
    "A model folder whose network is a mean"
    make, f32 = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [make.make_node("GlobalAveragePool", ["x"], ["p"]), make.make_node("Flatten", ["p"], ["f"]),
             make.make_node("MatMul", ["f", "w"], ["y"])]
    ends = [make.make_tensor_value_info(n, f32, s) for n, s in (("x", ["b", 1, "h", "w"]), ("y", ["b", 2]))]
    graph = make.make_graph(nodes, "mean", ends[:1], ends[1:], [make.make_tensor("w", f32, [1, 2], [scale, 0.])])
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=10), root/"n.onnx")
    save_package(root/name, model_name="mean", model_args={"c_in": 1}, state_dict={"w": np.float32([[scale, 0.]])},
                 classes=["bright", "dark"], preprocess=Preprocess(size=(32, 32)), certificate_sha256="c"*64,
                 run_hash="r"*64, metrics={"accuracy": .75}, threshold=.8, synthetic=True, published=False)
    add_runtime(root/name, "fp32", root/"n.onnx", {"ok": True})
    return root/name


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [folder(root, f"m{i}", 8. + i) for i in range(2)]


@both
def test_registry_on_both(store, url, folders):
    registry, other, how = Registry(store), Registry(open_store(url)), dict(who="ada", why="test")
    for f in folders: registry.register(f, "tumour")
    registry.promote("tumour", 1, **how)
    registry.promote("tumour", 2, alias="challenger", **how)
    registry.split("tumour", .25, **how)
    assert (other.state("tumour").share, other.state("tumour").challenger.number) == (.25, 2)
    assert other.promote("tumour", 2, **how).challenger is None
    assert registry.state("tumour").champion.number == 2, "seen without a restart"
    assert other.rollback("tumour", **how).champion.number == 1
    assert [m["action"] for m in registry.history("tumour")] == ["promote", "promote", "split 0.25", "promote", "drop",
                                                                 "rollback"]
    with pytest.raises(sql().exc.DatabaseError, match="new rows only"), store.write("x") as c:
        c.execute(registry._moves.delete())
    answers = Answers(store)
    for i in range(12):
        for n in (1, 2): answers.record("tumour", f"r{i}", n, [.9, .1] if n == 2 or i % 3 else [.1, .9], shown=n == 1)
        answers.truth("tumour", f"r{i}", "bright")
    told = answers.compare("tumour", 1, 2, classes=["bright", "dark"], n=200)
    assert (told.test.only_a, told.test.only_b, told.requests) == (4, 0, 12) and told.test.p == pytest.approx(.125)


def test_a_move_that_fails_half_way_leaves_everything(tmp_path, folders, monkeypatch):
    store = open_store(tmp_path/"a.db")
    registry, how = Registry(store), dict(who="ada", why="test")
    for f in folders: registry.register(f, "tumour")
    registry.promote("tumour", 1, **how)
    registry.promote("tumour", 2, alias="challenger", **how)
    before = registry.state("tumour"), registry.history("tumour")
    import phoenix.deploy.registry as module
    real, calls = module._record, []
    def record(*a):
        calls.append(a)
        if len(calls) == 2: raise OSError("disk full")
        return real(*a)
    monkeypatch.setattr(module, "_record", record)
    with pytest.raises(OSError): registry.promote("tumour", 2, **how)
    assert len(calls) == 2 and (registry.state("tumour"), registry.history("tumour")) == before


def test_promote_refuses_a_folder_that_changed(tmp_path, folders):
    import shutil
    registry = Registry(open_store(tmp_path/"a.db"))
    shutil.copytree(folders[0], tmp_path/"m")
    registry.register(tmp_path/"m", "tumour")
    (tmp_path/"m/card.md").write_text("better")
    with pytest.raises(ValueError, match="changed"): registry.promote("tumour", 1, who="ada", why="x")
    with pytest.raises(RegistryError, match="promote a version"): registry.state("tumour").serving("k")


def test_a_reference_is_made_by_the_models_own_network(tmp_path, folders):
    import cv2
    from phoenix.deploy.drift import reference_of
    from phoenix.deploy.package import load_package
    g = np.random.default_rng(0)
    for i in range(48): cv2.imwrite(str(tmp_path/f"{i}.png"), g.integers(0, 255, (32, 32), dtype=np.uint8))
    paths, package = sorted(tmp_path.glob("*.png")), load_package(folders[0])
    ref = reference_of(package, paths, window=8, alpha=.05)
    assert ref.classes == ("bright", "dark") and ref.arrays["mix"][0] > .9, "the mean of noise is bright"


@both
def test_secrets_are_in_no_output(store, capsys, caplog):
    from phoenix.deploy.keys import keys_list, keys_revoke
    ring = Keyring(store)
    new = ring.add("quiet", ["read"])
    shown = f"{new} {ring} {store} {vars(ring.list('quiet')[0])}"
    text = new.reveal()
    ring.authenticate(text), ring.authenticate(text + "x")
    for f in (lambda: ring.authorize(text, "admin"), lambda: ring.authorize(text + "x", "read")):
        with pytest.raises(KeyRefused) as e: f()
        shown += str(e.value) + repr(e.value)
    at = store.engine.url.render_as_string(hide_password=False)
    shown += str(keys_list(tenant="quiet", store=at)) + str(keys_revoke(new.key_id, store=at))
    out = capsys.readouterr()
    assert text[17:] not in shown + out.out + out.err + caplog.text and text[4:16] not in shown + out.out + out.err + caplog.text
