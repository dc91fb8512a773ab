"Golden values and properties of explanations and of the tri-objective; each test carries the number of the requirement it holds"
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from phoenix.data.concepts import ARTEFACT_CONCEPTS, ConceptRules
from phoenix.evaluate.explain import MAPS, linear_cka, map_names, removal
from phoenix.models.cam import CAMS, FeatureTap, attention_layers, drawn_cam, grad_cam, rollout, signed_cam
from phoenix.models.concepts import concept_hinge, soft_tcav
from phoenix.models.stability import (bottleneck, cosine, likeness, ms_ssim, normalised_l2, segment_maps, segment_stability, spearman, ssim,
                                      topk_iou)
from phoenix.models.zoo import create_model
from phoenix.train.attacks import kl
from phoenix.train.triobjective import PARTS, Shares, TriObjective, total_loss

LOGITS, ADV, TARGETS = torch.tensor([[2., 0., -1.], [0., 1., 0.]]), torch.tensor([[1., 1., -1.], [0., 0., 1.]]), torch.tensor([0, 2])


def case(label, *values): return pytest.param(*values, id=label)


def draw(*shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def small(name="cnn", k=3, **kw):
    torch.manual_seed(0)
    return create_model(name, k, **(dict(widths=(6, 8)) if name == "cnn" else kw))


# the sum of three parts

def parts(**kw): return dict.fromkeys(PARTS) | kw


@pytest.mark.parametrize("expl", [case("S2-R27-total", 0.)])
def test_total_golden(expl):
    ce, div = F.cross_entropy(LOGITS, TARGETS), kl(LOGITS, ADV).mean()
    assert ce.item() == pytest.approx(.860645, abs=5e-7) and div.item() == pytest.approx(.341276, abs=5e-7)
    total = total_loss(parts(task=ce, robust=div, stability=torch.tensor(expl), concept=torch.tensor(expl)), Shares(.3, 6., .2, .5))
    assert total.item() == pytest.approx(1.474943, abs=5e-7)


@pytest.mark.parametrize("which", [case(f"S2-R26-{n}-is-off", n) for n in PARTS[1:]])
def test_a_part_that_is_off_is_named(which):
    assert which in TriObjective(shares=Shares(robust=0., explain=0.)).off and "task" not in TriObjective().off


# maps inside a loss

@pytest.mark.parametrize("method", [case(f"S2-R24-{m}", m) for m in CAMS])
def test_parameter_gradients_are_not_touched(method):
    net, x = small(), draw(2, 1, 32, 32)
    net(x).sum().backward()
    before = [p.grad.clone() for p in net.parameters()]
    maps = grad_cam(net, x, 1, method=method, create_graph=True)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before))
    assert 0 <= maps.min() and maps.max() <= 1
    assert any(g is not None and g.abs().max() > 0 for g in
               torch.autograd.grad(maps.sum(), list(net.stages.parameters()), allow_unused=True)) or not maps.any()


@pytest.mark.parametrize("name", [case("S2-R11-hooks", "cnn")])
def test_hooks_go_after_an_error(name):
    net = small(name)
    with pytest.raises(RuntimeError):
        with FeatureTap(net):
            net(draw(1, 2, 32, 32))
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("net, layer", [case("S2-R30-cnn", "cnn", "stages.1"), case("S2-R30-neurosnake", "neurosnake_tiny", "stages.3"),
                                        case("S2-R30-timm", "resnet10t", "backbone.layer3")])
def test_grad_cam_equals_captum(net, layer):
    from captum.attr import LayerGradCam
    net, x = small(net).eval(), draw(2, 1, 48, 48)
    theirs = LayerGradCam(net, net.get_submodule(layer)).attribute(x, 1, relu_attributions=True)[:, 0]
    assert (signed_cam(net, x, 1, layer=layer).relu() - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("order, first", [case("S2-R31-layer-order", 1, .725), case("S2-R31-reversed", -1, .68)])
def test_rollout_golden(order, first):
    layers = [torch.tensor([[[.8, .2], [.4, .6]]])[None], torch.tensor([[[.5, .5], [.1, .9]]])[None]][::order]
    assert rollout(layers)[0, 0, 0].item() == pytest.approx(first, abs=1e-6)


@pytest.mark.parametrize("fused", [case("S2-R31-fused-off", False), case("S2-R31-fused-on", True)])
def test_rollout_whether_fused_or_not(fused):
    net, x = small("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2).eval(), draw(1, 1, 32, 32)
    for m in attention_layers(net).values():
        m.fused_attn = fused
    found = MAPS["rollout"](net, x)
    assert found.shape == (1, 32, 32) and all(m.fused_attn is fused for m in attention_layers(net).values())
    assert "rollout" in map_names(net)


# concepts

@pytest.mark.parametrize("value, kind, loss", [case("S2-R25-artefact-high", .8, "artefact", .5), case("S2-R25-artefact-low", .2, "artefact", 0.),
                                               case("S2-R25-medical-low", .1, "medical", .2), case("S2-R25-medical-high", .9, "medical", 0.)])
def test_hinge_has_the_right_sign(value, kind, loss):
    assert concept_hinge({"c": torch.tensor(value)}, {"c": kind}).item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("net, layer, n", [case("S2-R25-neurosnake", "neurosnake_tiny", "stages.1", 48)])
def test_soft_scores_reach_the_body(net, layer, n):
    net, x = small(net), draw(2, 1, 64, 64)
    score = soft_tcav(net, x, torch.tensor([0, 1]), {"c": F.normalize(draw(n), dim=0)}, layer)["c"]
    assert score.requires_grad
    grads = torch.autograd.grad(score, list(net.stages.parameters()), allow_unused=True)
    assert max(g.abs().max() for g in grads if g is not None) > 0


@pytest.mark.parametrize("rules", [case("S2-R34-knobs", ConceptRules())])
def test_rules_of_patches(rules):
    assert (rules.size, rules.medical, rules.artefact, rules.random) == (224, 100, 50, 200)
    assert (rules.quality, rules.similarity, rules.recent) == (.5, .7, 5)


@pytest.mark.parametrize("names", [case("S2-R38-artefacts", {"burned_in_text", "skull_crop", "ghosting_motion", "bias_field", "ringing",
                                                             "padding_black", "watermark"})])
def test_artefacts_by_name(names): assert set(ARTEFACT_CONCEPTS) == names


# likeness

@pytest.mark.parametrize("f, value", [case(f"S2-R35-identical-{f.__name__}", f, v) for f, v in (
    (ssim, 1), (ms_ssim, 1), (spearman, 1), (cosine, 1), (topk_iou, 1), (normalised_l2, 0))])
def test_identical_maps(f, value):
    a = draw(2, 32, 32)
    assert f(a, a).tolist() == pytest.approx([value]*2, abs=1e-5)


@pytest.mark.parametrize("low, high", [case("S2-R35-constant", .2, .8)])
def test_constant_maps(low, high):
    a, b = torch.full((1, 16, 16), low), torch.full((1, 16, 16), high)
    assert ssim(a, b).item() == pytest.approx(.470666, abs=1e-6)
    found = likeness(a, b).summary()
    assert found.excluded.spearman == 1 and found.n.spearman == 0 and np.isnan(found["mean"].spearman)


@pytest.mark.parametrize("value", [case("S2-R35-normalised-l2", .7071)])
def test_normalised_l2_golden(value):
    e = torch.tensor([[1., 0.]])
    assert normalised_l2(e, e.flip(1)).item() == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize("size", [case(f"S2-R35-msssim-{s}", s) for s in (16, 48, 200)])
def test_ms_ssim_of_opposites_is_a_number(size):
    a = draw(2, size, size)
    assert torch.equal(ms_ssim(a, 1 - a), torch.zeros(2))


# networks that segment: the probability map and Seg-Grad-CAM on the bottleneck stand for the class activation map

class Halved(nn.Module):
    "Set by hand: the mean of two by two pixels and a half minus it, a ReLU on the way up, two classes"
    def __init__(self):
        super().__init__()
        self.down, self.head = nn.Conv2d(1, 2, 2, 2), nn.Conv2d(2, 2, 1)
        self.down.weight.data = torch.tensor([.25, -.25]).view(2, 1, 1, 1).repeat(1, 1, 2, 2)
        self.down.bias.data, self.head.bias.data = torch.tensor([0, .5]), torch.tensor([.7, 0])
        self.head.weight.data = torch.tensor([[0., 0.], [3., 1.]]).view(2, 2, 1, 1)

    def forward(self, x): return self.head(F.interpolate(self.down(x), scale_factor=2.).relu())


class Ladder(nn.Module):
    "One step down, one up, one shortcut"
    def __init__(self):
        super().__init__()
        self.first, self.deep, self.head = nn.Conv2d(1, 4, 3, 1, 1), nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(12, 3, 3, 1, 1)

    def forward(self, x):
        a = self.first(x).relu()
        return self.head(torch.cat([F.interpolate(self.deep(a).relu(), scale_factor=2.), a], 1))


def ladder():
    torch.manual_seed(0)
    return Ladder()


@pytest.mark.parametrize("where, cam", [case("S2-R29-predicted-pixels", None, [[5.5, .5], [1.5, .5]]),
                                        case("S2-R29-all-pixels", torch.ones(1, 4, 4).bool(), [[4.5, 1.5], [2.1, 1.5]])])
def test_maps_of_a_network_that_segments_by_hand(where, cam):
    net, x = Halved(), F.interpolate(torch.tensor([[[[1., 0.], [.2, 0.]]]]), scale_factor=2.)
    found = segment_maps(net, x, 1, where=where)
    assert bottleneck(net, x) == "down" and bottleneck(nn.Sequential(net, nn.AdaptiveAvgPool2d(1)), x) == "0.down"
    assert torch.allclose(found.cam, drawn_cam(torch.tensor([cam]), (4, 4)), atol=1e-6)
    assert found.probs[0, ::2, ::2].flatten().tolist() == pytest.approx(torch.tensor([2.3, -.2, .2, -.2]).sigmoid().tolist(), abs=1e-6)


@pytest.mark.parametrize("value", [case("S2-R29-probability-golden", .944261)])
def test_stability_of_a_probability_map(value):
    "Of 0.908877 and 0.645656 everywhere, SSIM is its first factor"
    found = segment_stability(Halved(), torch.ones(1, 1, 12, 12), torch.full((1, 1, 12, 12), .4), 1)
    assert found.probs.item() == pytest.approx(value, abs=1e-6) and found.constant.item()


@pytest.mark.parametrize("target", [case(f"S2-R29-captum-{k}", k) for k in range(3)])
def test_seg_grad_cam_equals_captum(target):
    from captum.attr import LayerGradCam
    net, x = ladder(), draw(2, 1, 16, 16)
    where = draw(2, 16, 16, seed=1) > .5
    theirs = LayerGradCam(lambda z: (net(z)[:, target]*where).flatten(1).sum(1), net.deep).attribute(x, relu_attributions=True)[:, 0]
    assert torch.allclose(segment_maps(net, x, target, where=where).cam, drawn_cam(theirs.detach(), (16, 16)), atol=1e-5) and theirs.any()


@pytest.mark.parametrize("part", [case(f"S2-R29-loss-{p}", p) for p in ("probs", "cam")])
def test_stability_of_a_segmentation_is_a_loss(part):
    net, x, where = ladder(), draw(2, 1, 16, 16), torch.ones(2, 16, 16).bool()
    near = (x + .2*draw(2, 1, 16, 16, seed=1)).clamp(0, 1)
    assert torch.allclose(getattr(segment_stability(net, x, x, 1, where=where), part), torch.ones(2), atol=1e-5)
    found = segment_stability(net, x, near, 1, where=where, create_graph=True)
    assert not found.constant.any() and (getattr(found, part) < .999).all()
    slope, = torch.autograd.grad((1 - getattr(found, part)).sum(), net.first.weight)
    assert slope.isfinite().all() and slope.abs().max() > 0 and net.first.weight.grad is None


@pytest.mark.parametrize("target", [case("S2-R29-one-question", 0)])
def test_both_pictures_are_asked_about_the_same_pixels(target):
    net, x, other = ladder(), draw(2, 1, 16, 16), draw(2, 1, 16, 16, seed=1)
    first, own = segment_maps(net, x, target), segment_maps(net, other, target)
    asked = segment_maps(net, other, target, where=first.where)
    found = segment_stability(net, x, other, target)
    assert torch.equal(found.cam, ssim(first.cam, asked.cam)) and torch.equal(found.probs, ssim(first.probs, own.probs))
    assert not torch.allclose(found.cam, ssim(first.cam, own.cam)), "the changed picture does not choose the pixels"


@pytest.mark.parametrize("dims", [case(f"S2-R29-monai-{d}d", d) for d in (2, 3)])
def test_seg_grad_cam_of_a_network_of_monai(dims):
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    net, x = nets.BasicUNet(dims, 1, 2, features=(4, 4, 8, 8, 16, 4)).eval(), draw(2, 1, *[32]*dims)
    found = segment_maps(net, x, 1)
    assert bottleneck(net, x) == "down_4" and found.cam.shape == found.probs.shape == (2, *[32]*dims)
    assert torch.allclose(found.probs, net(x).softmax(1)[:, 1]) and 0 <= found.cam.min() and found.cam.max() <= 1


# faithfulness

class Mean(nn.Module):
    "The mean of a picture as a logit"
    def forward(self, x): return x.mean((1, 2, 3))[:, None]


@pytest.mark.parametrize("steps", [case(f"S2-R36-{n}-steps", n) for n in (2, 7, 50)])
@pytest.mark.parametrize("insert", [case("deletion", False), case("insertion", True)])
def test_a_straight_line_has_half_the_area(steps, insert):
    curve = removal(Mean(), torch.ones(2, 1, 10, 10), draw(2, 10, 10), lambda z: z[:, 0], steps=steps, fill="zero", insert=insert)
    assert curve.area.tolist() == pytest.approx([.5, .5], abs=1e-6) and (curve.share[0], curve.share[-1]) == (0, 1)


@pytest.mark.parametrize("p", [case(f"S2-R37-{p}-channels", p) for p in (8, 300)])
def test_cka_of_a_layer_and_its_rotation(p):
    r = np.random.default_rng(0)
    a, b = r.normal(size=(40, p)), r.normal(size=(40, p))
    q = np.linalg.qr(r.normal(size=(p, p)))[0]
    assert linear_cka(a, a) == pytest.approx(1, abs=1e-9) and linear_cka(a, a @ q) == pytest.approx(1, abs=1e-9)
    assert abs(linear_cka(a, b)) < .2
