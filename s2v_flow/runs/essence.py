"""The note inside a video: what it was made of. It says nothing of a run, so the same recipe gives the same bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from s2v_flow.cache.store import Entry
from s2v_flow.errors import MediaError
from s2v_flow.graph.node import Plan, PlanNode
from s2v_flow.media.provenance import MAX_NOTE_BYTES, note_box, read_note, tags_box
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
