"What several server processes do to one store at the same time: run by test_stores.py, one JSON object on stdout"
import json
import os
import signal
import sys
import time

from phoenix.deploy.audit import AuditLog
from phoenix.deploy.limits import Limiter, Plan, Rule
from phoenix.deploy.registry import State, Version
from phoenix.deploy.store import open_store, sql

URL = sys.argv[1]


def forked(*works):
    "Results of functions that run at the same time, each in a process of its own"
    pipes = []
    for work in works:
        r, w = os.pipe()
        pid = os.fork()
        if not pid:
            try: os.write(w, json.dumps(work()).encode())
            finally: os._exit(0)
        os.close(w)
        pipes.append((pid, r))
    out = []
    for pid, r in pipes:
        with os.fdopen(r) as f: out.append(json.loads(f.read() or "null"))
        os.waitpid(pid, 0)
    return out


def count():
    "Read, wait, write: lost updates would show"
    store = open_store(URL)
    t = store.table("test_count", sql().Column("n", sql().Integer))
    for _ in range(12):
        with store.write("count") as c:
            n = c.execute(sql().select(t.c.n)).scalar()
            time.sleep(.001)
            c.execute(t.insert().values(n=1) if n is None else t.update().values(n=n + 1))
    return n


def take(n, key="k"):
    "How many of n requests pass"
    limiter = Limiter(open_store(URL), Plan(Rule(1, 3600., burst=12), Rule(1, 3600., burst=18), tenant_quota=10_000))
    return sum(limiter.take(key, "clinic").ok for _ in range(n))


def quota(n):
    limiter = Limiter(open_store(URL), Plan(None, None, tenant_quota=9))
    return [d.reason for d in (limiter.take("k", "other") for _ in range(n))].count("")


def log(event):
    audit = AuditLog(open_store(URL))
    for i in range(8): audit.append(event, count=i)
    return i


def until_killed():
    "Write without an end"
    limiter, audit = Limiter(open_store(URL), Plan(Rule(1000))), AuditLog(open_store(URL))
    while True:
        limiter.take("doomed", "doomed")
        audit.append("doomed")


def killed():
    "SIGKILL in the middle of writing, three times; then the log is whole, and nobody waits for the dead"
    for i in range(3):
        pid = os.fork()
        if not pid: until_killed()
        store, before = open_store(URL), AuditLog(open_store(URL)).receipt()["entries"]
        while AuditLog(store).receipt()["entries"] < before + 4 + i: time.sleep(.003)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    store = open_store(URL)
    began = time.monotonic()
    Limiter(store, Plan()).take("alive", "doomed")
    chain = AuditLog(store).verify()
    return dict(ok=chain.ok, reasons=chain.reasons, waited=time.monotonic() - began,
                doomed=sum(e["event"] == "doomed" for e in AuditLog(store).tail(10**6)))


def arms():
    "Arms of a hundred keys"
    v = [Version("m", i, "", "", "fp32", "", 0.) for i in (1, 2)]
    state = State("m", 1, *v, .3, False, "the salt")
    return [state.serving(f"key {i}").number for i in range(100)]


if __name__ == "__main__":
    open_store(URL).subkey("first")
    count_first = forked(count, count)
    out = dict(count=max(count_first) + 1, first=forked(lambda: take(12), lambda: take(12)), again=forked(lambda: take(3))[0])
    out |= dict(tenant=forked(lambda: take(6, "a"), lambda: take(6, "b")), quota=forked(lambda: quota(7), lambda: quota(7)))
    out["logged"] = forked(lambda: log("one"), lambda: log("two"))
    chain = AuditLog(open_store(URL)).verify()
    out |= dict(chain=[chain.ok, chain.entries], killed=killed(), arms=arms())
    out["hash"] = hash("seeded")
    print(json.dumps(out))
