"Notebooks and modules one to one, the staircase of imports, and every module alone in a fresh process"
import ast
import subprocess
import sys

import pytest

from notebooks import ROOT, library

NOTEBOOKS = library()
NUMBER = {nb.module: nb.number for nb in NOTEBOOKS}


def test_one_notebook_one_module():
    modules = {str(p.relative_to(ROOT).with_suffix("")).replace("/", ".") for p in (ROOT / "phoenix").rglob("*.py")
               if p.name not in ("__init__.py", "_modidx.py")}
    assert modules == set(NUMBER), f"without a partner: {sorted(modules ^ set(NUMBER))}"


def absolute(node, module):
    "The absolute name of what `node` imports from"
    if not node.level:
        return node.module or ""
    base = module.split(".")[:-node.level]
    return ".".join(base + ([node.module] if node.module else []))


def imported(module):
    "Modules of phoenix that `module` imports, also inside functions"
    path = ROOT / (module.replace(".", "/") + ".py")
    for n in ast.walk(ast.parse(path.read_text())):
        if isinstance(n, ast.ImportFrom):
            name = absolute(n, module)
            if name.startswith("phoenix"):
                yield from (f"{name}.{a.name}" if f"{name}.{a.name}" in NUMBER else name for a in n.names)
        elif isinstance(n, ast.Import):
            yield from (a.name for a in n.names if a.name.startswith("phoenix"))


@pytest.mark.parametrize("module", sorted(NUMBER))
def test_staircase(module):
    for other in imported(module):
        if other in NUMBER:
            assert NUMBER[other] < NUMBER[module], f"{module} ({NUMBER[module]}) imports {other} ({NUMBER[other]})"


def python(code, argv=()):
    "Run `code` in a fresh interpreter, outside the checkout"
    return subprocess.run([sys.executable, "-c", code, *argv], cwd="/", capture_output=True, text=True, timeout=600)


IMPORTS = """
import importlib, os, sys, traceback
import fastai.learner, matplotlib.pyplot, pandas, scipy.stats, sklearn.metrics, timm, torch
for name in sys.argv[1:]:
    if not os.fork():
        try:
            module = importlib.import_module(name)
            os._exit(not all(hasattr(module, n) for n in module.__all__))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if os.wait()[1]: print(name)
"""


def test_every_module_imports_alone():
    "Each in a process of its own that knows the large libraries, and nothing of phoenix"
    done = python(IMPORTS, argv=sorted(NUMBER))
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted(NUMBER))
def test_fresh_import(module):
    done = python(f"import {module} as m; assert all(hasattr(m, n) for n in m.__all__)")
    assert done.returncode == 0, done.stderr


def test_import_phoenix_is_light():
    code = ("import sys, time; t = time.perf_counter(); import phoenix; s = time.perf_counter() - t; "
            "heavy = {'torch', 'fastai', 'numpy', 'pandas', 'matplotlib'} & set(sys.modules); "
            "assert not heavy, heavy; print(s)")
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", sorted(m for m, n in NUMBER.items() if n < "17"))
def test_data_side_needs_no_torch(module):
    done = python(f"import sys; import {module}; assert 'torch' not in sys.modules and 'fastai' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_cli_help_needs_no_torch():
    done = python("import sys; import phoenix.cli; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_sidebar_lists_every_notebook():
    import yaml
    from notebooks import NBS
    side = (NBS / "sidebar.yml").read_text()
    items = []

    def walk(x):
        for i in x:
            walk(i["contents"]) if isinstance(i, dict) else items.append(i)
    walk(yaml.safe_load(side)["website"]["sidebar"]["contents"])
    found = {str(p.relative_to(NBS)) for p in NBS.rglob("*.ipynb") if not any(d.startswith(("_", ".")) for d in p.relative_to(NBS).parts)}
    assert set(items) == found and len(items) == len(found), f"differ: {sorted(set(items) ^ found)}"
