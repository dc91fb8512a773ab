"""Writes peers.json: what torchmetrics, fairlearn, netcal, pytorch-msssim, grad-cam and MONAI say of inputs that are made here by formula.

Runs where these can be imported beside phoenix's own requirements; they are installed without their dependencies, which are there already:
pip install --no-deps torchmetrics==1.9.0 lightning-utilities fairlearn==0.15.0 netcal==1.4.0 pytorch-msssim==1.0.0 grad-cam==1.5.7 ttach monai==1.6.1
"""
import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

FILE = Path(__file__).with_name("peers.json")
PACKAGES = "torchmetrics", "fairlearn", "netcal", "pytorch-msssim", "grad-cam", "monai", "torch", "numpy"
BINS, SIDES, MS_WEIGHTS = (10, 15), (176, 192), (.0448, .2856, .3001, .2363, .1333) # of Wang et al. (2003)


def predictions(n=601, k=4, seed=0):
    "Probabilities, targets and a source of each row"
    g = np.random.default_rng(seed)
    y, source = g.integers(0, k, n), g.integers(0, 3, n)
    z = g.normal(size=(n, k)) + np.eye(k)[y] * (1 + source[:, None])
    p = np.exp(z)
    return p / p.sum(1, keepdims=True), y, source


def wave(*shape, pace=1., phase=0.):
    "Numbers in (-1, 1) that anyone can make again"
    return torch.from_numpy(np.sin(pace * np.arange(1, np.prod(shape) + 1)**1.5 + phase).reshape(shape))


def maps(side):
    "Two pairs of smooth maps in [0, 1], alike and less alike, in double precision"
    r, c = np.mgrid[:side, :side] / side
    a = np.stack([.5 + .5 * np.sin(9 * r + 4 * c**2), np.exp(-8 * ((r - .4)**2 + (c - .6)**2))])
    b = np.stack([a[0]**1.3, .7 * np.exp(-10 * ((r - .5)**2 + (c - .55)**2)) + .2 * (.5 + .5 * np.sin(60 * r * c))])
    return torch.from_numpy(a), torch.from_numpy(b)


def network(k=3):
    "Two convolutions with a ReLU each and a layer of all places, with weights by formula; and five pictures; in double precision"
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
                        nn.Linear(6 * 64, k)).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()): p.copy_(wave(*p.shape, pace=.7, phase=i)) # slopes of the logits: about 1, as a weight
    return net.eval(), .5 + .5 * wave(5, 1, 16, 16, pace=.3)


LAYER, CLASSES = "3", (0, 1, 2, 1, 0) # the second ReLU, and the class asked for in each picture


def of_fairlearn():
    import fairlearn.metrics as fl
    p, y, source = predictions()
    said = [dict(y_true=y == i, y_pred=p.argmax(1) == i, sensitive_features=source) for i in range(4)]
    return {"selection rate": [fl.demographic_parity_difference(**s) for s in said],
            "equalised odds": [fl.equalized_odds_difference(**s) for s in said]}


def of_torchmetrics():
    import torchmetrics.functional.classification as tm
    p, y, _ = predictions()
    t = torch.tensor(p), torch.tensor(y)
    found = {f"{name} {b}": tm.multiclass_calibration_error(*t, 4, n_bins=b, norm=norm).item()
             for name, norm in (("ece", "l1"), ("mce", "max")) for b in BINS}
    macro = dict(macro_f1=tm.multiclass_f1_score, macro_recall=tm.multiclass_recall, macro_auc=tm.multiclass_auroc,
                 macro_specificity=tm.multiclass_specificity)
    found |= {name: f(*t, num_classes=4, average="macro").item() for name, f in macro.items()}
    return found | dict(mcc=tm.multiclass_matthews_corrcoef(*t, num_classes=4).item())


def of_netcal():
    from netcal.metrics import ECE, MCE
    p, y, _ = predictions(600) # no quantile of 600 falls on a confidence, where its last bit would choose the bin
    return {f"{name} {kind} {b}": float(f(b, equal_intervals=kind == "width").measure(p, y))
            for name, f in (("ece", ECE), ("mce", MCE)) for kind in ("width", "mass") for b in BINS}


def of_likeness():
    "SSIM of full windows, cut from torchmetrics' map; MS-SSIM by both packages, with weights that sum to 1, not to 1.0001"
    from pytorch_msssim import ms_ssim
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as multi
    from torchmetrics.functional.image import structural_similarity_index_measure as single
    found, weights = {}, tuple(w / sum(MS_WEIGHTS) for w in MS_WEIGHTS)
    for side in SIDES:
        a, b = (o[:, None] for o in maps(side))
        whole = single(a, b, data_range=1., return_full_image=True)[1][..., 5:-5, 5:-5]
        found[side] = dict(ssim=whole.mean((1, 2, 3)).tolist(),
                           msssim=ms_ssim(a, b, data_range=1., size_average=False, weights=list(weights)).tolist(),
                           torchmetrics=[multi(i[None], j[None], data_range=1., betas=weights).item() for i, j in zip(a, b)])
    return found


def of_gradcam():
    "The package's maps as they are before it cuts, scales and resizes them"
    from pytorch_grad_cam import GradCAM, GradCAMPlusPlus, HiResCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    (net, x), targets, found = network(), [ClassifierOutputTarget(c) for c in CLASSES], {}
    for name, kind in {"gradcam": GradCAM, "gradcam++": GradCAMPlusPlus, "hirescam": HiResCAM}.items():
        with kind(net, [net[int(LAYER)]]) as cam:
            cam(x, targets)
            kept = cam.activations_and_grads
            features, slopes = kept.activations[0].numpy(), kept.gradients[0].numpy()
            found[name] = cam.get_cam_image(x, net[int(LAYER)], targets, features, slopes, False).tolist()
    return found


def masks(channels):
    "Logits of two small pictures and their masks; of one channel 0 and 1, else a class at each place"
    return 2 * wave(2, channels, 8, 9, pace=.9), ((.5 + .5 * wave(2, 8, 9, pace=.4)) * max(channels, 2)).long()


def of_monai():
    from monai.losses import DiceLoss, TverskyLoss
    found = {}
    for channels in (1, 3):
        (z, y), kw = masks(channels), dict(sigmoid=True) if channels == 1 else dict(softmax=True, to_onehot_y=True)
        found[channels] = dict(dice=DiceLoss(smooth_nr=1., smooth_dr=1., **kw)(z, y[:, None]).item(),
                               tversky=TverskyLoss(alpha=.3, beta=.7, smooth_nr=1., smooth_dr=1., **kw)(z, y[:, None]).item())
    return found


def inputs():
    "A few numbers by which inputs made elsewhere are known to be those of the record"
    p, y, source = predictions()
    return dict(probs=float((p * np.arange(1, p.size + 1).reshape(p.shape)).sum()), targets=int((y * (source + 1)).sum()),
                maps=[o.square().sum().item() for o in maps(SIDES[0])], logits=network()[0](network()[1]).tolist())


def main():
    found = dict(provenance={n: version(n) for n in PACKAGES}, inputs=inputs(), fairlearn=of_fairlearn(), torchmetrics=of_torchmetrics(),
                 netcal=of_netcal(), likeness=of_likeness(), gradcam=of_gradcam(), monai=of_monai())
    FILE.write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__": sys.exit(main())
