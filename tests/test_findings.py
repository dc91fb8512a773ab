"What the pages of results say is what the kept metrics say: their cells, run again, end in the words that are stored"
import pytest
from execnb.shell import CaptureShell
from fastcore.nbio import read_nb
from notebooks import NBS


def words(outputs):
    "The words of a cell's outputs; those of a picture stand beside it, and where figures are shown inline one more has none"
    said = ["".join(o["text"] if o["output_type"] == "stream" else o["data"]["text/plain"]) for o in outputs]
    return [s for s in said if not s.startswith("<Figure size")]


@pytest.mark.parametrize("name", ["index", "findings"], ids="S2-R47-{}".format)
def test_stored_outputs_follow_the_kept_metrics(name, monkeypatch):
    monkeypatch.chdir(NBS)
    cells = [c for c in read_nb(NBS/f"{name}.ipynb").cells
             if c.cell_type == "code" and "acquire(" not in c.source and "nbdev" not in c.source]
    shell = CaptureShell(path=NBS)
    for cell in cells:
        assert words(shell.run(cell.source)) == words(cell.outputs), f"run nbdev-test --save nbs/{name}.ipynb"
        assert not shell.exc, shell.exc
    assert sum(bool(c.outputs) for c in cells) >= 2


@pytest.mark.parametrize("name", ["index", "findings"])
def test_a_page_is_no_heavier_than_a_lesson(name):
    assert (NBS/f"{name}.ipynb").stat().st_size <= 400_000, "400 KB at most: smaller pictures"
