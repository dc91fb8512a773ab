"Simulations: tests reject true null hypotheses as often as they say, intervals hold the truth as often as they say"
import numpy as np
import pytest

from phoenix.evaluate.statistics import bootstrap, paired_difference
from phoenix.evaluate.tests import corrected_t, delong, delong_difference
from phoenix.keys import rng


def two_columns(score):
    "Probabilities of two classes from one logit"
    p = 1 / (1 + np.exp(-score))
    return np.stack([1 - p, p], axis=1)


def equals(g, patients=80, slices=3):
    "Two scores that are equally good, truths and patients; patients are independent, slices are not"
    kind = np.arange(patients) % 2
    scores = kind + g.normal(size=patients) + g.normal(size=(2, patients))
    noise = .3 * g.normal(size=(2, patients * slices))
    return np.repeat(scores, slices, axis=1) + noise, np.repeat(kind, slices), np.repeat(np.arange(patients), slices)


def overlapping(g, folds=10, share=.25):
    "Differences of two equal methods over folds whose training sets overlap as the corrected t assumes"
    return np.sqrt(share) * g.normal() + np.sqrt(1 - share) * g.normal(size=folds)


def rejects(test, g, i):
    "Whether one simulated comparison of equals is found to differ"
    if test.endswith("t"):
        return corrected_t(overlapping(g), n_train=75, n_test=25 if test == "corrected t" else 0).p < .05
    (a, b), y, who = equals(g, 80 if test == "delong" else 200) # with 80 patients the bootstrap rejects 6.2 %
    if test == "delong": return delong_difference(a, b, y == 1, who).p < .05
    return 0 not in paired_difference(two_columns(a - .5), two_columns(b - .5), y, who, n=999, seed=i)


def false_alarms(test, trials):
    return np.mean([rejects(test, rng(42, f"false alarms {test}", index=i), i) for i in range(trials)])


def test_corrected_t_on_overlapping_folds():
    assert .025 < false_alarms("corrected t", 600) < .075
    assert false_alarms("plain t", 300) > .2, "the usual t takes folds for independent"


@pytest.mark.slow
@pytest.mark.parametrize("test", ["delong", "bootstrap", "corrected t"])
def test_five_per_cent_of_true_nulls_are_rejected(test):
    assert abs(false_alarms(test, 2000) - .05) <= .01


def area_interval(method, a, y, who, i):
    if method == "delong": return delong(a, y == 1, who)
    return bootstrap("auc:1", two_columns(a), y, who, n=1000, seed=i, method=method)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["percentile", "bca", "delong"])
def test_intervals_of_an_area_hold_the_truth(method):
    truth = equal_area()
    hits = [truth in area_interval(method, (d := equals(rng(7, "cover", index=i)))[0][0], *d[1:], i) for i in range(2000)]
    assert abs(np.mean(hits) - .95) <= .015


def equal_area():
    "The true area of a score of `equals`: two slices of different patients differ by a normal deviate"
    from scipy.stats import norm
    return norm.cdf(1 / np.sqrt(2 * (1 + 1 + .3**2)))


def predictions(n=601, k=4, seed=0):
    "Probabilities, targets and a source of each row"
    g = np.random.default_rng(seed)
    y, source = g.integers(0, k, n), g.integers(0, 3, n)
    z = g.normal(size=(n, k)) + np.eye(k)[y] * (1 + source[:, None])
    p = np.exp(z)
    return p / p.sum(1, keepdims=True), y, source


@pytest.mark.slow
def test_gaps_are_those_of_fairlearn():
    fl = pytest.importorskip("fairlearn.metrics")
    from phoenix.evaluate.fairness import fairness
    p, y, source = predictions()
    table = fairness(p, y, source, None, list("abcd"), n=20).set_index(["measure", "class"]).gap
    for i, c in enumerate("abcd"):
        said = dict(y_true=y == i, y_pred=p.argmax(1) == i, sensitive_features=source)
        assert abs(fl.demographic_parity_difference(**said) - table["selection rate", c]) < 1e-12
        assert abs(fl.equalized_odds_difference(**said) - table["equalised odds", c]) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("bins", [10, 15])
def test_calibration_errors_and_scores_are_those_of_torchmetrics(bins):
    tm = pytest.importorskip("torchmetrics.functional.classification")
    import torch
    from phoenix.evaluate.calibration import ece, mce
    from phoenix.evaluate.headlines import headlines
    p, y, _ = predictions()
    t = torch.tensor(p), torch.tensor(y)
    for norm, ours in (("l1", ece), ("max", mce)):
        assert abs(tm.multiclass_calibration_error(*t, 4, n_bins=bins, norm=norm).item() - ours(p, y, bins)) < 1e-6
    found = headlines(p, y, None, list("abcd"), n=20).set_index(["measure", "class"]).value
    theirs = dict(macro_f1=tm.multiclass_f1_score, macro_recall=tm.multiclass_recall, macro_auc=tm.multiclass_auroc,
                  macro_specificity=tm.multiclass_specificity)
    for name, f in theirs.items(): assert abs(f(*t, num_classes=4, average="macro").item() - found[name, ""]) < 1e-6
    assert abs(tm.multiclass_matthews_corrcoef(*t, num_classes=4).item() - found["mcc", ""]) < 1e-6


NETCAL = {10: (.11746868438565918, .20281519729509623), 15: (.11746868438565918, .3213664433512273)} # netcal 1.4.0: ECE and MCE
ON_EDGES = {(.6, .65): .525, (.5, .55): .525} # ten bins; torchmetrics has .125 and .025


@pytest.mark.parametrize("bins", NETCAL)
def test_calibration_errors_are_those_of_netcal(bins):
    "By record, to 1e-12, also where a confidence lies on an edge: bins are closed on the right"
    from phoenix.evaluate.calibration import ece, mce
    p, y, _ = predictions()
    assert (ece(p, y, bins), mce(p, y, bins)) == pytest.approx(NETCAL[bins], abs=1e-12)
    for sure, golden in ON_EDGES.items():
        assert ece(np.stack([sure, 1 - np.array(sure)], 1), np.array([0, 1]), 10) == pytest.approx(golden, abs=1e-12)


@pytest.mark.slow
def test_all_headlines_of_ten_thousand_predictions():
    "2,000 resamples of 10,000 rows of four classes: every headline, whole and per class"
    from phoenix.evaluate.calibration import ece_sums
    from phoenix.evaluate.headlines import headlines
    p, y, _ = predictions(10000)
    table = headlines(p, y, np.arange(10000) // 8, list("abcd"), more=dict(ece=ece_sums()))
    assert len(table) == 28 and table.low.notna().all() and (table.n_groups == 1250).all()
