"Models, data, maps and searches: what is tested at length elsewhere, here by its essential sentence and the number of its requirement"
import ast
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from attacks_reference import small
from fastai.data.core import DataLoaders
from optuna.distributions import FloatDistribution
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from phoenix.data.acquire import build_manifest
from phoenix.data.augment import Augment, augment_for
from phoenix.data.concepts import ConceptSet
from phoenix.data.loaders import KeyedBatch
from phoenix.data.preprocess import Preprocess
from phoenix.data.splits import SplitError, certify, make_split, prove
from phoenix.deploy.package import PackageError, add_runtime, load_package, save_package
from phoenix.deploy.registry import Registry
from phoenix.deploy.store import open_store
from phoenix.evaluate.explain import integrated_gradients, occlusion
from phoenix.models.concepts import ConceptError, tcav
from phoenix.models.zoo import create_model
from phoenix.train.adversarial import Adversary
from phoenix.train.attacks import is_right, pgd, transfer
from phoenix.train.autoattack import counted
from phoenix.train.learner import fit, make_learner
from phoenix.train.masking import masking_checks
from phoenix.train.search import FURTHER, SPACE, Objective, SearchError, best_parameters, front, search, sub_space
from phoenix.train.triobjective import Shares, TriObjective, read_terms

def case(label, *values): return pytest.param(*values, id=label)


# models

COUNTS = {"resnet50": 25_557_032, "resnet101": 44_549_160, "efficientnet_b0": 5_288_548, "efficientnet_b4": 19_341_616,
          "vit_base_patch16_224": 86_567_656, "vit_large_patch16_224": 304_326_632}


@pytest.mark.parametrize("name", [case(f"S2-R10-{n}", n) for n in COUNTS])
def test_configured_networks_have_torchvisions_parameters(name):
    with torch.device("meta"): net = create_model(name, 1000, 3)
    assert sum(p.numel() for p in net.parameters()) == COUNTS[name]


@pytest.mark.parametrize("name", [case("S2-R12-stem-is-summed", "mobilenetv3_small_050")])
def test_one_channel_sees_what_three_equal_ones_saw(name, tmp_path):
    from safetensors.torch import save_file
    colour = create_model(name, 3, 3)
    save_file({k: v.contiguous() for k, v in colour.backbone.state_dict().items()}, tmp_path / "w.safetensors")
    grey = create_model(name, 3, 1, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "w.safetensors")))
    stems = [m.backbone.conv_stem.weight.detach() for m in (grey, colour)]
    assert torch.equal(stems[0], stems[1].sum(1, keepdim=True))


def network(path, k=3):
    "Logits that are the mean of the picture, as ONNX"
    make, f32 = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [make.make_node("GlobalAveragePool", ["image"], ["p"]), make.make_node("Flatten", ["p"], ["f"]),
             make.make_node("MatMul", ["f", "w"], ["logits"])]
    ends = [make.make_tensor_value_info(n, f32, s) for n, s in (("image", ["b", 1, "h", "w"]), ("logits", ["b", k]))]
    graph = make.make_graph(nodes, "mean", ends[:1], ends[1:], [make.make_tensor("w", f32, [1, k], [1.] * k)])
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=10), path)
    return path


def model_folder(path, classes=("glioma", "meningioma", "notumor"), note=0.):
    "A model folder of one layer, with its network"
    weights = dict(w=np.array([[8., note]], np.float32))
    save_package(path, model_name="mean", model_args=dict(c_in=1), classes=list(classes), preprocess=Preprocess(size=(32, 32)),
                 certificate_sha256="c" * 64, run_hash="r" * 64, metrics=dict(accuracy=.75), threshold=.8, synthetic=True,
                 published=False, state_dict=weights)
    add_runtime(path, "fp32", network(path.with_suffix(".onnx")), dict(ok=True))
    return path


@pytest.mark.parametrize("names", [case("S2-R13-versions-only-grow", "abc")])
def test_versions_have_rising_numbers_and_bytes_that_stay(names, tmp_path):
    registry = Registry(open_store(tmp_path / "registry.db"))
    made = [registry.register(model_folder(tmp_path / n, note=i), "tumour") for i, n in enumerate(names)]
    assert [v.name for v in made] == ["tumour@1", "tumour@2", "tumour@3"] and len({v.identity for v in made}) == 3
    assert registry.register(tmp_path / names[0], "tumour") == made[0], "the same bytes are the same version"
    assert registry.versions("tumour") == made and registry.load(made[1]).classes == ["glioma", "meningioma", "notumor"]


# attacks

class Rounded(nn.Module):
    "A network behind pixels of 8 levels: it hides its gradients"
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x): return self.net((7 * x).round() / 7)


@pytest.mark.parametrize("hidden", [case("S2-R18-open", False), case("S2-R18-hidden-gradients", True)])
def test_hidden_gradients_are_found_by_the_checks_and_by_transfer(hidden):
    net, x, y = small()
    asked = Rounded(net).eval() if hidden else net
    kept = is_right(asked, x, y)
    x, y = x[kept], y[kept]
    found = masking_checks(asked, x, y, eps=.04, surrogate=net, steps=10, queries=50)
    assert found.passed == (not hidden) and len(found.table) == 8
    carried = is_right(asked, transfer(net, x, y, eps=.1), y).double().mean()
    own = is_right(asked, pgd(asked, x, y, eps=.1), y).double().mean()
    assert (own > carried) == hidden, "its own gradients lead nowhere, those of the open network do"


# explanations

@pytest.mark.parametrize("base", [case("S2-R32-dark", .25), case("S2-R32-light", .75)])
def test_contributions_of_a_linear_network_in_closed_form(base):
    "A weight times the change of its pixel; the sum is whole, and of a network of bends what it misses is told"
    bent, x, _ = small()
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 32)).eval(), x[:4]
    net[1].load_state_dict(bent[1].state_dict())
    found, change = integrated_gradients(net, x, 1, base=base), net[1].weight[1].detach().view(1, 8, 8) * (x[:, 0] - base)
    assert torch.allclose(found.pixels, change, atol=1e-6) and found.error.max() < 1e-4
    assert torch.allclose(occlusion(net, x, 1, side=1, stride=1, base=base), change, atol=1e-5)
    few, many = (integrated_gradients(bent, x, 1, base=base, steps=n) for n in (2, 256))
    with torch.no_grad(): rise = (bent(x) - bent(torch.full_like(x, base)))[:, 1]
    for a in (few, many): assert torch.allclose(a.error, (a.pixels.sum((1, 2)) / rise - 1).abs(), atol=1e-4)
    assert many.error.max() < .01 < few.error.max(), "points of a path with bends"


class Bright(nn.Module):
    "Class 1 rises with brightness; stripes are seen in a second channel and lead nowhere"
    def __init__(self):
        super().__init__()
        self.see = nn.Conv2d(1, 2, 3, padding=1, padding_mode="replicate", bias=False)
        self.see.weight.data = torch.stack([torch.full((1, 3, 3), 1 / 9), torch.tensor([[[-1., 2., -1.]] * 3]) / 3])
        self.bend = nn.Identity()

    def forward(self, x):
        bright, stripes = self.see(x).unbind(1)
        z = self.bend(torch.stack([bright, stripes**2], 1)).mean((2, 3))[:, 0]
        return torch.stack([-z, z], 1)


def concept_sets(*names):
    "Pictures of noise, some brighter, some striped"
    g = torch.Generator().manual_seed(0)
    for name in names:
        x = .3 + .1 * torch.rand(12, 1, 16, 16, generator=g)
        if name == "bright": x = x + .2
        if name == "stripes": x = x + torch.tensor([0., .3]).repeat(8) - .15
        yield ConceptSet(name, "random", x, pd.DataFrame(dict(source=[f"{name}{i}" for i in range(len(x))])))


@pytest.mark.parametrize("n", [case("S2-R33-thirty-random-counterparts", 30)])
def test_a_concept_is_scored_only_where_its_direction_is_sound(n):
    net = Bright().train()
    asked, randoms = (sets := list(concept_sets("bright", "stripes", "noise", *(f"random{i}" for i in range(n)))))[:3], sets[3:]
    with pytest.raises(ConceptError, match="30 random counterparts"): tcav(net, asked[2].patches, 1, asked, randoms[1:], "bend")
    t = tcav(net, asked[2].patches, 1, asked, randoms, "bend").table.set_index("concept")
    assert net.training and t.verdict.to_dict() == dict(bright="depends", stripes="like random", noise="no direction")
    assert t.score["bright"] == 1 and t.low["bright"] > .5 and np.isnan(t.score["noise"]) and t.low["noise"] <= .5
    assert (t.p_holm >= t.p)[["bright", "stripes"]].all() and t.p_holm["bright"] == pytest.approx(3 * t.p["bright"]), "Holm, of three"


# data

@pytest.mark.parametrize("classes", [case("S2-R39-class-order", ("notumor", "glioma", "meningioma"))])
def test_class_order_is_kept_as_declared_and_another_is_refused(classes, tmp_path):
    folder = model_folder(tmp_path / "m", classes)
    assert load_package(folder).classes == list(classes) == load_package(folder, classes=list(classes)).classes
    with pytest.raises(PackageError, match="class order must be"): load_package(folder, classes=sorted(classes))
    raw = (folder / "model.safetensors").read_bytes()
    kept = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["classes"]
    assert json.loads(kept) == list(classes), "also in the weights"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "A set of 16 patients with two pictures each, a copy under another name and one in a mirror"
    root, g, rows = tmp_path_factory.mktemp("set"), np.random.default_rng(0), []
    for i in range(34):
        coarse = Image.fromarray(g.integers(0, 255, (6, 6)).astype(np.uint8)).resize((64, 64), Image.BICUBIC)
        if i == 32: coarse = Image.open(root / "0.png") # bytes of the first picture
        if i == 33: coarse = Image.open(root / "1.png").transpose(Image.FLIP_LEFT_RIGHT)
        coarse.save(root / f"{i}.png")
        label = ("glioma", "meningioma")[i // 2 % 2 if i < 32 else 0]
        rows.append(dict(file=f"{i}.png", label=label, patient=f"p{i // 2 if i < 32 else i}"))
    pd.DataFrame(rows).to_csv(root / "manifest.csv", index=False)
    return root


@pytest.mark.parametrize("name", [case("S2-R40-exact-paths", "7.png")])
def test_a_file_is_where_it_is_named_or_it_is_missing(name, pictures, tmp_path):
    "A picture of the same name in a deeper folder is not taken for it"
    rows = pd.read_csv(pictures / "manifest.csv")
    (tmp_path / "deeper").mkdir()
    for f in rows.file: (tmp_path / ("deeper" if f == name else "") / f).write_bytes((pictures / f).read_bytes())
    rows.to_csv(tmp_path / "manifest.csv", index=False)
    made = build_manifest(tmp_path, progress=False)
    problems = made.table.set_index("path").problem
    assert problems[name].startswith("missing") and (problems.drop(name) == "").all() and len(made.readable) == len(rows) - 1
    assert [f for f, _ in made.leftovers] == [f"deeper/{name}"]


class Keyed(tuple):
    "What a loader asks of a set: how many pictures, and the key of each"
    @property
    def keys(self): return self


@pytest.mark.parametrize("error", [case("S2-R41-no-second-try", TypeError)])
def test_a_transform_is_called_once_and_its_own_error_comes_through(error):
    calls = []
    def change(x, indices, *, seed, epoch):
        calls.append((tuple(x.shape), indices, seed, epoch))
        raise error("inside of the transform")
    loader = SimpleNamespace(shuffle=True, augment=change, dataset=Keyed((5, 6, 7)), seed=3, epoch=2)
    with pytest.raises(error, match="inside of the transform"):
        KeyedBatch(loader).encodes((torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), torch.tensor([2, 0])))
    assert calls == [((2, 1, 4, 4), [7, 5], 3, 2)]


CROSSINGS = {"patient": ("2.png", "3.png"), "sha256": ("0.png", "32.png"), "likeness": ("1.png", "33.png")}


@pytest.mark.parametrize("what", [case(f"S2-R42-{w}", w) for w in ("path", *CROSSINGS)])
def test_nothing_may_stand_on_two_sides(what, pictures):
    from phoenix.data.duplicates import find_pairs
    manifest = build_manifest(pictures, progress=False)
    pairs = find_pairs(manifest, progress=False)
    side = pd.Series(make_split(manifest, pairs, fractions=(.5, 0, .5)).assignment)
    assert {k for k, v in prove(manifest, pairs, side).items() if k.endswith("_across") and v} == set()
    if what == "path":
        with pytest.raises(SplitError, match="different readable files"):
            certify(manifest, pairs, pd.concat([side, pd.Series({"2.png": "test"})]), "mine")
        return
    one, other = CROSSINGS[what]
    assert side[one] == side[other], "groups are kept whole"
    side[one], side[other] = "train", "test"
    with pytest.raises(SplitError, match="may stand on two sides") as told: certify(manifest, pairs, side, "mine")
    assert ("patients_across" in str(told.value)) == (what == "patient") and ("edges_across" in str(told.value)) == (what != "patient")


@pytest.mark.parametrize("chain", [case("S2-R43-default", Augment.default), case("S2-R43-strong", Augment.strong)])
def test_a_head_is_not_turned_over_unless_that_is_declared(chain):
    made, free = chain(64), Augment.free(64)
    assert (made.flip, made.quarter, made.mirror) == (0, 0, 0) and made.rotate <= 15 and min(free.flip, free.quarter) > 0
    assert augment_for(SimpleNamespace(source="phantom"), 64) == Augment.default(64)
    x = torch.zeros(64, 1, 64, 64)
    x[:, :, 8:24, 24:40] = 1 # above the middle
    def above(chain): return (chain(x, range(64), seed=0)[:, :, :32].sum((1, 2, 3)) > x[:1].sum() / 2).sum().item()
    still = dict(alpha=(0, 0), noise=(0, 0), gain=0, gamma=0, bias=0, artefacts=(), p_spline=0.)
    assert above(replace(made, **still)) == 64 and above(replace(free, **still)) < 56


# search

@pytest.mark.parametrize("sampler", [case("S2-R54-nsga2", "nsga2"), case("S2-R54-tpe", "tpe")])
def test_several_objectives_give_a_front(sampler, tmp_path):
    space = dict(a=FloatDistribution(0, 1), b=FloatDistribution(0, 1))
    aims = [Objective("clean", "maximize", lambda folds, p: p["a"]), Objective("robust", "maximize", lambda folds, p: 1 - p["a"]**2 - p["b"])]
    study = search(tmp_path, lambda p, folder: iter([p]), steps=1, trials=15, space=space, objectives=aims, sampler=sampler, seed=1)
    values = np.array([t.values for t in study.trials])
    beaten = [any((o >= v).all() and (o > v).any() for o in values) for v in values]
    found = front(study)
    assert sorted(found.number) == [i for i, b in enumerate(beaten) if not b] and 1 < len(found) < 15
    with pytest.raises(SearchError, match="no best trial"): best_parameters(study)


@pytest.mark.parametrize("name", [case("S2-R54-the-bound-is-not-searched", "eps")])
def test_the_bound_is_no_parameter_of_a_search(name):
    assert not [n for n in SPACE | FURTHER if n.startswith(name)]
    with pytest.raises(SearchError, match="got 'eps'"): sub_space([name])


# labels

def test_the_copy_that_trades_made_serves_the_maps_too(tmp_path):
    "S2-R28: shared, each training picture is spared one pass forward and back; the seconds of each step are on record"
    x, y = torch.rand(16, 1, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4

    def passes(shared):
        dls = DataLoaders(*(DataLoader(TensorDataset(x, y), batch_size=8) for _ in range(2)), device="cpu")
        net = create_model("cnn", 4, widths=(6, 8, 10))
        tri = TriObjective(Adversary(2/255, steps=1), Shares(gamma=0), share_adv=shared)
        learn = make_learner(dls, net, run_dir=tmp_path/str(shared)).add_cbs([tri])
        with counted(net) as found: fit(learn, 1, progress=False)
        assert (read_terms(tmp_path/str(shared)).seconds > 0).all()
        return found.forward, found.backward
    (forward, backward), (fewer, less) = passes(False), passes(True)
    assert (forward - fewer, backward - less) == (16, 16)


def test_each_requirement_has_a_labelled_test():
    "S2-R1 to S2-R54, by the strings of tests/fidelity"
    said = [n.value for f in Path(__file__).parent.glob("test_*.py") for n in ast.walk(ast.parse(f.read_text()))
            if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    labelled = {int(n) for text in said for n in re.findall(r"S2-R(\d+)", text)}
    assert set(range(1, 55)) <= labelled
