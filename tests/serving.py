"A model, a server in a process of its own, and honest and dishonest callers: what the tests of serving share"
import asyncio
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import onnx
from PIL import Image

from phoenix.data.phantom import CLASSES, phantom_slice
from phoenix.data.preprocess import Preprocess
from phoenix.deploy.package import add_runtime, save_package
from phoenix.deploy.serve import prepare_store

ROOT = Path(__file__).resolve().parents[1]
START = """
import sys
from phoenix.deploy.audit import json_logging
from phoenix.deploy.door import DoorLimits
from phoenix.deploy.engine import EngineOptions, UploadLimits
from phoenix.deploy.limits import Plan, Rule
from phoenix.deploy.serve import ServeOptions, run_server
json_logging(open(sys.argv[2], "a"))
options = eval(sys.argv[1])  # written by the test itself
sys.exit(run_server(options, port=int(sys.argv[3]), announce=lambda a: print(a, flush=True)))
"""


def picture(size=64, patient=0, format="PNG"):
    "A phantom as the bytes of a file"
    out = io.BytesIO()
    Image.fromarray(phantom_slice("glioma", patient, 0, size=size).image).save(out, format)
    return out.getvalue()


def heads(patients):
    "Phantoms of four classes in turn, one a patient"
    return [phantom_slice(CLASSES[i % 4], i, 0, size=64).image for i in patients]


def png(grey):
    "A picture as the bytes of a PNG file"
    out = io.BytesIO()
    Image.fromarray(grey).save(out, "PNG")
    return out.getvalue()


def add_reference(folder, n=64):
    "A drift reference of phantoms in a model folder: windows of 8, one false alert in 800 pictures"
    from phoenix.deploy.drift import keep_reference, reference_of
    from phoenix.deploy.package import load_package
    with tempfile.TemporaryDirectory() as root:
        paths = [Path(root, f"{i}.png") for i in range(n)]
        for p, x in zip(paths, heads(range(1000, 1000 + n))): p.write_bytes(png(x))
        package = load_package(folder)
        return keep_reference(package, reference_of(package, paths, window=8, alpha=.01))


def save_model(folder, weight=8., work=0, size=32):
    "A model folder: logits (weight × mean, 0); `work` convolutions of 32 channels make it take time"
    make, f32 = onnx.helper, onnx.TensorProto.FLOAT
    nodes, weights, at = [], [make.make_tensor("w", f32, [1, 2], [weight, 0.])], "image"
    g = np.random.default_rng(0)
    for k in range(work):
        shape = (32, 1 if k == 0 else 32, 3, 3)
        weights.append(make.make_tensor(f"c{k}", f32, shape, (g.standard_normal(shape)*.01).astype(np.float32).ravel()))
        nodes.append(make.make_node("Conv", [at, f"c{k}"], [f"y{k}"], pads=[1, 1, 1, 1]))
        at = f"y{k}"
    if work:
        weights += [make.make_tensor("zero", f32, [], [0.])]
        nodes += [make.make_node("ReduceMean", [at], ["m"], keepdims=1, noop_with_empty_axes=0),
                  make.make_node("Mul", ["m", "zero"], ["nothing"]), make.make_node("Add", ["image", "nothing"], ["seen"])]
        at = "seen"
    nodes += [make.make_node("GlobalAveragePool", [at], ["p"]), make.make_node("Flatten", ["p"], ["f"]),
              make.make_node("MatMul", ["f", "w"], ["logits"])]
    ends = [make.make_tensor_value_info(n, f32, s) for n, s in (("image", ["b", 1, "h", "w"]), ("logits", ["b", 2]))]
    net = make.make_model(make.make_graph(nodes, "mean", ends[:1], ends[1:], weights),
                          opset_imports=[make.make_opsetid("", 18)], ir_version=10)
    save_package(folder, model_name="mean", model_args={}, classes=["bright", "dark"], preprocess=Preprocess(size=(size, size)),
                 state_dict={"w": np.array([[weight, 0.]], np.float32)}, certificate_sha256="c"*64, run_hash="r"*64,
                 metrics={"accuracy": 1.}, threshold=.5, synthetic=True, published=False)
    onnx.save(net, folder/"net.onnx.tmp")
    path = folder.with_suffix(".onnx")
    (folder/"net.onnx.tmp").replace(path)
    add_runtime(folder, "fp32", path, {"ok": True})
    return folder


def save_network(folder):
    "A model folder with weights that torch can load: a small plain network as it was drawn, and its export"
    from phoenix.deploy.export import check_parity, export_onnx
    from phoenix.keys import seeded
    from phoenix.models.zoo import create_model
    args = dict(n_classes=4, c_in=1)
    with seeded(1): net = create_model("plain_tiny_none", **args).eval()
    package = save_package(folder, model_name="plain_tiny_none", model_args=args, classes=list(CLASSES), preprocess=Preprocess(size=(64, 64)),
                           state_dict=net.state_dict(), certificate_sha256="c"*64, run_hash="r"*64, metrics={"accuracy": 1.}, threshold=0.,
                           synthetic=True, published=False)
    x = np.stack([package.preprocess(g) for g in heads(range(32))])[:, None].astype(np.float32)/255
    path = export_onnx(package.model(), folder.with_suffix(".onnx"), size=64)
    add_runtime(folder, "fp32", path, check_parity(package.model(), path, x))
    return folder


class Server:
    "A server in a process group of its own, on a free port; nothing of it outlives `stop`"
    def __init__(self, folder, model=None, options="", port=0, key=None, **how):
        self.store, self.log = folder/"s.db", folder/"log.jsonl"
        with contextlib.chdir(folder):
            if model: _, made = prepare_store(str(model), store=str(self.store), **how)
        self.key = key or made
        text = f"ServeOptions(store={str(self.store)!r}, {options or 'plan=Plan(None, None)'})"
        self.how = dict(args=[sys.executable, "-c", START, text, str(self.log), str(port)], stdout=subprocess.PIPE, text=True,
                        start_new_session=True, cwd=folder, env=os.environ | {
                            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])})
        self.start()

    def start(self):
        "A process with the options that the first one had"
        self.process = subprocess.Popen(**self.how)
        self.url = self.process.stdout.readline().strip()
        self.port = int(self.url.rpartition(":")[2] or 0)
        return self

    def kill(self):
        "SIGKILL for the server and its children"
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        return self

    def __enter__(self): return self

    def __exit__(self, *_): self.stop()

    def headers(self, **more): return {"Authorization": f"Bearer {self.key}", "Content-Type": "image/png", **more}

    def wait(self, path="/readyz", status=200, seconds=90):
        "Until the path answers with the status"
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url + path, timeout=5).status_code == status: return self
            time.sleep(.1)
        raise AssertionError(f"{path} did not become {status}; {self.log.read_text()[-2000:] if self.log.exists() else ''}")

    def model_pids(self):
        "Process ids of the children, the model's among them"
        import psutil
        return [c.pid for c in psutil.Process(self.process.pid).children()]

    def stop(self, sig=signal.SIGTERM, seconds=60):
        "End the whole group; the exit status of the server"
        if self.process.poll() is None: self.process.send_signal(sig)
        try: return self.process.wait(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError): os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process.stdout.close()


def post(server, data=None, path="/v1/predict", timeout=60, **headers):
    return httpx.post(server.url + path, content=picture() if data is None else data, headers=server.headers(**headers), timeout=timeout)


def quantile(values, q):
    "A quantile of latencies, nearest rank"
    return sorted(values)[min(int(q*len(values)), len(values) - 1)]


async def answered(seen, n=1, seconds=60):
    "Until `n` of the requests were answered with 200"
    end = time.monotonic() + seconds
    while sum(s[0] == 200 for s in seen) < n and time.monotonic() < end: await asyncio.sleep(.02)


async def users(server, n, seconds, data, pause=0., seen=None):
    "`n` callers, each asking again as soon as it is answered: (status, seconds, when) of every request"
    seen, end = [] if seen is None else seen, time.perf_counter() + seconds
    limits = httpx.Limits(max_connections=n, max_keepalive_connections=n)
    async with httpx.AsyncClient(base_url=server.url, headers=server.headers(), limits=limits, timeout=60) as c:
        async def one():
            while time.perf_counter() < end:
                start = time.perf_counter()
                try: status = (await c.post("/v1/predict", content=data)).status_code
                except httpx.HTTPError as e: status = type(e).__name__
                seen.append((status, time.perf_counter() - start, start))
                if status != 200: await asyncio.sleep(.05)
                if pause: await asyncio.sleep(pause)
        await asyncio.gather(*[one() for _ in range(n)])
    return seen


ATTACK = r"""
import asyncio, contextlib, sys
port, key, n = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: image/png\r\n".encode()
kinds = (b"GET / HTT", head + b"Content-Length: 100000\r\n\r\n", head + b"Transfer-Encoding: chunked\r\n\r\n",
         b"GET / HTTP/1.1\r\nx: y", b"GET / HTTP/1.1\r\nx: " + b"y"*20_000)
async def one(k):
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(kinds[k % 5])
            while not writer.is_closing():
                writer.write(b"1\r\n1\r\n" if k % 5 == 2 else b"1")
                await writer.drain()
                await asyncio.sleep(1)
        await asyncio.sleep(.2)
async def all_of_them(): await asyncio.gather(*[one(k) for k in range(n)])
asyncio.run(all_of_them())
"""


@contextlib.contextmanager
def attackers(server, n):
    "`n` sockets that send a byte a second, lie about their length, never end or have huge heads, in a process of their own"
    process = subprocess.Popen([sys.executable, "-c", ATTACK, str(server.port), server.key, str(n)])
    try: yield process
    finally:
        process.kill()
        process.wait()


def raw(port, *pieces, wait=0., read=True, timeout=15):
    "Bytes on a socket as they are; what comes back until the server closes or the time is over"
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as s:
        out = b""
        with contextlib.suppress(ConnectionError, TimeoutError):
            for p in pieces:
                s.sendall(p)
                time.sleep(wait)
            while read and (got := s.recv(65536)):
                out += got
                if b"\r\n\r\n" in out and b"connection: close" not in out.lower(): break
        return out
