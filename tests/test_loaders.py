"Loaders: the same batches in any process with any number of workers, and only under a certificate that holds."
import copy
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import fastai.callback.progress  # noqa: F401 (Learner.no_bar)
import fastai.callback.schedule  # noqa: F401 (Learner.lr_find)
import fastai.vision.learner  # noqa: F401 (plot_top_losses)
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from PIL import Image

from phoenix.data.acquire import build_manifest
from phoenix.data.augment import Augment
from phoenix.data.duplicates import find_pairs
from phoenix.data.loaders import EpochKeys, KeyedDL, LoaderError, TensorSlice, balanced_order, dl_rows, make_loaders
from phoenix.data.phantom import make_phantom
from phoenix.data.preprocess import Preprocess
from phoenix.data.splits import certify, group_rows, split_grouped, split_published
from phoenix.keys import seeded
from phoenix.train.checkpoints import read_checkpoint

PREPROCESS = Preprocess(size=(24, 32))
CLASSES = ('glioma', 'no_tumor', 'pituitary')


def noise_pictures(root, seed=0):
    "13 + 11 + 10 unlike pictures in Training, 5 a class in Testing, patients only by being unlike"
    rng = np.random.default_rng(seed)
    for name, n in zip(CLASSES, (13, 11, 10)):
        for split, count in (('Training', n), ('Testing', 5)):
            folder = root/split/name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                small = rng.integers(0, 255, (6, 6), dtype=np.uint8)
                Image.fromarray(small).resize((48, 40), Image.Resampling.BICUBIC).save(folder/f'{split[:2]}{name[:2]}{i:02d}.png')
    return root


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp('loaders')
    noise_pictures(folder/'raw')
    return folder


@pytest.fixture(scope='module')
def made(base):
    "Manifest, pairs, certificate"
    manifest = build_manifest(base/'raw', progress=False)
    pairs = find_pairs(manifest, progress=False)
    sides = split_grouped(manifest, group_rows(manifest, pairs), fractions=(.6, .2, .2), seed=3)
    return manifest, pairs, certify(manifest, pairs, sides, 'grouped', {'seed': 3})


@pytest.fixture
def load(made, base):
    def inner(**options):
        manifest, _, certificate = made
        options = dict(batch_size=5, cache_dir=base/'cache', augment=Augment.default(32), progress=False) | options
        return make_loaders(manifest, options.pop('certificate', certificate), PREPROCESS, **options)
    return inner


def epoch(dl, e):
    return [(x.clone(), y.clone()) for x, y in dl.set_epoch(e)]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b))


def states():
    return repr((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))


@pytest.mark.parametrize('balanced, counts', [(False, (1, 2, 3)), (True, (2,))])
def test_any_number_of_workers_gives_the_same_epochs(balanced, counts, load):
    reference = load(balanced=balanced)
    for workers in counts:
        other = load(balanced=balanced, workers=workers)
        for e in (0, 5): assert equal(epoch(reference.train, e), epoch(other.train, e))
        for a, b in zip(list(reference)[1:], list(other)[1:]): assert equal(list(a), list(b))


def test_epochs_come_back_and_differ(load):
    dls = load()
    first, second, again = epoch(dls.train, 0), epoch(dls.train, 1), epoch(dls.train, 0)
    assert equal(first, again) and not equal(first, second)
    other = load(seed=43).train
    assert not equal(first, epoch(other, 0))
    assert equal(list(other.set_epoch(2).new()), epoch(other, 2))


def test_abandoned_epochs_leave_no_trace(load):
    dls = load(workers=2)
    expected = epoch(load().train, 2)
    for _ in zip(range(1), dls.train.set_epoch(2)): pass
    dls.train.one_batch()
    assert equal(epoch(dls.train, 2), expected)


def test_a_sample_is_augmented_by_its_key_alone(load):
    def by_row(dls, e=4):
        order = [int(i) for i in dls.train.set_epoch(e).get_idxs()]
        return dict(zip(order, torch.cat([x for x, _ in dls.train])))
    small, large, later = by_row(load(batch_size=2)), by_row(load(batch_size=7)), by_row(load(batch_size=2), 5)
    shared = small.keys() & large.keys()
    assert len(shared) > 10 and all(torch.equal(small[i], large[i]) for i in shared)
    assert sum(torch.equal(small[i], later[i]) for i in small.keys() & later.keys()) < len(small)/3


def test_only_training_batches_are_augmented(load, made):
    plain, dls = load(augment=None), load()
    for a, b in zip(list(plain)[1:], list(dls)[1:]): assert equal(list(a), list(b))
    assert not equal(epoch(plain.train, 0), epoch(dls.train, 0))
    inside = list(dls.train.new(shuffle=False, drop_last=False))
    rows = dls.train.dataset.items
    assert sum(len(x) for x, _ in inside) == len(rows)
    assert torch.equal((torch.cat([x for x, _ in inside])*255).round().byte()[:, 0],
                       torch.from_numpy(dls.train.dataset.cache.images(rows.path)))


@pytest.mark.parametrize('workers', [0, 2])
def test_global_random_state_stays(workers, load):
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    before = states()
    dls = load(workers=workers)
    for dl in dls: list(dl)
    dls.one_batch()
    dls.show_batch(max_n=4)
    dls.train.show_batch(unique=True, max_n=4)
    dls.valid.new(shuffle=True).one_batch()
    plt.close('all')
    assert states() == before


FRESH = """
    import hashlib, sys
    from pathlib import Path
    from phoenix.data.acquire import build_manifest
    from phoenix.data.augment import Augment
    from phoenix.data.loaders import make_loaders
    from phoenix.data.preprocess import Preprocess
    from phoenix.data.splits import Certificate
    import torch
    torch.set_num_threads(1)
    base, workers = Path(sys.argv[1]), int(sys.argv[2])
    dls = make_loaders(build_manifest(base/'raw', progress=False), Certificate.load(base/'certificate.json'),
                       Preprocess(size=(24, 32)), batch_size=5, cache_dir=base/sys.argv[3], augment=Augment.default(32),
                       workers=workers, progress=False)
    digest = hashlib.sha256()
    for x, y in [*dls.train.set_epoch(1), *dls.test]: digest.update(x.numpy().tobytes() + y.numpy().tobytes())
    print(digest.hexdigest())
"""


def test_a_fresh_process_agrees(made, base, load):
    made[2].save(base/'certificate.json')
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(FRESH), str(base), '2', 'another cache'], text=True,
                          capture_output=True, timeout=240, env=dict(os.environ, PYTHONHASHSEED='1'))
    assert done.returncode == 0, done.stderr
    dls, digest = load(), hashlib.sha256()
    for x, y in [*dls.train.set_epoch(1), *dls.test]: digest.update(x.numpy().tobytes() + y.numpy().tobytes())
    assert done.stdout.strip() == digest.hexdigest()


def test_rows_are_those_of_the_batches(load, made):
    manifest, _, certificate = made
    dls = load()
    for dl, side in ((dls.valid, 'valid'), (dls.test, 'test')):
        rows = dl_rows(dl)
        assert list(rows.path) == [p for p in manifest.table.path if certificate.assignment[p] == side]
        assert [manifest.classes[t] for t in rows.target] == list(rows.label)
        assert torch.cat([y for _, y in dl]).tolist() == list(rows.target)
    with pytest.raises(LoaderError, match='shuffle'): dl_rows(dls.train)


def test_an_epoch_drops_only_its_incomplete_batch(load):
    n = len(load().train.dataset)
    size = next(b for b in (5, 6, 7) if n % b)
    train, whole = load(batch_size=size).train, n//size*size
    assert sorted(train.set_epoch(0).get_idxs()) == list(range(n))
    assert sum(len(y) for _, y in train) == whole and len(train) == n//size
    assert len({i for e in range(12) for i in train.set_epoch(e).get_idxs()[whole:]}) > n - whole
    with pytest.raises(LoaderError, match='fill a batch of 999'): load(batch_size=999)


def test_balance_counts_and_distinct_augmentations(load):
    dls = load(balanced=True, batch_size=1)
    targets = dls.train.dataset.targets
    n = len(targets)
    order = np.array(dls.train.set_epoch(2).get_idxs())
    counts = np.bincount(targets[order % n])
    assert len(order) == n and counts.max() - counts.min() <= 1 and len(set(order.tolist())) == n
    twice = [i for i in order if i >= n]
    assert twice
    images = dict(zip(order.tolist(), torch.cat([x for x, _ in dls.train])))
    assert all(not torch.equal(images[int(i)], images[int(i) % n]) for i in twice if int(i) % n in images)
    assert sorted(np.bincount(balanced_order(np.array([0, 0, 0, 0, 0, 0, 0, 1]), 0, 0)).tolist())[-1] == 1


def test_shuffled_labels_are_a_control(load):
    true, control = load(), load(shuffle_labels=True)
    for a, b in zip(true, control):
        assert np.bincount(a.dataset.targets).tolist() == np.bincount(b.dataset.targets).tolist()
        assert list(a.dataset.items.path) == list(b.dataset.items.path)
    changed = [float((a.dataset.targets != b.dataset.targets).mean()) for a, b in zip(true, control)]
    assert changed[0] > .4 and changed[1] > 0 and changed[2] == 0
    assert control.shuffled_labels and 'labels shuffled' in repr(control) and not true.stamps
    assert (load(shuffle_labels=True).train.dataset.targets == control.train.dataset.targets).all()


def test_published_split_needs_its_name(load, made):
    manifest, pairs, certificate = made
    leaky = certify(manifest, pairs, split_published(manifest, seed=1), 'published', {})
    with pytest.raises(LoaderError, match='published_split=False'): load(certificate=leaky)
    with pytest.raises(LoaderError, match='published_split=True'): load(published_split=True)
    dls = load(certificate=leaky, published_split=True)
    assert dls.published and 'published split' in repr(dls)
    assert set(dl_rows(dls.test).split) == {'Testing'}


def changed(certificate, **fields):
    other = copy.deepcopy(certificate)
    for name, value in fields.items(): object.__setattr__(other, name, value)
    return other


def test_certificates_that_do_not_hold_are_refused(load, made):
    manifest, _, good = made
    train = [p for p, s in good.assignment.items() if s == 'train']
    test = [p for p, s in good.assignment.items() if s == 'test']
    groups = dict(good.groups)
    groups[test[0]] = groups[train[0]]
    fewer = {p: s for p, s in good.assignment.items() if p != train[0]}
    folds = dict.fromkeys(good.assignment, 3)
    only = dict.fromkeys(good.assignment, 'train')
    for fields, message in ((dict(manifest_sha256='0'*64), 'of this manifest'), (dict(groups=groups), '1 cross'),
                            (dict(assignment=fewer), '1 differ'), (dict(assignment=dict(good.assignment, ghost='test')), '1 differ'),
                            (dict(assignment=folds), 'got 3'), (dict(assignment=only), 'test has none')):
        with pytest.raises(LoaderError, match=message): load(certificate=changed(good, **fields))
    with pytest.raises(LoaderError, match='got dict'): load(certificate={})
    dls = load(certificate=changed(good, assignment=fewer, left_out={train[0]: 'same group as another'}))
    assert train[0] not in set(dls.train.dataset.items.path) and len(dls.train.dataset) == len(train) - 1


def test_no_validation_side_is_an_empty_loader(load, made):
    good = made[2]
    sides = {p: 'train' if s == 'valid' else s for p, s in good.assignment.items()}
    groups = dict.fromkeys(good.groups, 0) | {p: i for i, p in enumerate(good.groups)}
    dls = load(certificate=changed(good, assignment=sides, groups=groups, edges=[]), shuffle_labels=True)
    assert [len(dl.dataset) for dl in dls] == [list(sides.values()).count(s) for s in ('train', 'valid', 'test')]
    assert list(dls.valid) == [] and len(dl_rows(dls.valid)) == 0 and 'valid 0' in repr(dls)


def test_a_class_without_training_pictures_is_refused(load, made):
    manifest, pairs, good = made
    label = dict(zip(manifest.table.path, manifest.table.label))
    sides = {p: 'test' if label[p] == 'glioma' else s for p, s in good.assignment.items()}
    with pytest.raises(LoaderError, match='glioma is not'): load(certificate=changed(good, assignment=sides))


@pytest.fixture
def learner(load, tmp_path):
    with seeded(0): model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(24*32, 3))
    learn = Learner(load(), model, loss_func=CrossEntropyLossFlat(), cbs=EpochKeys(), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): yield learn
    plt.close('all')


def test_learner_fits_and_finds_a_rate(learner):
    learner.fit(2, 1e-3)
    assert learner.dls.train.epoch == 1 and np.isfinite(learner.recorder.losses).all()
    assert learner.lr_find(num_it=12, show_plot=False).valley > 0


def test_learner_predictions_keep_the_order(learner, made, base):
    dls = learner.dls
    for args, dl in (({}, dls.valid), ({'dl': dls.test}, dls.test), ({'ds_idx': 0}, dls.train.new(shuffle=False, drop_last=False))):
        preds, targets = learner.get_preds(**args)
        assert targets.tolist() == list(dl_rows(dl).target) and len(preds) == len(dl.dataset)
    row = dl_rows(dls.test).iloc[0]
    name, number, probs = learner.predict(base/'raw'/row.path)
    one = learner.get_preds(dl=dls.test)[0][0]
    assert torch.allclose(probs, one) and name == made[0].classes[int(one.argmax())] == dls.vocab[int(number)]


def test_pictures_by_file_or_bytes(learner, base):
    paths = [base/'raw'/p for p in dl_rows(learner.dls.test).path[:3]]
    for items in (paths, [p.read_bytes() for p in paths]):
        preds = learner.get_preds(dl=learner.dls.test_dl(items))[0]
        assert torch.allclose(preds, learner.get_preds(dl=learner.dls.test)[0][:3])


def test_fastai_shows_slices_on_black(learner):
    learner.dls.show_batch(max_n=4)
    shown = plt.gcf().axes[0]
    assert shown.images[0].get_cmap().name == 'gray' and shown.get_title() in CLASSES
    learner.show_results(max_n=3)
    assert plt.gcf().axes[0].images[0].get_clim() == (0, 1)
    x, y = learner.dls.valid.dataset[0]
    assert isinstance(x, TensorSlice) and x.dtype == torch.uint8
    assert TensorSlice(torch.zeros(1, 4, 4, dtype=torch.uint8)).show().images[0].get_clim() == (0, 255)


def test_interpretation(learner):
    shown = ClassificationInterpretation.from_learner(learner)
    assert shown.confusion_matrix().sum() == len(learner.dls.valid.dataset)
    assert shown.vocab == list(CLASSES)
    shown.plot_top_losses(2)
    assert plt.gcf().axes[0].images[0].get_cmap().name == 'gray'


def test_further_transforms_and_devices(load):
    dls = load()
    more = dls.valid.new(after_batch=[lambda b: b])
    assert torch.equal(more.one_batch()[0], dls.valid.one_batch()[0])
    assert sum(type(t).__name__ == 'KeyedBatch' for t in more.after_batch.fs) == 1
    assert dls.device == dls.train.device and dls.one_batch()[0].device == dls.device
    assert isinstance(dls.train, KeyedDL) and dls.test is dls[2]


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    "A phantom whose table says which head and which place each slice is from, split by patient"
    base = tmp_path_factory.mktemp("volumes")
    truth = make_phantom(base/"phantom", patients=24, slices=4, size=48, seed=3)
    table = pd.DataFrame(truth["images"])[["file", "label", "patient"]]
    table["series"], table["slice_index"] = table.patient, [r["slice"] for r in truth["images"]]
    table.to_csv(base/"phantom/manifest.csv", index=False)
    manifest = build_manifest(base/"phantom", progress=False)
    pairs = find_pairs(manifest, progress=False)
    sides = split_grouped(manifest, group_rows(manifest, pairs), fractions=(.5, .25, .25))
    return base, manifest, certify(manifest, pairs, sides, "grouped"), pairs


def test_neighbouring_slices_are_channels(volumes):
    "The slice in the middle, those of its own volume beside it, in the order of the volume, repeated at the ends"
    base, manifest, cert, _ = volumes
    how = dict(cache_dir=base/"cache", batch_size=4, progress=False, device="cpu")
    one, three, five = (make_loaders(manifest, cert, Preprocess(size=(32, 32)), slices=n, **how) for n in (1, 3, 5))
    for dl, plain in zip(three, one):
        rows = dl.dataset.items
        image = {p: plain.dataset.cache.image(p) for p in rows.path}
        for i, row in enumerate(rows.itertuples()):
            volume = rows[rows.series == row.series].assign(k=lambda t: t.slice_index.astype(int)).sort_values("k").path.tolist()
            k = volume.index(row.path)
            want = [volume[max(k - 1, 0)], row.path, volume[min(k + 1, len(volume) - 1)]]
            assert (dl.dataset[i][0].numpy() == np.stack([image[p] for p in want])).all()
    x, again = three.test.one_batch()[0], next(iter(three.test.new(three.test.dataset.items.iloc[:4])))[0]
    assert x.shape[1:] == (3, 32, 32) and (x[:4] == again).all() and five.train.one_batch()[0].shape[1] == 5
    assert (x[:, 1:2] == one.test.one_batch()[0]).all()
    files = three.test.dataset.around[three.test.dataset.paths[0]]
    assert (three.test_dl([tuple(manifest.root/f for f in files)]).one_batch()[0][0] == x[0]).all()
    with pytest.raises(LoaderError, match="as 3 neighbouring slices, got 1"): three.test_dl([manifest.root/files[0]]).one_batch()


def test_a_volume_is_never_cut(volumes):
    "A split that would train on one half of a head and test the other is refused, also where patients are unknown"
    base, manifest, cert, pairs = volumes
    rows = pd.read_csv(manifest.root/"manifest.csv").drop(columns="patient")
    copy = base/"unknown"
    shutil.copytree(manifest.root, copy)
    rows.to_csv(copy/"manifest.csv", index=False)
    unknown = build_manifest(copy, progress=False)
    sides = pd.Series(cert.assignment)
    moved = unknown.table.path[unknown.table.path.map(sides).eq("train")].iloc[0]
    cut = certify(unknown, pairs.iloc[:0], sides.where(sides.index != moved, "test"), "mine")
    how = dict(cache_dir=base/"cache", batch_size=4, progress=False, device="cpu")
    assert make_loaders(unknown, cut, Preprocess(size=(32, 32)), **how).train
    with pytest.raises(LoaderError, match="a volume must be on one side, p00.. is cut in two"):
        make_loaders(unknown, cut, Preprocess(size=(32, 32)), slices=3, **how)


def test_a_network_of_neighbouring_slices_from_training_to_prediction(volumes):
    "It gets three channels, its choice is written down, and the packaged model sees what the training saw"
    from phoenix.deploy.package import save_package
    from phoenix.train.learner import train_classifier
    base, manifest, cert, _ = volumes
    size, how = Preprocess(size=(32, 32)), dict(epochs=1, batch_size=8, cache_dir=base/"cache", progress=False, slices=3)
    trained = train_classifier(manifest, cert, model="neurosnake_tiny_ca", preprocess=size, **how)
    weights = trained.learner.model.state_dict()
    assert trained.learner.choices["slices"] == 3 and next(v for v in weights.values() if v.ndim == 4).shape[1] in (3, 1)
    package = save_package(base/"model", model_name="neurosnake_tiny_ca", model_args=dict(n_classes=4, slices=3),
                           state_dict=weights, classes=trained.test.classes, preprocess=size, run_hash="none", threshold=0.,
                           certificate_sha256=cert.sha256, metrics=dict(accuracy=trained.test.accuracy), synthetic=True,
                           published=False)
    around = trained.dls.test.dataset.around
    x = torch.from_numpy(package.images([tuple(manifest.root/f for f in around[p]) for p in trained.test.rows.path]))
    assert x.shape[1] == 3
    with torch.no_grad(): assert (package.model()(x) - torch.from_numpy(trained.test.logits)).abs().max() < 1e-5


def test_the_batch_that_fits_is_found_once(volumes, monkeypatch):
    "'auto' is the most whose whole step fits, at most a quarter of the pictures; a resumed training keeps what it found"
    from phoenix.train import batches
    from phoenix.train.learner import train_classifier
    base, manifest, cert, _ = volumes
    how = dict(model="neurosnake_tiny_ca", preprocess=Preprocess(size=(32, 32)), batch_size="auto", cache_dir=base/"cache",
               progress=False)
    plenty = train_classifier(manifest, cert, epochs=1, **how).learner.choices["batch_size"]
    assert plenty == list(cert.assignment.values()).count("train")//4
    need = batches.step_bytes(train_classifier(manifest, cert, epochs=1, **how | dict(batch_size=4)).learner, 4)
    monkeypatch.setattr(batches, "_free_bytes", lambda device: need/.8 + 1)
    first = train_classifier(manifest, cert, epochs=1, run_dir=base/"auto", **how)
    assert first.learner.choices["batch_size"] == 4 < plenty
    monkeypatch.setattr(batches, "_free_bytes", lambda device: 2**40)
    again = train_classifier(manifest, cert, epochs=1, run_dir=base/"auto", resume=True, **how)
    assert again.learner.choices["batch_size"] == 4 and (again.test.logits == first.test.logits).all()


def typed(base, *words):
    "What a command answers, as it is typed"
    from typer.testing import CliRunner
    from phoenix.cli import app
    env = dict(PHOENIX_THREADS="1", PHOENIX_RUNS_DIR=str(base/"runs"), PHOENIX_CACHE_DIR=str(base/"cache"))
    return CliRunner().invoke(app, [*map(str, words), "--json"], env=env)


def test_options_of_phoenix_train_are_refused_in_one_sentence(volumes):
    "Before anything is trained; the run says that it failed and why"
    base, manifest, cert, _ = volumes
    cert.save(base/"split.json")
    start = ["train", manifest.root, base/"split.json", "--model", "neurosnake_tiny_ca", "--size", 32, "--epochs", 1]
    for words, why in ((["--batch-size", "many"], "must be a number from 1 or 'auto', got 'many'"),
                       (["--mixing", "cutmx"], "did you mean 'cutmix'"), (["--slices", 2], "slices must be odd"),
                       (["--average", "swa", "--seconds", 5], "give epochs alone"),
                       (["--sam", .05, "--accumulate", 2], "leave out sam or accumulate"),
                       (["--devices", 2, "--mixing", "mixup"], "must see the whole batch")):
        done = typed(base, *start, *words)
        assert done.exit_code == 2 and why in json.loads(done.stdout)["error"], done.stdout


@pytest.mark.slow
def test_every_option_of_phoenix_train_by_its_flag(volumes):
    "Three slices, the batch that fits, several options at once; resumed, exported, quantised and scored"
    base, manifest, cert, _ = volumes
    cert.save(base/"split.json")
    words = ["train", manifest.root, base/"split.json", "--model", "neurosnake_tiny_ca", "--size", 32, "--epochs", 2,
             "--slices", 3, "--batch-size", "auto", "--average", "swa", "--swa-start", .5, "--mixing", "mixup",
             "--precision", "bf16", "--accumulate", 2, "--weights", "balanced", "--loss", "focal", "--opt", "adamw"]
    first = json.loads(typed(base, *words).stdout)
    again = json.loads(typed(base, *words, "--resume", first["run"]).stdout)
    assert again["scores"] == first["scores"]
    state = read_checkpoint(Path(first["run"])/"checkpoints/last.safetensors").state["plan"]
    assert [state[k] for k in ("slices", "batch_size", "average", "schedule", "mixing", "precision", "accumulate", "opt",
                               "loss")] == [3, 12, "swa", "hold", "mixup", "bf16", 2, "adamw", "Focal"]
    place = first["model"], manifest.root, base/"split.json"
    assert typed(base, "export", *place).exit_code == 0 and typed(base, "quantize", *place, "--images", 24).exit_code in (0, 1)
    found = json.loads(typed(base, "evaluate", *place, "--runtime", "fp32").stdout)
    assert found["accuracy"] == pytest.approx(first["scores"]["test"]["accuracy"])
