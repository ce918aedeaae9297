"""Several videos on one page: a contact sheet, and one video that shows them side by side, each with its label."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from s2v_flow.files.facts import file_digest
from s2v_flow.media.audio import Sound
from s2v_flow.media.source import AV_ERRORS
from s2v_flow.media.video import VideoReader
from s2v_flow.media.writer import VideoWriter, replacing

_SHEET_WIDTH = 240  # pixels of one picture on the contact sheet
_SHOWN_AT = (0.02, 0.35, 0.65, 0.98)  # where in a video the sheet's pictures are taken, as shares of its length
_LABEL_HEIGHT = 24
_MAX_SIDE = 3840  # pixels of the side-by-side video
_MARK = "s2vflow-cells"  # the tag that says what a sheet or a film was made of


def contact_sheet(videos: Sequence[Path], labels: Sequence[str], target: str | os.PathLike[str]) -> None:
    """Write a PNG with a row for each video: its label, and four pictures from its beginning to its end.

    Nothing is done where it was made of the same before.

    Args:
        videos: At least one.
        labels: As many.
        target: The PNG; written whole or not at all.
    """
    identity = _identity(videos, labels)
    with suppress(OSError, ValueError, SyntaxError), Image.open(target) as old:
        if old.info.get(_MARK) == identity:
            return
    rows = []
    for video, label in zip(videos, labels, strict=True):
        with VideoReader(video) as reader:
            shown = [reader.read(int(len(reader) * share), 1) for share in _SHOWN_AT]
        height = max(1, round(shown[0].shape[1] * _SHEET_WIDTH / shown[0].shape[2]))
        pictures = [_scaled(frames[0], _SHEET_WIDTH, height) for frames in shown if len(frames)]
        rows.append(np.concatenate([_label(label, _SHEET_WIDTH * len(pictures)), np.concatenate(pictures, 1)]))
    width = max(row.shape[1] for row in rows)
    sheet = np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows])
    mark = PngImagePlugin.PngInfo()
    mark.add_text(_MARK, identity)
    with replacing(Path(target)) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG", pnginfo=mark)


def side_by_side(
    videos: Sequence[Path], labels: Sequence[str], target: str | os.PathLike[str], audio: Sound | None, fps: Fraction
) -> None:
    """Write an mp4 that shows videos in a grid, each under its label; shorter ones stand still at their end.

    Nothing is done where it was made of the same before.

    Args:
        videos: At least one; scaled to the first one's size, and down to a 4K picture together.
        labels: As many.
        target: The mp4; written whole or not at all.
        audio: The sound, or none.
        fps: Frames a second.
    """
    identity = _identity(videos, [*labels, str(fps), str(audio is not None)])
    with suppress(*AV_ERRORS), av.open(os.path.abspath(target), format="mp4") as old:
        if old.metadata.get(_MARK) == identity:
            return
    with ExitStack() as stack:
        readers = [stack.enter_context(VideoReader(video, fps)) for video in videos]
        columns = math.ceil(math.sqrt(len(readers)))
        rows = math.ceil(len(readers) / columns)
        first = readers[0].read(0, 1)[0]
        factor = min(1.0, _MAX_SIDE / (columns * first.shape[1]), _MAX_SIDE / (rows * (first.shape[0] + _LABEL_HEIGHT)))
        width, height = (max(2, int(side * factor) // 2 * 2) for side in (first.shape[1], first.shape[0]))
        captions = [_label(label, width) for label in labels]
        size = (columns * width, rows * (height + _LABEL_HEIGHT))
        writer = stack.enter_context(VideoWriter(target, *size, fps=fps, audio=audio, metadata={_MARK: identity}))
        for pictures in _in_step(readers):
            page = np.zeros((size[1], size[0], 3), np.uint8)
            for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
                top, left = index // columns * (height + _LABEL_HEIGHT), index % columns * width
                page[top : top + _LABEL_HEIGHT, left : left + width] = caption
                page[top + _LABEL_HEIGHT : top + _LABEL_HEIGHT + height, left : left + width] = _scaled(
                    picture, width, height
                )
            writer.write(page[None])


def _identity(videos: Sequence[Path], words: Sequence[str]) -> str:
    """Return a digest of the videos' bytes and of what is said about them."""
    digest = hashlib.sha256(repr(list(words)).encode())
    for video in videos:
        digest.update(file_digest(video).encode())
    return digest.hexdigest()


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


def _label(text: str, width: int) -> NDArray[np.uint8]:
    """Draw one line of text, light on dark: uint8 [24, width, 3]."""
    image = Image.new("RGB", (width, _LABEL_HEIGHT), (24, 24, 24))
    ImageDraw.Draw(image).text((6, 5), text, fill=(240, 240, 240), font=ImageFont.load_default())
    return np.asarray(image)
