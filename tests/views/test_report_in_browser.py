"""Reports in a real browser: a clean console, nothing loaded but videos, no fault of accessibility, one cursor.

With S2VFLOW_SHOTS=docs/images the picture of the docs is made.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from recipes_for_tests import RECIPES, call
from runs_for_tests import Place, copied

CHROMIUM = shutil.which("chromium")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
FLAGS += ("--disable-component-update", "--disable-sync")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of playwright's own pipes
]


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Any]:
    """Open a page; at the end nothing may have been said, asked of a network, or be hard to reach."""
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    said: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1180, "height": 900}, **options)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.extend([request.url] if request.url.startswith(("http", "ws")) else []))
        page.goto(path.as_uri())
        wait(page, "[...document.querySelectorAll('video')].every(video => video.readyState >= 2)")
        yield page
        found = Axe().run(page)
        browser.close()
    assert found.violations_count == 0, found.generate_report()
    assert said == []


def wait(page: Any, is_so: str) -> None:
    """Wait until something is so; the page's policy allows no other way than to ask again and again."""
    for _ in range(200):
        if page.evaluate(is_so):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"it never was so: {is_so}")


def times(page: Any) -> list[float]:
    wait(page, "[...document.querySelectorAll('video')].every(video => !video.seeking)")
    return [round(time, 3) for time in page.evaluate("[...document.querySelectorAll('video')].map(v => v.currentTime)")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_keys_and_the_mouse_move_one_cursor(quick_run: Place, tmp_path: Path, scheme: str) -> None:
    """A frame is a sixteenth of a second; a click into the time line goes there; space plays."""
    assert quick_run.call("report", "last", "-o", tmp_path / "report.html")[0] == 0
    with opened(tmp_path / "report.html", color_scheme=scheme) as page:
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert times(page) == [0.125]
        page.keyboard.press("Shift+ArrowRight")
        assert times(page) == [1.125]
        page.locator(".timeline").click()  # in its middle
        assert times(page) == [pytest.approx(0.625, abs=0.01)]
        cursor = page.locator(".timeline .cursor").get_attribute("transform")
        assert float(cursor.removeprefix("translate(").partition(" ")[0]) == pytest.approx(500, abs=5)
        page.keyboard.press(" ")
        wait(page, "document.querySelector('video').currentTime > 0.7")
        page.keyboard.press(" ")
        assert page.evaluate("document.querySelector('video').paused")


def test_a_matrix_plays_together(quick_run: Place, tmp_path: Path) -> None:
    """And steps together; it is a table of its two axes."""
    done = copied(quick_run, tmp_path / "here")
    code, out, err = done.run("-m", "nodes.first.seed=1,2", "-m", "nodes.first.steps=1,2", "--report")
    assert code == 0, err
    (target,) = [Path(line) for line in out.splitlines() if line.endswith(".html")]
    assert target.name.startswith("recipe.cells.")
    with opened(target) as page:
        assert page.locator("thead th[scope=col]").all_inner_texts()[:2] == ["steps=1", "steps=2"]
        assert page.locator(".grid tbody th").all_inner_texts() == ["seed=1", "seed=2"]
        page.keyboard.press("ArrowRight")
        assert times(page) == [0.063] * 4 or times(page) == [0.062] * 4
        page.get_by_role("button", name="Play all").click()
        wait(page, "[...document.querySelectorAll('video')].every(video => video.currentTime > 0.3)")


def test_two_are_compared(quick_run: Place, tmp_path: Path) -> None:
    """Both move together, and so does the difference."""
    done = copied(quick_run, tmp_path / "here")
    other = tmp_path / "here" / "other.mp4"
    assert done.run("--seed", "7", "-o", other)[0] == 0
    assert done.call("diff", done.video, other, "--report", tmp_path / "both.html")[0] == 0
    with opened(tmp_path / "both.html") as page:
        page.keyboard.press("Shift+ArrowRight")
        wait(page, "[...document.querySelectorAll('video')].every(video => video.currentTime === 1)")
        assert "seed" in page.locator("#differs ~ .scroll").inner_text()


def test_the_demos_report_is_sound_and_can_be_looked_at(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its three chunks and two prompts stand on the time line; narrow it can be read too."""
    shots = Path(os.environ.get("S2VFLOW_SHOTS", tmp_path)).absolute()
    monkeypatch.chdir(RECIPES.parent)
    where = ["--output-dir", tmp_path / "out", "--cache-dir", tmp_path / "cache", "--models-dir", tiny_models]
    if shots == tmp_path:
        where += ["--set", "width=64", "--set", "height=64", "--set", "steps=2"]
    code, out, err = call("run", "recipes/demo.yaml", "--report", *where)
    assert code == 0, err
    report = Path(out.splitlines()[-1])
    with opened(report) as page:
        assert page.locator(".timeline .seam").count() == 2
        assert page.locator(".timeline").text_content().count("She ") >= 2
        page.keyboard.press("Shift+ArrowRight")
        times(page)
        page.set_viewport_size({"width": 1180, "height": 1280})
        page.wait_for_timeout(1000)  # the player's controls and its picture
        page.screenshot(path=shots / "report.jpg", quality=80)
        page.set_viewport_size({"width": 400, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
