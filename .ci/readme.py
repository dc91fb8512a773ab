"README.md from nbs/index.ipynb: markdown as it is, code in fences, outputs as blocks; its figure from a kept run; `--check` compares."
import json
import re
import sys
from pathlib import Path

from fastcore.nbio import read_nb

from phoenix.data.duplicates import plot_leak
from phoenix.evaluate.report import draw

root = Path(__file__).resolve().parents[1]


def text_of(output):
    "The text of one code output, '' for pictures"
    data = output.get("data", {})
    text = output.get("text") or data.get("text/markdown") or data.get("text/plain") or ""
    return "".join(text) if "image/png" not in data else ""


def block(cell):
    "One cell of the index as markdown"
    if cell.cell_type == "markdown":
        return re.sub(r"\]\((\w[^):]*\.(?:svg|ipynb|md))\)", r"](nbs/\1)", cell.source)
    source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|"))
    if "#| hide" in cell.source or not source.strip():
        return ""
    out = "".join(text_of(o) for o in cell.get("outputs", [])).rstrip()
    shown = [] if "#| echo: false" in cell.source else [f"```python\n{source.strip()}\n```"]
    return "\n\n".join(shown + ([f"```text\n{out}\n```"] if out else []))


def readme():
    "The whole page"
    cells = read_nb(root / "nbs/index.ipynb").cells
    head = "<!-- made from nbs/index.ipynb by `make readme`; edit the notebook -->\n\n"
    return head + "\n\n".join(b for b in map(block, cells) if b) + "\n"


def figure():
    "The leak of the published split, from the kept run"
    leak = json.loads((root / "nbs/results/leakage_sartaj.json").read_text())["metrics"]["leak"]
    return draw(lambda ax: plot_leak(leak, ax=ax), "The leak", size=(6.4, 3.4)).image


if __name__ == "__main__":
    page, drawn = root / "README.md", root / "nbs/leak.svg"
    if "--check" in sys.argv:
        same = page.read_text() == readme() and drawn.read_bytes() == figure()
        sys.exit(0 if same else "README.md or nbs/leak.svg is not what nbs/index.ipynb and nbs/results say: run `make readme`")
    page.write_text(readme())
    drawn.write_bytes(figure())
