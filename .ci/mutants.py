"""Mutation testing: each small fault in a module must fail a test of the gate. Lists the faults that nothing notices.

    python .ci/mutants.py train.losses evaluate.metrics --share .2

Every fault meets the module's own lesson and the golden tests that name it. What survives them meets the quick ones among the
gate's other tests and lessons that name the module. The list says how many each of both noticed.
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
QUICK, ALL, SEARCH = 2., 12., 100.  # processor seconds of a test that counts as quick, of all of them, and to find them in
LOOKS = {"figsize", "fontsize", "title_fontsize", "lw", "ms", "rotation", "color", "alpha", "ncols"}  # of a plot_ function
ARITHMETIC = "Add|Sub|Mul|Div"  # others fail on floats at once and would flatter the score
KEEP = re.compile(rf"core/(ReplaceBinaryOperator_({ARITHMETIC})_({ARITHMETIC})|ReplaceBinaryOperator_Pow_Mul|"
                  r"ReplaceComparisonOperator_(Eq|NotEq|Lt|LtE|Gt|GtE)_(Eq|NotEq|Lt|LtE|Gt|GtE)|"
                  r"ReplaceComparisonOperator_(Is_IsNot|IsNot_Is)|ReplaceUnaryOperator_(USub_UAdd|Delete_USub|Delete_Not)|"
                  r"ReplaceTrueWithFalse|ReplaceFalseWithTrue|ReplaceAndWithOr|ReplaceOrWithAnd|ReplaceBreakWithContinue|"
                  r"ReplaceContinueWithBreak|NumberReplacer|ZeroIterationForLoop)$")


def spans(source):
    "Where a source says something about types or looks only, and where its binary operators are: (first, last) in characters"
    lines, spared, binary = source.splitlines(), [], []

    def at(line, byte): return line, len(lines[line - 1].encode()[:byte].decode())
    for node in ast.walk(ast.parse(source)):
        for note in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if note: spared.append((at(note.lineno, note.col_offset), at(note.end_lineno, note.end_col_offset)))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("plot_"):
            looks = (k.value for k in ast.walk(node) if isinstance(k, ast.keyword) and k.arg in LOOKS)
            spared += [(at(v.lineno, v.col_offset), at(v.end_lineno, v.end_col_offset)) for v in looks]
        if isinstance(node, ast.BinOp):
            binary.append((at(node.left.end_lineno, node.left.end_col_offset), at(node.right.lineno, node.right.col_offset)))
    return spared, binary


def faults(source):
    "Each fault that can be put into a source as (name of its operator, number, line)"
    from cosmic_ray.ast import Visitor, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    class Places(Visitor):
        def __init__(self, operator): self.operator, self.found = operator, []

        def visit(self, node):
            self.found += [start for start, _ in self.operator.mutation_positions(node)]
            return node

    (spared, binary), tree = spans(source), get_ast(source)

    def counts(name, at):  # the star of a parameter list and of unpacking is no product
        return not any(a <= at < b for a, b in spared) and ("Binary" not in name or any(a <= at < b for a, b in binary))

    for name in filter(KEEP.match, operator_names()):
        places = Places(get_operator(name)())
        places.walk(tree)
        yield from ((name, k, at[0]) for k, at in enumerate(places.found) if counts(name, at))


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


def tests_naming(module, folder="tests/fidelity"):
    "The test files of a folder that name the module: the golden tests first, which every fault meets"
    word = re.compile(rf"\bphoenix\.{re.escape(module)}\b")
    return [str(p.relative_to(ROOT)) for p in sorted((ROOT/folder).glob("test_*.py")) if word.search(p.read_text())]


def lessons_naming(module):
    "The lessons of other modules that name the module, as tests"
    from notebooks import library
    word = re.compile(rf"\bphoenix\.{re.escape(module)}\b")
    return [f"tests/test_notebooks.py::test_examples_against_the_module[{n.name}]" for n in library()
            if n.module != f"phoenix.{module}" and any(word.search(c.source) for c in n.code)]


class Quick:
    "Notes in a file which tests pass and their processor time, one by one, as the search for them may be cut short"
    def __init__(self, path): self.path, self.start, self.good = path, 0., True

    def pytest_sessionstart(self): signal.setitimer(signal.ITIMER_PROF, SEARCH)

    def pytest_runtest_logstart(self): self.start, self.good = sum(os.times()[:4]), True

    def pytest_runtest_logreport(self, report): self.good &= report.outcome == "passed"

    def pytest_runtest_logfinish(self, nodeid):
        took = sum(os.times()[:4]) - self.start
        if self.good and took < QUICK:
            with open(self.path, "a") as f: f.write(f"{took:.3f} {nodeid}\n")


def cheapest(lines):
    "Names of the cheapest tests that `Quick` noted, as many as fit into the time for all, in their own order"
    noted, total, chosen = [(float(took), name) for took, name in (x.split(" ", 1) for x in lines)], 0., set()
    for took, name in sorted(noted):
        total += took
        if total < ALL: chosen.add(name)
    return [name for _, name in noted if name in chosen]


def run_tests(module, path, source, tests, seconds, plugins=(), options=("-x",)):
    "In this process: tests of the gate by file or name against the given source"
    import pytest
    if not any(isinstance(f, Swapped) for f in sys.meta_path): sys.meta_path.insert(0, Swapped(f"phoenix.{module}", path, source))
    signal.alarm(int(seconds))
    os.chdir(ROOT)
    return pytest.main([*options, "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests], list(plugins)) if tests else 0


def run_all(module, path, source, files, seconds):
    "In this process: the lesson's cells, then the golden tests, against the given source"
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
    return run_tests(module, path, source, files, seconds)


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


def rehearse(work, module):
    "Import here what work imports, phoenix and the tests aside; the seconds it takes then, passing as it must without a fault"
    names, failed = ROOT/f".mutants-{os.getpid()}", f"{module}: its lesson and tests must pass without a fault, they ended with"

    def noted():
        code = work()
        names.write_text("\n".join(n for n in list(sys.modules) if not n.startswith(("phoenix", "test", "notebooks", "conftest"))))
        return code
    try:
        if code := forked(noted): sys.exit(f"{failed} {code}")
        for n in names.read_text().splitlines():
            try: importlib.import_module(n)
            except Exception: continue  # parts of libraries that cannot be imported by name
    finally: names.unlink(missing_ok=True)
    start = time.perf_counter()
    if code := forked(work): sys.exit(f"{failed} {code} with its libraries loaded beforehand")
    return time.perf_counter() - start


def quick_tests(module, path, source):
    "The quick ones among the gate's other tests and lessons that name the module, and the seconds they take without a fault"
    found = ROOT/f".mutants-quick-{os.getpid()}"
    try:
        found.touch()
        asked = tests_naming(module, "tests") + lessons_naming(module)
        forked(lambda: run_tests(module, path, source, asked, 10*SEARCH, [Quick(found)], ()))
        tests = cheapest(found.read_text().splitlines())
    finally: found.unlink(missing_ok=True)
    took = rehearse(lambda: run_tests(module, path, source, tests, 10*SEARCH), module)
    print(f"{module}: what its lesson and golden tests let pass meets {len(tests)} quick tests of the gate, {took:.0f} s")
    return tests, took


def measure(module, share, seed, out, gate=True):
    "Put faults into one module one by one: (killed, tried)"
    path = ROOT/"phoenix"/(module.replace(".", "/") + ".py")
    source, files = path.read_text(), tests_naming(module)
    found = list(faults(source))
    random.Random(seed).shuffle(found)
    found = found[:max(1, round(share*len(found)))]
    tests, took = quick_tests(module, path, source) if gate else ([], 0.)
    seconds = 20 + 5*rehearse(lambda: run_all(module, path, source, files, 3600), module)
    alive, by = [], dict(lesson=0, gate=0)
    for name, number, line in found:
        (mutated, text), operator = mutate(source, name, number), name.removeprefix("core/")
        code, who = forked(lambda: run_all(module, path, mutated, files, seconds)), "lesson"
        if not code: code, who = forked(lambda: run_tests(module, path, mutated, tests, 20 + 5*took)), "gate"
        if code: by[who] += 1
        else: alive.append((operator, line, text))
        said = "survived" if not code else "timeout" if code == -signal.SIGALRM else "killed"
        out.writerow([module, operator, line, text, said, who if code else ""])
    noticed = len(found) - len(alive)
    print(f"{module}: {noticed} of {len(found)} faults noticed ({100*noticed/len(found):.0f} %), {by['lesson']} by its lesson and "
          f"golden tests, {by['gate']} by the gate's other tests")
    for operator, line, text in sorted(alive, key=lambda a: a[1]): print(f"  line {line}, {operator}: {text}")
    return noticed, len(found)


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("modules", nargs="+", help="dotted names below phoenix")
    ask.add_argument("--share", type=float, default=1., help="share of the faults that is drawn")
    ask.add_argument("--seed", type=int, default=0, help="of the draw")
    ask.add_argument("--least", type=float, default=.85, help="share that must be noticed")
    ask.add_argument("--alone", action="store_true", help="run the module's lesson and golden tests alone, not the gate's other tests")
    ask.add_argument("--csv", type=Path, default=Path("mutants.csv"), help="every fault and what became of it")
    said = ask.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="agg")
    warnings.simplefilter("ignore")
    with open(said.csv, "w", newline="", buffering=1) as f:
        rows = csv.writer(f)
        rows.writerow(["module", "operator", "line", "becomes", "result", "noticed_by"])
        done = [measure(m, said.share, said.seed, rows, not said.alone) for m in said.modules]
    killed, tried = map(sum, zip(*done))
    print(f"{killed} of {tried} faults noticed ({100*killed/tried:.1f} %), {100*said.least:g} % asked for")
    sys.exit(killed < said.least*tried)
