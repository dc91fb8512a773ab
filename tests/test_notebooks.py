"Each notebook's example cells against the exported module: what is proven is the package, not the notebook"
import importlib
import json
import linecache
import warnings

import fastai.torch_core  # noqa: F401  it changes how tensors compare with lists; loaded first, the order of tests cannot matter
import matplotlib
import pytest

from notebooks import NBS, SKIP_FLAGS, experiments, library, tutorials

matplotlib.use("agg")
NOTEBOOKS = library()


def runs(cell):
    "Whether a test run executes the cell"
    return not cell.flags & SKIP_FLAGS and "eval: false" not in cell.source


@pytest.mark.parametrize("nb", NOTEBOOKS, ids=lambda nb: nb.name)
def test_examples_against_the_module(nb, monkeypatch):
    import matplotlib.pyplot as plt
    monkeypatch.chdir(NBS)
    monkeypatch.setenv("IN_TEST", "1")
    module = importlib.import_module(nb.module)
    space = dict(vars(module), __name__="__main__")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for cell in nb.code:
            if cell.exported or not runs(cell):
                continue
            name = f"{nb.name}#cell{cell.index}"
            linecache.cache[name] = len(cell.source), None, cell.source.splitlines(True), name  # so that inspect finds it
            exec(compile(cell.source, name, "exec"), space)
    plt.close("all")


def test_cells_that_run_do_not_shrink():
    "Nothing passes by being skipped: the number of checking cells that run is on record"
    ran = sum(c.checks and runs(c) for nb in NOTEBOOKS for c in nb.code if not c.exported)
    recorded = json.loads((NBS.parent / "tests/counts.json").read_text())["cells"]
    print(f"{ran} checking cells run, {recorded} on record; {len(tutorials())} tutorials, {len(experiments())} experiments")
    assert ran >= recorded
