"The sizes and habits that keep notebooks teachable: tests/notebooks.py reads, this file measures"
import ast
import base64
import importlib
import inspect
import statistics

import pytest
from fastcore.docments import docments

from notebooks import ROOT, experiments, library, tutorials

NOTEBOOKS = library()
each = pytest.mark.parametrize("nb", NOTEBOOKS, ids=lambda nb: nb.name)


def length(node): return node.end_lineno - node.lineno + 1


def functions(cell):
    return [n for n in ast.walk(cell.tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


IMPORTS = ast.Import, ast.ImportFrom


def quoted(cell):
    "Types that stand in quotes in the signatures of a cell"
    for f in functions(cell):
        for hint in [f.returns, *(a.annotation for a in [*f.args.args, *f.args.kwonlyargs, *f.args.posonlyargs])]:
            yield from (n.value for n in [hint] if isinstance(n, ast.Constant) and isinstance(n.value, str))


@each
def test_layout(nb):
    title = nb.prose[0].splitlines()
    assert title[0].startswith("# ") and any(x.startswith("> ") and len(x) > 10 for x in title), "title and one true sentence"
    assert nb.module == "phoenix." + nb.name.split("_", 1)[1], "the stem of the notebook is its module"
    assert "nbdev_export()" in nb.code[-1].source and "hide" in nb.code[-1].flags, "the last cell exports, hidden"
    assert len(set(nb.ids)) == len(nb.ids) and all(nb.ids), "every cell has an id of its own"
    assert not any(c.source.lstrip().startswith(("%", "!")) for c in nb.code), "no magics: cells are plain Python"


@each
def test_cell_sizes(nb):
    for c in nb.exported:
        where = f"{nb.name} cell {c.index}"
        assert len(c.lines) <= 50, f"{where}: {len(c.lines)} lines exported, 50 at most"
        assert len(c.definitions) <= 3, f"{where}: {len(c.definitions)} definitions, 3 at most"
        for n in functions(c):
            assert length(n) <= 40, f"{where}: {n.name} has {length(n)} lines, 40 at most"
        for n in c.definitions:
            if isinstance(n, ast.ClassDef):
                assert length(n) <= 60, f"{where}: {n.name} has {length(n)} lines, 60 at most"
    for c in nb.code:
        if not c.exported:
            assert len(c.lines) <= 15, f"{nb.name} cell {c.index}: an example of {len(c.lines)} lines, 15 at most"
        assert all(len(x) <= 120 for x in c.lines), f"{nb.name} cell {c.index}: a line over 120 characters"


@each
def test_proportions(nb):
    assert len(nb.cells) <= 140, "140 cells at most"
    assert len(nb.prose) / len(nb.cells) >= .2, f"{len(nb.prose)} of {len(nb.cells)} cells are prose, a fifth at least"
    defined = sum(len([d for d in c.definitions if not d.name.startswith("_")]) for c in nb.exported)
    checks = sum(c.checks for c in nb.code if not c.exported)
    assert checks >= .5 * defined, f"{checks} cells that check for {defined} public definitions, half at least"


@each
def test_exported_cells_do_not_pile_up(nb):
    row = 0
    for c in nb.cells:
        cell = next((k for k in nb.code if k.index == nb.cells.index(c)), None) if c.cell_type == "code" else None
        row = row + 1 if cell and cell.exported and not cell.imports_only else 0
        assert row <= 2, f"{nb.name}: three exported cells in a row before cell {nb.cells.index(c)}"


@each
def test_the_docs_can_be_built(nb):
    "nbdev-proc-nbs executes exported cells and cells with imports in order, and nothing else"
    known = set()
    for c in nb.code:
        known |= {d.name for d in c.definitions if c.exported}
        if not c.exported and "nbdev_export()" not in c.source and any(isinstance(n, IMPORTS) for n in ast.walk(c.tree)):
            assert c.imports_only, f"{nb.name} cell {c.index}: imports stand alone, in the hidden cell of the lesson"
        for name in quoted(c) if c.exported else []:
            assert name in known, f"{nb.name} cell {c.index}: the type {name!r} is not known yet where the docs need it"


@each
def test_exported_imports_are_named(nb):
    for c in nb.exported:
        for n in ast.walk(c.tree):
            assert not (isinstance(n, ast.ImportFrom) and any(a.name == "*" for a in n.names)), f"{nb.name}: import *"
            assert not (isinstance(n, ast.ExceptHandler) and n.type is None), f"{nb.name}: bare except"


def public(nb):
    "Public functions and classes of the notebook's module, with their names"
    module = importlib.import_module(nb.module)
    for name in module.__all__:
        obj = getattr(module, name)
        if getattr(obj, "__module__", None) == module.__name__ and (inspect.isfunction(obj) or inspect.isclass(obj)):
            yield name, obj


def undocumented(name, f):
    "What is missing from the signature of `f`"
    docs, missing = docments(f, full=True), []
    for p in inspect.signature(f).parameters.values():
        if p.name in ("self", "cls") or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        if p.annotation is p.empty: missing.append(f"{name}({p.name}): no type")
        doc = (docs.get(p.name) or {}).get("docment")
        if not doc: missing.append(f"{name}({p.name}): no docment")
        elif "noqa" in doc: missing.append(f"{name}({p.name}): a word to a linter, not to a reader")
    if inspect.signature(f).return_annotation is inspect.Signature.empty: missing.append(f"{name}: no return type")
    return missing


@each
def test_public_things_are_documented(nb):
    missing = []
    for name, obj in public(nb):
        doc = (obj.__doc__ or "").strip()
        if not doc or "\n" in doc: missing.append(f"{name}: a docstring of one line")
        if inspect.isfunction(obj): missing += undocumented(name, obj)
    assert not missing, "\n".join(missing)


def test_medians():
    "The house as a whole stays near the aims of the style: small cells, small functions"
    cells = [len(c.lines) for nb in NOTEBOOKS for c in nb.exported if not c.imports_only]
    functions_ = [length(n) for nb in NOTEBOOKS for c in nb.exported for n in functions(c)]
    print(f"exported cells {statistics.median(cells)}, functions {statistics.median(functions_)} lines (medians)")
    assert statistics.median(cells) <= 16 and statistics.median(functions_) <= 12


@pytest.mark.parametrize("nb", experiments(), ids=lambda nb: nb.name)
def test_experiment_layout(nb):
    tagged = [c for c in nb.code if "parameters" in c.tags]
    assert len(tagged) == 1 and len(tagged[0].lines) <= 12, "one cell of parameters, twelve lines at most"
    assert nb.prose[0].splitlines()[0].endswith("?"), "the title of an experiment is its question"
    assert not nb.exported and not nb.module, "an experiment exports nothing"


def test_no_machine_paths_or_secrets():
    import re
    import subprocess
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    bad = re.compile(r"/home/\w+/|/ro[o]t/|/wo[r]k/|KAGGLE_KEY\s*=\s*['\"]?[0-9a-f]{32}|-----BEGIN [A-Z ]*PRIVATE KEY")
    for f in filter(None, files):
        p = ROOT / f
        if p.suffix in {".py", ".ipynb", ".md", ".toml", ".ini", ".yml", ".yaml", ".txt", ".json", ""} and p.is_file():
            if f == "tests/test_style.py": continue
            found = bad.search(p.read_text(errors="ignore"))
            assert not found, f"{f} holds {found.group()!r}"


@pytest.mark.parametrize("nb", library() + experiments() + tutorials(), ids=lambda nb: f"{nb.path.parent.name}/{nb.name}")
def test_what_a_notebook_weighs(nb):
    assert nb.path.stat().st_size <= 400_000, "400 KB at most"
    assert all(len(line) <= 120 for c in nb.code for line in c.lines), "a line over 120 characters"
    for i, c in enumerate(nb.cells):
        for o in c.get("outputs", []):
            png = o.get("data", {}).get("image/png", "")
            size = len(base64.b64decode("".join(png)))
            assert size <= 80_000, f"{nb.name} cell {i}: a plot of {size/1000:.0f} KB, 80 at most; show it with picture()"
            assert o.output_type != "error", f"{nb.name} cell {i}: a stored error"
