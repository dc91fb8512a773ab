"Measures and maps against packages that have the same; peers_reference.py wrote down what those say, with their versions"
import json
from pathlib import Path

import numpy as np
import pytest
from peers_reference import BINS, CLASSES, LAYER, SIDES, inputs, maps, masks, network, predictions

from phoenix.evaluate.calibration import ece, mce, reliability
from phoenix.evaluate.fairness import fairness
from phoenix.evaluate.headlines import headlines
from phoenix.evaluate.statistics import mcnemar
from phoenix.models.cam import CAMS, signed_cam
from phoenix.models.stability import ms_ssim, ssim
from phoenix.train.losses import Dice, Tversky

GOLDEN = json.loads(Path(__file__).with_name("peers.json").read_text())
ERRORS = dict(ece=ece, mce=mce)


def case(label, *values): return pytest.param(*values, id=label)


def test_the_inputs_are_those_of_the_record():
    for name, golden in GOLDEN["inputs"].items():
        assert np.allclose(inputs()[name], golden, rtol=1e-6, atol=1e-6), f"other {name}: the record says nothing about them"


@pytest.mark.parametrize("gap", [case(f"S2-R44-fairlearn-{g.replace(' ', '-')}", g) for g in GOLDEN["fairlearn"]])
def test_gaps_are_those_of_fairlearn(gap):
    table = fairness(*predictions(), None, list("abcd"), n=20).set_index(["measure", "class"]).gap
    assert [table[gap, c] for c in "abcd"] == pytest.approx(GOLDEN["fairlearn"][gap], abs=1e-12)


@pytest.mark.parametrize("bins", [case(f"S2-R44-torchmetrics-{b}-bins", b) for b in BINS])
@pytest.mark.parametrize("name", ERRORS)
def test_calibration_errors_are_those_of_torchmetrics(name, bins):
    "To single precision, in which torchmetrics counts"
    p, y, _ = predictions()
    assert ERRORS[name](p, y, bins) == pytest.approx(GOLDEN["torchmetrics"][f"{name} {bins}"], abs=1e-6)


@pytest.mark.parametrize("name", [case(f"S2-R44-torchmetrics-{n}", n) for n in GOLDEN["torchmetrics"] if n.split()[0] not in ERRORS])
def test_headlines_are_those_of_torchmetrics(name):
    p, y, _ = predictions()
    found = headlines(p, y, None, list("abcd"), n=20).set_index(["measure", "class"]).value
    assert found[name, ""] == pytest.approx(GOLDEN["torchmetrics"][name], abs=1e-6)


@pytest.mark.parametrize("bins", [case(f"S2-R44-netcal-{b}-bins", b) for b in BINS])
@pytest.mark.parametrize("kind", ["width", "mass"])
def test_calibration_errors_are_those_of_netcal(kind, bins):
    "Bins of equal width, and of equal fullness by quantiles"
    p, y, _ = predictions(600)
    assert ece(p, y, bins, kind) == pytest.approx(GOLDEN["netcal"][f"ece {kind} {bins}"], abs=1e-12)
    if kind == "width": assert mce(p, y, bins) == pytest.approx(GOLDEN["netcal"][f"mce width {bins}"], abs=1e-12)
    table = reliability(p, y, bins, kind) # of which the worst bin is the maximum
    assert (table.confidence - table.accuracy).abs().max() == pytest.approx(GOLDEN["netcal"][f"mce {kind} {bins}"], abs=1e-12)


# ten bins; torchmetrics has .125 and .025, for its bins are open on the right
ON_EDGES = {(.6, .65): .525, (.5, .55): .525}


@pytest.mark.parametrize("sure", [case(f"S2-R44-edge-{e[0]}", e) for e in ON_EDGES])
def test_bins_are_closed_on_the_right_as_in_netcal(sure):
    probs = np.stack([sure, 1 - np.array(sure)], 1)
    assert ece(probs, np.array([0, 1]), 10) == pytest.approx(ON_EDGES[sure], abs=1e-12)


@pytest.mark.parametrize("seed", [case(f"S2-R44-mcnemar-statsmodels-{s}", s) for s in range(6)])
def test_mcnemar_is_that_of_statsmodels(seed):
    "Exact p and corrected chi-squared, of two models of any likeness; at equal counts nothing is corrected, as in R"
    from statsmodels.stats.contingency_tables import mcnemar as theirs
    (p, y, _), g = predictions(20 + 100 * seed, seed=seed), np.random.default_rng(seed)
    q = p * np.exp((.2 + .3 * seed) * g.normal(size=p.shape))
    right = [(o.argmax(1) == y) for o in (p, q)]
    table = [[np.sum((right[0] == i) & (right[1] == j)) for j in (True, False)] for i in (True, False)]
    found = mcnemar(p, q / q.sum(1, keepdims=True), y)
    assert (found.only_a, found.only_b) == (table[0][1], table[1][0]) and found.only_a + found.only_b > 0
    assert found.p == pytest.approx(theirs(table, exact=True).pvalue, rel=1e-9)
    golden = theirs(table, exact=False, correction=found.only_a != found.only_b).statistic
    assert found.chi2 == pytest.approx(golden, rel=1e-12)


@pytest.mark.parametrize("side", [case(f"S2-R35-{s}-pixels", s) for s in SIDES])
def test_likeness_of_maps_is_that_of_the_packages(side):
    """SSIM is that of torchmetrics on its full windows, MS-SSIM that of pytorch-msssim, whose window is of single precision.

    torchmetrics' own MS-SSIM takes the coarsest scale with mirrored borders: on these maps it lies up to .0061 higher."""
    (a, b), golden = maps(side), GOLDEN["likeness"][str(side)]
    assert ssim(a, b).tolist() == pytest.approx(golden["ssim"], abs=1e-12)
    assert ms_ssim(a, b).tolist() == pytest.approx(golden["msssim"], abs=3e-6)
    assert ms_ssim(a, b).tolist() == pytest.approx(golden["torchmetrics"], abs=.0065)


@pytest.mark.parametrize("method", [case(f"S2-R30-package-{m}", m) for m in CAMS])
def test_activation_maps_are_those_of_the_grad_cam_package(method):
    "In double precision, before anything is cut; its Grad-CAM++ adds 1e-6 to each denominator, where here a zero one is replaced"
    net, x = network()
    ours, theirs = signed_cam(net, x, list(CLASSES), layer=LAYER, method=method).numpy(), np.array(GOLDEN["gradcam"][method])
    rel = 1e-4 if method == "gradcam++" else 1e-12
    assert np.abs(ours - theirs).max() <= rel * np.abs(theirs).max()


@pytest.mark.parametrize("channels", [case("mask-sigmoid", 1), case("mask-softmax", 3)])
def test_losses_of_masks_are_those_of_monai(channels):
    z, y = masks(channels)
    found, golden = dict(dice=Dice()(z, y).item(), tversky=Tversky()(z, y).item()), GOLDEN["monai"][str(channels)]
    assert y.unique().tolist() == list(range(max(channels, 2))) and found == pytest.approx(golden, abs=1e-12)
