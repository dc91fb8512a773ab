"The page in a browser: by keyboard alone, on a desk and on a phone; a browser that is absent is said, not passed over"
import base64
import io
import os

import numpy as np
import pytest

from serving import Server, picture, post, save_model, save_network

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("page"), save_model(tmp_path_factory.mktemp("models")/"model"), "plan=Plan(None, None)") as s:
        yield s.wait()


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


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    "A server of a network with weights"
    with Server(tmp_path_factory.mktemp("why"), save_network(tmp_path_factory.mktemp("models")/"net"), "plan=Plan(None, None)") as s:
        yield s.wait()


def test_a_map_over_http_and_by_the_client(explained):
    "Shape, class and stamp are those of `check_map` on the same weights; a map that fails says so in words and in the picture"
    from PIL import Image

    from phoenix.client import Client, ServerError
    with Client(explained.url, explained.key, timeout_s=120) as client:
        passed = client.explain(picture(), "occlusion", target="glioma")
        failed = client.explain(picture(), "integrated gradients", target="glioma")
        for wrong, why in ((dict(map="x"), "a map must be one of gradcam"), (dict(map="rollout"), "a map must be one of"), (dict(target="x"), "a class must be")):
            with pytest.raises(ServerError, match=why): client.explain(picture(), **wrong)
        assert client.explain(picture())["target"] == max(passed["answer"]["probs"], key=passed["answer"]["probs"].get)
    shown = [Image.open(io.BytesIO(base64.b64decode(x["png"]))) for x in (passed, failed)]
    assert [(i.format, i.size, i.mode) for i in shown] == [("PNG", (448, 448), "RGB")]*2
    assert passed["stamp"] == "" and [t["passed"] for t in passed["tests"]] == [True]*4 and passed["target"] == "glioma"
    assert failed["stamp"] == "FAILED: weights"
    assert {t["test"]: t["passed"] for t in failed["tests"]} == {"weights": False, "deletion": True, "insertion": True, "stability": True}
    white = [(np.asarray(i)[:60, :300] > 250).all(-1).sum() for i in shown]
    assert white[0] < 20 < 400 < white[1], f"the stamp is written across the failed map, and only there: {white}"
    said = post(explained, path="/v1/explain?map=occlusion&target=glioma")
    assert said.status_code == 200 and said.json()["png"] == passed["png"], "the same picture has the same map"


def test_an_answer_without_weights_says_why_there_is_no_map(server):
    said = post(server, path="/v1/explain", timeout=120)
    assert said.status_code == 422 and "an explanation needs weights that this phoenix can load" in said.json()["error"]["message"]
    assert post(server).status_code == 200, "the answer itself needs none"


def test_the_page_shows_why(browser, explained, server, tmp_path):
    "A map with its stamp and tests in words, and the sentence where there is none"
    for name, s, width in (("desk", explained, 1280), ("phone", explained, 390), ("none", server, 390)):
        page = browser.new_page(viewport=dict(width=width, height=900))
        page.goto(s.url)
        choose(page, tmp_path, picture(128))
        page.get_by_label("API key").fill(s.key)
        page.get_by_label("Show why").check()
        page.locator("#go").click()
        page.locator("h2", has_text="Explanation").wait_for(timeout=120_000)
        text = page.locator("#out").inner_text()
        if os.environ.get("PAGE_SHOTS"): page.screenshot(path=f"{os.environ['PAGE_SHOTS']}/why-{name}.png", full_page=True)
        heard = page.get_by_role("status").inner_text()
        if s is server:
            assert "No map: an explanation needs weights that this phoenix can load" in text and page.locator(".verdict").inner_text() == "bright"
            assert heard == "Answer: bright. No map."
        else:
            image = page.locator("section img")
            assert image.evaluate("i => i.complete && i.naturalWidth") == 448 and "heat map of gradcam for " in image.get_attribute("alt")
            assert "passed its 4 tests" in text or "Do not trust this map" in text and image.get_attribute("alt").count("stamped")
            assert all(t in text for t in ("weights", "deletion", "insertion", "stability", "Explanation: gradcam for "))
            assert "map" in heard and page.evaluate("document.activeElement.id") == "out"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.close()


def test_the_names_that_a_screen_reader_says(page):
    tree = page.locator("body").aria_snapshot()
    for part in ('heading "phoenix" [level=1]', 'textbox "API key"', 'button "Classify"', 'checkbox "Show why', "main:"):
        assert part in tree, tree
