"""What a video says of itself: always the same for the same recipe, and enough to make it again."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from recipes_for_tests import call, options, without_notes, write_recipe
from runs_for_tests import QUICK, Place, copied, ran

from s2v_flow import __version__, api
from s2v_flow.cache.store import Store
from s2v_flow.errors import MediaError
from s2v_flow.media.video import VideoReader
from s2v_flow.runs.essence import MAX_NOTE_BYTES, note_box, note_of, read_essence, read_note
from s2v_flow.runs.manifest import Essence, EssenceNode


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, quick_run: Place) -> Place:
    return copied(quick_run, tmp_path_factory.mktemp("essence"))


def film_of(done: Place) -> bytes:
    """The film as it is stored, without what stands behind it in the file."""
    manifest = json.loads(done.manifests()[0].read_text())
    (film,) = (node["outputs"]["file"] for node in manifest["nodes"] if node["name"] == "video")
    (stored,) = done.cache.glob(f"objects/??/{film}.mp4")
    return stored.read_bytes()


def test_the_file_is_the_stored_film_with_a_note_behind_it(done: Place) -> None:
    note, content, film = read_note(done.video), done.video.read_bytes(), film_of(done)
    assert note is not None
    assert content.startswith(film)
    assert len(note_box(note)) < len(content) - len(film) < 64_000  # with ComfyUI's workflow
    assert content.endswith(note)
    with VideoReader(done.video) as reader:
        assert len(reader) == 20


def test_it_says_what_it_was_made_of(done: Place) -> None:
    essence = read_essence(done.video)
    assert (essence.node, essence.device, essence.frames) == ("video", "cpu", 20)
    assert essence.software["s2vflow"] == [__version__]
    assert len(essence.software["torch"]) == 1
    assert {item.name for item in essence.files if item.role == "model"} >= {"tiny_s2v.safetensors"}
    assert all(item.sha256 and len(item.sha256) == 64 for item in essence.files)
    assert list(essence.nodes) == ["positive", "speech", "reference", "first", "talk[1]", "talk[2]", "video"]
    manifest = json.loads(done.manifests()[0].read_text())
    fingerprints = {node["name"]: node["fingerprint"] for node in manifest["nodes"]}
    assert {name: node.fingerprint for name, node in essence.nodes.items()}.items() <= fingerprints.items()
    assert essence.frames_sha256 == manifest["outputs"][0]["frames_sha256"]


def test_comfyui_finds_the_workflow_where_it_looks(done: Place) -> None:
    """In the named keys of the first `udta` of the file, in both formats; a recipe that it cannot run has none."""
    content = done.video.read_bytes()
    start = content.index(b"udta", len(film_of(done))) - 4
    keys = content.index(b"keys", start)
    assert content[keys + 4 : keys + 12] == struct.pack(">II", 0, 2)
    assert content[keys + 16 : keys + 36] == b"mdtaworkflow" + struct.pack(">I", 14) + b"mdta"
    assert content[keys + 36 : keys + 42] == b"prompt"
    texts = [content[item + 12 :] for item in _data_boxes(content, keys)][:2]
    workflow, prompt = (json.JSONDecoder().raw_decode(text.decode("utf-8", "replace"))[0] for text in texts)
    assert "WanSoundImageToVideo" in {node["type"] for node in workflow["nodes"]}
    assert "WanSoundImageToVideo" in {node["class_type"] for node in prompt.values()}


def _data_boxes(content: bytes, start: int) -> Iterator[int]:
    while (start := content.find(b"data" + struct.pack(">II", 1, 0), start + 1)) > 0:
        yield start


def test_it_says_nothing_of_the_run(done: Place) -> None:
    note = (read_note(done.video) or b"").decode()
    assert done.manifests()[0].parent.name not in note
    assert str(done.folder) not in note
    assert str(done.cache) not in note


@pytest.mark.slow
def test_a_second_run_leaves_the_file_alone_and_imports_no_torch(done: Place) -> None:
    before = done.video.stat().st_mtime_ns, done.video.read_bytes()
    code = (
        "import sys; from s2v_flow.cli import main as cli; sys.argv[0] = 's2vflow'\n"
        "try: cli.main()\n"
        "finally: print('torch' in sys.modules, 'numpy' in sys.modules and 'safetensors' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "run", str(done.recipe), *done.where]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1] == "False False"
    assert without_notes(result.stderr).endswith(f"recipe: video: {done.video} is up to date\n")
    assert (done.video.stat().st_mtime_ns, done.video.read_bytes()) == before


@pytest.mark.slow
def test_the_same_recipe_elsewhere_gives_the_same_file(done: Place, tmp_path: Path, tiny_models: Path) -> None:
    """Another folder, another cache, everything computed anew: bit for bit the same, note included."""
    other = ran(tmp_path, tiny_models)
    assert other.video.read_bytes() == done.video.read_bytes()


def test_a_file_without_its_note_is_mended(done: Place) -> None:
    content = done.video.read_bytes()
    done.video.write_bytes(film_of(done))
    assert done.run()[0] == 0
    assert done.video.read_bytes() == content


def test_what_writes_other_files_is_left_out(done: Place, tmp_path: Path) -> None:
    """So that a further output changes nothing about the video."""
    other = copied(done, tmp_path)
    other.video.unlink()
    write_recipe(tmp_path, {**QUICK, "more": {"kind": "save_latent", "latent": "$talk", "file": "out/more.latent"}})
    assert other.run()[0] == 0
    assert (tmp_path / "out" / "more.latent").is_file()
    assert other.video.read_bytes() == done.video.read_bytes()


@pytest.mark.slow
def test_a_cell_of_a_matrix_says_the_same_as_the_recipe_alone(done: Place, tmp_path: Path) -> None:
    chosen = [*done.where, "--set", "nodes.video.crf=25"]
    code, out, err = call("run", done.recipe, *chosen, "-m", "nodes.first.seed=20,21", "--json")
    assert code == 0, err
    cell = Path(json.loads(out)["outputs"]["seed=20/video"][0])
    manifest = json.loads((done.cache / "runs" / json.loads(out)["run"] / "manifest.json").read_text())
    assert manifest["cells"] == ["seed=20", "seed=21"]
    assert manifest["given"]["overrides"] == ["-m nodes.first.seed=20,21", "--set nodes.video.crf=25"]
    assert call("run", done.recipe, *chosen, "--output-dir", tmp_path)[0] == 0
    assert cell.read_bytes() == (tmp_path / "out" / "talk.mp4").read_bytes()


def test_a_file_that_says_nothing_is_refused_with_the_reason(done: Place, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    film.write_bytes(film_of(done))
    with pytest.raises(MediaError, match="does not say how it was made"):
        read_essence(film)
    film.write_bytes(film.read_bytes() + note_box(b'{"essence": 2}'))
    with pytest.raises(MediaError, match="its note cannot be read"):
        read_essence(film)


def test_a_note_holds_names_that_are_no_utf_8_and_no_count_that_is_none(done: Place, tmp_path: Path) -> None:
    """Such a folder's name, as Python escapes it; a size that no disk has."""
    film, note = tmp_path / "film.mp4", json.loads(read_note(done.video) or b"")
    note["files"][0]["name"] = "\udcff.safetensors"
    film.write_bytes(film_of(done) + note_box(json.dumps(note).encode()))
    assert read_essence(film).files[0].name == "\udcff.safetensors"
    note["files"][0]["size"] = 10**400
    film.write_bytes(film_of(done) + note_box(json.dumps(note).encode()))
    assert call("show", film)[0] == 4


def test_a_note_of_a_very_long_video_does_without_its_nodes() -> None:
    node = EssenceNode(kind="extend", fingerprint="a" * 64, outputs={"latent": "b" * 64})
    essence = Essence(
        essence=1,
        node="video",
        recipe="s2vflow: 1\n",
        files=[],
        device="cpu",
        software={},
        nodes={f"talk[{index}]": node for index in range(30_000)},
        frames_sha256="c" * 64,
    )
    note = note_of(essence)
    assert len(note) <= MAX_NOTE_BYTES
    assert Essence.model_validate_json(note) == essence.model_copy(update={"nodes": {}})


def test_what_computed_a_result_stays_with_it(done: Place, tiny_models: Path) -> None:
    """A newer s2vflow that finds everything stored must not claim to have made it."""
    chosen = options(done.folder, tiny_models)
    result = api.run(done.recipe, chosen)
    entries = Store(chosen.cache_root).recent(100)
    assert all(entry.facts["s2vflow"] == __version__ for entry in entries)
    assert all(entry.facts["torch"] for entry in result.entries.values())
