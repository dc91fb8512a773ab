"""Mutation testing: each small fault in a module must fail its lesson or a golden test. Lists the faults that nothing notices.

    python .ci/mutants.py train.losses evaluate.metrics --share .2

Faults come from cosmic-ray's operators; each runs in a fork of its own, so nothing on disk changes and libraries load once."""
import argparse
import ast
import csv
import importlib
import importlib.abc
import importlib.util
import os
import random
import re
import signal
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/"tests")]
ARITHMETIC = "Add|Sub|Mul|Div"  # others fail on floats at once and would flatter the score
KEEP = re.compile(rf"core/(ReplaceBinaryOperator_({ARITHMETIC})_({ARITHMETIC})|ReplaceBinaryOperator_Pow_Mul|"
                  r"ReplaceComparisonOperator_(Eq|NotEq|Lt|LtE|Gt|GtE)_(Eq|NotEq|Lt|LtE|Gt|GtE)|"
                  r"ReplaceComparisonOperator_(Is_IsNot|IsNot_Is)|ReplaceUnaryOperator_(USub_UAdd|Delete_USub|Delete_Not)|"
                  r"ReplaceTrueWithFalse|ReplaceFalseWithTrue|ReplaceAndWithOr|ReplaceOrWithAnd|ReplaceBreakWithContinue|"
                  r"ReplaceContinueWithBreak|NumberReplacer|ZeroIterationForLoop)$")


def typing_only(tree):
    "Where the source says something about types only: (first, last) positions"
    for node in ast.walk(tree):
        for note in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if note: yield (note.lineno, note.col_offset), (note.end_lineno, note.end_col_offset)


def faults(source):
    "Each fault that can be put into a source as (name of its operator, number, line)"
    from cosmic_ray.ast import Visitor, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    class Places(Visitor):
        def __init__(self, operator): self.operator, self.found = operator, []

        def visit(self, node):
            self.found += [start for start, _ in self.operator.mutation_positions(node)]
            return node

    spared, tree = list(typing_only(ast.parse(source))), get_ast(source)
    for name in filter(KEEP.match, operator_names()):
        places = Places(get_operator(name)())
        places.walk(tree)
        yield from ((name, k, at[0]) for k, at in enumerate(places.found) if not any(a <= at < b for a, b in spared))


def mutate(source, name, number):
    "The source with one fault, and what its line becomes"
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator
    mutated = mutate_code(source, get_operator(name)(), number)
    return mutated, next(new.strip() for old, new in zip(source.splitlines(), mutated.splitlines()) if old != new)


class Swapped(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    "An import that gives the mutated source in place of the module"
    def __init__(self, name, path, source): self.name, self.path, self.source = name, path, source

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def create_module(self, spec): return None

    def exec_module(self, module): exec(compile(self.source, str(self.path), "exec"), vars(module))


def tests_naming(module):
    "The golden tests that name the module; longer tests notice more, and would take hours"
    word = re.compile(rf"\bphoenix\.{re.escape(module)}\b")
    return [str(p) for p in sorted((ROOT/"tests/fidelity").glob("test_*.py")) if word.search(p.read_text())]


def run_all(module, path, source, files, seconds):
    "In this process: the lesson's cells, then the test files, against the given source"
    import pytest
    sys.meta_path.insert(0, Swapped(f"phoenix.{module}", path, source))
    signal.alarm(int(seconds))
    from notebooks import NBS, library
    from test_notebooks import runs
    nb = next(n for n in library() if n.module == f"phoenix.{module}")
    os.chdir(NBS)
    os.environ["IN_TEST"] = "1"
    space = dict(vars(importlib.import_module(nb.module)), __name__="__main__")
    for cell in nb.code:
        if not cell.exported and runs(cell): exec(compile(cell.source, nb.name, "exec"), space)
    os.chdir(ROOT)
    return pytest.main(["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *files]) if files else 0


def forked(work):
    "Exit status of `work()` in a fork that writes nothing; minus the signal that ended it"
    sys.stdout.flush()
    if not (child := os.fork()):
        code = 1
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2): os.dup2(quiet, stream)
            os.setpgid(0, 0)
            code = int(work() or 0)
        finally: os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def preload(module, path, source, files):
    "Import here what a run without a fault imports, phoenix and the tests aside; seconds that run took"
    names, start = ROOT/f".mutants-{os.getpid()}", time.perf_counter()

    def work():
        code = run_all(module, path, source, files, 3600)
        names.write_text("\n".join(n for n in list(sys.modules) if not n.startswith(("phoenix", "test", "notebooks", "conftest"))))
        return code
    try:
        if code := forked(work): sys.exit(f"{module}: its lesson and tests must pass without a fault, they ended with {code}")
        took = time.perf_counter() - start
        for n in names.read_text().splitlines():
            try: importlib.import_module(n)
            except Exception: continue  # parts of libraries that cannot be imported by name
    finally: names.unlink(missing_ok=True)
    return took


def measure(module, share, seed, out):
    "Put faults into one module one by one: (killed, tried)"
    path = ROOT/"phoenix"/(module.replace(".", "/") + ".py")
    source, files = path.read_text(), tests_naming(module)
    found = list(faults(source))
    random.Random(seed).shuffle(found)
    found = found[:max(1, round(share*len(found)))]
    seconds = 20 + 5*preload(module, path, source, files)
    alive = []
    for name, number, line in found:
        mutated, text = mutate(source, name, number)
        code, operator = forked(lambda: run_all(module, path, mutated, files, seconds)), name.removeprefix("core/")
        if not code: alive.append((operator, line, text))
        out.writerow([module, operator, line, text, "survived" if not code else "timeout" if code == -signal.SIGALRM else "killed"])
    print(f"{module}: {len(found) - len(alive)} of {len(found)} faults noticed ({100*(1 - len(alive)/len(found)):.0f} %)")
    for operator, line, text in sorted(alive, key=lambda a: a[1]): print(f"  line {line}, {operator}: {text}")
    return len(found) - len(alive), len(found)


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("modules", nargs="+", help="dotted names below phoenix")
    ask.add_argument("--share", type=float, default=1., help="share of the faults that is drawn")
    ask.add_argument("--seed", type=int, default=0, help="of the draw")
    ask.add_argument("--least", type=float, default=.85, help="share that must be noticed")
    ask.add_argument("--csv", type=Path, default=Path("mutants.csv"), help="every fault and what became of it")
    said = ask.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="agg")
    warnings.simplefilter("ignore")
    with open(said.csv, "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["module", "operator", "line", "becomes", "result"])
        done = [measure(m, said.share, said.seed, rows) for m in said.modules]
    killed, tried = map(sum, zip(*done))
    print(f"{killed} of {tried} faults noticed ({100*killed/tried:.1f} %), {100*said.least:g} % asked for")
    sys.exit(killed < said.least*tried)
