"A tri-objective training that is stopped in the middle of an epoch ends in the same bytes, with every step on record"
import io
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from torch.utils.data import DataLoader, TensorDataset

from phoenix.data.concepts import ConceptRules, artefact_set, counterparts
from phoenix.data.phantom import CLASSES, phantom_slice
from phoenix.keys import seeded
from phoenix.models.concepts import CavBank
from phoenix.models.zoo import create_model
from phoenix.train.adversarial import Adversary
from phoenix.train.learner import fit, make_learner
from phoenix.train.losses import CrossEntropy
from phoenix.train.triobjective import Shares, TriObjective, read_terms

RULES, NAMES = ConceptRules(size=32, quality=0, similarity=1), [f"p{k}" for k in range(24)]


class Stop(Callback):
    "What a killed process looks like to a training"
    order = 200

    def after_batch(self):
        if self.training and self.epoch == 1 and self.iter == 1:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def pictures():
    heads = [phantom_slice(CLASSES[k % 4], k, 0, size=32).image for k in range(24)]
    return torch.from_numpy(np.stack(heads)[:, None]/255).float(), torch.arange(24) % 4


def learner(pictures, folder, *cbs):
    x, y = pictures
    dls = DataLoaders(*(DataLoader(TensorDataset(x[:n], y[:n]), batch_size=8) for n in (24, 8)), device="cpu")
    with seeded(3): net = create_model("cnn", 4, widths=(6, 8, 10), dropout=0.)
    ringing, others = artefact_set("ringing", x, NAMES, n=20, rules=RULES), counterparts(x, NAMES, number=2, n=20, rules=RULES)
    tri = TriObjective(Adversary(2/255, steps=1), Shares(explain=2., gamma=2.), bank=CavBank([ringing], others, "stages.1"), refresh=2)
    return make_learner(dls, net, lr=.01, loss=CrossEntropy(0.), run_dir=folder).add_cbs([tri, *cbs])


def train(learn, **kw):
    with redirect_stdout(io.StringIO()): fit(learn, 4, warmup_epochs=1, progress=False, save_seconds=1e-6, **kw)
    return torch.cat([v.flatten().double() for v in learn.model.state_dict().values()])


def test_stopped_and_resumed_is_the_same(pictures, tmp_path):
    whole = train(learner(pictures, tmp_path/"whole"))
    with pytest.raises(KeyboardInterrupt): train(learner(pictures, tmp_path/"two", Stop()))
    assert torch.equal(train(learner(pictures, tmp_path/"two"), resume=True), whole)
    one, two = (read_terms(tmp_path/d).drop(columns="seconds") for d in ("whole", "two"))
    assert len(one) == 12 and one.equals(two), "directions of the interrupted epoch are kept, and so is each step's row"
