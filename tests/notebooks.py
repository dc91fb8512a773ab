"Reading the project's notebooks: what the tests of style, structure and coverage share"
import ast
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fastcore.nbio import read_nb

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
SKIP_FLAGS = {"notest", "slow", "cuda", "data"}


@dataclass(frozen=True)
class Cell:
    "One code cell: its source without directives, its directives, its syntax tree"
    source: str
    index: int
    tags: tuple = ()

    @cached_property
    def flags(self): return set(re.findall(r"^#\|\s*(\w+)", self.source, re.M))

    @property
    def exported(self): return bool(self.flags & {"export", "exports", "exporti"})

    @cached_property
    def lines(self): return [x for x in self.source.splitlines() if x.strip() and not x.startswith("#|")]

    @cached_property
    def tree(self): return ast.parse(self.source)

    @cached_property
    def definitions(self):
        return [n for n in self.tree.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]

    @property
    def imports_only(self):
        return bool(self.tree.body) and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in self.tree.body)

    @property
    def checks(self):
        "Whether the cell can fail on a wrong result"
        return bool(re.search(r"\bassert\b|\btest_\w+\(|expect_fail|ExceptionExpected|\btest_fail\(", self.source))


class Notebook:
    "A notebook as prose cells and code cells"
    def __init__(self, path):
        self.path, nb = path, read_nb(path)
        self.cells = list(nb.cells)
        self.prose = [c.source for c in self.cells if c.cell_type == "markdown"]
        self.code = [Cell(c.source, i, tuple(c.metadata.get("tags", ()))) for i, c in enumerate(self.cells)
                     if c.cell_type == "code" and c.source.strip()]
        self.ids = [c.get("id") for c in self.cells]

    @property
    def name(self): return self.path.stem

    @property
    def module(self):
        "Dotted module name from `default_exp`, '' when the notebook exports nothing"
        found = re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join(c.source for c in self.code), re.M)
        return f"phoenix.{found[0]}" if found else ""

    @property
    def number(self): return re.match(r"\d+\w?", self.name).group()

    @property
    def exported(self): return [c for c in self.code if c.exported]


def library(): return [Notebook(p) for p in sorted(NBS.glob("[0-9]*.ipynb"))]
def experiments(): return [Notebook(p) for p in sorted((NBS / "experiments").glob("*.ipynb"))]
def tutorials(): return [Notebook(p) for p in sorted((NBS / "tutorials").glob("*.ipynb"))]
