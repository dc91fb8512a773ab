"What runs on a CPU runs on CUDA with the same answers; without a device these tests say so"
import copy

import pytest
import torch
import torch.nn.functional as F

from phoenix.data.duplicates import find_pairs
from phoenix.data.phantom import make_phantom
from phoenix.data.preprocess import Preprocess
from phoenix.data.splits import make_split
from phoenix.data.acquire import build_manifest
from phoenix.keys import seeded
from phoenix.models.snake import DynamicSnakeConv, choose_formulation
from phoenix.models.zoo import create_model
from phoenix.train.learner import train_classifier
from phoenix.train.optimizers import Adan

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def told(layer, x):
    "Output and all gradients, on the CPU"
    z = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(z)
    y.square().sum().backward()
    return [t.detach().cpu() for t in (y, z.grad, *(p.grad for p in layer.parameters()))]


@pytest.mark.parametrize("how", ["rows", "bag", "gather", "matrix"])
@pytest.mark.parametrize("dtype, far", [(torch.float64, 1e-10), (torch.float32, 1e-3)], ids=str)
def test_every_formulation_is_that_of_the_cpu(how, dtype, far):
    with seeded(0): layer, x = DynamicSnakeConv(5, 6, 9).to(dtype), torch.randn(3, 5, 17, 12, dtype=dtype)
    want = told(copy.deepcopy(layer), x)
    layer.formulation = how
    for a, b in zip(want, told(layer.to(DEVICE), x.to(DEVICE))): assert (a - b).abs().max() <= far*max(1, a.abs().max())


def test_the_device_chooses_and_half_precision_is_near():
    assert choose_formulation("cuda") == "bag"
    with seeded(0): layer, x = DynamicSnakeConv(8, 8, 9).to(DEVICE), torch.randn(2, 8, 24, 24, device=DEVICE)
    whole = layer(x)
    with torch.autocast(DEVICE, torch.bfloat16): half = layer(x)
    half.float().sum().backward()
    assert (whole - half).abs().mean() < .05*whole.abs().mean()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_a_step_of_adan():
    with seeded(0): net, x = create_model("neurosnake_tiny_ca", 4).double().eval(), torch.rand(4, 1, 32, 32, dtype=torch.float64)
    y, nets = torch.arange(4), [net, copy.deepcopy(net).to(DEVICE)]
    for n in nets:
        where, opt = next(n.parameters()).device, Adan(n.parameters(), lr=1e-3, weight_decay=.02)
        for _ in range(5):
            F.cross_entropy(n(x.to(where)), y.to(where)).backward()
            opt.step()
            opt.zero_grad()
    for a, b in zip(*(n.parameters() for n in nets)): assert (a - b.cpu()).abs().max() < 1e-7


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_training_goes_on_where_it_was(tmp_path, precision):
    "Trained on the device that is there; read back from its checkpoint it answers to the last bit"
    make_phantom(tmp_path/"phantom", patients=24, slices=1, size=64, seed=3)
    manifest = build_manifest(tmp_path/"phantom", progress=False)
    certificate = make_split(manifest, find_pairs(manifest, progress=False), seed=42)
    how = dict(model="neurosnake_tiny_ca", preprocess=Preprocess(size=(32, 32)), epochs=2, batch_size=6, warmup_epochs=0,
               precision=precision, cache_dir=tmp_path/"cache", progress=False)
    whole = train_classifier(manifest, certificate, run_dir=tmp_path/"whole", **how)
    assert next(whole.learner.model.parameters()).device.type == DEVICE and whole.test.probs.shape[1] == 4
    again = train_classifier(manifest, certificate, run_dir=tmp_path/"whole", resume=True, **how)
    assert (again.test.logits == whole.test.logits).all()
