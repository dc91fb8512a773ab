"A cluster of processes gives what one process gives, also when a worker is killed on the way"
import os
import signal
from types import SimpleNamespace

import pytest

from phoenix.data.acquire import AcquireError
from phoenix.data.distributed import DistributedError, cluster_map, scan_distributed
from phoenix.data.duplicates import cluster, find_pairs, scan, signatures
from phoenix.data.phantom import Faults, make_phantom
from phoenix.data.splits import make_split, verify_certificate

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cluster") / "set"
    make_phantom(root, patients=36, slices=2, size=64, faults=Faults.some(3))
    return root


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    "Two worker processes of one thread each, under nannies that replace the dead"
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0",
                                  local_directory=tmp_path_factory.mktemp("dask")) as local:
        with distributed.Client(local) as client: yield client


def job(manifest):
    pairs = find_pairs(manifest, progress=False)
    return cluster(manifest.readable.path, pairs), make_split(manifest, pairs)


def test_a_worker_killed_on_the_way_changes_nothing(root, client, monkeypatch):
    from phoenix.data import distributed as module
    killed = []

    def murderous(client, function, items, batch):
        def slow(x):
            import time
            time.sleep(.02)
            return function(x)
        for k, result in enumerate(cluster_map(client, slow, items, batch=2)):
            if k == 4:
                killed.append(next(iter(client.run(os.getpid).values())))
                os.kill(killed[0], signal.SIGKILL)
            yield result

    monkeypatch.setattr(module, "cluster_map", murderous)
    manifest = scan_distributed(root, client, progress=False)
    assert len(killed) == 1 and killed[0] not in client.run(os.getpid).values()
    here = scan(root, progress=False)
    assert manifest.table.equals(here.table) and manifest.sha256 == here.sha256
    assert (manifest.table.problem != "").any(), "unreadable files are part of the job"
    marks, own = (signatures(m, progress=False) for m in (manifest, here))
    assert marks.paths == own.paths and (marks.hashes == own.hashes).all() and (marks.thumbs == own.thumbs).all()
    assert manifest.looks.keys() == here.looks.keys()
    (far, proof), (near, same) = job(manifest), job(here)
    assert far == near and proof.sha256 == same.sha256
    assert verify_certificate(proof, root).ok


def test_a_task_that_kills_each_worker_is_named():
    def deadly(x):
        from distributed.scheduler import KilledWorker
        raise KilledWorker("decode-7", SimpleNamespace(address="tcp://dead"), 3)
    with distributed.Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=":0") as here:
        with pytest.raises(DistributedError, match="died on decode-7.*make batch smaller"): list(cluster_map(here, deadly, [1]))
        assert list(cluster_map(here, str, range(5), batch=2)) == list("01234")


def test_errors_are_those_of_one_machine(client, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(AcquireError, match="above the classes"): scan_distributed(tmp_path / "empty", client)
    with pytest.raises(AcquireError, match="must be a folder"): scan_distributed(tmp_path / "absent", client)
