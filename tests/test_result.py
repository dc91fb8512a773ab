"What is kept of a run: only sealed ones of committed code, and outputs beneath the very cells that made them"
import base64
import importlib.util
import io
import json
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from fastcore.nbio import read_nb
from notebooks import NBS
from PIL import Image

spec = importlib.util.spec_from_file_location("result", NBS.parent/".ci/result.py")
result = importlib.util.module_from_spec(spec)
spec.loader.exec_module(result)


def run_folder(folder, dirty=False):
    "The files of a run, as `kept` reads them"
    made = dict(phoenix="0", git=dict(revision="a", dirty=dirty), python="3", system="s", cpu="c", time="t")
    for name, value in dict(provenance=made, parameters=dict(data="/here/clean4", work="/there/w", n=1), run=dict(cpu_seconds=2.),
                            metrics=dict(score=.5), seal={}).items():
        (folder/f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize("state, dirty", [("changed", False), ("sealed", True)])
def test_refuses_what_proves_nothing(state, dirty, tmp_path, monkeypatch):
    monkeypatch.setattr(result, "verify_run", lambda run: SimpleNamespace(state=state, reasons=[]))
    with pytest.raises(SystemExit, match=f"must be sealed and from committed code, got {state}, dirty: {dirty}"):
        result.kept(run_folder(tmp_path, dirty))


def test_keeps_the_numbers_and_no_path(tmp_path, monkeypatch):
    monkeypatch.setattr(result, "verify_run", lambda run: SimpleNamespace(state="sealed", reasons=["phantom"]))
    kept = result.kept(run_folder(tmp_path))
    assert kept["metrics"] == dict(score=.5) and kept["cpu_seconds"] == 2 and kept["notes"] == ["phantom"]
    assert kept["parameters"] == dict(data="clean4", work="w", n=1), "names of folders, not where they lie"
    assert kept["seal_sha256"] == result.sha256_file(tmp_path/"seal.json")


def test_a_large_picture_shrinks_and_a_small_one_stays():
    def png(side):
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()
    assert result.small(png(20)) == png(20)
    assert len(base64.b64decode(result.small(png(400)))) <= 80_000 < len(base64.b64decode(png(400)))


def test_outputs_go_beneath_the_cells_that_made_them(tmp_path, monkeypatch):
    "Progress, warnings of the machine and pages of words are left out; a cell that was changed since shows nothing"
    v4, folder = nbformat.v4, tmp_path/"nbs/experiments"
    def out(text, **data): return v4.new_output("execute_result", data={"text/plain": text, **data}, execution_count=3)
    outputs = [[v4.new_output("stream", name="stdout", text="epoch 1\nkept\n"), out("4")],
               [v4.new_output("stream", name="stderr", text="noise"), out("x"*4000), out("site-packages/y"),
                out("x"*4000, **{"text/html": "<table/>"})], [out("5")]]
    cells = [v4.new_code_cell("n = 1", metadata=dict(tags=["parameters"]))]
    cells += [v4.new_code_cell(f"cell {i}", outputs=o) for i, o in enumerate(outputs)]
    folder.mkdir(parents=True)
    nb = v4.new_notebook(cells=cells)
    nbformat.write(nb, tmp_path/"notebook.ipynb")
    nb.cells[3].source = "cell 2, changed"
    nbformat.write(nb, folder/"x.ipynb")
    monkeypatch.setattr(result, "root", tmp_path)
    assert result.show(tmp_path, "kept", "x") == "nbs/experiments/x.ipynb: 1 cells changed since, without outputs"
    said, first, second, third = read_nb(folder/"x.ipynb").cells
    assert tmp_path.name in "".join(said.outputs[0]["text"])
    assert "".join(first.outputs[0]["text"]) == "kept\n" and first.outputs[1]["execution_count"] is None
    assert len(second.outputs) == 1 and "text/html" in second.outputs[0]["data"] and not third.outputs
