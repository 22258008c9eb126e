"""The report in a real browser, without a network: it loads, sorts, filters, plays in step, and obeys the keyboard."""

from __future__ import annotations

import shutil
import statistics
import time
from itertools import pairwise
from pathlib import Path

import pytest

from ovi.report.page import write_page
from ovi.runs.run import find_runs
from run_folders import CAPTIONS, LOSS, OFFSET, clip_file, run_folder, sweep_folder

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome here")

HOSTILE = '</script><img src=x onerror="window.hacked=1"><b>bold</b>'
MEANS = {"ovi": 40, "bridge": 62, "joint": 90, "none": 240}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        opened = started.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    root = sweep_folder(tmp_path_factory.mktemp("browser") / "sweep", MEANS)
    hostile = {"label": HOSTILE, "variant": {"model/fusion": HOSTILE}, "captions": [HOSTILE]}
    run_folder(
        root / "hostile",
        seed=0,
        metrics={OFFSET: 300.0, LOSS: 0.5},
        clip=clip_file(root / "x.mp4", 0.3, 300),
        **hostile,
    )
    run_folder(root / "failed", label="fusion=film", variant={}, seed=0, metrics={}, status="failed")
    return write_page(find_runs(root)[0], root / "report.html", title=HOSTILE)


@pytest.fixture
def opened(browser, report):
    page, said = open_page(browser, report)
    yield page
    page.context.close()
    assert said == []


def open_page(browser, path: Path, **options):
    """The page, and a list of what went wrong in it or left it."""
    context = browser.new_context(offline=True, viewport={"width": 1200, "height": 900}, **options)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on(
        "request",
        lambda r: said.append(r.url[:99]) if not r.url.startswith(("data:", "blob:", path.as_uri())) else None,
    )
    page.goto(path.as_uri())
    page.wait_for_selector("#curves .main-svg", state="attached")
    return page, said


def until(page, condition: str) -> None:
    """Wait for a condition; the page's own policy forbids what ``wait_for_function`` does."""
    end = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.03)


def names(page, table="#ranking") -> list[str]:
    return page.locator(f"{table} tbody tr:visible th").all_text_contents()


def test_it_loads_sorts_filters_and_keeps_a_users_text_as_text(opened):
    page, variants = opened, [f"fusion={name}" for name in MEANS]
    assert names(page) == [*variants, HOSTILE]
    assert page.title() == HOSTILE
    # By mean, both ways, and by name; the state is told to those who do not see it.
    mean = page.get_by_role("button", name="mean")
    mean.click()
    assert page.locator("#ranking th[aria-sort=ascending]").text_content() == "mean"
    mean.click()
    assert names(page) == [HOSTILE, *reversed(variants)]
    page.get_by_role("button", name="variant").first.press("Enter")
    assert names(page)[1:] == sorted(variants)
    # Another figure ranks anew, and keeps the order asked for.
    page.get_by_role("button", name="#").click()
    page.get_by_label("Figure", exact=False).first.select_option(LOSS)
    assert names(page)[0] == HOSTILE
    page.get_by_label("Figure", exact=False).first.select_option(OFFSET)
    # Filters act on tables, plots, and the count.
    page.get_by_label("Find").fill("bri")
    until(page, "document.querySelector('#count').textContent === '3 of 14 runs'")
    assert names(page) == ["fusion=bridge"]
    assert names(page, "#runs") == [f"fusion=bridge_seed{n}" for n in range(3)]
    plotted = "[...document.querySelectorAll('#dots .ytick text')].map(t => t.textContent)"
    assert page.evaluate(plotted) == ["fusion=bridge"]
    assert page.locator("#cells .cell").count() == 2  # the real one and its own
    page.get_by_role("button", name="Clear").click()
    page.get_by_label("Status").select_option("failed")
    assert names(page, "#runs") == ["failed"]
    assert page.locator("#dots").text_content().startswith("Nothing to show")
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("combobox", name="Seed", exact=True).select_option("2")
    assert page.locator("#runs tbody tr:visible").count() == 4
    assert "over all finished seeds" in page.locator("#ranking-note").text_content()
    page.get_by_role("button", name="Clear").click()
    # Captions and labels in the player and in plots.
    page.locator("#prompt").select_option(label=f"0: {HOSTILE}")
    assert page.locator("#caption").text_content() == HOSTILE
    assert HOSTILE[:29] in "".join(page.evaluate(plotted))
    assert page.evaluate("[window.hacked, document.querySelectorAll('img[src=x]').length]") == [None, 0]


def playing(page) -> None:
    page.locator("#player").scroll_into_view_if_needed()
    until(page, "document.querySelectorAll('#cells video').length === 5")
    page.get_by_role("button", name="Play", exact=True).click()
    until(page, "[...document.querySelectorAll('#cells video')].every(v => v.currentTime > 0.1 && !v.paused)")


TIMES = "[...document.querySelectorAll('#cells video')].map(v => v.currentTime)"
HEARD = "[...document.querySelectorAll('#cells video')].flatMap((v, i) => v.muted ? [] : [i])"


def test_clips_play_in_step_and_one_is_heard(opened):
    """H.264 and AAC, as training writes them."""
    page = opened
    playing(page)
    spreads, seen = [], []
    for _ in range(40):
        times = page.evaluate(TIMES)
        spreads.append(max(times) - min(times))
        seen.append(times[0])
        time.sleep(0.05)
    # Round the loop, seeks of several files end one after the other; a busy machine adds to that.
    assert statistics.median(spreads) < 0.05
    assert sum(later < earlier for earlier, later in pairwise(seen)) >= 1  # it went round
    assert page.evaluate(HEARD) == [1]
    page.get_by_role("button", name="Hear real").click()
    assert page.evaluate(HEARD) == [0]
    assert page.locator(".cell[aria-pressed=true]").count() == 1
    page.get_by_label("mute").check()
    assert page.evaluate(HEARD) == []
    # Pausing brings all to one instant.
    page.get_by_role("button", name="Pause").click()
    page.wait_for_timeout(150)
    times = page.evaluate(TIMES)
    assert max(times) - min(times) < 1e-3
    assert page.evaluate("[...document.querySelectorAll('#cells video')].every(v => v.paused)")


@pytest.mark.slow
def test_without_the_loop_it_stops_at_the_end(opened):
    page = opened
    playing(page)
    page.get_by_label("loop").uncheck()
    until(page, "document.querySelector('#play').textContent === 'Play'")
    assert min(page.evaluate(TIMES)) > 1.4


def test_everything_can_be_done_by_keys(opened):
    page = opened
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    player = page.locator("#player")
    player.scroll_into_view_if_needed()
    until(page, "[...document.querySelectorAll('#cells video')].filter(v => v.readyState > 1).length === 5")
    player.focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    until(page, "[...document.querySelectorAll('#cells video')].every(v => Math.abs(v.currentTime - 0.5) < 0.01)")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#time").text_content().startswith("0.40 / 1.")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(HEARD) == [2]
    page.keyboard.press("m")
    assert page.evaluate(HEARD) == []
    page.keyboard.press("n")
    assert page.locator("#caption").text_content() != CAPTIONS[0]
    page.keyboard.press("p")
    assert page.locator("#caption").text_content() == CAPTIONS[0]
    page.keyboard.press("Space")
    until(page, "document.querySelector('#play').getAttribute('aria-pressed') === 'true'")
    page.keyboard.press("Space")
    assert page.locator("#play").text_content() == "Play"
    # Every control can be reached and has a name.
    unnamed = page.evaluate("""[...document.querySelectorAll('button, select, input')].filter(e =>
        !e.hidden && !(e.getAttribute('aria-label') || e.textContent.trim() || e.closest('label')?.textContent.trim())
    ).map(e => e.outerHTML)""")
    assert unnamed == []


def test_dark_and_narrow_windows(browser, report):
    page, said = open_page(browser, report, color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    fill = "document.querySelector('#dots .ytick text').style.fill"
    assert page.evaluate(fill) == "rgb(232, 233, 236)"
    page.emulate_media(color_scheme="light")
    until(page, f"{fill} === 'rgb(28, 30, 33)'")
    page.set_viewport_size({"width": 360, "height": 740})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.context.close()
    assert said == []


@pytest.mark.slow
def test_a_hundred_runs(browser, tmp_path):
    root = sweep_folder(
        tmp_path / "many", {f"f{n:02d}": 40 + 5 * n for n in range(34)}, steps=2000,
        captions=[f"prompt {n}" for n in range(8)],
    )  # fmt: skip
    began = time.perf_counter()
    out = write_page(find_runs(root)[0], root / "report.html")
    assert time.perf_counter() - began < 30
    began = time.perf_counter()
    page, said = open_page(browser, out)
    assert time.perf_counter() - began < 20
    assert len(names(page)) == 34
    page.locator("#player").scroll_into_view_if_needed()
    page.wait_for_selector("#cells video")
    page.wait_for_timeout(500)
    # Decoders are few: what is far from the window has none.
    assert page.locator("#cells .cell").count() == 35
    assert page.locator("#cells video").count() < 35
    began = time.perf_counter()
    page.get_by_label("Find").fill("f1")
    until(page, "document.querySelector('#count').textContent === '30 of 102 runs'")
    assert time.perf_counter() - began < 5
    assert len(names(page)) == 10
    page.context.close()
    assert said == []
