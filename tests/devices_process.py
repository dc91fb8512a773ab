"What tests/test_devices.py runs: one training on one process, or on two that are forked and meet in gloo"
import functools
import os
import signal
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from fastai.callback.core import Callback

import phoenix.train.devices as devices
from phoenix.data.acquire import build_manifest
from phoenix.data.augment import Augment
from phoenix.data.duplicates import find_pairs
from phoenix.data.phantom import make_phantom
from phoenix.data.preprocess import Preprocess
from phoenix.data.splits import make_split
from phoenix.records import read_json
from phoenix.train.learner import fit


class Cast(Callback):
    "Pictures in the precision of the network"
    order = -10

    def before_batch(self): self.learn.xb = (self.xb[0].to(next(self.model.parameters()).dtype),)
    def after_batch(self): self.learn.loss = self.loss.float() # what fastai's recorder keeps


def phantom(folder):
    "A small set with classes of unequal size, so that weights matter, and its split"
    make_phantom(folder/"made", patients=32, slices=1, size=64, seed=3)
    rows = build_manifest(folder/"made", progress=False).table
    few = rows.label.eq(rows.label.iloc[0]) & (rows.groupby("label").cumcount() > 3)
    for r in rows[~few].itertuples():
        to = folder/"phantom"/r.label/f"{r.Index}.png"
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes((folder/"made"/r.path).read_bytes())
    manifest = build_manifest(folder/"phantom", progress=False)
    assert manifest.table.label.value_counts().nunique() > 1
    return manifest, make_split(manifest, find_pairs(manifest, progress=False), fractions=(.6, .2, .2))


def job(folder, name, data, **changes):
    "A job with class weights and augmentation, without dropout"
    how = dict(model="neurosnake_tiny_ca", model_options=dict(dropout=0.), preprocess=Preprocess(size=(32, 32)), epochs=2,
               augment=Augment.default(32), batch_size=6, cache_dir=folder/"cache", warmup_epochs=0, weights="balanced")
    return devices.write_job(folder/name, *data, run_dir=folder/name/"run", **(how | changes))


class FirstGradient(Callback):
    "Keep the gradient of the first step, before it is clipped"
    order = 19

    def __init__(self, path): self.path = path
    def before_step(self):
        if not self.path.exists(): torch.save(torch.cat([p.grad.flatten() for g in self.opt.param_lists for p in g]), self.path)


def learner(*args, dtype, make=devices.learner_of_job, eps=None, rank=0):
    "The job's learner in a precision, its optimizer with another epsilon where one is given"
    learn = make(*args)
    learn.model.to(dtype), learn.loss_func.to(dtype)
    if eps: learn.opt_func = functools.partial(learn.opt_func, eps=eps)
    return learn.add_cbs([Cast(), FirstGradient(Path(args[0]).with_name(f"gradient{rank}.pt"))])


def alone(path, dtype=torch.float64, eps=None):
    "Weights of the job, trained in this process"
    learn, options = learner(path, dtype=dtype, eps=eps), read_json(path)
    fit(learn, options["epochs"], progress=False, resume=True, **options["options"]["fit"])
    return learn.model.state_dict()


class Kill(Callback):
    "The process ends as by kill -9 in the middle of an epoch"
    def __init__(self, epoch): self.at = epoch
    def after_step(self):
        if self.epoch == self.at: os.kill(os.getpid(), signal.SIGKILL)


def _child(path, rank, world, dtype, run, kill_at, eps):
    def make(*args):
        made = learner(*args, dtype=dtype, eps=eps, rank=rank)
        if kill_at is not None: made.add_cb(Kill(kill_at))
        return made
    devices.learner_of_job = make
    store = dist.FileStore(str(path.with_name(f"store{run}")), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    learn = devices.run_job(path, rank, world)
    torch.save(learn.model.state_dict(), path.with_name(f"weights{rank}.pt"))


def together(path, world=2, dtype=torch.float64, run=0, kill_at=None, eps=None):
    "Weights of the job on each of several forked processes"
    children = []
    for rank in range(world):
        if not (child := os.fork()):
            code = 1
            try:
                torch.set_num_threads(1)
                _child(Path(path), rank, world, dtype, run, kill_at, eps)
                code = 0
            except BaseException: traceback.print_exc()
            finally: os._exit(code)
        children.append(child)
    ended = [os.waitpid(c, 0)[1] for c in children]
    if kill_at is not None: return None
    assert ended == [0]*world
    return [torch.load(path.with_name(f"weights{r}.pt")) for r in range(world)]


def furthest(one, two):
    "Largest difference between two sets of weights"
    return max(float((one[k].double() - two[k].double()).abs().max()) for k in one)
