"Golden values and properties of the losses; each test carries the number of the requirement it holds"
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from phoenix.evaluate.calibration import fit_temperature
from phoenix.train.losses import (BinaryCrossEntropy, BinaryFocal, Boundary, CalibrationLoss, CrossEntropy, Dice, Focal, LossError,
                                  Tversky, best_thresholds, check_finite, pos_weights, task_loss)

LOGITS, TARGETS = torch.tensor([[2., 0., -1.], [0., 1., 0.]]), torch.tensor([0, 2])
REDUCTIONS = "none", "mean", "sum"


def case(label, *values): return pytest.param(*values, id=label)


def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def multi_class(loss, b=8, k=4, seed=0):
    "Logits and classes"
    return loss, draw(b, k, seed=seed) * 3, torch.arange(b) % k


def multi_label(loss, b=8, k=4, seed=0):
    "Logits and labels"
    return loss, draw(b, k, seed=seed) * 3, (draw(b, k, seed=seed + 1) > 0).long()


CLASS = [case(f"S2-R{n}-{name}", cls, kw) for n, name, cls, kw in (
    (2, "cross-entropy", CrossEntropy, dict(label_smoothing=0.)), (2, "weighted", CrossEntropy, dict(weight=torch.tensor([1., 2., .5, 3.]))),
    (7, "smoothed-others", CrossEntropy, dict(spread="others")), (3, "focal", Focal, dict(alpha=torch.tensor([1., 2., .5, 3.]))),
    (3, "focal-half", Focal, dict(gamma=.5)))]
LABEL = [case(f"S2-R{n}-{name}", cls, kw) for n, name, cls, kw in (
    (4, "binary", BinaryCrossEntropy, dict(label_smoothing=0.)),
    (5, "pos-weight", BinaryCrossEntropy, dict(pos_weight=torch.tensor([1., 2., .5, 3.]))),
    (5, "binary-focal", BinaryFocal, dict()), (5, "binary-focal-half", BinaryFocal, dict(gamma=.5, label_smoothing=.1)))]


# golden values

@pytest.mark.parametrize("temperature, value", [case("S2-R2-T1", 1., .860645), case("S2-R2-T1.5", 1.5, .854426)])
def test_cross_entropy_golden(temperature, value):
    loss = CrossEntropy(label_smoothing=0., temperature=True)
    torch.nn.init.constant_(loss.log_temperature, math.log(temperature))
    assert loss(LOGITS, TARGETS).item() == pytest.approx(value, abs=5e-7)


@pytest.mark.parametrize("frozen", [case("S2-R2-temperature-is-frozen", CrossEntropy), case("S2-R5-temperature-is-frozen", BinaryCrossEntropy)])
def test_temperature_is_frozen_by_default(frozen): assert not list(frozen().parameters())


@pytest.mark.parametrize("reduction", [case(f"S2-R3-{r}", r) for r in REDUCTIONS])
def test_focal_golden(reduction):
    value = Focal(2., label_smoothing=0., reduction=reduction)(LOGITS, TARGETS)
    golden = dict(none=torch.tensor([.0041, .9635]), mean=torch.tensor(.483824), sum=torch.tensor(.967648))[reduction]
    assert torch.allclose(value, golden, atol=5e-5 if reduction == "none" else 1.1e-6, rtol=0)


@pytest.mark.parametrize("eps", [case(f"S2-R3-gamma-0-smoothing-{e}", e) for e in (0., .1)])
def test_focal_without_focus_is_cross_entropy(eps):
    _, z, y = multi_class(None)
    for r in REDUCTIONS:
        assert torch.allclose(Focal(0., label_smoothing=eps, reduction=r)(z, y), CrossEntropy(eps, reduction=r)(z, y), atol=1e-6, rtol=0)


@pytest.mark.parametrize("alpha", [case("S2-R3-binary-alpha", .25)])
def test_binary_alpha_belongs_to_the_positive_class(alpha):
    z, y = draw(6, 2), torch.tensor([0, 1, 1, 0, 1, 0])
    ratio = Focal(alpha=alpha, reduction="none")(z, y) / Focal(reduction="none")(z, y)
    assert torch.allclose(ratio, torch.where(y == 1, alpha, 1 - alpha), atol=1e-6)


@pytest.mark.parametrize("gamma", [case(f"S2-R5-sigmoid-gamma-{g}", g) for g in (0., .5, 2., 5.)])
def test_binary_focal_equals_torchvision(gamma):
    from torchvision.ops import sigmoid_focal_loss
    _, z, y = multi_label(None)
    theirs = sigmoid_focal_loss(z.double(), y.double(), alpha=.25, gamma=gamma)
    assert torch.allclose(BinaryFocal(gamma, reduction="none").double()(z.double(), y), theirs, atol=1e-12)


@pytest.mark.parametrize("logit", [case("S2-R4-minus-40", -40.)])
def test_binary_cross_entropy_golden(logit):
    z = torch.tensor([[logit]], requires_grad=True)
    loss = BinaryCrossEntropy(label_smoothing=0.)(z, torch.tensor([[1]]))
    loss.backward()
    assert loss.item() == pytest.approx(40, abs=1e-6) and z.grad.item() == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("eps", [case("S2-R5-smoothing", .2)])
def test_multi_label_smoothing(eps):
    _, z, y = multi_label(None)
    theirs = F.binary_cross_entropy_with_logits(z, y * (1 - eps) + eps / 2)
    assert torch.allclose(BinaryCrossEntropy(eps)(z, y), theirs, atol=1e-6)


@pytest.mark.parametrize("share, weight", [case("S2-R5-one-in-four", .25, 3.), case("S2-R5-rare", .001, 100.), case("S2-R5-common", .99, .1)])
def test_pos_weights_are_clamped(share, weight):
    labels = (torch.arange(1000) < 1000 * share).long()[:, None]
    assert pos_weights(labels).item() == pytest.approx(weight)


@pytest.mark.parametrize("classes", [case("S2-R5-thresholds", 3)])
def test_thresholds_against_a_slow_search(classes):
    from sklearn.metrics import f1_score
    p, y = torch.rand(60, classes, generator=torch.Generator().manual_seed(3)), (draw(60, classes) > .5).long()
    y[:, -1] = 0
    found, f1 = best_thresholds(p, y)
    grid = np.linspace(.1, .9, 81)
    for k in range(classes - 1):
        scores = [f1_score(y[:, k], p[:, k].double().numpy() >= t, zero_division=0) for t in grid]
        assert f1[k].item() == pytest.approx(max(scores), abs=1e-6)
        assert found[k].item() == pytest.approx(grid[int(np.argmax(scores))], abs=1e-9)
    assert found[-1].isnan() and f1[-1].isnan()


@pytest.mark.parametrize("task, kind", [case(f"S2-R6-{t}-{k}", t, k) for t in ("multi_class", "multi_label") for k in ("cross_entropy", "focal")])
def test_facade(task, kind):
    _, z, y = (multi_class if task == "multi_class" else multi_label)(None)
    assert task_loss(task, kind=kind)(z, y).isfinite()


@pytest.mark.parametrize("spread", [case("S2-R7-all", "all"), case("S2-R7-others", "others")])
def test_smoothing_forms(spread):
    eps, (_, z, y) = .1, multi_class(None)
    target = F.one_hot(y, 4).float()
    soft = target * (1 - eps) + (eps / 4 if spread == "all" else (1 - target) * eps / 3)
    assert torch.allclose(CrossEntropy(eps, spread=spread)(z, y), -(soft * z.log_softmax(1)).sum(1).mean(), atol=1e-6)


@pytest.mark.parametrize("factor", [case(f"S2-R8-{f}", f) for f in (.3, 1., 3.)])
def test_temperature_never_raises_the_validation_loss(factor):
    g = torch.Generator().manual_seed(2)
    true = torch.randn(400, 4, generator=g)
    y, z = torch.multinomial(true.softmax(1), 1, generator=g)[:, 0], factor * true
    T = fit_temperature(z.numpy(), y.numpy())
    after, before = (F.cross_entropy(x.double(), y).item() for x in (z / float(getattr(T, "temperature", T)), z))
    assert after <= before + 1e-9


@pytest.mark.parametrize("strength", [case("S2-R9-soft-ece", 1.)])
def test_calibration_loss_pulls_confidence_towards_accuracy(strength):
    "An overconfident network whose answers are right two times in three: the extra term lowers the largest logit"
    z = torch.tensor([[4., 0.]]).repeat(30, 1).requires_grad_()
    y = (torch.arange(30) % 3 == 0).long()
    (CalibrationLoss(strength)(z, y) - CrossEntropy(0.)(z, y)).backward()
    assert z.grad[:, 0].sum() > 0


# properties

@pytest.mark.parametrize("make, cases", [case("S2-R1-class", multi_class, CLASS), case("S2-R1-label", multi_label, LABEL)])
def test_reductions_agree(make, cases):
    for cls, kw in (c.values for c in cases):
        _, z, y = make(None)
        none, mean, total = (cls(reduction=r, **kw)(z, y) for r in REDUCTIONS)
        assert torch.allclose(none.sum(), total, rtol=1e-5) and torch.allclose(total / cls(**kw).total(y), mean, rtol=1e-5)


@pytest.mark.parametrize("where", [case("S2-R1-first-bad-index", (3, 1))])
def test_nan_names_its_index(where):
    z = draw(5, 3)
    z[where] = z[4, 2] = torch.nan
    with pytest.raises(ValueError, match=r"index \(3, 1\)"): check_finite(z)


@pytest.mark.parametrize("cls, kw", CLASS + LABEL)
def test_batches_must_match(cls, kw):
    y = torch.zeros(3, dtype=torch.long) if issubclass(cls, CrossEntropy) else torch.zeros(3, 4)
    with pytest.raises(LossError, match="unchanged"): cls(**kw)(draw(4, 4), y)


@pytest.mark.parametrize("cls, kw", CLASS + LABEL)
def test_batch_of_none(cls, kw):
    "S2 edge case: the sum of nothing is 0 and has a gradient, the mean of nothing is an error"
    z = torch.zeros(0, 4, requires_grad=True)
    y = torch.zeros(0, dtype=torch.long) if issubclass(cls, CrossEntropy) else torch.zeros(0, 4)
    loss = cls(reduction="sum", **kw)(z, y)
    loss.backward()
    assert loss.item() == 0 and z.grad.shape == (0, 4)
    with pytest.raises(LossError, match="at least one sample"): cls(**kw)(z, y)


@pytest.mark.parametrize("cls", [Dice, Tversky, Boundary])
def test_mask_batch_of_none(cls):
    "As for classes: the sum over no image is 0 with a gradient, the mean is an error"
    for classes in (1, 3):
        z, y = torch.zeros(0, classes, 6, 5, requires_grad=True), torch.zeros(0, 6, 5, dtype=torch.long)
        loss = cls(reduction="sum")(z, y)
        loss.backward()
        assert loss.item() == 0 and z.grad.shape == z.shape
        with pytest.raises(LossError, match="at least one sample"): cls()(z, y)


@pytest.mark.parametrize("cls, kw", CLASS + LABEL)
def test_finite_at_a_thousand(cls, kw):
    make = multi_class if issubclass(cls, CrossEntropy) else multi_label
    for dtype in (torch.float32, torch.bfloat16):
        loss, z, y = make(cls(**kw))
        for far in (z.sign() * 1000, torch.full_like(z, 1000.), torch.full_like(z, -1000.), z.sign() * 40):
            far = far.to(dtype).requires_grad_()
            value = loss(far, y)
            value.backward()
            assert value.isfinite() and far.grad.isfinite().all()


@pytest.mark.parametrize("cls, kw", CLASS + LABEL)
def test_gradients(cls, kw):
    make = multi_class if issubclass(cls, CrossEntropy) else multi_label
    loss, z, y = make(cls(temperature=True, **kw).double())
    z = z.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, t: loss(x, y), (z, loss.log_temperature))
    with torch.no_grad(): start = loss(z, y)
    (step,) = torch.autograd.grad(loss(z, y), z)
    with torch.no_grad(): assert loss(z - 1e-3 * step, y) < start


@pytest.mark.parametrize("gamma", [case(f"S2-R3-gradient-gamma-{g}", g) for g in (.1, .5, .9)])
def test_focal_gradient_at_certainty(gamma):
    "Below 1 the power's own gradient is infinite at p = 1; the loss's is 0 there"
    z = torch.tensor([[200., 0., 0.]], requires_grad=True)
    Focal(gamma, label_smoothing=0.)(z, torch.tensor([0])).backward()
    assert z.grad.abs().max() < 1e-12
    z = torch.tensor([[200., -200.]], requires_grad=True)
    BinaryFocal(gamma)(z, torch.tensor([[1, 0]])).backward()
    assert z.grad.abs().max() < 1e-12


@pytest.mark.parametrize("k", [case(f"S2-edge-uniform-{k}", k) for k in (2, 4, 7, 14)])
def test_uniform_predictions(k):
    y = torch.arange(k)
    for eps in (0., .1): assert CrossEntropy(eps)(torch.zeros(k, k), y).item() == pytest.approx(math.log(k), abs=1e-6)
    assert BinaryCrossEntropy()(torch.zeros(k, k), torch.eye(k)).item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("cls", [case("S2-edge-monotone-ce", CrossEntropy), case("S2-edge-monotone-focal", Focal)])
def test_falls_with_confidence(cls):
    z = torch.zeros(60, 3, dtype=torch.float64)
    z[:, 0] = torch.linspace(-20, 20, 60)
    losses = cls(label_smoothing=0., reduction="none")(z, torch.zeros(60, dtype=torch.long))
    assert (losses.diff() < 0).all() and losses[-1] < 1e-6 and losses[0] > 19


@pytest.mark.parametrize("cls, kw", CLASS + LABEL)
def test_the_mean_is_the_same_for_any_size_of_batch(cls, kw):
    make = multi_class if issubclass(cls, CrossEntropy) else multi_label
    loss, z, y = make(cls(**kw), b=1)
    for n in (2, 7, 32, 128): assert loss(z.repeat(n, 1), y.repeat(n, *[1] * (y.ndim - 1))).item() == pytest.approx(loss(z, y).item(), rel=1e-5)


@pytest.mark.parametrize("shape", [case("S2-chest-14-labels", (16, 14)), case("S2-one-label", (16, 1))])
def test_label_shapes(shape):
    _, z, y = multi_label(None, *shape)
    for cls in (BinaryCrossEntropy, BinaryFocal):
        loss = cls(reduction="none")
        assert loss(z, y).shape == shape and cls()(z, y).shape == () and loss.decodes(loss.activation(z)).shape == shape


@pytest.mark.parametrize("k", [case("S2-skin-7-classes", 7), case("S2-tumour-4-classes", 4)])
def test_class_shapes(k):
    _, z, y = multi_class(None, 16, k)
    for cls in (CrossEntropy, Focal):
        loss = cls(reduction="none")
        assert loss(z, y).shape == (16,) and cls()(z, y).shape == () and loss.decodes(loss.activation(z)).shape == (16,)


@pytest.mark.parametrize("cls, kw", CLASS)
def test_mixed_labels(cls, kw):
    "MixUp and CutMix work with any loss: the loss of a mixture of labels is the mixture of the losses"
    loss, z, y = multi_class(cls(reduction="none", **kw))
    other, share = y.roll(1), torch.rand(8, 1, generator=torch.Generator().manual_seed(5))
    mixed = loss(z, share * F.one_hot(y, 4) + (1 - share) * F.one_hot(other, 4))
    assert torch.allclose(mixed, share[:, 0] * loss(z, y) + (1 - share[:, 0]) * loss(z, other), rtol=1e-5, atol=1e-6)


# masks

@pytest.mark.parametrize("cls", [case(f"mask-{c.__name__}", c) for c in (Dice, Tversky, Boundary)])
def test_mask_reductions_and_limits(cls):
    z, y = draw(3, 2, 6, 6), (draw(3, 6, 6) > 0).long()
    none, mean, total = (cls(reduction=r)(z, y) for r in REDUCTIONS)
    assert torch.allclose(none.sum(), total) and torch.allclose(none.mean(), mean)
    for far in (z.sign() * 1000, torch.full_like(z, 1000.)):
        far.requires_grad_()
        cls()(far, y).backward()
        assert far.grad.isfinite().all()
    for empty in (torch.zeros_like(y), torch.ones_like(y)): assert cls()(z, empty).isfinite()
