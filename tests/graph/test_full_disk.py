"""A disk that is really full, or really limited, while a node writes its own files: a warning, or exit code 6."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
from faults_for_tests import forked, needs_small_disks, small_disk
from safetensors.numpy import save_file
from toy import Save, Text, Word, Workshop

from s2v_flow.errors import ExitCode, S2VFlowError
from s2v_flow.graph.events import Noted
from s2v_flow.graph.node import Node
from s2v_flow.graph.ports import FileField, Neutral, Ref

R = Ref.parse
SIZE = 200_000


def by_safetensors(path: Path) -> None:
    save_file({"x": np.zeros(SIZE, np.uint8)}, path)


def by_python(path: Path) -> None:
    with path.open("wb") as file:  # the error has no file's name
        file.write(bytes(SIZE))


def by_descriptor(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        for _ in range(SIZE // 1000):
            os.write(descriptor, bytes(1000))
    finally:
        os.close(descriptor)


def by_a_library(path: Path) -> None:
    try:
        by_python(path)
    except OSError as error:
        raise S2VFlowError(f"{path.name}: cannot be written", exit_code=ExitCode.DISK_FULL) from error


WRITERS = {writer.__name__: writer for writer in (by_safetensors, by_python, by_descriptor, by_a_library)}


class Segments(Node):
    """Writes a file of 200 kB into its scratch folder, though it is no sink."""

    kind: ClassVar[str] = "segments"
    outputs: ClassVar = {"text": "conditioning"}
    is_stored: ClassVar[bool] = True

    a: Text
    writer: str

    def run(self, context: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        path = context.scratch / "00000.safetensors"
        WRITERS[self.writer](path)
        return {"text": path}


class Film(Segments):
    """The same as a sink, which fails in no other place than its own."""

    kind: ClassVar[str] = "film"
    outputs: ClassVar = {}
    is_sink: ClassVar[bool] = True

    file: Annotated[str, FileField("output", "video"), Neutral()]

    def run(self, context: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"file": super().run(context, inputs)["text"]}


def segments(writer: str) -> dict[str, Node]:
    nodes = {"word": Word(text="w"), "speech": Segments(a=R("$word"), writer=writer)}
    return {**nodes, "save": Save(a=R("$speech"), file="out/saved.txt")}


def film(writer: str) -> dict[str, Node]:
    return {"word": Word(text="w"), "film": Film(a=R("$word"), writer=writer, file="out/saved.txt")}


def warned(shop: Workshop) -> list[str]:
    return [event.text for event in shop.events if isinstance(event, Noted) and event.is_warning]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    for name in ("cache", "temporary", "out"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return Workshop(tmp_path)


@needs_small_disks()
@pytest.mark.parametrize("nodes", [segments, film])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_cache_on_a_full_disk_costs_one_warning(
    writer: str, nodes: Callable[[str], dict[str, Node]], shop: Workshop
) -> None:
    """The files are written in another place, and are gone from it afterwards."""

    def run() -> None:
        small_disk(shop.folder / "cache")
        result = shop.run(nodes(writer))
        assert (shop.folder / "out/saved.txt").stat().st_size >= SIZE
        assert result.not_kept[0] in ("speech", "film")
        (text,) = warned(shop)
        assert f"the cache folder {shop.folder / 'cache'} cannot be written (no space left)" in text
        assert list((shop.folder / "temporary").iterdir()) == []
        assert [path.name for path in (shop.folder / "out").iterdir()] == ["saved.txt"]

    forked(run)


@needs_small_disks()
@pytest.mark.parametrize("nodes", [segments, film])
@pytest.mark.parametrize("writer", WRITERS)
def test_where_every_disk_is_full_a_run_ends_with_6_and_says_which_node(
    writer: str, nodes: Callable[[str], dict[str, Node]], shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file is left."""
    disk = shop.folder / "disk"
    disk.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    on_disk = Workshop(disk)

    def run() -> None:
        small_disk(disk)
        with pytest.raises(S2VFlowError, match="no space left while writing under") as caught:
            on_disk.run(nodes(writer))
        assert caught.value.exit_code == ExitCode.DISK_FULL
        assert caught.value.inside in ("nodes.speech (kind: segments)", "nodes.film (kind: film)")
        assert caught.value.place is not None
        assert caught.value.place.line == 2
        assert [path for path in disk.rglob("*") if path.is_file() and path.stat().st_size >= SIZE // 2] == [
            disk / "filler"
        ]

    forked(run)


@needs_small_disks()
def test_an_output_on_a_full_disk_ends_with_6_and_its_result_is_stored(shop: Workshop) -> None:
    """The next run has only to deliver it."""

    def run() -> None:
        small_disk(shop.folder / "out")
        with pytest.raises(S2VFlowError, match=r"no space left while writing under .*saved\.txt") as caught:
            shop.run(film("by_python"))
        assert caught.value.exit_code == ExitCode.DISK_FULL
        assert warned(shop) == []
        assert [path.name for path in (shop.folder / "out").iterdir()] == ["filler"]
        (shop.folder / "out/filler").unlink()
        assert shop.run(film("by_python")).computed == ()
        assert (shop.folder / "out/saved.txt").stat().st_size == SIZE

    forked(run)


@pytest.mark.parametrize("nodes", [segments, film])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_limit_on_files_is_an_error_that_says_how_to_lift_it(
    writer: str, nodes: Callable[[str], dict[str, Node]], shop: Workshop
) -> None:
    """A real one, which needs no rights: it holds in every place."""

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, SIZE // 2))
        with pytest.raises(S2VFlowError) as caught:
            shop.run(nodes(writer))
        text = f"{caught.value.message} {caught.value.fix}"
        assert writer == "by_a_library" or ("File too large" in text and "ulimit -f" in text), text
        assert caught.value.inside in ("nodes.speech (kind: segments)", "nodes.film (kind: film)")
        assert list((shop.folder / "temporary").iterdir()) == []

    forked(run)
