"What a notebook can't hold about pretraining: that the prose of the experiment is what its recorded runs say"
import json

import pytest

from notebooks import NBS, ROOT, Notebook

RUNS = {share: json.loads((ROOT/f"nbs/results/{name}.json").read_text())["metrics"]
        for share, name in ((.1, "pretraining_clean4"), (.25, "pretraining_quarter_clean4"), (1., "pretraining_clean4"))}


def said(share):
    "A row of the table in the experiment's last cell, from the recorded run"
    m = RUNS[share]
    mean = {r["arm"]: 100*r["mean"] for r in m["table"] if (r["share"], r["score"]) == (share, "accuracy")}
    cells = [f"{share:.0%}".replace("%", " %")]
    for a, b in (("pretrained", "from scratch"), ("probe pretrained", "probe random")):
        d = next(r for r in m["paired"] if (r["share"], r["score"], r["arm"]) == (share, "accuracy", a))
        shown = [f"{100*d[k]:+.1f}".replace("-", "−") for k in ("difference", "low", "high")]
        cells += [f"{mean[a]:.1f}", f"{mean[b]:.1f}", "{} [{}, {}]".format(*shown)]
    return "| " + " | ".join(cells) + " |"


@pytest.mark.parametrize("share", RUNS)
def test_the_prose_is_what_the_runs_recorded(share):
    last = Notebook(NBS/"experiments/12_pretraining.ipynb").prose[-1]
    assert said(share) in last, f"the table must hold {said(share)}"


def test_the_recorded_seconds_are_equal():
    for m in RUNS.values():
        assert all(.9 < r["scratch / pretrained"] < 1.1 for r in m["seconds"]), m["seconds"]


if __name__ == "__main__":
    print(*map(said, RUNS), sep="\n")
