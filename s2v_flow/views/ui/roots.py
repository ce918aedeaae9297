"""The files that the page may name: below a few folders, of a few kinds; and what is uploaded."""

from __future__ import annotations

import filecmp
import os
import re
from collections.abc import AsyncIterable, Mapping
from contextlib import suppress
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from s2v_flow.errors import MediaError, MissingError, RefusedError, S2VFlowError, UsageError
from s2v_flow.files.atomic import TakenError, finish, free_name, put_new, temporary, writing

RECIPES = (".yaml", ".yml")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
SOUNDS = (".wav", ".mp3", ".flac", ".ogg", ".m4a", ".opus")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm")
SHOWN = (*PICTURES, *SOUNDS, *VIDEOS, ".html")


class TooLargeError(RefusedError):
    """More bytes than may be sent."""


def file_below(roots: Mapping[str, Path], root: str, text: str, suffixes: tuple[str, ...]) -> Path:
    """Return the real path of a file by its path below a root; `roots`: the only folders that may be named, by name.

    Raises:
        RefusedError: It lies outside, also by way of `..` or a link, is hidden, or of another kind.
        MissingError: There is no such file.
    """
    base = Path(os.path.realpath(roots.get(root, os.devnull)))
    try:
        real = Path(os.path.realpath(base / text))
        inside = real.relative_to(base).parts
    except ValueError:  # elsewhere, or no path at all
        inside = ()
    if not inside or any(part.startswith(".") for part in inside) or real.suffix.lower() not in suffixes:
        raise RefusedError(f"{text}: the page gives out {', '.join(suffixes)} below {root} only")
    if not os.path.isfile(real):  # a name that is too long is no file
        raise MissingError(f"{text}: no such file below {root}")
    return real


async def save_upload(parts: AsyncIterable[bytes], name: str, folder: Path, limit: int, *, made_here: Path) -> Path:
    """Write what is sent to a new file, whole or not at all.

    Of the name that the sender gives, letters, digits, `-`, `_`, `.` and the suffix stay.

    Returns the file: the one that is there already, also in `made_here`, byte for byte; else a new one in `folder`,
    numbered where the name is taken.

    Raises:
        S2VFlowError: It is no picture, sound or video by its name, or cannot be read as what its name says.
        TooLargeError: It has more than `limit` bytes.
        CannotWriteError: It cannot be written.
    """
    suffix, size = Path(name).suffix.lower(), 0
    if suffix not in (*PICTURES, *SOUNDS, *VIDEOS):
        kinds = ", ".join((*PICTURES, *SOUNDS, *VIDEOS))
        raise UsageError(f"{name}: no portrait, voice or video", f"use one of {kinds}")
    stem = re.sub(r"[^\w.-]+", "_", Path(name).stem)[:80].strip("_.") or "file"
    with writing(folder), temporary(folder, suffix) as (file, made):
        async for part in parts:
            size += len(part)
            if size > limit:
                raise TooLargeError(f"{name}: more than {limit >> 20} MiB")
            file.write(part)
        finish(file)
        try:
            await run_in_threadpool(_check_media, made, suffix)
        except S2VFlowError as error:
            raise UsageError(error.message.replace(made, name), error.fix) from error
        path = made_here / f"{stem}{suffix}"
        while not _is_same(path, made):
            path = free_name(folder / path.name, lambda path: not os.path.lexists(path) or _is_same(path, made))
            with suppress(TakenError):  # just now: another name then
                put_new(made, path)
        return path


def _check_media(path: str, suffix: str) -> None:
    """Read a picture whole, of a sound the beginning, of a video what `probe_video` does; it may be a sound, too."""
    from s2v_flow.media.audio_blocks import decode_blocks
    from s2v_flow.media.image import probe_image
    from s2v_flow.media.video import probe_video

    if suffix in PICTURES:
        probe_image(path, decodes=True)
        return
    try:
        if suffix in VIDEOS:
            probe_video(path)
            return
    except MediaError as error:
        with suppress(MediaError):
            next(decode_blocks(path, lambda text: None))
            return
        raise error
    next(decode_blocks(path, lambda text: None))


def _is_same(path: Path, made: str) -> bool:
    return path.is_file() and filecmp.cmp(path, made, shallow=False)
