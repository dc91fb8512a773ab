"Make README.md from nbs/index.ipynb: markdown as it is, code in fences, text outputs as blocks; `--check` only compares."
import re
import sys
from pathlib import Path

from fastcore.nbio import read_nb

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
    return f"```python\n{source.strip()}\n```" + (f"\n\n```text\n{out}\n```" if out else "")


def readme():
    "The whole page"
    cells = read_nb(root / "nbs/index.ipynb").cells
    head = "<!-- made from nbs/index.ipynb by `make readme`; edit the notebook -->\n\n"
    return head + "\n\n".join(b for b in map(block, cells) if b) + "\n"


if __name__ == "__main__":
    page = root / "README.md"
    if "--check" in sys.argv:
        sys.exit(0 if page.read_text() == readme() else "README.md and nbs/index.ipynb differ: run `make readme`")
    page.write_text(readme())
