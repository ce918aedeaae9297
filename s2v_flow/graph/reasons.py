"""Why a node must run: what differs from the nearest result that is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from s2v_flow.cache.store import Entry
from s2v_flow.wording import shown

NEVER = "never ran with these inputs and settings"
_SHOWN = 3


def explain(name: str, recipe_node: str, image: Mapping[str, Any], entries: Sequence[Entry]) -> str:
    """Say what differs from the nearest stored result of the same kind.

    Args:
        name: The plan node; among equally near results, its own earlier ones count first.
        recipe_node: The recipe's node, named in the text.
        image: The pre-image of its fingerprint.
        entries: Stored results, the newest first.

    Returns:
        Text like "nodes.first.steps: 4 -> 20".
    """
    best: list[str] | None = None
    for entry in sorted(entries, key=lambda entry: entry.facts.get("node") != name):
        if entry.preimage.get("kind") != image["kind"]:
            continue
        found = list(differences(entry.preimage, image, recipe_node))
        if found and (best is None or len(found) < len(best)):
            best = found
    if best is None:
        return NEVER
    more = f" and {len(best) - _SHOWN} more" if len(best) > _SHOWN else ""
    return "; ".join(best[:_SHOWN]) + more


def differences(old: Mapping[str, Any], new: Mapping[str, Any], recipe_node: str) -> Iterator[str]:
    """Yield each difference of two pre-images, in words."""
    found = list(_of_what_was_asked(old, new, recipe_node))
    yield from found
    if not found and old.get("degraded"):
        less = ", ".join(f"{key} {shown(value)}" for key, value in old["degraded"].items())
        yield f"its last result was made with less memory than it needs: {less}"


def _of_what_was_asked(old: Mapping[str, Any], new: Mapping[str, Any], recipe_node: str) -> Iterator[str]:
    if old.get("version") != new.get("version"):
        yield f"the kind {new['kind']} has changed in s2vflow (version {old.get('version')} -> {new.get('version')})"
    for section in ("numerics", "fields"):
        before, after = old.get(section, {}), new.get(section, {})
        where = f"nodes.{recipe_node}." if section == "fields" else ""
        yield from _changed(before, after, where)
    before, after = old.get("inputs", {}), new.get("inputs", {})
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield f"input {key} is {'new' if key not in before else 'gone' if key not in after else 'another'}"


def _changed(before: Any, after: Any, where: str) -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in [*after, *(key for key in before if key not in after)]:
            dot = "" if where.endswith(".") or not where else "."
            yield from _changed(before.get(key), after.get(key), f"{where}{dot}{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _changed(one, other, f"{where}[{index}]")
    elif before != after or type(before) is not type(after):
        if _is_digest(before) and _is_digest(after):
            yield f"{where}: another file"
        else:
            yield f"{where}: {shown(before)} -> {shown(after)}"


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and value.startswith("sha256:")
