"Contracts of attacks and robust training that hold for each of them alike; each test carries the number of the requirement it holds"
import ast
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attacks_reference import small

from phoenix.train.adversarial import AdversarialTraining, Adversary, boosted_cross_entropy, mart_loss, trades_loss
from phoenix.train.attacks import carlini_wagner, fgsm, kl, noise, pgd
from phoenix.train.autoattack import apgd, auto_attack, fab, square

LOGITS, ADV, TARGETS = torch.tensor([[2., 0., -1.], [0., 1., 0.]]), torch.tensor([[1., 1., -1.], [0., 0., 1.]]), torch.tensor([0, 2])
EPS = .05


def case(label, *values): return pytest.param(*values, id=label)


ATTACKS = [case(f"S2-R19-{name}", attack, bounded) for name, attack, bounded in (
    ("fgsm", lambda *a, **k: fgsm(*a, eps=EPS, **k), True), ("pgd", lambda *a, **k: pgd(*a, eps=EPS, steps=3, restarts=2, **k), True),
    ("pgd-kl", lambda *a, **k: pgd(*a, eps=EPS, steps=3, loss="kl", **k), True),
    ("apgd", lambda *a, **k: apgd(*a, eps=EPS, steps=5, **k), True), ("square", lambda *a, **k: square(*a, eps=EPS, queries=9, **k), True),
    ("fab", lambda *a, **k: fab(*a, steps=4, **k)[0], False),
    ("cw", lambda *a, **k: carlini_wagner(*a, steps=20, searches=2, **k)[0], False),
    ("auto", lambda *a, **k: auto_attack(*a, eps=EPS, steps=5, queries=9, **k).adv, True))]


@pytest.mark.parametrize("attack, bounded", ATTACKS)
def test_an_attack_leaves_nothing_behind_and_stays_in_its_box(attack, bounded):
    net, x, y = small()
    net.train()
    net[0].eval() # a network of mixed modes comes back mixed
    net(x).square().sum().backward()
    grads, states = [p.grad.clone() for p in net.parameters()], [p.detach().clone() for p in net.parameters()]
    modes, torch_state, numpy_state = [m.training for m in net.modules()], torch.get_rng_state(), np.random.get_state()[1].copy()
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:6, 2:6] = 1
    before = x.clone()
    adv = attack(net, x, y, mask=mask)
    assert [m.training for m in net.modules()] == modes and torch.equal(x, before) and not adv.requires_grad
    assert all(torch.equal(p.grad, g) and torch.equal(p, s) for p, g, s in zip(net.parameters(), grads, states))
    assert torch.equal(torch.get_rng_state(), torch_state) and (np.random.get_state()[1] == numpy_state).all()
    change = adv - x
    assert (change != 0).any() and not (change*(1 - mask)).any(), "outside of the mask no pixel moves"
    assert 0 <= adv.min() and adv.max() <= 1
    if bounded: assert change.abs().max() <= EPS + 1e-6, "S2-R15"
    assert torch.equal(adv, attack(net, x, y, mask=mask)), "the same key gives the same images"


@pytest.mark.parametrize("eps", [case("S2-R14-linear", .1)])
def test_fgsm_of_a_linear_network_in_closed_form(eps):
    w = torch.tensor([[1., -2., 0., .5], [-1., 1., 0., 2.]])
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2, bias=False))
    net[1].weight.data = w
    x = torch.full((1, 1, 2, 2), .5)
    assert torch.equal(fgsm(net, x, torch.tensor([0]), eps=eps), x + eps*(w[1] - w[0]).sign().view(1, 1, 2, 2))


@pytest.mark.parametrize("steps", [case("S2-R16-per-sample", 60)])
def test_carlini_wagner_searches_for_each_image_by_itself(steps):
    "Of a linear network the nearest wrong image lies at margin over the length of the weights, whatever else is in the batch"
    w = torch.tensor([3., -1., 2., .5])
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2, bias=False))
    net[1].weight.data = torch.stack([w, -w])
    x = torch.stack([.5 + .02*w/w.norm(), .5 + .15*w/w.norm()]).view(2, 1, 2, 2)
    net[1].bias = torch.nn.Parameter(-.5*net[1].weight.sum(1).detach())
    far = carlini_wagner(net, x, torch.tensor([0, 0]), steps=steps, searches=6, c=.1)[1]
    assert far.tolist() == pytest.approx([.02, .15], rel=.03)
    assert carlini_wagner(net, x[:1], torch.tensor([0]), steps=steps, searches=6, c=.1)[1].item() == pytest.approx(far[0].item(), rel=1e-4)


@pytest.mark.parametrize("share", [case("S2-R20-alone", 0.), case("S2-R20-mixed", .25)])
def test_pgd_training_is_the_cross_entropy_under_attack(share):
    at = AdversarialTraining("pgd", mix_clean=share)
    at.learn = SimpleNamespace(loss_func=F.cross_entropy)
    ce = [F.cross_entropy(z, TARGETS).item() for z in (LOGITS, ADV)]
    assert at.objective(LOGITS, ADV, TARGETS).item() == pytest.approx(share*ce[0] + (1 - share)*ce[1])


@pytest.mark.parametrize("beta", [case("S2-R21-trades", 6.)])
def test_trades_golden(beta):
    clean, adv = LOGITS.clone().requires_grad_(), ADV.clone().requires_grad_()
    loss = trades_loss(clean, adv, TARGETS, beta=beta)
    assert loss.item() == pytest.approx(.860645 + beta*.341276, abs=5e-6)
    assert kl(LOGITS, ADV).mean().item() == pytest.approx(.341276, abs=5e-7)
    assert kl(ADV, LOGITS).mean().item() == pytest.approx(.387699, abs=5e-7), "the wrong direction"
    (loss - F.cross_entropy(clean, TARGETS)).backward()
    assert clean.grad.abs().max() > .01 and adv.grad.abs().max() > .01, "both branches learn"


@pytest.mark.parametrize("far", [case("S2-R21-underflow", 2000.)])
def test_trades_has_a_gradient_where_a_probability_underflows(far):
    clean, adv = torch.tensor([[far, 0., -far]], requires_grad=True), torch.tensor([[-far, 0., far]], requires_grad=True)
    trades_loss(clean, adv, torch.tensor([0])).backward()
    assert clean.grad.isfinite().all() and adv.grad.isfinite().all()


@pytest.mark.parametrize("lam", [case("S2-R22-mart", 5.)])
def test_mart_golden(lam):
    assert boosted_cross_entropy(ADV, TARGETS).mean().item() == pytest.approx(1.089816, abs=1e-6)
    assert mart_loss(LOGITS, ADV, TARGETS, lam=lam).item() == pytest.approx(1.931626, abs=2e-6)
    clean = LOGITS.clone().requires_grad_()
    mart_loss(clean, ADV, TARGETS, lam=lam).backward()
    assert clean.grad.abs().max() > .01, "the weight of the divergence learns too"


@pytest.mark.parametrize("epochs, share", [case(f"S2-R23-warm-up-{e}", e, s) for e, s in ((0., 0.), (1., .5), (2., 1.), (9., 1.))])
def test_the_bound_grows(epochs, share): assert Adversary(8/255, warmup_epochs=2).bound(epochs) == pytest.approx(share*8/255)


@pytest.mark.parametrize("reach", [case("S2-R23-fast", 1.25)])
def test_fast_training_is_one_long_step_from_a_random_start(reach):
    "Wong et al. (2020): a uniform start, one step of 1.25 times the bound, and back into the box"
    net, x, y = small()
    one = Adversary(EPS, steps=1, step_size=reach)
    adv = pgd(net, x, y, keep="last", seed=3, **one.options(x))
    start = (x + EPS*noise(x, "uniform", seed=3, purpose="attack.0")).clamp(x - EPS, x + EPS).clamp(0, 1).requires_grad_()
    slope, = torch.autograd.grad(F.cross_entropy(net(start), y, reduction="sum"), start)
    wanted = (start + reach*EPS*slope.sign()).detach().clamp(x - EPS, x + EPS).clamp(0, 1)
    assert torch.allclose(adv, wanted, atol=1e-6)


# what is reported

ROOT = Path(__file__).resolve().parents[2]
REPORTED = [p for d in ("evaluate", "deploy") for p in sorted((ROOT / "phoenix" / d).glob("*.py"))]
KEYED = {"efficientquant.py": "np.random.default_rng(seed)"} # draws that are named here one by one: seeded, and said so


def draws(path):
    "Calls of a random function without a generator of its own"
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call): continue
        name = ast.unparse(node.func)
        free = re.fullmatch(r"np\.random\.\w+|random\.(random|uniform|choice|gauss|randint|shuffle|sample)", name)
        free = free or re.fullmatch(r"torch\.(rand|randn|randint|randperm|rand_like|randn_like|bernoulli|normal|multinomial)", name)
        if free and "generator" not in {k.arg for k in node.keywords} and ast.unparse(node) != KEYED.get(path.name): yield ast.unparse(node)


@pytest.mark.parametrize("paths", [case("S2-R47-contract-1-no-random-number-is-reported", REPORTED)])
def test_no_random_number_is_reported(paths):
    assert len(paths) > 50 and {p.name: list(draws(p)) for p in paths if list(draws(p))} == {}
