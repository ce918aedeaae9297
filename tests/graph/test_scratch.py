"""Where nodes write: in a private folder, never in the folder where somebody stands."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from toy import Join, Save, Text, Word, Workshop

from s2v_flow.errors import S2VFlowError
from s2v_flow.graph.node import Node
from s2v_flow.graph.ports import Ref

R = Ref.parse
NAMES = ("00000.safetensors", "waveform", "saved.txt")


class Segments(Node):
    """Writes files of the usual names."""

    kind: ClassVar[str] = "segments"
    outputs: ClassVar = {"text": "conditioning"}
    is_stored: ClassVar[bool] = True

    a: Text
    places: ClassVar[list[Path]] = []

    def run(self, context: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        folder = context.scratch
        assert folder == context.scratch
        self.places.append(folder)
        (folder / "waveform").write_bytes(b"noise")
        (folder / "00000.safetensors").write_bytes(inputs["a"].read())
        return {"text": folder / "00000.safetensors"}


def nodes(text: str = "w") -> dict[str, Node]:
    made = {"word": Word(text=text), "speech": Segments(a=R("$word")), "join": Join(a=R("$speech"))}
    return {**made, "save": Save(a=R("$join"), file="out/saved.txt")}


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """A cache folder that cannot be made, and a user who stands among files of their own."""
    (tmp_path / "cache").symlink_to("/dev/null/cache")
    for name in ("temporary", "here"):
        (tmp_path / name).mkdir()
    for name in NAMES:
        (tmp_path / "here" / name).write_text("mine")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "here")
    Segments.places.clear()
    return Workshop(tmp_path)


def mine(shop: Workshop) -> dict[str, str]:
    return {path.name: path.read_text() for path in (shop.folder / "here").iterdir()}


def test_without_a_cache_a_node_writes_into_a_private_temporary_folder(shop: Workshop) -> None:
    """Nobody else's files are written over, and none is left; two runs have two folders."""
    for text in ("w", "v"):
        shop.run(nodes(text))
        assert (shop.folder / "out/saved.txt").read_text() == text
    assert [place.parent for place in Segments.places] == [shop.folder / "temporary"] * 2
    assert len(set(Segments.places)) == 2
    assert mine(shop) == dict.fromkeys(NAMES, "mine")
    assert list((shop.folder / "temporary").iterdir()) == []


def test_without_any_place_a_node_that_writes_is_an_error(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/temporary")
    with pytest.raises(S2VFlowError, match="cannot write under /dev/null/temporary: Not a directory") as caught:
        shop.run(nodes())
    assert caught.value.inside == "nodes.speech (kind: segments)"
    assert mine(shop) == dict.fromkeys(NAMES, "mine")


def test_what_writes_no_files_needs_no_place(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a folder is made for it."""
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/temporary")
    only = {"word": Word(text="w"), "join": Join(a=R("$word")), "save": Save(a=R("$join"), file="out/saved.txt")}
    shop.run(only)
    assert (shop.folder / "out/saved.txt").read_text() == "w"
