"""Files given as a recipe that are none: recognised by content, with the command that helps."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from s2v_flow.wording import listed, nearest, path_slip, shortened

_FTYP = b"ftyp"
_WORKFLOW_KEYS = (b'"class_type"', b'"last_node_id"', b'"last_link_id"')
_TEXT_CHUNK = re.compile(rb"[tiz][TE]Xt(?:workflow|prompt)\0", re.IGNORECASE)
_OURS = b"s2vflow-prov-001"  # runs.essence.BOX_ID
_JSON_VERSION = re.compile(rb'"?s2vflow"?\s*:\s*\d')
_VERSION = re.compile(rb"^s2vflow[ \t]*:", re.MULTILINE)
_TEXT_ENCODINGS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Species:
    """What something is, in words that follow "this is", and what to do with it."""

    what: str
    fix: str


def place_species(path: Path, name: str) -> Species | None:
    """Return what a path is if it is a folder or an address on the web, else None. `name` is as the user wrote it."""
    if re.match(r"(?:https?|ftp|s3|gs|hf)://?", name, re.IGNORECASE) and not path.exists():
        return Species("an address", "recipes are read from files: download it, and name the file")
    if not os.path.isdir(path):
        return None
    quoted = shlex.quote(name)
    if (path / "manifest.json").is_file():
        fix = f"s2vflow show {quoted} prints it, s2vflow reproduce {quoted} runs it again"
        return Species("the folder of a run", fix)
    recipes = sorted([*path.glob("*.yaml"), *path.glob("*.yml")])[:3]
    if recipes:
        return Species("a folder", f"name the recipe in it: {', '.join(map(str, recipes))}")
    return Species("a folder", f"name a recipe; a models folder is given as --models-dir {quoted}")


def file_species(path: Path, name: str, data: bytes) -> Species | None:
    """Return what a file is that is no recipe, by its content; None where it may be one.

    `name`: as the user wrote it; `data`: all of it, or how it begins.
    """
    tail = b""
    with suppress(OSError), open(path, "rb") as file:  # where videos say how they were made
        if file.seek(0, os.SEEK_END) > len(data):
            file.seek(-len(data), os.SEEK_END)
            tail = file.read(len(data))
    return next(_species(shlex.quote(name), data, data + tail), None)


def similar_file(path: Path) -> str:
    """Return what to do about a file that is not there: a slip in its path, the file beside it that may be meant."""
    if slip := path_slip(str(path)):
        return slip
    if os.path.exists(home := os.path.expanduser(path)):
        name_a_file = "check its permissions" if os.path.isfile(path) else "name a file, no folder, pipe or device"
        return f"did you mean {home}?" if home != str(path) else name_a_file
    try:
        siblings = [entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml", path.suffix)]
    except (OSError, ValueError):
        return f"check the path: there is no folder {shortened(str(path.parent), 200)}"
    named = {Path(name).stem: name for name in siblings}  # not by the ending, which all of them share
    match = nearest(path.stem, named)
    if match is not None and named[match] != path.name:
        return f"did you mean {path.parent / named[match]}?"
    return f"check the path; there: {listed(sorted(siblings), 5)}" if siblings else "check the path"


def _species(name: str, head: bytes, all_of_it: bytes) -> Iterator[Species]:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    yield from _picture_or_film(name, head, all_of_it)
    yield from _sound(name, head)
    yield from _model(name, head)
    if text.startswith((b"{", b"[")) and not _JSON_VERSION.search(text):
        yield from _json(name, text)
    elif text[:200].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        yield Species("a web page", "what was downloaded is no file but a page about it, or a login: download it again")
    elif text.startswith(b"version https://git-lfs.github.com/spec/"):
        yield Species("a pointer of git LFS", "get the file itself: git lfs pull")
    elif text.startswith((b"base_path:", b"comfyui:")) and not _VERSION.search(text):
        yield Species("ComfyUI's list of model folders", f"give it as --extra-model-paths {name}")
    elif b"\0" in head[:1024] and b"\0" not in head[:2] and not head.startswith(_TEXT_ENCODINGS):  # else UTF-16
        yield Species("no text", "name a recipe: a YAML file")


def _picture_or_film(name: str, head: bytes, all_of_it: bytes) -> Iterator[Species]:
    is_film = head[4:8] == _FTYP or head.startswith(b"\x1aE\xdf\xa3")
    is_picture = head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8")) or (head[:4], head[8:12]) == (b"RIFF", b"WEBP")
    kind = "video" if is_film else "picture"
    if is_film and _OURS in all_of_it:
        fix = f"s2vflow recipe {name} prints the recipe that is in it, s2vflow reproduce {name} makes it again"
        yield Species("a video that s2vflow made", fix)
    elif (is_film or is_picture) and (_TEXT_CHUNK.search(all_of_it) or any(key in all_of_it for key in _WORKFLOW_KEYS)):
        yield Species(f"a {kind} with a ComfyUI workflow in it", f"s2vflow import {name} makes a recipe of that")
    elif is_picture:
        yield Species("a picture", f"s2vflow make {name} VOICE PROMPT makes a video of it")
    elif is_film:
        yield Species(
            "a video", f"name a recipe; s2vflow import {name} if ComfyUI made it, and left its workflow in it"
        )


def _sound(name: str, head: bytes) -> Iterator[Species]:
    is_wave = head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE"
    if is_wave or head.startswith((b"ID3", b"fLaC", b"OggS", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2", b"FORM")):
        yield Species("a sound", f"s2vflow make PORTRAIT {name} PROMPT makes a video with it")


def _model(name: str, head: bytes) -> Iterator[Species]:
    fix = "put it into a models folder, and name it as the checkpoint of a load node: --set nodes.NODE.checkpoint=FILE"
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        yield Species("a model file (safetensors)", fix)
    elif head.startswith(b"GGUF"):
        yield Species("a model file (GGUF)", fix)
    elif head.startswith((b"PK\x03\x04", b"\x80\x02")):
        convert = f"s2vflow models convert {name} -o NEW.safetensors, if it is a model"
        yield Species("a zip archive or a model of PyTorch's", convert)


def _json(name: str, text: bytes) -> Iterator[Species]:
    if any(key in text for key in _WORKFLOW_KEYS) or (re.search(rb'"nodes"\s*:\s*\[', text) and b'"links"' in text):
        what = f"a ComfyUI workflow: s2vflow import {name} makes a recipe of it"
        yield Species(what, "run that command; -o NAME.yaml writes the recipe into a file")
    elif re.search(rb'"manifest"\s*:\s*\d', text) and b'"recipe"' in text:
        fix = f"s2vflow reproduce {name} runs it again, s2vflow show {name} prints the recipe that is in it"
        yield Species("the manifest of a run", fix)
    elif b'"weight_map"' in text:
        yield Species("the index of a model in several files", "name the model's own file in a load node's checkpoint")
    elif re.match(rb'\{"type": "version", "events"', text):
        yield Species("the events of a run", "name the recipe, or a run: s2vflow show last")
