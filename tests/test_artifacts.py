"Artefacts, severities and mixtures: what holds for every size, type and batch, and oracles by the definition"
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from phoenix.data.artifacts import (ARTEFACTS, Artefact, ArtefactError, aliasing, bspline_displacement, bspline_gain,
                                    curve_coefficients, elastic_bspline, ghosting, gibbs, motion, noncentral_chi,
                                    spikes, zipper)
from phoenix.data.augment import Augment
from phoenix.data.mixing import MixingError, RandAugment, cutmix, mixup, partners
from phoenix.data.phantom import phantom_slice
from phoenix.data.physics import AugmentError, generators, normal, rician, warp, warp_boxes
from phoenix.data.severity import KINDS, STRENGTHS, corrupt, psnr, severity_keys

each_kind = pytest.mark.parametrize("kind", KINDS)


def gens(n, purpose="test", epoch=0, start=0): return generators(11, purpose, epoch, range(start, start + n))


def images(n=4, size=(48, 48), channels=1):
    return torch.rand(n, 1, *size, generator=torch.Generator().manual_seed(1)).expand(-1, channels, -1, -1).contiguous()


def close(a, b, eps=1e-5): torch.testing.assert_close(a, b, atol=eps, rtol=0)


@each_kind
@pytest.mark.parametrize("size", [(48, 48), (33, 50), (50, 33), (31, 31)])
def test_any_size_and_channels(kind, size):
    x = images(4, size, 3)
    before, state, numbers = x.clone(), torch.get_rng_state(), np.random.get_state()[1].copy()
    y = corrupt(x, kind, 3, gens(4))
    assert y.shape == x.shape and y.dtype == x.dtype and y.isfinite().all() and 0 <= y.min() and y.max() <= 1
    assert not torch.equal(y, x), "it does something"
    close(y, y[:, :1].expand_as(y), 1e-6)
    assert torch.equal(x, before), "the input is left alone"
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numbers).all()
    assert torch.equal(y, corrupt(x, kind, 3, gens(4))), "same key, same bytes"


@each_kind
def test_a_sample_is_on_its_own(kind):
    x = images(6)
    whole = corrupt(x, kind, 4, gens(6))
    for rows in ([2], [5, 0], [3, 1, 4]):
        close(corrupt(x[rows], kind, 4, [gens(6)[i] for i in rows]), whole[rows])


@each_kind
def test_half_precision_and_gradients(kind):
    x = images()
    for dtype in (torch.bfloat16, torch.float16):
        y = corrupt(x.to(dtype), kind, 2, gens(4))
        assert y.dtype == dtype
        close(y.float(), corrupt(x.to(dtype).float(), kind, 2, gens(4)), 1e-2)
    assert not corrupt(x, kind, 2, gens(4)).requires_grad
    with torch.inference_mode(): close(corrupt(x, kind, 2, gens(4)), corrupt(images(), kind, 2, gens(4)), 0)


@each_kind
def test_every_severity_is_worse(kind):
    made = [phantom_slice(c, p, 1, size=112).image for c, p in (("glioma", 11), ("pituitary", 2), ("no_tumor", 5))]
    x = torch.from_numpy(np.stack(made).astype(np.float32)/255)[:, None].repeat(4, 1, 1, 1)
    assert corrupt(x, kind, 0, gens(12)) is x
    falls = [psnr(x, corrupt(x, kind, s, severity_keys(kind, range(12), 3))).mean() for s in range(1, 6)]
    assert all(a > b for a, b in zip(falls, falls[1:])), falls
    assert all(math.isfinite(f) for f in falls)


@pytest.mark.parametrize("coils", [1, 2, 8])
def test_noncentral_chi_is_what_coils_make(coils):
    "The same quantiles as n complex coils of equal signal, drawn one by one"
    signal, sigma = .3, .06
    ours = noncentral_chi(torch.full((1, 1, 300, 300), signal), gens(1), (sigma, sigma), coils=coils).flatten()
    g = np.random.default_rng(0)
    coil = g.normal(signal/math.sqrt(coils), sigma, (coils, 90_000))**2 + g.normal(0, sigma, (coils, 90_000))**2
    at = [.01, .1, .25, .5, .75, .9, .99]
    np.testing.assert_allclose(np.quantile(ours.numpy(), at), np.quantile(np.sqrt(coil.sum(0)), at), atol=2e-3)


def test_noncentral_chi_with_one_coil_is_rician():
    x = torch.full((1, 1, 300, 300), .1)
    a = noncentral_chi(x, gens(1), (.05, .05), coils=1).flatten().numpy()
    b = rician(x, gens(1), (.05, .05)).flatten().numpy()
    np.testing.assert_allclose(np.quantile(a, [.05, .5, .95]), np.quantile(b, [.05, .5, .95]), atol=2e-3)


def test_bspline_gain_for_every_lattice_and_size():
    for size, cells in [((50, 31), 1), ((31, 50), 3), ((224, 224), 8)]:
        gain = bspline_gain(size, gens(5), (.2, .6), cells=cells)
        close(gain.mean((1, 2, 3)), torch.ones(5))
        most = (gain - 1).abs().amax((1, 2, 3))
        assert .2 <= most.min() and most.max() <= .6 + 1e-6
    assert torch.equal(bspline_gain((9, 9), gens(2), (0, 0)), torch.ones(2, 1, 9, 9))


@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_ghosts_are_shifted_heads(n):
    "Where n divides the width, the magnitude of the head plus a times its n - 1 shifts, with one phase"
    x = images(3, (20, 48))*.2
    y = ghosting(x, gens(3), (.3, .3), period=(n, n), axis="horizontal")
    shifted = sum(x.roll(48//n*j, -1) for j in range(1, n))*.3
    cosine = (y**2 - x**2 - shifted**2)/(2*x*shifted).clamp_min(1e-9)
    for c in cosine:
        assert c.std() < 2e-2 and c.abs().max() < 1.02, "one phase per image"


def test_ghosts_follow_the_axis():
    x = images(3, (48, 48))
    sideways = ghosting(x, gens(3), axis="horizontal")
    close(ghosting(x.transpose(2, 3), gens(3), axis="vertical").transpose(2, 3), sideways, 1e-6)


def test_motion_without_amount_in_a_range_is_the_head():
    x = images(2, (40, 41))
    for kind in ("sudden", "periodic"): close(motion(x, gens(2), (0, 1e-9), kind=kind), x)


def test_motion_by_definition():
    "The whole picture from the full complex transform of heads that are warped here, line by line"
    from phoenix.data.artifacts import _periodic, _sudden
    x = torch.zeros(1, 1, 64, 64)
    x[..., 20:45, 18:40] = images(1, (25, 22))
    for kind, plan in (("sudden", _sudden), ("periodic", _periodic)):
        y = motion(x, gens(1), (6, 6), kind=kind, axis="horizontal")[0, 0]
        g = gens(1)[0]
        assert g.random() is not None  # the draw of the amount
        poses, lines = plan(g, 64, 2)
        heads = [x]
        for turn, right, down in poses*6:
            c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
            v, u = torch.meshgrid(*[torch.arange(64) - 31.5]*2, indexing="ij")
            to = torch.stack([c*u + s*v + right*64/240, -s*u + c*v + down*64/240])[None].float()
            heads.append(warp(x, to))
        k = [np.fft.fftshift(np.fft.fft2(h[0, 0].numpy()), -1) for h in heads]
        mixed = np.stack([k[p][:, i] for i, p in enumerate(lines)], 1)
        close(y, torch.from_numpy(abs(np.fft.ifft2(np.fft.ifftshift(mixed, -1)))).float().clamp(max=1), 1e-4)
        assert lines[32] == 0 and set(lines) <= set(range(len(poses) + 1)) and len(set(lines)) > 1


def test_gibbs_keeps_the_centre_of_k_space():
    x = images(2, (40, 51))*.01 + .5
    y = gibbs(x, gens(2), (.5, .5))
    a, b = (torch.fft.fftshift(torch.fft.fft2(i), (2, 3)) for i in (x, y))
    close(a[..., 10:31, 13:38].abs(), b[..., 10:31, 13:38].abs(), 1e-3)
    assert b[..., :9, :].abs().max() < 1e-3 and b[..., :12].abs().max() < 1e-3


def test_spikes_are_on_whole_frequencies():
    x = torch.full((5, 1, 45, 64), .6)
    y = spikes(x, gens(5), (.01, .01), count=3)
    k = torch.fft.fft2(y - .6).abs()[:, 0]/(45*64)
    assert ((k > .2*.01).flatten(1).sum(1) <= 6).all(), "three waves and their mirror images"
    close((y - .6).square().mean((1, 2, 3)), torch.full((5,), 3*.01**2/2), 2e-5)


def test_aliasing_folds_at_most_half():
    x = images(2, (8, 21))*.5
    y = aliasing(x, gens(2), (.5, .5), axis="horizontal")
    close(y.sum(-1), x.sum(-1))
    assert (y != 0).any(2).any(1).sum(1).tolist() == [11, 11]


def test_zipper_is_white_along_the_line():
    "A leak has the same strength in every line of k-space, only its phase differs"
    x = torch.zeros(3, 1, 30, 64)
    power = torch.stack([zipper(x, generators(1, "zip", e, range(3)), (.2, .2), axis="horizontal").square().sum(2)
                         for e in range(200)]).mean((0, 1, 2))
    assert power.std()/power.mean() < .12 and abs(power.mean() - .04) < 1e-4


def test_curves_rise_between_the_corners():
    c = curve_coefficients(gens(200), (1., 1.))
    t = np.linspace(0, 1, 201)
    y = (c[:, :, None]*t**np.arange(1, c.shape[1] + 1)[:, None]).sum(1)
    assert np.diff(y, axis=1).min() > 0 and abs(y[:, -1] - 1).max() < 1e-9 and abs(y[:, 0]).max() == 0
    assert abs(y[:, 100].mean() - .5) < .05, "neither brighter nor darker on average"


def test_bspline_displacement_keeps_its_bound():
    d = bspline_displacement((60, 90), gens(20), (.48, .48), cells=5)
    assert d[:, 0].abs().max() <= .48*90/5 and d[:, 1].abs().max() <= .48*60/5 and d.abs().max() > 2
    x = images(2)
    close(elastic_bspline(x, gens(2), (0, 1e-7)), x, 1e-4)


@pytest.mark.parametrize("call, message", [
    (lambda x, g: noncentral_chi(x, g, coils=0), "coils"), (lambda x, g: ghosting(x, g, period=(1, 3)), "period"),
    (lambda x, g: spikes(x, g, count=0), "count"), (lambda x, g: zipper(x, g, lines=0), "lines"),
    (lambda x, g: ghosting(x, g, axis="up"), "axis"), (lambda x, g: gibbs(x, g, (.5, .2)), "cut"),
    (lambda x, g: Artefact("gibbs", .5, (.1, 1.5)), "cut")])
def test_refusals(call, message):
    with pytest.raises(ArtefactError, match=message): call(images(2), gens(2))


def test_the_chain_with_every_artefact():
    chain = replace(Augment.strong(48), artefacts=[Artefact(k, .5, (STRENGTHS[k][1],)*2) for k in ARTEFACTS])
    x = images(20, (48, 40), 3)
    y = chain(x, range(20), seed=1)
    assert y.isfinite().all() and 0 <= y.min() and y.max() <= 1
    for rows in ([3], [19, 2, 8], list(range(5, 18))): close(chain(x[rows], rows, seed=1), y[rows])
    half = chain(x.bfloat16(), range(20), seed=1)
    assert half.dtype == torch.bfloat16 and half.isfinite().all()
    assert chain(x[:0], [], seed=1).shape == (0, 3, 48, 40)
    without = replace(chain, artefacts=chain.artefacts[:-1])(x, range(20), seed=1)
    assert 0 < sum(torch.equal(a, b) for a, b in zip(without, y)) < 20, "one fewer leaves the draws of the others alone"
    with pytest.raises(AugmentError, match="p_spline"): Augment(p_spline=2)


@pytest.mark.parametrize("size", [(40, 40), (33, 50)])
def test_the_chain_moves_masks_and_boxes_with_the_head(size):
    chain, x = Augment(mirror=.5, p_affine=1, p_spline=1, p_intensity=0, p_noise=0), images(12, size)
    where = chain.source(size, range(12), seed=9, epoch=4)
    close(warp(x, where), chain(x, range(12), seed=9, epoch=4), 2e-5)
    assert not torch.equal(where, chain.source(size, range(12), seed=9, epoch=5))
    close(chain.source(size, [7], seed=9, epoch=4)[0], where[7], 1e-4)
    still = Augment.none().source(size, range(2), seed=1)
    box = torch.tensor([[[3., 4, 20, 30]]]).expand(2, 1, 4)
    assert torch.equal(warp_boxes(box, still), box)
    labels = (torch.arange(size[0]*size[1]).view(1, 1, *size) % 5).float().expand(12, 1, -1, -1)
    assert set(warp(labels, where, "nearest").unique().tolist()) == {0., 1, 2, 3, 4}, "no label is invented"


def test_mixtures_do_not_depend_on_the_order():
    x, y, who = images(9), torch.arange(9) % 3, [4, 8, 15, 16, 23, 42, 1, 2, 3]
    back = list(range(8, -1, -1))
    for mix in (mixup, cutmix):
        a, la = mix(x, y, who, 3, seed=5)
        b, lb = mix(x[back], y[back], [who[i] for i in back], 3, seed=5)
        close(b, a[back]), close(lb, la[back], 1e-6)
        assert torch.equal(mix(x, y, who, 3, seed=5, alpha=0)[0], x)
        soft, ls = mix(x, torch.nn.functional.one_hot(y).float(), who, 3, seed=5)
        assert torch.equal(soft, a) and torch.equal(ls, la)
        assert mix(x.bfloat16(), y, who, 3, seed=5)[0].dtype == torch.bfloat16
        with pytest.raises(MixingError, match="alpha"): mix(x, y, who, 3, seed=5, alpha=-1)


def test_mixup_is_symmetric_beta():
    n = 4000
    x = torch.cat([torch.zeros(n//2, 1, 1, 1), torch.ones(n//2, 1, 1, 1)])
    kept = (mixup(x, (torch.arange(n) >= n//2).long(), range(n), 2, seed=1, alpha=1.)[1]).max(1)[0]
    mixed = kept[torch.arange(n).ge(n//2) != torch.arange(n).ge(n//2)[partners(range(n), seed=1)]]
    np.testing.assert_allclose(np.quantile(mixed, [.1, .5, .9]), [.55, .75, .95], atol=.02)


def test_cutmix_areas_are_uniform_before_the_edge_cuts_them():
    y = cutmix(torch.zeros(4000, 1, 64, 64), torch.arange(4000) % 2, range(4000), 2, seed=1)[1]
    area = 1 - y.gather(1, (torch.arange(4000) % 2)[:, None])
    assert area.min() == 0 and .9 < area.max() <= 1 and .1 < area.mean() < .3


@pytest.mark.parametrize("size", [(32, 32), (31, 44)])
def test_randaugment_by_key(size):
    x, rand = images(12, size, 3), RandAugment(3, 15)
    y = rand(x, range(12), seed=2)
    for rows in ([4], [9, 0, 7]): close(rand(x[rows], rows, seed=2), y[rows])
    close(y, y[:, :1].expand_as(y), 1e-6)
    assert not any(torch.equal(a, b) for a, b in zip(y, rand(x, range(12), seed=3)))
    assert torch.equal(RandAugment(0)(x, range(12), seed=2), x)
    with pytest.raises(MixingError, match="indices"): rand(x, range(3), seed=2)


def test_normal_numbers_are_those_of_before():
    "The look-up table serves other distributions too; the normal numbers of a key have not moved"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z = normal(generators(42, "fixed", 1, [5]), (4,))
    bits = generators(42, "fixed", 1, [5])[0].bit_generator.random_raw(1).view(np.uint16)
    from scipy.special import ndtri
    np.testing.assert_allclose(z[0].numpy(), ndtri((bits + .5)/65536), atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each_kind
def test_the_same_on_a_gpu(kind):
    x = images()
    close(corrupt(x.cuda(), kind, 3, gens(4)).cpu(), corrupt(x, kind, 3, gens(4)), 1e-4)
