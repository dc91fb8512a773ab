"Attacks and robust training against the published implementations; attacks_reference.py wrote down what those do"
import json
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attacks_reference import CW, EPS, margins, small
from torch.utils.data import DataLoader, TensorDataset

from phoenix.train.adversarial import AdversarialTraining, Adversary
from phoenix.train.attacks import carlini_wagner, fgsm, pgd
from phoenix.train.autoattack import apgd, auto_attack, counted, fab, square
from phoenix.train.learner import make_learner
from fastai.callback.core import Callback  # isort: skip
from fastai.data.core import DataLoaders  # isort: skip

GOLDEN = json.loads(Path(__file__).with_name("attacks.json").read_text())
NET, X, Y = small()
each_eps = pytest.mark.parametrize("eps", EPS)


def test_the_network_is_the_one_of_the_record():
    for k, golden in ((4, "clean"), (3, "clean_of_3")):
        assert np.allclose(margins(*small(k)), GOLDEN[golden], atol=1e-5), "other weights or images: the record says nothing about them"


@each_eps
@pytest.mark.parametrize("name, attack", [
    ("fgsm", lambda eps: fgsm(NET, X, Y, eps=eps)),
    ("pgd", lambda eps: pgd(NET, X, Y, eps=eps, start="none", keep="last")),
    ("tpgd", lambda eps: pgd(NET, X, Y, eps=eps, loss="kl", start="normal", keep="last"))], ids=["S2-R14-fgsm", "S2-R15-pgd", "S2-R21-tpgd"])
def test_gradient_attacks_equal_torchattacks(name, attack, eps):
    "Same steps, same images: the margins agree to rounding"
    assert np.allclose(margins(NET, attack(eps), Y), GOLDEN[name][str(eps)], atol=2e-5)


@pytest.mark.parametrize("c, steps", CW, ids=[f"S2-R16-c-{c}-steps-{n}" for c, n in CW])
def test_carlini_wagner_finds_the_images_of_torchattacks(c, steps):
    """One constant at a time, as torchattacks has it: the same images become wrong, at the same distances but for rounding.

    Where torchattacks stops because the cost of the whole batch rises, no image is farther here."""
    theirs, far = GOLDEN["cw"][f"{c} {steps}"], carlini_wagner(NET, X, Y, c=c, steps=steps, searches=1)[1].numpy()
    golden = np.array(theirs["far"])
    assert (np.isfinite(far) == np.isfinite(golden)).all(), "the same images become wrong"
    assert (far <= golden * (1 + 1e-4) + 2e-6).all()
    if theirs["whole"]: assert np.allclose(far, golden, rtol=1e-4, atol=2e-6)


def test_carlini_wagner_searches_on_from_the_constant_of_torchattacks():
    "S2-R16: it makes all wrong where the constant makes 17 of 48, none is farther, and half are nearer than with any constant on record"
    first, near = GOLDEN["cw"]["0.1 200"]["far"], np.min([run["far"] for run in GOLDEN["cw"].values()], axis=0)
    far = carlini_wagner(NET, X, Y, c=.1, steps=200, searches=5)[1].numpy()
    assert np.isfinite(first).sum() == 17 and np.isfinite(far).all() and (far <= np.array(first) * (1 + 1e-4) + 2e-6).all()
    assert np.median(far / near) <= 1 and (far <= 1.1 * near).all()


@each_eps
@pytest.mark.parametrize("loss, k", [("ce", 4), ("dlr", 4), ("dlr", 3)], ids=["S2-R17-ce", "S2-R17-dlr", "S2-R17-dlr-of-3"])
def test_apgd_withstands_the_same_images_as_the_authors(loss, k, eps):
    net, x, y = small(k)
    theirs = np.array(GOLDEN[f"apgd_{loss}" + "_of_3" * (k == 3)][str(eps)]) > 0
    ours = np.array(margins(net, apgd(net, x, y, eps=eps, loss=loss), y)) > 0
    assert (ours == theirs).all(), f"{ours.sum()} images wrong, the authors' code has {theirs.sum()}"


def test_fab_finds_the_authors_distances():
    "S2-R17: the minimal changes of 48 images, by the authors' code, over three targets each"
    far = fab(NET, X, Y)[1]
    assert np.allclose(far, GOLDEN["fab"], atol=2e-6), np.abs(far.numpy() - GOLDEN["fab"]).max()


def against_the_authors(k, eps, queries):
    "Verdicts and cost of AutoAttack beside those of the authors' code"
    net, x, y = small(k)
    theirs = GOLDEN["auto"][f"{k} {eps} {queries}"]
    ours = auto_attack(net, x, y, eps=eps, queries=queries)
    assert ours.right.int().tolist() == theirs["right"], "the same images withstand"
    assert ours.passes.forward <= 1.1 * theirs["forward"] and ours.passes.backward <= 1.1 * theirs["backward"], (ours.passes, theirs)
    print(f"{k} classes, eps {eps}: forward passes {ours.passes.forward / theirs['forward']:.3f} of theirs, backward "
          f"{ours.passes.backward / theirs['backward']:.3f}")


@pytest.mark.parametrize("k", [4, 3], ids=["S2-R17-4-classes", "S2-R17-3-classes"])
def test_auto_attack_gives_the_verdicts_of_the_authors_for_no_more_passes(k):
    "With 100 queries of Square on both sides; of three classes both take the untargeted ratio"
    against_the_authors(k, .03, 100)


@pytest.mark.slow
@pytest.mark.parametrize("k, eps, queries", [(10, .02, 100), (4, .03, 5000), (4, .01, 5000), (10, .03, 5000), (3, .02, 5000)])
def test_auto_attack_in_full_length(k, eps, queries): against_the_authors(k, eps, queries)


@pytest.mark.parametrize("eps", EPS[1:])
def test_square_is_as_strong_as_the_authors_or_stronger(eps):
    "S2-R17: squares are drawn otherwise here, per image, so the number that withstands 1000 queries is compared and not which"
    left = (np.array(margins(NET, square(NET, X, Y, eps=eps, queries=1000), Y)) <= 0).sum()
    assert left <= GOLDEN["square"][str(eps)]


# a step of TRADES

class Meter(Callback):
    "Seconds of processor time and passes of each training step"
    order, run_valid = -100, False
    def before_batch(self): self.since = time.process_time()


class MeterEnd(Callback):
    order, run_valid = 1000, False
    def __init__(self): self.seconds = []
    def after_batch(self): self.seconds.append(time.process_time() - self.learn.meter.since)


def trades_learner(batches, side=64, size=16):
    "NeuroSnake in TRADES-10 on noise"
    x = torch.rand(batches * size, 1, side, side, generator=torch.Generator().manual_seed(1))
    sets = TensorDataset(x, torch.arange(len(x)) % 4), TensorDataset(x[:4], torch.arange(4))
    dls = DataLoaders(*(DataLoader(s, batch_size=size) for s in sets), device="cpu")
    dls.vocab = list("abcd")
    return make_learner(dls, "neurosnake_tiny_ca").add_cbs([AdversarialTraining("trades", Adversary(8 / 255, steps=10)), Meter(), MeterEnd()])


def run(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn


def test_a_trades_step_asks_for_the_clean_answer_once_and_not_in_every_step():
    "S2-R21: 13 forward passes; the published step takes 23, with the clean answer in each of its ten steps and twice after them"
    learn = trades_learner(batches=1, side=32)
    with counted(learn.model) as passes: run(learn)
    assert (passes.forward, passes.backward) == (16 * 13 + 4, 16 * 10)


def published_step(model, x, y, opt, eps, steps=10, beta=6.):
    "As the authors of TRADES wrote it down"
    model.eval()
    adv, total = x + .001 * torch.randn_like(x), torch.nn.KLDivLoss(reduction="sum")
    for _ in range(steps):
        adv.requires_grad_()
        grad, = torch.autograd.grad(total(F.log_softmax(model(adv), 1), F.softmax(model(x), 1)), [adv])
        adv = torch.clamp(torch.min(torch.max(adv.detach() + eps / 4 * grad.sign(), x - eps), x + eps), 0, 1)
    model.train()
    opt.zero_grad()
    loss = F.cross_entropy(model(x), y) + beta / len(x) * total(F.log_softmax(model(adv), 1), F.softmax(model(x), 1))
    loss.backward()
    opt.step()


def passes_alone(model, x, y, steps=10):
    "The passes of a TRADES step, and nothing between them"
    model.eval()
    with torch.no_grad(): model(x)
    for _ in range(steps):
        adv = x.clone().requires_grad_()
        torch.autograd.grad(model(adv).logsumexp(1).sum(), adv)
    model.train()
    (F.cross_entropy(model(x), y) + F.cross_entropy(model(x), y)).backward()


def seconds(f, *args):
    since = time.process_time()
    f(*args)
    return time.process_time() - since


@pytest.mark.slow
def test_the_price_of_a_trades_step():
    "At most 1.15 times its passes and 0.75 times the published step: processor time, interleaved, medians of eight"
    learn = run(trades_learner(batches=1))
    model, x, y, opt = learn.model, *learn.dls.train.dataset.tensors, torch.optim.AdamW(learn.model.parameters())
    ours, alone, published = [], [], []
    for _ in range(8):
        ours += run(learn).meter_end.seconds[-1:]
        alone.append(seconds(passes_alone, model, x, y))
        published.append(seconds(published_step, model, x, y, opt, 8 / 255))
    mine, bare, theirs = map(statistics.median, (ours, alone, published))
    print(f"a step takes {mine:.3f} s: {mine / bare:.3f} times its passes, {mine / theirs:.3f} times the published step")
    assert mine <= 1.15 * bare and mine <= .75 * theirs
