"""Where workflows hide: JSON files, PNG and WebP images, videos and sounds, ComfyUI's saved latents."""

from __future__ import annotations

import json
import os
import re
import shlex
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from s2v_flow.errors import ExitCode, MediaError, MissingError, RefusedError, S2VFlowError
from s2v_flow.recipe.species import similar_file

MAX_BYTES = 50 << 20
_MAX_DIGITS = 20  # 2**64 - 1, the largest seed, has as many
_NAMES = ("workflow", "prompt")  # the editor's format first: it has titles and notes
_PNG = b"\x89PNG\r\n\x1a\n"
_RECORDINGS = re.compile(  # how they begin, by FFmpeg's name of the format
    rb"(?P<mov>.{4}ftyp)|(?P<matroska>\x1aE\xdf\xa3)|(?P<flac>fLaC)|(?P<ogg>OggS)|(?P<mp3>ID3|\xff[\xfb\xf3\xf2])"
    rb"|(?P<wav>RIFF.{4}WAVE)",
    re.DOTALL,
)
_OURS = "essence"  # what the comment of a video of s2vflow's begins with
_FIX = (
    "give the JSON that ComfyUI saves (Workflow > Save or Export), or an image, video or sound with the workflow in it"
)


def read_workflow(path: Path) -> Any:
    """Return the workflow in a file, as JSON says it: the editor's format where there are both.

    Raises:
        MissingError: The file is not there or cannot be read.
        RefusedError: It is too large.
        S2VFlowError: There is no workflow in it.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(16)
            file.seek(0)
            texts = _texts(file, head, path)
    except (OSError, ValueError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        raise MissingError(f"{path}: cannot be read: {reason}", similar_file(path)) from error
    for name in _NAMES:
        if name in texts:
            return parse(texts[name], path)
    if _OURS in texts:
        fix = f"write it out: {shlex.join(['s2vflow', 'recipe', str(path), '-o', f'{path.stem}.yaml'])}"
        what = f"{path}: holds no ComfyUI workflow, but the recipe that s2vflow made it from"
        raise S2VFlowError(what, fix, exit_code=ExitCode.RECIPE)
    raise bad_file(path, "no workflow is in it")


def parse(text: str | bytes, path: Path) -> Any:
    """Parse JSON; NaN, which ComfyUI writes at times, becomes null, and what has more than 20 digits a float.

    Raises:
        S2VFlowError: It is not JSON, or nested too deep.
    """
    try:
        return json.loads(text, parse_constant=lambda name: None, parse_int=_number)
    except RecursionError:
        raise bad_file(path, "its JSON is nested too deep") from None
    except ValueError as error:  # also text that is not UTF-8, and numbers with thousands of digits
        raise bad_file(path, f"it is not JSON: {str(error)[:200]}") from error


def _number(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)


def bad_file(path: Path, reason: str) -> S2VFlowError:
    """Return the error of a file that holds no usable workflow."""
    return S2VFlowError(f"{path}: not a ComfyUI workflow: {reason}", _FIX, exit_code=ExitCode.RECIPE)


def _texts(file: BinaryIO, head: bytes, path: Path) -> Mapping[str, str | bytes]:
    if head.startswith(_PNG):
        return _wanted(_png_texts(file, path))
    if (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or head[:3] == b"\xff\xd8\xff":
        return _wanted(_exif_texts(file, path))
    if recording := _RECORDINGS.match(head):
        return _wanted(_recording_texts(file, recording.lastgroup, path))
    if head.startswith((b"PK", b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!")):
        raise bad_file(path, "it is an archive: unpack it, and give the workflow that is in it")
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < os.fstat(file.fileno()).st_size:
        return _wanted(_safetensors_texts(file, path))
    if os.fstat(file.fileno()).st_size > MAX_BYTES:
        raise _too_large(path)
    text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise _too_large(path)
    return {"workflow": text.removeprefix(b"\xef\xbb\xbf")}


def _wanted(pairs: Iterator[tuple[str, str]]) -> dict[str, str | bytes]:
    return {key.lower(): text for key, text in pairs if key.lower() in (*_NAMES, _OURS)}


def _too_large(path: Path) -> RefusedError:
    return RefusedError(f"{path}: a workflow may have {MAX_BYTES >> 20} MB, this is more", "workflows have kilobytes")


def _png_texts(file: BinaryIO, path: Path) -> Iterator[tuple[str, str]]:
    """Yield a PNG's text chunks; pixels are skipped."""
    file.seek(len(_PNG))
    while len(header := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", header)
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            file.seek(size + 4, os.SEEK_CUR)
            continue
        if size > MAX_BYTES:
            raise _too_large(path)
        data = file.read(size)
        file.seek(4, os.SEEK_CUR)
        key, _, rest = data.partition(b"\0")
        yield key.decode("latin-1"), _png_text(kind, rest, path)


def _png_text(kind: bytes, rest: bytes, path: Path) -> str:
    if kind == b"tEXt":
        return rest.decode("latin-1")
    if kind == b"zTXt":
        return _inflated(rest[1:], path).decode("latin-1")
    is_compressed, text = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    return (_inflated(text, path) if is_compressed else text).decode("utf-8", "replace")


def _inflated(data: bytes, path: Path) -> bytes:
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(data, MAX_BYTES)
    except zlib.error as error:
        raise bad_file(path, f"a damaged text chunk ({error})") from error
    if inflater.unconsumed_tail:
        raise _too_large(path)
    return text


def _exif_texts(file: BinaryIO, path: Path) -> Iterator[tuple[str, str]]:
    """Yield what ComfyUI puts into EXIF tags: `workflow:{...}` and `prompt:{...}`."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file, formats=("WEBP", "JPEG")) as image:
            values = [value for value in image.getexif().values() if isinstance(value, str)]
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise bad_file(path, f"a damaged image ({error})") from error
    for value in values:
        if len(value) > MAX_BYTES:
            raise _too_large(path)
        key, found, text = value.partition(":")
        if found:
            yield key, text


def _recording_texts(file: BinaryIO, form: str | None, path: Path) -> Iterator[tuple[str, str]]:
    """Yield the tags of a video or sound, in ogg a stream's; some nodes put a JSON object with both into a comment."""
    from s2v_flow.media.source import AV_ERRORS, open_container, tags_of

    try:
        with open_container(file, form, path) as container:  # nothing but this file is read
            tags = [pair for part in (container, *container.streams) for pair in tags_of(part)]
    except (MediaError, *AV_ERRORS) as error:
        raise bad_file(path, f"a damaged video or sound ({error.__cause__ or error})") from error
    for key, text in tags:
        if len(text) > MAX_BYTES:
            raise _too_large(path)
        yield key, text
        if key.lower() == "comment" and text.lstrip().startswith("{"):
            content = parse(text, path)
            for name in (*_NAMES, _OURS):
                inner = content.get(name) if isinstance(content, dict) else None
                if inner:
                    yield name, inner if isinstance(inner, str) else json.dumps(inner)


def _safetensors_texts(file: BinaryIO, path: Path) -> Iterator[tuple[str, str]]:
    (size,) = struct.unpack("<Q", file.read(8))
    if size > MAX_BYTES:
        raise _too_large(path)
    header = parse(file.read(size), path)
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    for key, text in metadata.items() if isinstance(metadata, dict) else ():
        if isinstance(text, str):
            yield key, text
