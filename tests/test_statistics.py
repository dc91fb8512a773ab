"Simulations: tests reject true null hypotheses as often as they say, intervals hold the truth as often as they say"
import time

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


@pytest.mark.slow
def test_all_headlines_of_ten_thousand_predictions():
    "2,000 resamples of 10,000 rows of four classes: every headline, whole and per class, in 10 s of processor time"
    from phoenix.evaluate.calibration import ece_sums
    from phoenix.evaluate.headlines import headlines
    from phoenix.evaluate.metrics import softmax
    g = np.random.default_rng(0)
    y = g.integers(0, 4, 10000)
    p, since = softmax(g.normal(size=(10000, 4)) + 1.5 * np.eye(4)[y]), time.process_time()
    table = headlines(p, y, np.arange(10000) // 8, list("abcd"), n=2000, more=dict(ece=ece_sums()))
    seconds = time.process_time() - since
    print(f"{len(table)} headlines took {seconds:.1f} s")
    assert seconds < 10
    assert len(table) == 28 and table.low.notna().all() and (table.n_groups == 1250).all()
