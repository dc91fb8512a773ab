"The page in a browser: by keyboard alone, on a desk and on a phone; a browser that is absent is said, not passed over"
import os
import shutil

import pytest

from serving import Server, picture, save_model

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="the browser is absent: install Debian's "
                                                   "chromium to test the page")]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("page"), save_model(tmp_path_factory.mktemp("models")/"model"), "plan=Plan(None, None)") as s:
        yield s.wait()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield b
        b.close()


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desk", "phone"])
def page(request, browser, server):
    page = browser.new_page(viewport=dict(zip(("width", "height"), request.param)))
    page.said, page.asked = [], []
    page.on("console", lambda m: page.said.append(m.text))
    page.on("request", lambda r: page.asked.append(r.url))
    page.goto(server.url)
    yield page
    shots = os.environ.get("PAGE_SHOTS")
    if shots: page.screenshot(path=f"{shots}/{request.node.name.replace('/', '_')}.png", full_page=True)
    page.close()


def choose(page, tmp_path, data):
    (tmp_path/"a.png").write_bytes(data)
    page.get_by_label("Image: PNG").set_input_files(tmp_path/"a.png")


def test_an_answer_by_keyboard(page, server, tmp_path):
    choose(page, tmp_path, picture(128))
    page.get_by_label("API key").focus()
    page.keyboard.type(server.key)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "explain"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "go"
    page.keyboard.press("Enter")
    page.wait_for_selector(".verdict", timeout=60_000)
    assert page.locator(".verdict").inner_text() == "bright"
    text = page.locator("#out").inner_text()
    for part in ("Set of classes", "Uncertainty", "Unlike known pictures", "Time", "model@1", "not a diagnosis", "made images"):
        assert part in text, part
    assert page.get_by_role("status").inner_text() == "Answer: bright" and page.evaluate("document.activeElement.id") == "out"
    assert page.get_by_role("meter").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the screen"
    assert not page.said and all(u.startswith(server.url) or u.startswith("data:") for u in page.asked)
    assert page.locator(":is(a,button,input:not([type=checkbox]))").evaluate_all("e => e.every(x => x.getBoundingClientRect().height >= 40)")


def test_refusals_are_said(page, server, tmp_path):
    page.get_by_label("API key").fill("wrong")
    choose(page, tmp_path, picture())
    page.locator("#go").click()
    page.wait_for_selector(".bad")
    assert "Refused (401)" in page.locator("#out").inner_text() and "Refused" in page.get_by_role("status").inner_text()
    page.get_by_label("API key").fill(server.key)
    choose(page, tmp_path, b"<script>document.title='x'</script>")
    page.locator("#go").click()
    page.locator("#out", has_text="415").wait_for()
    assert page.title() == "phoenix: classify an image"


def test_the_names_that_a_screen_reader_says(page):
    tree = page.locator("body").aria_snapshot()
    for part in ('heading "phoenix" [level=1]', 'textbox "API key"', 'button "Classify"', 'checkbox "Show why', "main:"):
        assert part in tree, tree
