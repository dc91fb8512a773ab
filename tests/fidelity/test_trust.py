"Golden values of statistics, calibration and selective prediction; each test carries the number of the requirement it holds"
import numpy as np
import pytest

from phoenix.evaluate.calibration import as_log_probs, as_probs, ece, fit_calibrator, fit_temperature, mce, nll
from phoenix.evaluate.headlines import headlines
from phoenix.evaluate.metrics import MetricError, softmax
from phoenix.evaluate.selective import Gate, compare_at_coverage, confidence, control_risk, decide, records, tune
from phoenix.evaluate.statistics import McNemar, bootstrap, class_strata, mcnemar
from phoenix.evaluate.tests import adjust, hypervolume
from phoenix.evaluate.uncertainty import aurc


def case(label, *values): return pytest.param(*values, id=label)


CONFIDENCE, RIGHT = np.array([.95, .85, .75, .65, .55]), np.array([1, 1, 0, 1, 0])


def made(n=400, k=4, seed=0, skill=1.5):
    "Probabilities and targets"
    g = np.random.default_rng(seed)
    y = g.integers(0, k, n)
    return softmax(skill * np.eye(k)[y] + g.normal(size=(n, k))), y


@pytest.mark.parametrize("bins", [case(f"S2-R44-{b}-bins", b) for b in (10, 15)])
def test_calibration_errors(bins):
    probs = np.stack([CONFIDENCE, 1 - CONFIDENCE], 1)
    assert ece(probs, 1 - RIGHT, bins) == pytest.approx(.37, abs=1e-12)
    assert mce(probs, 1 - RIGHT, bins) == pytest.approx(.75, abs=1e-12)


@pytest.mark.parametrize("only_a, only_b, p, chi2", [case("S2-R44-mcnemar", 10, 2, .038574, 4.0833)])
def test_mcnemar(only_a, only_b, p, chi2):
    a, b = np.zeros(15, int), np.zeros(15, int)
    b[:only_a], a[only_a:only_a + only_b] = 1, 1
    found = mcnemar(np.eye(2)[a], np.eye(2)[b], np.zeros(15, int))
    assert (found.only_a, found.only_b) == (only_a, only_b)
    assert found.p == pytest.approx(p, abs=5e-7) and found.chi2 == pytest.approx(chi2, abs=5e-5)
    assert McNemar(0, 0, 1.).chi2 == 0


@pytest.mark.parametrize("method, golden", [case("S2-R44-holm", "holm", [.03, .06, .06]), case("S2-R44-bh", "bh", [.03, .04, .04])])
def test_families(method, golden): assert adjust([.01, .04, .03], method) == pytest.approx(golden, abs=1e-12)


@pytest.mark.parametrize("points", [case("S2-R44-hypervolume", [(1, 3), (2, 2), (3, 1)])])
def test_hypervolume(points): assert hypervolume(np.array(points), [0, 0]) == pytest.approx(6)


@pytest.mark.parametrize("given", [case("S2-R44-neither", {}), case("S2-R44-both", dict(probs=[[.5, .5]], logits=[[0., 0.]])),
                                   case("S2-R44-logits-as-probs", dict(probs=[[2., -1.]]))])
def test_inputs_are_named_and_never_guessed(given):
    with pytest.raises(MetricError): as_probs(**given)
    with pytest.raises(MetricError): as_log_probs(**given)


@pytest.mark.parametrize("k", [case("S2-R45-binary", 2)])
def test_two_columns_are_no_special_case(k):
    probs, y = made(k=k)
    t = headlines(probs, y, None, ["a", "b"], n=50).set_index(["measure", "class"]).value
    assert t["auc", "a"] == pytest.approx(t["auc", "b"]) and t["recall", "a"] == pytest.approx(t["specificity", "b"])


@pytest.mark.parametrize("absent", [case("S2-R45-absent-class", 2)])
def test_an_absent_class_is_nan_by_name_and_counted(absent):
    probs, y = made()
    here = y != absent
    with pytest.warns(UserWarning, match="no picture of c: macro"):
        t = headlines(probs[here], y[here], None, list("abcd"), n=50).set_index(["measure", "class"])
    assert np.isnan(t.value["recall", "c"]) and np.isnan(t.value["auc", "c"])
    assert t.value["macro_auc", ""] == pytest.approx(t.value["auc"][["a", "b", "d"]].mean())
    assert t.classes["macro_recall", ""] == 3 and t.value["macro_recall", ""] == pytest.approx(t.value["recall"][["a", "b", "d"]].mean())


@pytest.mark.parametrize("stat", [case(f"S2-R46-{s}", s) for s in ("accuracy", "macro_f1", "macro_auc")])
def test_bootstrap_clusters_by_patient_in_strata_with_its_own_generator(stat):
    probs, y = made(60)
    probs, y, who = np.repeat(probs, 5, 0), np.repeat(y, 5), np.repeat(np.arange(60), 5)
    before = np.random.get_state()[1].copy()
    one, again = (bootstrap(stat, probs, y, who, strata=class_strata(y, who), n=400) for _ in range(2))
    naive = bootstrap(stat, probs, y, None, n=400)
    assert one == again and (np.random.get_state()[1] == before).all() and one.n_groups == 60
    assert one.high - one.low > 1.7 * (naive.high - naive.low)


@pytest.mark.parametrize("strategy, accepted", [
    case("S2-R48-confidence-only", "confidence_only", [1, 1, 0]), case("S2-R48-stability-only", "stability_only", [1, 0, 1]),
    case("S2-R48-combined", "combined", [1, 0, 0])])
def test_strategies(strategy, accepted):
    assert decide(Gate(strategy), [.9, .9, .6], [.8, .7, .8]).is_accepted.tolist() == [bool(a) for a in accepted]


@pytest.mark.parametrize("field", [case(f"S2-R48-{f}", f) for f in (
    "prediction", "confidence", "stability", "is_accepted", "rejection_reason", "decision_strategy", "logits", "probabilities",
    "true_label", "sample_id", "metadata")])
def test_records_keep_every_field(field):
    record = records(Gate(), [.9], logits=[[3., 0., 0.]], targets=[1], ids=["a"])[0]
    assert hasattr(record, field) and record.true_label == 1 and record.prediction == 0


@pytest.mark.parametrize("excess, value", [case("S2-R49-aurc", False, .196667), case("S2-R49-excess", True, .066667)])
def test_risk_coverage_areas(excess, value):
    assert aurc([.9, .8, .7, .6, .5], [0, 0, 1, 0, 1], excess=excess) == pytest.approx(value, abs=5e-7)
    assert aurc([0, 0, -1, 0, -1], [0, 0, 1, 0, 1]) == pytest.approx(.13)


def gated(seed, useful):
    "Confidence, stability that sees half of the errors or none, errors"
    g = np.random.default_rng(seed)
    wrong, seen = g.random(2000) < .25, g.random(2000) < .5
    c = .8 - .25 * (wrong & ~seen) + .1 * g.normal(size=2000)
    return np.clip(c, 0, 1), np.clip(.75 - .3 * (wrong & seen) * useful + .1 * g.normal(size=2000), 0, 1), wrong


@pytest.mark.parametrize("useful", [case("S2-R50-stability-helps", True), case("S2-R50-stability-is-noise", False)])
def test_the_report_says_whether_stability_added_anything_at_equal_coverage(useful):
    gate = tune(*(x[i] for x, i in zip([gated(1, useful)] * 3, (0, 2, 1))), target=.7)
    c, s, wrong = gated(2, useful)
    accepted = decide(gate, c, s).is_accepted.to_numpy()
    found = compare_at_coverage(accepted, c, wrong, np.arange(2000) // 4, n=400)
    assert found.coverage == pytest.approx(accepted.mean()) and found.difference.n_groups == 500
    assert ("it is not shown" not in found.sentence and "adds something" in found.sentence) == useful
    if not useful: assert wrong[accepted].mean() < wrong.mean(), "answering less lowers the risk, whatever the gate asks"


@pytest.mark.parametrize("alpha", [case("S2-R51-risk-control", .1)])
def test_conformal_risk_control_keeps_its_promise(alpha):
    g, risks = np.random.default_rng(3), []
    for _ in range(1500):
        score = g.normal(size=60)
        wrong = g.random(60) < 1 / (1 + np.exp(score + 1))
        t = control_risk(score[:59], wrong[:59], alpha)
        risks.append(wrong[59] & (score[59] > t))
    assert np.mean(risks) < alpha + 3 * np.sqrt(alpha * (1 - alpha) / 1500)


@pytest.mark.parametrize("kind", [case("S2-R52-max", "max"), case("S2-R52-entropy", "entropy")])
def test_scorers_take_the_whole_batch(kind):
    probs, _ = made(9)
    assert confidence(kind, probs=probs) == pytest.approx([confidence(kind, probs=p[None])[0] for p in probs])


@pytest.mark.parametrize("gate", [case("S2-R53-fast-accept-is-off", Gate())])
def test_sureness_does_not_bypass_the_second_door(gate):
    assert gate.fast_accept is None
    assert decide(gate, [1.], [.1]).rejection_reason[0] == "low_stability"


@pytest.mark.parametrize("method", [case(f"calibration-fold-{m}", m) for m in ("temperature", "vector", "isotonic")])
def test_no_map_raises_the_loss_of_its_fold(method):
    for seed in range(6):
        probs, y = made(120, 3, seed, skill=seed / 2)
        fit = fit_calibrator(method, y, probs=probs) if seed > 1 or method != "temperature" else None
        if fit: assert fit.after <= fit.before + 1e-12 and fit.before == pytest.approx(nll(probs, y), abs=1e-9)


@pytest.mark.parametrize("seed", [case(f"temperature-optimum-{s}", s) for s in range(3)])
def test_temperature_is_the_true_optimum(seed):
    from scipy.optimize import brentq
    g = np.random.default_rng(seed)
    z = 3 * g.normal(size=(300, 4))
    y = (softmax(z / 2).cumsum(1) > g.random((300, 1))).argmax(1)
    def slope(t): return ((softmax(z / t) * z).sum(1) - z[np.arange(300), y]).mean()
    assert fit_temperature(z, y) == pytest.approx(brentq(slope, .2, 20, xtol=1e-13), rel=1e-6)
