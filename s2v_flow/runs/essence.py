"""The note inside a video: what it was made of. It says nothing of a run, so the same recipe gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from s2v_flow.cache.store import Entry
from s2v_flow.errors import MediaError
from s2v_flow.graph.plan import Plan, PlanNode
from s2v_flow.media.provenance import MAX_NOTE_BYTES, note_box, read_note
from s2v_flow.recipe.document import Recipe
from s2v_flow.runs.files import alone, ancestors, file_records, part_of
from s2v_flow.runs.manifest import Essence, EssenceNode, to_note
from s2v_flow.runs.values import home_hidden, written

SOFTWARE = ("s2vflow", "torch")  # the facts of a stored result that say what computed it


def essence_of(
    recipe: Recipe,
    plan: Plan,
    node: PlanNode,
    entries: Mapping[str, Entry],
    digest: Callable[[Path], str | None],
    device_class: str,
) -> Essence:
    """Return what a sink's result was made of.

    Args:
        recipe: The recipe.
        plan: Its plan.
        node: The sink in the plan.
        entries: The stored results by plan node.
        digest: sha256 of a file.
        device_class: "cpu", "cuda" or "mps".
    """
    parts = ancestors(plan, node.name)
    stored = {part.name: entries[part.name] for part in parts if part.name in entries}
    others = frozenset(_others(recipe, node))
    facts = stored[node.name].facts
    software = {
        name: sorted({str(entry.facts[name]) for entry in stored.values() if entry.facts.get(name)})
        for name in SOFTWARE
    }
    return Essence(
        essence=1,
        node=node.recipe_node,
        recipe=written(recipe, without=others)[0],
        files=file_records(parts, digest),
        device=device_class,
        software=software,
        nodes={alone(name): _essence_node(plan.node(name), entry) for name, entry in stored.items()},
        frames=facts.get("frames"),
        frames_sha256=facts.get("frames_sha256"),
    )


def note_maker(
    recipe_of: Callable[[str], Recipe],
    plan: Plan,
    digest: Callable[[Path], str | None],
    device_class: str,
    tags: Callable[[Recipe, Plan], Mapping[str, str]],
) -> Callable[[PlanNode, Mapping[str, Entry]], bytes]:
    """Return what gives a run its notes: the essence of a sink, as what stands behind an mp4.

    Args:
        recipe_of: The recipe that a plan node belongs to.
        plan: The plan.
        digest: sha256 of a file.
        device_class: "cpu", "cuda" or "mps".
        tags: Gives more texts by name, for a recipe and a plan of one output.
    """

    def note(node: PlanNode, entries: Mapping[str, Entry]) -> bytes:
        recipe = recipe_of(node.name)
        essence = note_of(essence_of(recipe, plan, node, entries, digest, device_class))
        nodes = {name: spec for name, spec in recipe.nodes.items() if name not in _others(recipe, node)}
        texts = tags(replace(recipe, nodes=nodes), part_of(plan, node.name))
        return note_box(essence, {name: home_hidden(text).encode() for name, text in texts.items()})

    return note


def _others(recipe: Recipe, node: PlanNode) -> set[str]:
    """Return the recipe's other sinks."""
    return {name for name, spec in recipe.nodes.items() if spec.node.is_sink and name != node.recipe_node}


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
        raise MediaError(
            f"{path} does not say how it was made",
            fix="only an mp4 as s2vflow wrote it does; tools that cut or recode it drop the note",
        )
    try:
        return Essence.model_validate_json(note)
    except ValidationError as error:
        raise MediaError(
            f"{path}: its note cannot be read: {error.error_count()} values are not as expected",
            fix="read it with the version of s2vflow that wrote it",
        ) from error


def _essence_node(node: PlanNode, entry: Entry) -> EssenceNode:
    outputs = {port: item.sha256 for port, item in entry.outputs.items()}
    return EssenceNode(kind=node.kind, fingerprint=entry.fingerprint, outputs=outputs)
