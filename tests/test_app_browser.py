"""In Chromium: each panel of the page of `actstore open`, with no request but to loopback; the report as it is printed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import actstore
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.trees.task import TreeSet
from tests import tiny_models

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
IMAGES = os.environ.get("ACTSTORE_IMAGES")  # a folder that takes a picture of each panel: docs/images
STORE = os.environ.get(
    "ACTSTORE_IMAGES_OF"
)  # a larger store than the test's own, with studies depth and probes, for these pictures
SERVE = "from actstore.cli import main; main()"

pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed (`apt-get install chromium`)"),
    pytest.mark.filterwarnings("ignore"),  # of playwright
]


@pytest.fixture
def shown(shipped, tmp_path):
    """A store of trees and texts with answers and patterns, and a study of two runs."""
    if STORE:
        return Path(STORE)
    store, sites = tmp_path / "demo.act", ["embed", "resid_post", "pattern"]
    execute(Ingest(store, shipped, TreeSet("reproduction", 24), sites=sites))
    others = TreeSet("reproduction", 24, seed=1, name="others")
    execute(Ingest(store, shipped, others, "again", sites=["embed", "resid_post"]))
    for study in ("depth", "probes"):
        actstore.study(store, study, ["reproduction", "again"], check=False)
    model = tiny_models.llama(tmp_path / "tiny")
    actstore.ingest(store, str(model), text=["the cat <b>sat</b>", "a dog ran"], run="t", dataset="texts", sites=sites)
    return store


def test_each_panel_opens_and_no_request_leaves_loopback(shown):
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-c", SERVE, "open", str(shown), "--no-browser"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    asked: list[str] = []
    faults: list[str] = []
    try:
        address = server.stdout.readline().strip()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1200, "height": 1000})
            page.set_default_timeout(60_000)
            page.on("request", lambda request: asked.append(request.url))
            page.on("websocket", lambda socket: asked.append(socket.url))
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.goto(address.partition("?")[0])
            assert page.get_by_text("Tables and views").count() == 0, "without the token there is no page"
            page.goto(address)
            look(page)
            browser.close()
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
        assert server.stderr.read() == ""
    finally:
        server.kill()
        server.communicate()
    port = re.search(r":(\d+)/", address)[1]
    own = (f"http://127.0.0.1:{port}/", f"ws://127.0.0.1:{port}/", "data:", f"blob:http://127.0.0.1:{port}/")
    assert len(asked) > 20
    assert [url for url in asked if not url.startswith(own)] == []
    assert faults == []


def test_the_report_is_printed_whole_on_white_paper(tmp_path):
    from playwright.sync_api import sync_playwright

    from tests.answering import Answering, noise
    from tests.test_pipeline import small_model

    trees = TreeSet("reproduction", 150, n_nodes=6, name="d")
    execute(Answering(tmp_path / "s.act", small_model(), trees, sites=[], says=noise, run="small"))
    made = actstore.report(tmp_path / "s.act", tmp_path / "out")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 700, "height": 1000}, color_scheme="dark")
        page.goto(made.page.as_uri())
        white = "rgb(255, 255, 255)"
        ground = "el => getComputedStyle(el).backgroundColor"
        figures, dark = page.locator("figure img.light"), page.locator("figure img.dark")
        assert figures.count() == dark.count() >= 2
        assert all(figure.is_visible() for figure in dark.all())
        assert not any(figure.is_visible() for figure in figures.all())
        assert page.locator("body").evaluate(ground) != white, "the screen is dark"
        page.emulate_media(media="print")  # no wait follows: a browser prints what it has
        assert not any(figure.is_visible() for figure in dark.all()), "a figure is printed light on dark"
        assert all(figure.is_visible() for figure in figures.all())
        assert figures.evaluate_all("els => els.every(el => el.complete && el.naturalWidth)")
        assert page.locator("body").evaluate(ground) == white
        assert not any(part.is_visible() for part in page.locator("nav, details").all()), "they are of no use on paper"
        style = "(els, name) => els.map(el => getComputedStyle(el)[name])"
        for what in ("figure", "tr"):
            assert {*page.locator(what).evaluate_all(style, "breakInside")} == {"avoid"}
        page_height = 96 * 9  # pixels of a letter's text
        for box in (figure.bounding_box() for figure in figures.all()):
            assert box["height"] < page_height
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 700
        wide = page.locator(".wide")
        assert {*wide.evaluate_all(style, "overflowX")} == {"visible"}, "a table is cut where one cannot scroll"
        browser.close()


def look(page):
    """Open each panel and use it."""

    def to(panel):
        page.get_by_role("radio", name=panel).click()

    page.get_by_text("Tables and views").wait_for()
    keep(page, "holds", 620)

    to("sql")
    box = page.get_by_role("textbox", name="SQL")
    box.fill("")
    box.press_sequentially("select tok")
    page.locator(".sqlbox li", has_text="token_id").first.wait_for()
    box.fill("select * from tokens where ro")
    box.press("End")
    box.press_sequentially("l")
    box.press("Tab")
    assert box.input_value() == "select * from tokens where role"
    box.fill("select nothing from tokens")
    box.press("Control+Enter")
    page.locator(".told", has_text="nothing").wait_for()
    box.fill("select token_id, token, role, act(token_id, 'reproduction', 'resid_post.2') as x from tokens limit 500")
    box.press("Control+Enter")
    page.locator(".told", has_text="500 rows").wait_for()
    page.locator("td svg").first.wait_for()
    keep(page, "sql", 900)

    to("tree")
    page.locator(".about", has_text="Tree 0").wait_for()
    page.locator(".picture [data-at='4']").first.click()
    page.locator(".attended", has_text="at position 4 ").wait_for()
    page.locator("svg[aria-label^='Each cell names']").first.wait_for()
    keep(page, "tree", 1420)

    to("text")
    page.locator(".about", has_text="Sequence ").wait_for()
    words = page.locator(".picture span[data-at]")
    words.nth(2).click()
    page.locator(".attended", has_text="at position 2 attends to").wait_for()
    darkest = "els => Math.min(...els.map(el => getComputedStyle(el).backgroundColor.match(/\\d+/g)[0]))"
    assert words.evaluate_all(darkest) < 250, "no token is blue"
    assert page.locator(".picture b").count() == 0, "what a text says became a part of the page"
    cells = page.locator("svg[aria-label^='Each cell names'] g[data-at='2'] title")
    cells.first.wait_for(state="attached")
    spelled = words.nth(2).inner_text().replace("\xa0", " ").strip() or "␣"
    assert f", {spelled} (2): " in cells.first.text_content(), "the lens is not at the token in its tokenizer's piece"
    keep(page, "text", 900)

    to("map")
    canvas = page.locator(".map canvas")
    canvas.wait_for()
    page.get_by_text("Draw a rectangle").wait_for()
    at = canvas.bounding_box()
    page.mouse.move(at["x"] + 60, at["y"] + 60)
    page.mouse.down()
    page.mouse.move(at["x"] + 300, at["y"] + 200, steps=4)
    page.mouse.move(at["x"] + 430, at["y"] + 300, steps=4)
    page.mouse.up()
    page.locator(".brushed", has_text="where token_id in (").wait_for()
    keep(page, "map", 1300)
    to("sql")
    page.locator(".told").wait_for()
    assert "where token_id in (" in box.input_value()
    box.press("Control+Enter")
    page.locator(".told:not(:has-text('500 rows'))", has_text="row").wait_for()

    to("results")
    figures = page.get_by_alt_text("figure")
    figures.nth(1).wait_for()
    boxes = [figures.nth(turn).bounding_box() for turn in (0, 1)]
    assert abs(boxes[0]["y"] - boxes[1]["y"]) < 2, "two runs do not stand beside each other"
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"] + 1
    assert boxes[0]["width"] > 300
    assert boxes[1]["x"] + boxes[1]["width"] <= 1200, "the second run leaves the page"
    page.get_by_label("study").select_option("probes")
    maps = page.locator("svg[aria-label^='Accuracy of the probes']")
    maps.nth(1).wait_for()
    fits = "els => els.every(el => el.scrollWidth <= el.clientWidth)"
    assert maps.locator("..").evaluate_all(fits), "a grid of probes is cut"
    keep(page, "results", 1300)


def keep(page, name, height):
    """Take a picture of a panel, if a folder is named."""
    if IMAGES:
        page.set_viewport_size({"width": 1200, "height": height})
        page.wait_for_timeout(1500)
        page.screenshot(path=Path(IMAGES) / f"open-{name}.png")
        page.set_viewport_size({"width": 1200, "height": 1000})
