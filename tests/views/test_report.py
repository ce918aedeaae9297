"""Reports as files: what stands in them, that they hold together without a network, and what they leave alone."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image
from recipes_for_tests import call
from runs_for_tests import Place, copied, place

from s2v_flow.media.writer import VideoWriter
from s2v_flow.runs.manifest import NodeRecord
from s2v_flow.views.film import cues_of, film_of, graph_of
from s2v_flow.views.report import MAX_BYTES, cell_of


class Page(HTMLParser):
    """A page's elements, as (name, attributes), and its text by element."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.source = path, path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.inside: list[str] = []
        self.texts: dict[str, str] = {}
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in set(self.inside):
            self.texts[tag] = self.texts.get(tag, "") + data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def videos(self) -> list[Path]:
        return [(self.path.parent / unquote(item["src"])).resolve() for item in self.all("video")]


@pytest.fixture(scope="module")
def page(quick_run: Place, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of a run of three chunks."""
    target = tmp_path_factory.mktemp("report") / "report.html"
    code, out, err = quick_run.call("report", "last", "-o", target)
    assert (code, out) == (0, f"{target}\n"), err
    return Page(target)


def change_manifest(of: Place, change: Callable[[dict[str, Any]], None]) -> None:
    (path,) = of.manifests()
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_a_report_loads_nothing_but_the_video_beside_it(page: Page, quick_run: Place) -> None:
    """Every address is inside the page, or the video's; styles and scripts are those that the policy has digests of."""
    (policy,) = [item["content"] for item in page.all("meta") if "http-equiv" in item]
    assert policy.startswith("default-src 'none'; ")
    for kind in ("style", "script"):
        (block,) = re.findall(f"<{kind}>(.*?)</{kind}>", page.source, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    given = [item for _, item in page.elements]
    addresses = [item[name] for item in given for name in ("src", "href", "poster") if name in item]
    assert sorted({address.partition(":")[0] for address in addresses if ":" in address}) == ["data"]
    assert not [name for item in given for name in item if name.startswith("on") or name == "style"]
    assert page.videos == [quick_run.video.resolve()]
    assert len(page.source) < MAX_BYTES / 50


def test_a_report_of_a_run_says_what_was_done(page: Page) -> None:
    """Chunks are marked in time and folded in the graph; every kind that was computed has its time and memory."""
    lines = [item for item in page.all("path") if item.get("class") == "seam"]
    assert len(lines) == 2
    assert {item["class"] for item in page.all("path")} >= {"wave", "loud", "mouth", "seam", "cursor", "edge"}
    assert "talk × 2" in page.texts["text"]
    for kind in ("encode_text", "sample", "extend", "save_video"):
        assert kind in page.texts["table"]
    assert "Drift since the start" in page.texts["caption"]
    assert "kind: extend" in page.texts["pre"]
    assert "Since the run before" not in page.texts["h2"]


def test_a_report_of_a_video_says_what_the_video_says(quick_run: Place, tmp_path: Path) -> None:
    """Without the run: no times; and with --embed the picture and the sound are inside."""
    code, _, err = call("report", quick_run.video, "-o", tmp_path / "one.html", "--embed", "--cache-dir", tmp_path)
    assert code == 0, err
    page = Page(tmp_path / "one.html")
    assert page.all("video")[0]["src"].startswith("data:video/mp4;base64,")
    assert "Time and memory" not in page.texts["h2"]
    assert "talk" in page.texts["text"]
    assert len([item for item in page.all("path") if item.get("class") == "seam"]) == 2


def test_the_strip_of_a_video_of_few_frames_has_no_holes(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 64, 64) as writer:
        writer.write(np.full((2, 64, 64, 3), 200, np.uint8))
    strip = film_of(tmp_path / "a.mp4", "a").strip.partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(strip))) as picture:
        assert np.asarray(picture).min() > 150


def test_what_a_recipe_says_is_text(quick_run: Place, tmp_path: Path) -> None:
    """Nothing of it becomes an element of the page."""
    done, evil = copied(quick_run, tmp_path / "here"), "</code><script>alert(1)</script>\"'"

    def change(manifest: dict[str, Any]) -> None:
        manifest["recipe"]["text"] = manifest["recipe"]["path"] = evil
        manifest["recipe"]["values"] |= {"nodes.talk.timeline[0].at": 0.5, "nodes.talk.timeline[0].prompt": evil}
        manifest["given"]["overrides"] = [evil]

    change_manifest(done, change)
    assert done.call("report", "last", "-o", done.video.with_suffix(".html"))[0] == 0
    page = Page(done.video.with_suffix(".html"))
    assert len(page.all("script")) == 1
    assert page.texts["pre"] == evil
    assert evil[:40] in page.texts["text"] or evil[:30] in page.texts["text"]


def test_a_value_that_no_run_writes_is_left_out(quick_run: Place, tmp_path: Path) -> None:
    """A time that is no number, a LoRA that changes nothing, a home of nobody; a name that is no UTF-8 is shown."""
    done = copied(quick_run, tmp_path / os.fsdecode(b"here \xff"))

    def change(manifest: dict[str, Any]) -> None:
        manifest["recipe"]["values"] |= {f"nodes.talk.timeline[{at!r}].at": at for at in ("soon", [], {}, 0.5)}
        manifest["recipe"]["path"], manifest["error"] = "~nobody-of-this-name/recipe.yaml", "no such file: \udcff"
        manifest["loras"] = [{"node": "first", "id": "a", "matched": 0, "total": 2, "blocks": {"0": 0}}]

    change_manifest(done, change)
    target = done.video.with_suffix(".html")
    for subject in ("last", done.video):
        code, _, err = done.call("report", subject, "-o", target)
        assert code == 0, err
    (shown,) = Page(target).all("video")
    assert shown["src"] == "talk.mp4"


def test_a_file_that_is_no_report_stays(quick_run: Place, tmp_path: Path) -> None:
    """And a report is replaced."""
    target = tmp_path / "notes.html"
    target.write_text("my notes")
    code, _, err = quick_run.call("report", "last", "-o", target)
    assert (code, target.read_text()) == (2, "my notes")
    assert f"{target} is there already, and is no report" in err
    target.unlink()
    assert quick_run.call("report", "last", "-o", target)[0] == quick_run.call("report", "last", "-o", target)[0] == 0


def test_a_video_that_is_gone_comes_out_of_the_cache(quick_run: Place, tmp_path: Path) -> None:
    """Beside the page; and where the cache has lost it too, it is said where it was looked for."""
    done = copied(quick_run, tmp_path / "here")
    change_manifest(done, lambda manifest: manifest["recipe"].update(path=str(done.recipe)))
    content = done.video.read_bytes()
    done.video.unlink()
    target = tmp_path / "page" / "report.html"
    assert done.call("report", "last", "-o", target)[0] == 0
    (video,) = Page(target).videos
    assert video.parent == target.parent.resolve()
    assert content.startswith(video.read_bytes())
    for item in done.cache.glob("objects/*/*.mp4"):
        item.unlink()
    video.unlink()
    code, _, err = done.call("report", "last", "-o", target)
    assert code == 4
    assert "nor in the cache" in err
    assert str(done.video) in err


def test_a_comparison_shows_both_and_what_differs(quick_run: Place, tmp_path: Path) -> None:
    target, video = tmp_path / "both.html", quick_run.video
    code, out, err = quick_run.call("diff", video, video, "--report", target)
    assert (code, "the same" in out, f"the report is {target}" in err) == (0, True, True)
    page = Page(target)
    assert len(page.all("video")) == 4  # both, and both again for the difference
    assert "Nothing differs." in page.texts["dd"]


def test_without_jinja2_nothing_is_begun(tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    made = place(tmp_path, tiny_models)
    code, _, err = made.run("--report")
    assert (code, made.cache.exists() and made.manifests()) == (4, [] if made.cache.exists() else False)
    assert "fix: pip install 's2vflow[report]'" in err


@pytest.mark.slow
def test_a_run_gives_a_first_look_and_a_report(tmp_path: Path, tiny_models: Path) -> None:
    """The look's chunk is the whole's, which finds it stored; they are one run, with pictures of all chunks."""
    made = place(tmp_path, tiny_models)
    code, out, err = made.run("--first-look", "--report", "--events", tmp_path / "events.jsonl")
    assert code == 0, err
    names = ["talk.first.mp4", "talk.mp4", "talk.html"]
    assert out.splitlines() == [str(made.video.with_name(name)) for name in names]
    (manifest,) = made.manifests()
    states = {node["name"]: node["status"] for node in json.loads(manifest.read_text())["nodes"]}
    assert (states["first"], states["talk[1]"]) == ("stored", "computed")
    assert len(list(manifest.parent.glob("*.jpg"))) == 6
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert {line["run"] for line in lines} == {manifest.parent.name}
    assert [line["type"] for line in lines].count("run_finished") == 1
    assert Page(made.video.with_suffix(".html")).videos == [made.video.resolve()]


def test_chunks_and_cells_are_one_box() -> None:
    values = {
        "nodes.a.kind": "load_vae",
        "nodes.first.kind": "sample",
        "nodes.first.vae": "$a",
        "nodes.talk.kind": "extend",
        "nodes.talk.video": "$first",
        "nodes.talk.seed": [1, 2],
    }

    def record(name: str, kind: str, **more: Any) -> NodeRecord:
        return NodeRecord(name=name, kind=kind, status="computed", fingerprint=None, outputs={}, **more)

    cells = [record(f"seed={seed}/talk[{index}]", "extend", seconds=1.5) for seed in (1, 2) for index in (1, 2)]
    graph = graph_of(values, [*cells, record("talk.positive[1]", "encode_text", seconds=9.0)])
    (box,) = [box for box in graph.boxes if box.name == "talk"]
    assert (box.num_nodes, box.time, len(graph.edges)) == (4, "6.0 s", 2)
    assert [box.x for box in graph.boxes] == sorted(box.x for box in graph.boxes)


def test_labels_and_cues_are_taken_apart() -> None:
    assert cell_of("seed=1,prompt=a, b=c/video") == ("seed=1", "prompt=a, b=c")
    assert cell_of("steps=2,nodes.talk.seed=3/video") == ("steps=2", "nodes.talk.seed=3")
    assert cell_of("video") == ()
    values = {
        "nodes.talk.timeline[0].at": 4.0,
        "nodes.talk.timeline[0].cfg": 2.0,
        "nodes.talk.timeline[1].at": 2.5,
        "nodes.talk.timeline[1].prompt": "She smiles.",
        "nodes.talk.timeline[1].seed": None,
    }
    assert cues_of(values) == [(2.5, "She smiles."), (4.0, "cfg 2.0")]
