"Skin and chest sets end to end: read, split, trained, resumed under their own class order alone"
import json

import numpy as np
import pytest
import torch

from phoenix.data.acquire import build_manifest
from phoenix.data.duplicates import find_pairs
from phoenix.data.mimics import make_mimic
from phoenix.data.organs import ORGANS, label_matrix
from phoenix.data.preprocess import Preprocess
from phoenix.data.splits import make_split
from phoenix.settings import PhoenixError
from phoenix.train.learner import TrainError, make_learner, make_loss, predict, train_classifier

JOB = dict(model="simple_cifar_net", preprocess=Preprocess(size=(32, 32)), batch_size=16, lr=2e-3, progress=False,
           epochs=1, warmup_epochs=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "Made sets of a chest and of skin, with a certified split of each"
    at = tmp_path_factory.mktemp("organs")
    for name, groups in (("padchest", 24), ("isic2018", 40)): make_mimic(name, at/name, groups=groups, size=40)
    return at


def split_of(manifest, **how): return make_split(manifest, find_pairs(manifest, progress=False), **how)


def test_labels_train_and_predict(base):
    manifest = build_manifest(base/"padchest", progress=False)
    done = train_classifier(manifest, split_of(manifest), weights="balanced", cache_dir=base/"cache", **JOB)
    p = done.test
    assert p.task == "labels" and p.probs.shape == p.targets.shape == (len(p.rows), 14)
    np.testing.assert_array_equal(p.targets, label_matrix(p.rows.label, manifest.classes))
    assert np.isnan(done.dls.train.dataset.targets).any() and p.classes == list(ORGANS["padchest"].classes)
    assert done.history.rows[0]["accuracy"] == pytest.approx(done.valid.accuracy, abs=1e-12)
    assert not np.allclose(p.probs.sum(1), 1), "labels do not exclude each other"


def test_what_stands_at_unknown_places_does_not_matter(base):
    "A step from targets with NaN equals one from the known entries alone, to the last bit of every weight"
    manifest = build_manifest(base/"padchest", progress=False)
    done = train_classifier(manifest, split_of(manifest), cache_dir=base/"cache", **JOB)
    x, y = done.dls.train.new(shuffle=False).one_batch()
    x, y, net = x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor), done.learner.model.eval()
    loss = make_loss("cross_entropy", y.numpy(), 14, label_smoothing=0.)
    grads = []
    for known_only in (True, False):
        net.zero_grad()
        z = net(x)
        if known_only:
            at = y.isfinite()
            value = torch.nn.functional.binary_cross_entropy_with_logits(z[at], y[at])
        else: value = loss(z, y)
        value.backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    assert y.isnan().float().mean() > .1
    for a, b in zip(*grads): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_seven_classes_keep_their_order_and_refuse_another(base):
    manifest = build_manifest(base/"isic2018", progress=False)
    cert = split_of(manifest, rule="official")
    assert manifest.classes == ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"] != sorted(manifest.classes)
    done = train_classifier(manifest, cert, cache_dir=base/"cache", run_dir=base/"run", **JOB)
    assert [done.test.classes[t] for t in done.test.targets] == list(done.test.rows.label)
    assert done.test.classes == manifest.classes
    manifest.order = tuple(sorted(manifest.order))
    other = split_of(manifest, rule="official")
    with pytest.raises(TrainError, match="classes was .'MEL', 'NV'.* and is .'AKIEC'"):
        train_classifier(manifest, other, cache_dir=base/"cache", run_dir=base/"run", resume=True, **JOB)
    with pytest.raises(PhoenixError, match="must be of this manifest"):
        train_classifier(manifest, cert, cache_dir=base/"cache", **JOB)


def test_no_lesion_on_two_sides(base):
    manifest = build_manifest(base/"isic2018", progress=False)
    for rule in ("grouped", "folds", "official"):
        side = split_of(manifest, rule=rule, n=4).assignment
        rows = manifest.table[manifest.table.patient != ""]
        assert (rows.path.map(side).groupby(rows.patient).nunique() == 1).all(), rule
    torn = manifest.table.patient == manifest.table.patient[manifest.table.split == "Training"].iloc[0]
    manifest.table.loc[manifest.table[torn].index[0], "split"] = "Testing"
    cert = split_of(manifest, rule="official")
    assert cert.proof["patients_across"] == 0 and len(cert.left_out) == torn.sum() - 1, "its other pictures give way"


def test_one_file_missing_is_listed_and_not_looked_for(base, tmp_path):
    make_mimic("isic2020", tmp_path/"set", groups=10, size=32)
    gone = tmp_path/"set/train/ISIC_0000003.jpg"
    (tmp_path/"set/elsewhere").mkdir()
    gone.rename(tmp_path/"set/elsewhere/ISIC_0000003.jpg")
    m = build_manifest(tmp_path/"set", progress=False)
    row = m.table.set_index("path").loc["train/ISIC_0000003.jpg"]
    assert row.problem.startswith("missing") and len(m.readable) == 19
    assert ("elsewhere/ISIC_0000003.jpg", "not named by isic2020") in m.leftovers


def test_a_folder_can_declare_labels_of_its_own(base, tmp_path):
    "manifest.csv with classes.json goes the same way as a known set, and through read_set and the processed folder"
    from phoenix.data.overlap import read_set
    from phoenix.data.processed import write_processed
    from_set = build_manifest(base/"padchest", progress=False)
    root = write_processed(from_set, Preprocess(size=(32, 32)), tmp_path/"small", progress=False)
    m = read_set(root, tmp_path/"unused")
    assert (m.task, m.classes) == ("labels", from_set.classes)
    assert sorted(m.table.label) == sorted(from_set.table.label)
    assert json.loads((root/"classes.json").read_text())["task"] == "labels"
    assert read_set(base/"isic2018", tmp_path/"unused").classes[0] == "MEL"


def test_an_empty_side_has_no_predictions(base):
    manifest = build_manifest(base/"padchest", progress=False)
    done = train_classifier(manifest, split_of(manifest, fractions=(.8, 0, .2)), cache_dir=base/"cache", **JOB)
    assert done.valid.logits.shape == done.valid.targets.shape == (0, 14) and done.valid.task == "labels"
    learn = make_learner(done.dls, "simple_cifar_net", loss=make_loss("focal", done.dls.train.dataset.targets, 14))
    assert predict(learn, done.dls.test).logits.shape == done.test.logits.shape
