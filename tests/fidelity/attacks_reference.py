"""Writes attacks.json: what the published attacks do to a small network of fixed weights.

Runs where torchattacks 3.5.1 and pyautoattack 0.2.0 (the authors' AutoAttack, packaged) can be imported; both are installed without their
dependencies, which pin an old requests:  pip install --no-deps torchattacks==3.5.1 pyautoattack==0.2.0
Random starts are taken from phoenix's keys, so that the ascent is compared and not the luck of the start.
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


def main():
    import torchattacks
    from pyautoattack import AutoAttack
    from pyautoattack.autopgd_base import APGDAttack
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack
    net, x, y = small()
    normal, uniform = noise(x, "normal", purpose="attack.0"), noise(x, "uniform", purpose="apgd")
    found = dict(provenance=dict(torchattacks=version("torchattacks"), pyautoattack=version("pyautoattack"), torch=torch.__version__),
                 clean=margins(net, x, y), fgsm={}, pgd={}, tpgd={}, apgd_ce={}, apgd_dlr={}, square={}, auto={})
    for e in EPS:
        found["fgsm"][e] = margins(net, torchattacks.FGSM(net, eps=e)(x, y), y)
        found["pgd"][e] = margins(net, torchattacks.PGD(net, eps=e, alpha=e / 4, steps=10, random_start=False)(x, y), y)
        with mock.patch("torch.randn_like", lambda _: normal):
            found["tpgd"][e] = margins(net, torchattacks.TPGD(net, eps=e, alpha=e / 4, steps=10)(x, y), y)
        for loss in ("ce", "dlr"):
            with mock.patch("torch.rand", lambda *_: (uniform + 1) / 2):
                attack = APGDAttack(net, n_iter=100, norm="Linf", eps=e, seed=0, loss=loss, device="cpu")
                found[f"apgd_{loss}"][e] = margins(net, attack.perturb(x, y), y)
        blind = SquareAttack(net, p_init=.8, n_queries=1000, eps=e, norm="Linf", n_restarts=1, seed=0, device="cpu", resc_schedule=False)
        found["square"][e] = (net(blind.perturb(x, y)).argmax(1) == y).sum().item()
    near, attack = torch.full((len(x),), torch.inf), FABAttack_PT(net, norm="Linf", n_iter=100, targeted=True, device="cpu")
    for attack.target_class in (2, 3, 4):
        adv = attack.attack_single_run(x, y, is_targeted=True)
        near = torch.where(net(adv).argmax(1) != y, torch.minimum(near, (adv - x).abs().amax((1, 2, 3))), near)
    found["fab"] = near.tolist()
    for k, e, queries in ((4, .03, 100), (10, .02, 100), (4, .03, 5000), (4, .01, 5000), (10, .03, 5000)):
        net, x, y = small(k)
        whole = AutoAttack(net, norm="Linf", eps=e, version="standard", device="cpu", seed=0)
        whole.apgd_targeted.n_target_classes = whole.fab.n_target_classes = k - 1
        whole.square.n_queries = queries
        with counted(net) as passes: adv, _ = whole.run_standard_evaluation(x.clone(), y.clone(), batch_size=250)
        found["auto"][f"{k} {e} {queries}"] = dict(right=(net(adv).argmax(1) == y).int().tolist(), **vars(passes))
    FILE.write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__": sys.exit(main())
