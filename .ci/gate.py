"Everything before pytest: notebooks and package in step, lint, every notebook's cells. Stops at the first failure."
import os
import subprocess
import sys
import time
from pathlib import Path

root = Path(__file__).resolve().parents[1]
bin_dir = Path(sys.executable).parent


def step(name, *command):
    "Run one step of the gate and say how long it took"
    start = time.perf_counter()
    env = dict(os.environ, PATH=f"{bin_dir}:{os.environ['PATH']}", MPLBACKEND="agg")
    done = subprocess.run(command, cwd=root, env=env)
    print(f"gate: {name}: {'ok' if done.returncode == 0 else 'FAILED'} in {time.perf_counter() - start:.1f} s", flush=True)
    if done.returncode:
        sys.exit(done.returncode)


def state():
    "What git sees of notebooks, package and README: unstaged changes and untracked files"
    paths = ["nbs", "phoenix", "README.md"]
    diff = subprocess.run(["git", "diff", "--", *paths], cwd=root, capture_output=True, text=True, check=True).stdout
    new = subprocess.run(["git", "ls-files", "-o", "--exclude-standard", "--", *paths],
                         cwd=root, capture_output=True, text=True, check=True).stdout
    return diff, new


def unchanged(name, command):
    "Run `command`; it must leave notebooks and package as they were"
    before = state()
    step(name, command)
    after = state()
    if before != after:
        subprocess.run(["git", "status", "--short", "--", "nbs", "phoenix"], cwd=root)
        sys.exit(f"gate: {command} changed files: run `{command}`, look at the difference and commit it")


if __name__ == "__main__":
    unchanged("nbdev-clean leaves no diff", "nbdev-clean")
    unchanged("nbdev-export leaves no diff", "nbdev-export")
    step("README.md is made from the index", sys.executable, ".ci/readme.py", "--check")
    step("ruff", "ruff", "check", "phoenix", "tests", ".ci")
    step("notebook cells", "nbdev-test", "--n-workers", "2", "--skip-folder-re", "^[_.]|experiments", "nbs")
