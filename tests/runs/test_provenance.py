"""A note inside an mp4: it comes back, and nothing else minds it."""

from __future__ import annotations

import struct
from pathlib import Path

import av
import numpy as np
import pytest
from recipes_for_tests import remux

from s2v_flow.errors import MediaError
from s2v_flow.media.video import VideoReader
from s2v_flow.media.writer import VideoWriter
from s2v_flow.runs.essence import BOX_ID, MAX_NOTE_BYTES, note_box, read_note, tags_box

FTYP = struct.pack(">I4s", 16, b"ftyp") + b"isom\0\0\0\0"


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("film") / "a.mp4"
    with VideoWriter(path, 32, 32, preset="ultrafast") as writer:
        writer.write(np.arange(5, dtype=np.uint8)[:, None, None, None] * np.full((5, 32, 32, 3), 40, np.uint8))
    return path.read_bytes()


def written(folder: Path, content: bytes) -> Path:
    (folder / "b.mp4").write_bytes(content)
    return folder / "b.mp4"


@pytest.mark.parametrize("note", [b"", b"{}", '{"prompt": "中文"}'.encode(), bytes(range(256)) * 40])
def test_a_note_comes_back_as_it_was(tmp_path: Path, film: bytes, note: bytes) -> None:
    assert read_note(written(tmp_path, film + note_box(note))) == note


def test_a_film_with_a_note_plays_as_without(tmp_path: Path, film: bytes) -> None:
    with VideoReader(written(tmp_path, film)) as reader:
        before = reader.read(0, 9)
    with VideoReader(written(tmp_path, film + note_box(b"x" * 1000))) as reader:
        after = reader.read(0, 9)
    assert before.shape == (5, 32, 32, 3)
    assert (before == after).all()


def test_ffmpeg_reads_the_note_as_a_comment_and_a_remux_keeps_it(tmp_path: Path, film: bytes) -> None:
    """Whatever the length; into mp4 with either sort of tags, and into Matroska. The workflow needs named tags."""
    note = b'{"essence":1,"text":"' + b"x" * 100_000 + b'"}'
    source = written(tmp_path, film + tags_box({"workflow": b'{"nodes":[]}'}) + note_box(note))
    with av.open(str(source)) as container:
        assert container.metadata["comment"].encode() == note
        assert container.metadata["workflow"] == '{"nodes":[]}'
    for name, movflags in (("a.mp4", ""), ("b.mp4", "use_metadata_tags"), ("c.mkv", "")):
        target = tmp_path / name
        remux(source, target, **({"movflags": movflags} if movflags else {}))
        assert b"s2vflow-prov-001" not in target.read_bytes()
        assert read_note(target) == note
        with av.open(str(target)) as container:
            tags = {key.lower() for key in container.metadata}
        assert ("workflow" in tags) == (name != "a.mp4")


def test_a_comment_that_is_no_note_is_none(tmp_path: Path, film: bytes) -> None:
    box = note_box(b'{"other":1}')
    assert read_note(written(tmp_path, film + box[: box.index(b"uuid") - 4])) is None


def test_a_film_without_a_note_has_none(tmp_path: Path, film: bytes) -> None:
    assert read_note(written(tmp_path, film)) is None


def test_other_programs_boxes_are_passed_over(tmp_path: Path) -> None:
    foreign = struct.pack(">I4s", 24 + 3, b"uuid") + b"somebody-else-00" + b"abc"
    short = struct.pack(">I4s", 12, b"uuid") + b"abcd"
    assert read_note(written(tmp_path, FTYP + foreign + short + note_box(b"mine"))) == b"mine"


def test_boxes_with_long_sizes_and_without_a_size_are_read(tmp_path: Path) -> None:
    """A size of 1 means that 64 bits follow; of 0, that the box goes on to the file's end."""
    long = struct.pack(">I4sQ", 1, b"mdat", 16 + 5) + b"media"
    endless = struct.pack(">I4s16s", 0, b"uuid", BOX_ID) + b"to the end"
    assert read_note(written(tmp_path, FTYP + long + endless)) == b"to the end"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"RIFF",
        b"\x89PNG\r\n\x1a\n" + bytes(40),
        FTYP[:12],
        FTYP + b"\0\0",
        FTYP + struct.pack(">I4s", 100, b"mdat"),
        FTYP + struct.pack(">I4s", 4, b"mdat"),
        FTYP + struct.pack(">I4sQ", 1, b"mdat", 2**63),
        FTYP + struct.pack(">I4s", 8, b"free") * 10_001,
    ],
    ids=["empty", "riff", "png", "cut", "rest", "cut box", "size below a header", "size beyond", "too many boxes"],
)
def test_what_is_no_whole_mp4_is_refused(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path, content)
    if content:
        with pytest.raises(MediaError, match="is not a whole mp4"):
            read_note(path)
    else:
        assert read_note(path) is None


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"gone\.mp4 cannot be read"):
        read_note(tmp_path / "gone.mp4")


def test_a_note_that_is_too_long_is_neither_written_nor_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most"):
        note_box(bytes(MAX_NOTE_BYTES + 1))
    box = struct.pack(">I4s16s", 24 + MAX_NOTE_BYTES + 1, b"uuid", BOX_ID) + bytes(MAX_NOTE_BYTES + 1)
    assert read_note(written(tmp_path, FTYP + box)) is None
    assert read_note(written(tmp_path, FTYP + note_box(bytes(MAX_NOTE_BYTES)))) == bytes(MAX_NOTE_BYTES)
