"""Writes attacks.json: what the published attacks do to a small network of fixed weights.

Runs where torchattacks 3.5.1 and pyautoattack 0.2.0 (the authors' AutoAttack, packaged) can be imported; both are installed without their
dependencies, which pin an old requests:  pip install --no-deps torchattacks==3.5.1 pyautoattack==0.2.0
Random starts are taken from phoenix's keys, so that the ascent is compared and not the luck of the start.
Words after the command are parts of the record that are written anew; all are without any.
"""
import json
import sys
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

from phoenix.train.attacks import noise
from phoenix.train.autoattack import counted

EPS, FILE = (.01, .02, .04), Path(__file__).with_name("attacks.json")
CW = (.03, 200), (.1, 200), (1., 100), (10., 100), (1., 200) # constant and steps of Carlini and Wagner's attack
AUTO = (4, .03, 100), (10, .02, 100), (4, .03, 5000), (4, .01, 5000), (10, .03, 5000), (3, .03, 100), (3, .02, 5000)


def small(k=4, width=32, seed=3, n=48):
    "A network of 64 pixels with fixed weights, and images that it gets right"
    draw = np.random.default_rng(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, k))
    with torch.no_grad():
        for layer, size in zip((net[1], net[3]), ((width, 64), (k, width))):
            layer.weight.copy_(torch.from_numpy(draw.normal(size=size) / size[1]**.5))
            layer.bias.zero_()
        x = torch.from_numpy(draw.uniform(size=(n, 1, 8, 8))).float()
        net[3].bias.sub_(net(x).mean(0))
    return net.eval(), x, net(x).argmax(1)


def margins(net, x, y):
    "The best wrong logit minus the true one"
    z = net(x).detach()
    own = z.gather(1, y[:, None])[:, 0]
    return (z.scatter(1, y[:, None], -torch.inf).amax(1) - own).tolist()


def of_torchattacks():
    import torchattacks
    (net, x, y), found = small(), dict(fgsm={}, pgd={}, tpgd={})
    normal = noise(x, "normal", purpose="attack.0")
    for e in EPS:
        found["fgsm"][e] = margins(net, torchattacks.FGSM(net, eps=e)(x, y), y)
        found["pgd"][e] = margins(net, torchattacks.PGD(net, eps=e, alpha=e / 4, steps=10, random_start=False)(x, y), y)
        with mock.patch("torch.randn_like", lambda _: normal):
            found["tpgd"][e] = margins(net, torchattacks.TPGD(net, eps=e, alpha=e / 4, steps=10)(x, y), y)
    return found


class Raised(nn.Module):
    "The same answers with logits above 0: torchattacks' CW takes no logit below it for the best of the others"
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x): return self.net(x) + 10


def of_carlini_wagner():
    "Distances, infinite where no image became wrong, and whether every step was taken: it stops where the cost of the batch rises"
    import torchattacks
    (net, x, y), found = small(), {}
    for c, steps in CW:
        with counted(net) as passes: adv = torchattacks.CW(Raised(net).eval(), c=c, kappa=0, steps=steps, lr=.01)(x, y)
        far = torch.where(net(adv).argmax(1) != y, (adv - x).flatten(1).norm(dim=1), torch.inf)
        found[f"{c} {steps}"] = dict(far=far.tolist(), whole=passes.forward == steps * len(x))
    return dict(cw=found)


def of_apgd():
    from pyautoattack.autopgd_base import APGDAttack
    found = dict(apgd_ce={}, apgd_dlr={}, apgd_dlr_of_3={})
    for name, loss, k in (("apgd_ce", "ce", 4), ("apgd_dlr", "dlr", 4), ("apgd_dlr_of_3", "dlr", 3)):
        net, x, y = small(k)
        uniform = noise(x, "uniform", purpose="apgd")
        for e in EPS:
            with mock.patch("torch.rand", lambda *_: (uniform + 1) / 2):
                attack = APGDAttack(net, n_iter=100, norm="Linf", eps=e, seed=0, loss=loss, device="cpu")
                found[name][e] = margins(net, attack.perturb(x, y), y)
    return found


def of_fab_and_square():
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack
    (net, x, y), found = small(), dict(square={})
    for e in EPS:
        blind = SquareAttack(net, p_init=.8, n_queries=1000, eps=e, norm="Linf", n_restarts=1, seed=0, device="cpu", resc_schedule=False)
        found["square"][e] = (net(blind.perturb(x, y)).argmax(1) == y).sum().item()
    near, attack = torch.full((len(x),), torch.inf), FABAttack_PT(net, norm="Linf", n_iter=100, targeted=True, device="cpu")
    for attack.target_class in (2, 3, 4):
        adv = attack.attack_single_run(x, y, is_targeted=True)
        near = torch.where(net(adv).argmax(1) != y, torch.minimum(near, (adv - x).abs().amax((1, 2, 3))), near)
    return found | dict(fab=near.tolist())


# of three classes there is no targeted ratio: the untargeted one takes its place, as phoenix's report says
THREE = dict(version="custom", attacks=["apgd-ce", "apgd-dlr", "fab-t", "square"])


def of_auto_attack():
    from pyautoattack import AutoAttack
    found = {}
    for k, e, queries in AUTO:
        net, x, y = small(k)
        whole = AutoAttack(net, norm="Linf", eps=e, device="cpu", seed=0, **(THREE if k == 3 else dict(version="standard")))
        whole.apgd.n_restarts = whole.fab.n_restarts = 1
        whole.apgd_targeted.n_target_classes = whole.fab.n_target_classes = k - 1
        whole.square.n_queries = queries
        with counted(net) as passes: adv, _ = whole.run_standard_evaluation(x.clone(), y.clone(), batch_size=250)
        found[f"{k} {e} {queries}"] = dict(right=(net(adv).argmax(1) == y).int().tolist(), **vars(passes))
    return dict(auto=found)


PARTS = dict(torchattacks=of_torchattacks, cw=of_carlini_wagner, apgd=of_apgd, fab=of_fab_and_square, auto=of_auto_attack)


def main(*parts):
    found = json.loads(FILE.read_text()) if parts else {}
    found |= dict(provenance=dict(torchattacks=version("torchattacks"), pyautoattack=version("pyautoattack"), torch=torch.__version__),
                  clean=margins(*small()), clean_of_3=margins(*small(3)))
    for part in parts or PARTS: found |= PARTS[part]()
    FILE.write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__": sys.exit(main(*sys.argv[1:]))
