"Shared fixtures, and the count of tests that may only grow"
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
COUNTS = Path(__file__).with_name("counts.json")


def data_root():
    "Folder of the real images: PHOENIX_DATA, else ../shared/data beside the checkout"
    return Path(os.environ.get("PHOENIX_DATA") or ROOT.parent / "shared/data")


@pytest.fixture(autouse=True)
def same_draws():
    "What torch draws without a key is the same in each test, whichever tests the process ran before"
    if "torch" in sys.modules: sys.modules["torch"].manual_seed(67280421310721) # torch's own first seed


@pytest.fixture(scope="session")
def real_data():
    "The real images, or a skip that names what is absent"
    root = data_root()
    if not (root / "sartajbhuvaji").is_dir():
        pytest.skip(f"real images are absent: neither PHOENIX_DATA nor {root.name} beside the checkout holds sartajbhuvaji/")
    return root


@pytest.fixture(scope="module")
def browser():
    "A headless Chromium, or a skip that says it is absent"
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not path: pytest.skip("the browser is absent: install Debian's chromium to test the pages")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield b
        b.close()


@pytest.fixture(autouse=True)
def two_threads_at_most():
    "Tests share two cores: torch keeps to one thread"
    import sys
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    "Print how many tests ran, and fail a whole run in which fewer pass than are on record"
    passed = len(terminalreporter.stats.get("passed", []))
    whole = not config.getoption("-k") and config.getoption("-m") in ("", "not slow") and config.args in ([], ["tests"], [str(ROOT / "tests")])
    recorded = json.loads(COUNTS.read_text())["tests"] if COUNTS.exists() else 0
    terminalreporter.write_line(f"phoenix: {passed} tests passed, {recorded} on record")
    config.stash[_SHORT] = whole and passed < recorded and exitstatus == 0


_SHORT = pytest.StashKey[bool]()


def pytest_unconfigure(config):
    "A shrunken suite is a failure even when each test in it passes"
    if config.stash.get(_SHORT, False):
        raise pytest.UsageError("fewer tests passed than tests/counts.json records: find out which vanished or were skipped")
