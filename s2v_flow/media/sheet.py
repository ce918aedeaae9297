"""Several videos on a page, laid out in rows and columns: a contact sheet, and one video that shows them at once."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from s2v_flow.files.facts import file_digest
from s2v_flow.media.audio import Sound
from s2v_flow.media.source import AV_ERRORS
from s2v_flow.media.video import VideoReader
from s2v_flow.media.writer import VideoWriter, replacing

_FRAME_WIDTH = 240  # pixels of one picture on the contact sheet
_SHOWN_AT = (0.02, 0.35, 0.65, 0.98)  # where in a video the sheet's pictures are taken, as shares of the longest
_MAX_SIDE = 3840  # pixels of a page
_LINE_HEIGHT = 20
_GAP = 8  # pixels between the columns of a sheet
_FONT_SIZES = (14, 12, 10)
_RATE_HZ = 16  # at which the sheet counts frames
_MARK = "s2vflow-cells"  # the tag that says what a sheet or a film was made of


@dataclass(frozen=True)
class Tile:
    """A video's place on a page: the one or two lines that stand above it, and the file."""

    lines: tuple[str, ...]
    video: Path


Page = Sequence[Sequence[Tile | None]]  # rows of as many columns each; None leaves a hole


def contact_sheet(page: Page, target: str | os.PathLike[str], *, replaces: bool = True) -> None:
    """Write a PNG with pictures of every video: of the same times, which stand below; of a shorter one its last.

    Four of each; where there are more than four columns, two. Nothing is done where it was made of the same before.

    `target`: the PNG; written whole or not at all. `replaces`: another file is replaced, else TakenError raised.
    """
    identity = page_identity(page)
    if mark_of(Path(target)) == identity:
        return
    shares = _SHOWN_AT if len(page[0]) * len(_SHOWN_AT) * _FRAME_WIDTH <= _MAX_SIDE else _SHOWN_AT[1::2]
    with ExitStack() as stack:
        readers = [stack.enter_context(VideoReader(tile.video, _RATE_HZ)) for tile in _tiles(page)]
        longest = max(len(reader) for reader in readers)
        strips = [_strip(reader, [int(longest * share) for share in shares]) for reader in readers]
    sheet = _composed(page, _captions(page, len(shares) * _FRAME_WIDTH + _GAP), strips)
    mark = PngImagePlugin.PngInfo()
    mark.add_text(_MARK, identity)
    with replacing(Path(target), replaces) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG", pnginfo=mark)


def side_by_side(
    page: Page, target: str | os.PathLike[str], audio: Sound | None, fps: Fraction, *, replaces: bool = True
) -> None:
    """Write an mp4 that shows a page's videos at once, the time below; shorter ones stand still at their end.

    Nothing is done where it was made of the same before.

    `page`: at least one video; all are scaled to the first one's size, and down to a 4K picture together. The target is
    written whole or not at all; `replaces`: whether another file is replaced, or TakenError raised.
    """
    identity = page_identity(page)
    if mark_of(Path(target)) == identity:
        return
    with ExitStack() as stack:
        readers = [stack.enter_context(VideoReader(tile.video, fps)) for tile in _tiles(page)]
        first = readers[0].read(0, 1)[0]
        tall = first.shape[0] + 2 * _LINE_HEIGHT
        factor = min(1.0, _MAX_SIDE / (len(page[0]) * first.shape[1]), _MAX_SIDE / (len(page) * tall))
        width, height = (max(2, int(side * factor) // 2 * 2) for side in (first.shape[1], first.shape[0]))
        captions = _captions(page, width)
        across = captions[0].shape[1] * len(page[0])
        size = (across, len(page) * (captions[0].shape[0] + height) + _LINE_HEIGHT)
        given: dict[str, Any] = {"fps": fps, "audio": audio, "metadata": {_MARK: identity}, "replaces": replaces}
        writer = stack.enter_context(VideoWriter(target, *size, **given))
        for index, pictures in enumerate(_in_step(readers)):
            shown = _composed(page, captions, [_scaled(picture, width, height) for picture in pictures])
            time = _caption((_time_code(index / fps),), across, _FONT_SIZES[0])
            writer.write(np.concatenate([shown, time])[None])


def page_identity(page: Page) -> str:
    """Return a digest of the videos' bytes, of where they stand and of what is said about them."""
    shown = [[tile and (tile.lines, file_digest(tile.video)) for tile in row] for row in page]
    return hashlib.sha256(f"2 {shown!r}".encode()).hexdigest()


def mark_of(path: Path) -> str | None:
    """Return the identity of the page that a PNG or an mp4 of this module shows; None for any other file, or none."""
    found = None
    with suppress(OSError, ValueError, SyntaxError, *AV_ERRORS):
        if path.suffix == ".png":
            with Image.open(path) as picture:
                found = picture.info.get(_MARK)
        else:
            with av.open(os.path.abspath(path), format="mp4") as film:
                found = film.metadata.get(_MARK)
    return found


def _strip(reader: VideoReader, indices: Sequence[int]) -> NDArray[np.uint8]:
    """Return frames beside each other, each with its time below: uint8 [H + 20, n * 240, 3]."""
    parts = []
    for index in indices:
        at = min(index, len(reader) - 1)
        (frame,) = reader.read(at, 1)
        height = max(1, round(frame.shape[0] * _FRAME_WIDTH / frame.shape[1]))
        below = _caption((_time_code(Fraction(at, _RATE_HZ)),), _FRAME_WIDTH, _FONT_SIZES[1])
        parts.append(np.concatenate([_scaled(frame, _FRAME_WIDTH, height), below]))
    return np.concatenate(parts, 1)


def _time_code(seconds: Fraction) -> str:
    return f"{int(seconds // 60)}:{float(seconds % 60):05.2f}"


def _tiles(page: Page) -> list[Tile]:
    return [tile for row in page for tile in row if tile is not None]


def _composed(
    page: Page, captions: Sequence[NDArray[np.uint8]], pictures: Sequence[NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    """Put each tile's picture under its caption, all of which are as wide; holes are black."""
    left, width = iter(zip(captions, pictures, strict=True)), captions[0].shape[1]
    lines = []
    for row in page:
        columns = [() if tile is None else next(left) for tile in row]
        line = np.zeros((max(sum(map(len, column)) for column in columns), len(row) * width, 3), np.uint8)
        for index, column in enumerate(columns):
            top = 0
            for part in column:
                line[top : top + len(part), index * width : index * width + part.shape[1]] = part
                top += len(part)
        lines.append(line)
    return np.concatenate(lines)


def _captions(page: Page, width: int) -> list[NDArray[np.uint8]]:
    """Draw what stands above each tile, `width` pixels wide, or wider where the smallest letters need it."""
    lines = [line for tile in _tiles(page) for line in tile.lines]
    size = next((size for size in _FONT_SIZES if _width(lines, size) <= width), _FONT_SIZES[-1])
    wide, tall = max(width, _width(lines, size)), max(len(tile.lines) for tile in _tiles(page))
    return [_caption((*tile.lines, "")[:tall], wide, size) for tile in _tiles(page)]


def _width(lines: Sequence[str], size: int) -> int:
    """Return the even number of pixels that the longest line needs, margins included."""
    font = ImageFont.load_default(size)
    return (max(math.ceil(font.getlength(line)) for line in lines) + 13) // 2 * 2


def _caption(lines: Sequence[str], width: int, size: int) -> NDArray[np.uint8]:
    """Draw lines of text, light on dark: uint8 [20 * lines, width, 3]."""
    image = Image.new("RGB", (width, _LINE_HEIGHT * len(lines)), (24, 24, 24))
    for number, line in enumerate(lines):
        at, font = (6, number * _LINE_HEIGHT + 2), ImageFont.load_default(size)
        ImageDraw.Draw(image).text(at, line, fill=(240, 240, 240), font=font)
    return np.asarray(image)


def _in_step(readers: Sequence[VideoReader]) -> Iterator[list[NDArray[np.uint8]]]:
    """Yield one frame of every video at a time, to the end of the longest."""
    streams = [iter(reader) for reader in readers]
    last: list[NDArray[np.uint8] | None] = [None] * len(streams)
    for _ in range(max(len(reader) for reader in readers)):
        last = [next(stream, before) for stream, before in zip(streams, last, strict=True)]
        yield [picture for picture in last if picture is not None]


def _scaled(picture: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))
