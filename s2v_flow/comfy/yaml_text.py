"""Recipes as YAML text: short nodes on one line, others as blocks, comments kept; always the same bytes."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from s2v_flow.comfy.finish import Reference, Sections
from s2v_flow.recipe.emit import scalar_text
from s2v_flow.recipe.reader import FORBIDDEN

_WIDTH = 120
_LONGEST_ALIGNED = 12  # longer names do not move the others to the right
_ESCAPED = re.compile(r"\$(?=\{|params\.)")


def recipe_text(sections: Sections, description: str, profiles: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a recipe's text."""
    lines = ["s2vflow: 1", f"description: {_scalar(description, in_flow=False)}", ""]
    if sections.params:
        lines += _comments(sections.remarks.get("params", []), "")
        lines += ["params:", *_block(sections.params, "  "), ""]
    lines += ["nodes:", *_nodes(sections)]
    if profiles:
        lines += ["", *_comments(sections.remarks.get("profiles", []), ""), "profiles:", *_block(profiles, "  ", {})]
    notes = sections.notes + ([] if profiles else sections.remarks.get("profiles", []))
    if notes:
        lines += ["", "# Notes from the workflow"]
        for note in notes:
            lines += ["#", *_comments([note], "")]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _nodes(sections: Sections) -> Iterator[str]:
    short = [name for name, node in sections.nodes.items() if len(name) <= _LONGEST_ALIGNED and _fits(name, node)]
    width = max((len(name) + 1 for name in short), default=0)
    for name, node in sections.nodes.items():
        yield from _comments(sections.remarks.get(name, []), "  ")
        flow = _flow(node)
        if _fits(name, node):
            yield f"  {name + ':':<{width}} {flow}"
        else:
            yield f"  {name}:"
            yield from _block(node, "    ")


def _fits(name: str, node: Mapping[str, Any]) -> bool:
    has_loras = any(isinstance(value, list) and value and isinstance(value[0], dict) for value in node.values())
    has_lines = any(isinstance(value, str) and "\n" in value for value in node.values())
    return not has_loras and not has_lines and max(len(name) + 1, 10) + len(_flow(node)) + 3 <= _WIDTH


def _comments(texts: list[str], indent: str) -> Iterator[str]:
    for text in texts:
        clean = re.sub(r"\n\s*\n\s*", "\n\n", FORBIDDEN.sub("", text))
        for line in clean.splitlines():
            parts = textwrap.wrap(line, _WIDTH - len(indent) - 2, break_long_words=False, break_on_hyphens=False)
            yield from (f"{indent}# {part}" for part in parts or [""])


def _block(values: Mapping[str, Any], indent: str, short: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Yield a map as a block. With `short`, maps inside that fit on a line are written in one."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value and (short is None or len(indent) + len(key) + len(_flow(value)) > 100):
            yield f"{indent}{key}:"
            yield from _block(value, indent + "  ", short)
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield f"{indent}{key}:"
            yield from _items(value, indent + "  ")
        elif isinstance(value, str) and _takes_lines(value):
            yield f"{indent}{key}: |-"
            yield from (f"{indent}  {line}" for line in _written(value).split("\n"))
        else:
            yield f"{indent}{key}: {_flow(value, in_flow=False)}"


def _items(items: list[Any], indent: str) -> Iterator[str]:
    for item in items:
        flow = _flow(item)
        if len(flow) + len(indent) + 2 <= _WIDTH:
            yield f"{indent}- {flow}"
        else:
            for number, line in enumerate(_block(item, "")):
                yield f"{indent}{'  ' if number else '- '}{line}"


def _takes_lines(text: str) -> bool:
    """Tell whether text of several lines can be written as a block, as it is."""
    clean = _written(text)
    lines = clean.split("\n")
    has_odd = any(character in clean for character in "\t\r\x85\xa0\u2028\u2029")
    return len(lines) > 1 and not has_odd and all(line == line.strip() for line in lines) and all((lines[0], lines[-1]))


def _flow(value: Any, *, in_flow: bool = True) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    return value.text if isinstance(value, Reference) else _scalar(value, in_flow=in_flow)


def _scalar(value: Any, *, in_flow: bool) -> str:
    return scalar_text(_written(value) if isinstance(value, str) else value, in_flow=in_flow)


def _written(text: str) -> str:
    """Return text with what a recipe may not hold left out, and `${` and `$params.` escaped."""
    return _ESCAPED.sub("$$", FORBIDDEN.sub("", text))
