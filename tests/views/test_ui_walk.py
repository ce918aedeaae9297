"""A walk through the page in Chromium: drop files, plan, run, stop, go on, compare; accessible, with a clean console.

S2VFLOW_SCREENSHOTS=docs/images makes it walk through the demo in its own size, and leave pictures there.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from page_for_tests import Open, started
from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright
from recipes_for_tests import RECIPES
from runs_for_tests import Place, copied

from s2v_flow.graph import events

CHROMIUM = shutil.which("chromium")
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
SHOTS = os.environ.get("S2VFLOW_SCREENSHOTS")
SIZE = "128" if SHOTS else "64"
LONG_MS = 600_000
WIDE = {"width": 1280, "height": 900}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; Debian's package of that name has it"),
]


@contextmanager
def walking(opened: Open) -> Iterator[tuple[Page, list[str]]]:
    """Give the page in a browser, and what the console says; what is still there at the end is an error."""
    said: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*QUIET])
        page = browser.new_context(viewport=WIDE, color_scheme="light").new_page()
        page.set_default_timeout(60_000)
        page.context.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(opened.address)
        yield page, said
        browser.close()
    assert said == []


def shoot(what: Page | Locator, name: str) -> None:
    if SHOTS:
        picture = Image.open(io.BytesIO(what.screenshot()))
        picture.convert("RGB").quantize(256).save(Path(SHOTS) / f"{name}.png", optimize=True)


def becomes(page: Page, condition: str) -> None:
    """Wait until something holds; `wait_for_function` would need a policy that allows eval."""
    for _ in range(300):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(200)
    raise AssertionError(condition)


def is_accessible(page: Page) -> None:
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def drop(page: Page, *files: Path) -> None:
    """Drop files on the page, as a person does."""
    given = [[file.name, base64.b64encode(file.read_bytes()).decode()] for file in files]
    held = page.evaluate_handle(
        """(files) => files.reduce((held, [name, text]) => {
            held.items.add(new File([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], name));
            return held;
        }, new DataTransfer())""",
        given,
    )
    page.dispatch_event("main", "drop", {"dataTransfer": held})


def test_a_walk_from_a_portrait_to_two_videos_compared(tmp_path: Path, tiny_models: Path) -> None:
    """Everything is done with the page alone; the files that it leaves are looked at in between."""
    folder = tmp_path / "talks"
    folder.mkdir()
    text = (RECIPES / "demo.yaml").read_text(encoding="utf-8")
    (folder / "demo.yaml").write_text(text.replace("inputs/", "nothing-there/"), encoding="utf-8")
    with started(folder, S2VFLOW_MODELS_DIR=tiny_models) as (opened, _), walking(opened) as (page, said):
        expect(page.locator("#folder")).to_have_text("talks")
        assert "token" not in page.url
        expect(page.locator("#problem")).to_contain_text("missing: nothing-there/character.png")
        expect(page.get_by_role("button", name="Run", exact=True)).to_be_disabled()
        is_accessible(page)

        drop(page, RECIPES / "inputs" / "character.png", RECIPES / "inputs" / "speech.mp3")
        expect(page.get_by_role("img", name="The image")).to_have_attribute(
            "src", "/files/work/ui/inputs/character.png"
        )
        for name in ("width", "height"):
            page.get_by_label(name, exact=True).fill(SIZE)
        page.get_by_label("steps", exact=True).fill("0")
        expect(page.locator("#problem")).to_contain_text("steps")
        assert ["422" in line for line in said] == [True], "the browser notes each refused call by itself"
        said.clear()
        page.get_by_label("steps", exact=True).fill("40")  # there is to be time to stop it
        expect(page.locator("#problem")).to_be_hidden()
        expect(page.locator("#total")).to_contain_text("3 chunks · 11 to compute")
        page.get_by_text("Command and recipe").click()
        expect(page.locator("#command")).to_contain_text("s2vflow run ui/demo.yaml")
        page.get_by_text("Command and recipe").click()

        page.get_by_role("button", name="Run", exact=True).click()
        expect(page.locator("#step")).to_contain_text("step", timeout=LONG_MS)
        if hasattr(events, "Preview"):
            expect(page.locator("#preview")).to_be_visible(timeout=LONG_MS)
            becomes(page, "document.getElementById('preview').naturalWidth > 0")
        assert 0 < float(page.locator("#share").get_attribute("value") or 0) < 1
        page.evaluate("scrollTo(0, 0)")
        shoot(page, "ui")
        page.get_by_role("button", name="Stop: ").click()
        page.get_by_role("button", name="Go on: ").click(timeout=LONG_MS)
        expect(page.locator("#jobs .finished")).to_be_visible(timeout=LONG_MS)
        assert (folder / "ui" / "out" / "demo.mp4").is_file()
        assert (folder / "ui" / "demo.yaml").read_text().startswith("# s2vflow run ui/demo.yaml\n")

        page.get_by_text("Every other setting").click()
        page.get_by_text("video (save_video)").click()
        page.get_by_label("video.crf").fill("40")
        page.get_by_label("Name").fill("coarse")
        expect(page.locator("#total")).to_contain_text("1 to compute")
        page.get_by_role("button", name="Run", exact=True).click()
        expect(page.locator("#jobs .finished")).to_have_count(2, timeout=LONG_MS)
        expect(page.locator("#gallery video")).to_have_count(2)
        page.get_by_text("video (save_video)").click()
        page.get_by_text("Every other setting").click()

        for name in ("demo.mp4", "coarse.mp4"):
            page.locator("article", has=page.get_by_role("heading", name=name)).get_by_label("Compare").check()
        page.get_by_role("button", name="Compare two").click()
        expect(page.locator("#differences")).to_contain_text("nodes.video.crf", timeout=LONG_MS)
        becomes(page, "[...document.querySelectorAll('#sides video')].every((video) => video.readyState > 1)")
        page.get_by_label("Time in both videos").fill("0.5")
        becomes(page, "[...document.querySelectorAll('#sides video')].every((video) => video.currentTime > 2)")
        is_accessible(page)
        page.wait_for_timeout(500)
        shoot(page, "ui-compare")
        page.keyboard.press("Escape")
        expect(page.locator("#pair")).to_be_hidden()

        page.emulate_media(color_scheme="dark")
        is_accessible(page)
        shoot(page.locator("#videos"), "ui-videos")
        page.get_by_label("Search").fill("coarse")
        expect(page.locator("#gallery article")).to_have_count(1)
        page.get_by_role("button", name="Report of coarse.mp4").click()
        with page.expect_popup() as popup:
            page.get_by_role("link", name="Open the report").click(timeout=LONG_MS)
        expect(popup.value.locator("body")).to_contain_text("coarse")
        becomes(popup.value, "document.querySelector('video').readyState > 0")


def test_our_video_gives_its_recipe_and_the_keyboard_is_enough(quick_run: Place, tmp_path: Path) -> None:
    """The recipe in a dropped mp4 runs from here; focus is seen and goes through the page in its order."""
    place = copied(quick_run, tmp_path / "talks")
    with started(place.folder, S2VFLOW_MODELS_DIR=place.where[1]) as (opened, _), walking(opened) as (page, _):
        expect(page.locator("#source")).to_have_value("recipe.yaml")
        drop(page, place.video)
        expect(page.locator("#source")).to_have_value("ui/inputs/talk.mp4")
        expect(page.locator("#total")).to_contain_text("nothing to compute")
        page.get_by_role("link", name="Make").focus()
        reached = []
        while len(reached) < 40 and reached[-1:] != ["run"]:
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        assert reached[:3] == ["Queue", "Videos", "source"]
        assert reached[-2:] == ["name", "run"]
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        expect(page.locator("#jobs .finished")).to_be_visible(timeout=LONG_MS)
        assert (place.folder / "ui" / "out" / "talk.mp4").is_file()


def test_many_tabs_share_one_queue_and_a_double_click_runs_once(quick_run: Place, tmp_path: Path) -> None:
    """A browser has six connections to a server for all its tabs; a video goes on playing while the lists change."""
    place = copied(quick_run, tmp_path / "talks")
    with started(place.folder, S2VFLOW_MODELS_DIR=place.where[1]) as (opened, _), walking(opened) as (page, _):
        tabs = [page, *(page.context.new_page() for _ in range(6))]
        for tab in tabs[1:]:
            tab.goto(opened.address)
            expect(tab.locator("#total")).to_contain_text("compute", timeout=LONG_MS)
        last = tabs[-1]
        last.evaluate(
            """() => {
                window.video = document.querySelector("#gallery video");
                Object.assign(video, { muted: true, loop: true });
                return video.play();
            }"""
        )
        page.get_by_label("Name").fill("once")
        page.get_by_role("button", name="Run", exact=True).dblclick()
        expect(last.locator("#jobs .finished")).to_be_visible(timeout=LONG_MS)
        expect(last.locator("#gallery article")).to_have_count(2)
        assert last.evaluate("video.isConnected && !video.paused")
        expect(page.locator("#jobs li")).to_have_count(1)
        page.close()  # another tab listens for all now
        wishes = [{"source": "recipe.yaml", "name": "both", "values": {"nodes.video.crf": crf}} for crf in ("20", "21")]
        with ThreadPoolExecutor(2) as pool:
            made = pool.map(lambda wish: opened.json("/api/jobs", wish)["recipe"], wishes)
            assert sorted(made) == ["ui/both.2.yaml", "ui/both.yaml"]
        expect(last.locator("#jobs li")).to_have_count(3)
