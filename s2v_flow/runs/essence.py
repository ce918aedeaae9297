"""The note inside a video: what it was made of. It says nothing of a run, so the same recipe gives the same bytes.

It stands in boxes after an mp4's film, which players skip (ISO/IEC 14496-12, 4.2). A `uuid` box holds it byte for byte.
In a `udta` box it stands as the comment tag too, which FFmpeg reads and a remux keeps. ComfyUI's tags (workflow,
prompt) stand in one of their own: ComfyUI looks for named keys in the first `udta` of a file. FFmpeg reads them too,
where the film's own header has no named keys; a remux keeps them in Matroska, and in mp4 with
`-movflags use_metadata_tags`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from s2v_flow.cache.store import Entry
from s2v_flow.errors import MediaError
from s2v_flow.graph.node import Plan, PlanNode
from s2v_flow.recipe.config import portable_text
from s2v_flow.recipe.load import Recipe
from s2v_flow.runs.manifest import Essence, EssenceNode, FileRecord, from_text, to_note
from s2v_flow.runs.values import alone, file_records, home_hidden, part_of, without_nodes
from s2v_flow.wording import WARNING, shortened

SOFTWARE = ("s2vflow", "torch")  # the facts of a stored result that say what computed it


def essence_of(
    recipe: Recipe,
    plan: Plan,
    node: PlanNode,
    entries: Mapping[str, Entry],
    digest: Callable[[Path], str | None],
    device_class: str,
) -> Essence:
    """Return what a sink's result was made of; `device_class`: "cpu", "cuda" or "mps"."""
    parts = plan.made_of(node.name)
    stored = {part.name: entries[part.name] for part in parts if part.name in entries}
    facts = stored[node.name].facts
    software = {
        name: sorted({str(entry.facts[name]) for entry in stored.values() if entry.facts.get(name)})
        for name in SOFTWARE
    }
    return Essence(
        essence=1,
        node=node.recipe_node,
        recipe=home_hidden(portable_text(recipe)),
        files=file_records(parts, digest),
        device=device_class,
        software=software,
        nodes={
            alone(name): EssenceNode(
                kind=plan.node(name).kind, fingerprint=entry.fingerprint, outputs=entry.output_digests()
            )
            for name, entry in stored.items()
        },
        frames=facts.get("frames"),
        frames_sha256=facts.get("frames_sha256"),
        chunk_starts=node.facts.get("chunk_starts") or [],
    )


def note_maker(
    recipe_of: Callable[[str], Recipe],
    plan: Plan,
    digest: Callable[[Path], str | None],
    device_class: str,
    tags: Callable[[Recipe, Plan], Mapping[str, str]],
) -> Callable[[PlanNode, Mapping[str, Entry]], bytes]:
    """Return what gives a run its notes: the essence of a sink, as what stands behind an mp4.

    `recipe_of`: the recipe that a plan node belongs to; `tags`: more texts by name, for a recipe and a plan of one
    output.
    """

    def note(node: PlanNode, entries: Mapping[str, Entry]) -> bytes:
        whole = recipe_of(node.name)
        others = {name for name, spec in whole.nodes.items() if spec.node.is_sink and name != node.recipe_node}
        recipe = without_nodes(whole, others)
        essence = note_of(essence_of(recipe, plan, node, entries, digest, device_class))
        texts = tags(recipe, part_of(plan, node.name))
        return tags_box({name: home_hidden(text).encode() for name, text in texts.items()}) + note_box(essence)

    return note


def note_of(essence: Essence) -> bytes:
    """Return an essence as bytes that fit into a video: without its nodes where they are too many."""
    note = to_note(essence)
    return note if len(note) <= MAX_NOTE_BYTES else to_note(essence.model_copy(update={"nodes": {}}))


def read_essence(path: Path) -> Essence:
    """Return what a video says of itself.

    Raises:
        MediaError: It is no mp4, or says nothing, or says it in another version's words.
    """
    note = read_note(path)
    if note is None:
        fix = "only an mp4 as s2vflow wrote it does; tools that cut or recode it drop the note"
        raise MediaError(f"{path} does not say how it was made", fix)
    try:
        return from_text(Essence, note)
    except (ValueError, RecursionError) as error:
        text = f"{path}: its note cannot be read: it is damaged, or of another version of s2vflow"
        raise MediaError(text, fix="read it with the version of s2vflow that wrote it") from error


def essence_in(path: Path) -> Essence | None:
    """Return what a video says of itself; None where the file is no video, or one without a sound note."""
    with suppress(OSError, MediaError):
        with path.open("rb") as file:
            head = file.read(8)
        if head[4:8] == b"ftyp" or head.startswith(b"\x1aE\xdf\xa3"):
            return read_essence(path)
    return None


def likely_folders(video: Path, recipe: Recipe, node: str) -> list[Path]:
    """Return where the recipe's inputs may be: where the recipe stood if the video still does, beside it, and here.

    Raises:
        MediaError: The video's node does not stand in its recipe, or writes no file.
    """
    files = recipe.nodes[node].node.files() if node in recipe.nodes else ()
    text = next((text for _, mark, text in files if mark.role == "output"), None)
    if text is None:
        message = f"{video}: its note says that {shortened(node)} wrote it, which writes no file in the recipe there"
        raise MediaError(message, fix="use a video as s2vflow wrote it")
    file, folders, below = video.absolute(), [video.absolute().parent, Path.cwd()], Path(text).parent.parts
    is_there = (
        not os.path.isabs(os.path.expanduser(text)) and file.parts[:-1][len(file.parts) - 1 - len(below) :] == below
    )
    return [file.parents[len(below)], *folders] if is_there else folders


def changed_files(
    essence: Essence, plan: Plan, digest: Callable[[Path], str | None]
) -> list[tuple[FileRecord, FileRecord]]:
    """Return the models, then the inputs, that are not those that went into a video: what was, and what is there."""
    now = {item.at: item for item in file_records(plan.nodes, digest)}
    pairs = [(was, now[was.at]) for was in essence.files if was.at in now]
    pairs.sort(key=lambda pair: pair[0].role != "model")
    return [(was, item) for was, item in pairs if item.sha256 is not None and item.sha256 != was.sha256]


def video_notes(recipe: Recipe, plan: Plan, digest: Callable[[Path], str | None]) -> Iterator[str]:
    """Say where the paths of a recipe from a video start, and which of the video's files are others by now."""
    essence = None if recipe.folder is None else essence_in(recipe.path)
    if essence is not None:
        yield f"the recipe is the one inside {recipe.path}; its relative paths start at {recipe.folder}"
        for was, now in changed_files(essence, plan, digest):
            if was.name == now.name:
                yield f"{WARNING}{was.at}: {was.name} has changed since it went into {recipe.path.name}"


BOX_ID = bytes.fromhex("733276666c6f772d70726f762d303031")  # "s2vflow-prov-001"
MAX_NOTE_BYTES = 4 << 20
_BEGINNING = '{"essence":'
_MAX_BOXES = 10_000
_UTF8 = struct.pack(">II", 1, 0)  # the type of a tag's value, and its locale


def note_box(note: bytes) -> bytes:
    """Return the boxes that hold a note, UTF-8 text, to be put at an mp4's end.

    Raises:
        ValueError: The note is longer than `MAX_NOTE_BYTES`.
    """
    if len(note) > MAX_NOTE_BYTES:
        raise ValueError(f"a note is at most {MAX_NOTE_BYTES} bytes, got {len(note)}")
    comment = _box(b"ilst", _box(b"\xa9cmt", _box(b"data", _UTF8, note)))
    return _meta(b"mdir", b"appl", comment) + _box(b"uuid", BOX_ID, note)


def tags_box(tags: Mapping[str, bytes]) -> bytes:
    """Return the box of UTF-8 texts under names of one's own, to be put between the film and the note."""
    keys = (_box(b"mdta", name.encode()) for name in tags)
    values = (_box(struct.pack(">I", key), _box(b"data", _UTF8, text)) for key, text in enumerate(tags.values(), 1))
    named = _box(b"keys", struct.pack(">II", 0, len(tags)), *keys), _box(b"ilst", *values)
    return _meta(b"mdta", bytes(4), *named) if tags else b""


def _box(kind: bytes, *content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + sum(map(len, content)), kind) + b"".join(content)


def _meta(handler: bytes, maker: bytes, *content: bytes) -> bytes:
    return _box(b"udta", _box(b"meta", bytes(4), _box(b"hdlr", bytes(8), handler, maker, bytes(9)), *content))


def read_note(path: str | os.PathLike[str]) -> bytes | None:
    """Return the note inside an mp4, or in the comment tag of an mp4 or Matroska file; None where there is none.

    Raises:
        MediaError: The file cannot be read, or is no such file.
    """
    try:
        with Path(path).open("rb") as file:
            if file.read(4) == b"\x1aE\xdf\xa3":
                return _comment(file, "matroska", path)
            size = os.fstat(file.fileno()).st_size
            for kind, start, end in _boxes(file, size, path):
                if kind == b"uuid" and end - start >= 16:
                    file.seek(start)
                    if file.read(16) == BOX_ID and end - start - 16 <= MAX_NOTE_BYTES:
                        return file.read(end - start - 16)
            return _comment(file, "mov", path) if size else None
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}", "check the name and its permissions") from error


def _comment(file: BinaryIO, form: str, path: str | os.PathLike[str]) -> bytes | None:
    """Return a container's comment if it is a note, as a remux has left it."""
    from s2v_flow.media.source import open_container, tags_of

    file.seek(0)
    try:
        with open_container(file, form, path) as container:
            texts = [text for name, text in tags_of(container) if name.lower() == "comment"]
    except MediaError:
        return None
    notes = (text.encode() for text in texts if text.startswith(_BEGINNING) and len(text) <= MAX_NOTE_BYTES)
    return next(notes, None)


def _boxes(file: BinaryIO, size: int, path: str | os.PathLike[str]) -> Iterator[tuple[bytes, int, int]]:
    """Yield the top-level boxes: type, where the content begins, where it ends."""
    position = 0
    for count in range(_MAX_BOXES):
        if position == size:
            return
        file.seek(position)
        header = file.read(16)
        if len(header) < 8:
            break
        length, kind = struct.unpack(">I4s", header[:8])
        begin = 8
        if length == 1 and len(header) == 16:
            (length,), begin = struct.unpack(">Q", header[8:]), 16
        elif length == 0:
            length = size - position
        if (count == 0 and kind != b"ftyp") or length < begin or position + length > size:
            break
        yield kind, position + begin, position + length
        position += length
    raise MediaError(f"{path} is not a whole mp4 file", "copy or download it again")
