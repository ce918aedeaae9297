"""`--set PATH=VALUE`: one value changed from the command line, read as its place in the schema takes it, never guessed.

PATH is `nodes.NODE.FIELD`, with `[id]` or `[0]` for an item of a list and further fields after a dot; `params.NAME`; or
`NAME` alone for a parameter. Nothing is ever added that the schema or the recipe does not know.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from s2v_flow.diagnostics import did_you_mean, listed, nearest, shortened, shown
from s2v_flow.graph.node import NAME, Node
from s2v_flow.recipe.fields import Accepts, field_at
from s2v_flow.recipe.params import whole_reference
from s2v_flow.recipe.problems import Problems, StopReadingError
from s2v_flow.recipe.reader import FORBIDDEN, Source, read_yaml
from s2v_flow.recipe.scalars import read_scalar
from s2v_flow.recipe.sections import Body
from s2v_flow.recipe.tree import Entry, ListValue, MapValue, Origin, Scalar, ScalarValue, Tree

_PART = re.compile(rf"(?P<name>{NAME})(?P<items>(?:\[[A-Za-z0-9_-]+\])*)(?P<dot>\.|$)")
_ITEM = re.compile(r"\[([A-Za-z0-9_-]+)\]")


class _FaultyOverrideError(Exception):
    """An override cannot be applied; its message has been collected."""


@dataclass(frozen=True)
class _Step:
    """One step of a path: a key, or an item of a list, and where it stands in the argument."""

    text: str
    is_item: bool
    start: int


@dataclass(frozen=True)
class _Override:
    """One `--set` argument."""

    source: Source
    steps: tuple[_Step, ...]
    path: str
    value: str

    def at(self, step: _Step) -> Origin:
        return self.source.origin(0, step.start, len(step.text))

    @property
    def value_origin(self) -> Origin:
        return self.source.origin(0, len(self.path) + 1, len(self.value))


def apply_overrides(
    body: Body, sets: Sequence[str], kinds: Mapping[str, type[Node]], base_dir: Path, problems: Problems
) -> Body:
    """Apply the `--set` arguments in order, later ones over earlier ones. Faulty ones are collected and left out."""
    for number, argument in enumerate(sets, start=1):
        source = Source("--set", base_dir, tuple(argument.splitlines()) or ("",), line=number)
        try:
            override = _parse(argument, source, problems)
            body = _apply(body, override, kinds, problems)
        except _FaultyOverrideError:
            continue
    return body


def _parse(argument: str, source: Source, problems: Problems) -> _Override:
    forbidden = FORBIDDEN.search(argument)
    if forbidden is not None:
        message = f"the character U+{ord(forbidden[0]):04X} may not stand in a recipe"
        raise _faulty(problems, "R003", message, source.origin(0, forbidden.start()))
    path, equals, value = argument.partition("=")
    if not equals:
        origin = source.origin(0, 0, len(argument))
        fix = "write PATH=VALUE, like steps=20 or nodes.first.cfg=6"
        raise _faulty(problems, "R050", f"'{shortened(argument)}' has no = in it", origin, fix)
    steps: list[_Step] = []
    position = 0
    while position < len(path):
        match = _PART.match(path, position)
        if match is None or (match.end() == len(path) and match["dot"]):
            break
        steps.append(_Step(match["name"], False, position))
        items = _ITEM.finditer(path, match.start("items"), match.end("items"))
        steps += [_Step(item[1], True, item.start(1)) for item in items]
        position = match.end()
    if position < len(path) or not steps:
        fix = "a path is written like steps, params.steps, nodes.first.steps or nodes.dit.loras[lightning].strength"
        origin = source.origin(0, position, len(path) - position)
        raise _faulty(problems, "R050", f"'{shortened(path)}' is no path", origin, fix)
    return _Override(source, tuple(steps), path, value)


def _apply(body: Body, override: _Override, kinds: Mapping[str, type[Node]], problems: Problems) -> Body:
    first, *rest = override.steps
    if first.text == "params" and rest and not rest[0].is_item:
        return replace(body, params=_set_param(body, override, rest, kinds, problems))
    if first.text == "nodes" and rest and not rest[0].is_item:
        return replace(body, nodes=_set_field(body, override, rest, kinds, problems))
    if first.text in body.params.entries:
        return replace(body, params=_set_param(body, override, list(override.steps), kinds, problems))
    if first.text in ("params", "nodes"):
        fix = did_you_mean("", [f"{first.text}.{name}" for name in getattr(body, first.text).entries])
    elif first.text in body.nodes.entries:
        fix = f"did you mean nodes.{shortened(override.path)}?"
    else:
        match = nearest(first.text, body.params.entries)
        known = listed(body.params.entries)
        fix = f"{f'did you mean {match}? ' if match else ''}parameters: {known or 'none'}; fields: nodes.NODE.FIELD"
    is_section = first.text in ("params", "nodes")
    message = f"{shortened(override.path)}: {'name a value in it' if is_section else 'there is no such parameter'}"
    raise _faulty(problems, "R051", message, override.at(first), fix)


def _set_param(
    body: Body, override: _Override, steps: Sequence[_Step], kinds: Mapping[str, type[Node]], problems: Problems
) -> MapValue:
    name, *items = steps
    entry = body.params.entries.get(name.text)
    if entry is None:
        fix = did_you_mean(name.text, body.params.entries) or "the recipe has no params"
        raise _faulty(problems, "R051", f"there is no parameter {shortened(name.text)}", override.at(name), fix)
    takes = _param_takes(name.text, entry.value, body, kinds)
    if items:
        takes = [use.item for use in takes if use.item is not None]
    value = _change(entry.value, None, items, override, takes, problems)
    return body.params.with_entry(name.text, replace(entry, value=value))


def _set_field(
    body: Body, override: _Override, steps: Sequence[_Step], kinds: Mapping[str, type[Node]], problems: Problems
) -> MapValue:
    name, *fields = steps
    entry = body.nodes.entries.get(name.text)
    if entry is None:
        fix = did_you_mean(name.text, body.nodes.entries, "nodes") or "the recipe has no nodes"
        raise _faulty(problems, "R051", f"there is no node {shortened(name.text)}", override.at(name), fix)
    kind = entry.value.get("kind") if isinstance(entry.value, MapValue) else None
    model = kinds.get(str(kind.value)) if isinstance(kind, Scalar) else None
    if model is None:  # the recipe is wrong, which is said elsewhere
        raise _FaultyOverrideError
    if not fields or fields[0].text == "kind":
        what = "a node as a whole" if not fields else "the kind of a node"
        fix = f"set one of its fields: {listed(model.model_fields)}; or use an override file (-f)"
        raise _faulty(problems, "R051", f"{what} cannot be set", override.at((fields or [name])[0]), fix)
    value = _change(entry.value, model, fields, override, [], problems)
    return body.nodes.with_entry(name.text, replace(entry, value=value))


def _change(
    tree: Tree | None,
    model: type[Node] | None,
    steps: Sequence[_Step],
    override: _Override,
    takes: Sequence[Accepts],
    problems: Problems,
) -> Tree:
    """Return the tree with the value at `steps` exchanged.

    `model` is the schema; in params there is none, and `takes` says what the value may be.
    """
    walked: list[str | int] = []
    trail: list[tuple[Tree, str | int, Origin]] = []
    for step in steps:
        key: str | int = _item_index(tree, step, override, problems) if step.is_item else step.text
        if not step.is_item:
            _check_field(tree, model, walked, step, override, problems)
        assert tree is not None
        trail.append((tree, key, override.at(step)))
        walked.append(key)
        tree = _child(tree, key)
    if model is not None:
        taken = field_at(model, tuple(walked))
        takes = [taken] if taken is not None else []
    new = _read(override, takes, problems)
    for parent, key, origin in reversed(trail):
        new = _with_child(parent, key, new, origin)
    return new


def _check_field(
    tree: Tree | None,
    model: type[Node] | None,
    walked: list[str | int],
    step: _Step,
    override: _Override,
    problems: Problems,
) -> None:
    """Refuse a field that the schema does not have, or whose surroundings are not in the recipe."""
    around = field_at(model, tuple(walked)) if model is not None else None
    if around is None or around.model is None:
        message = f"{shortened(override.path)}: there are no fields here, so no {shortened(step.text)}"
        fix = "an item of a list is named by its id: loras[lightning].strength" if around and around.item else None
        raise _faulty(problems, "R051", message, override.at(step), fix)
    if step.text not in around.model.model_fields:
        fix = did_you_mean(step.text, around.model.model_fields)
        raise _faulty(problems, "R051", f"there is no field {shortened(step.text)}", override.at(step), fix)
    if not isinstance(tree, MapValue):
        message = f"{shortened(override.path)}: the recipe has no map here"
        raise _faulty(problems, "R051", message, override.at(step), "set the whole value")


def _item_index(tree: Tree | None, step: _Step, override: _Override, problems: Problems) -> int:
    """Return the index of a list's item by its id, or by its position from 0."""
    if not isinstance(tree, ListValue):
        message = f"{shortened(override.path)}: the recipe has no list here"
        raise _faulty(problems, "R051", message, override.at(step), "set the whole value")
    ids: list[str] = []
    for index, item in enumerate(tree.items):
        name = item.get("id") if isinstance(item, MapValue) else None
        ids.append(str(name.value) if isinstance(name, Scalar) else str(index))
    if step.text in ids:
        return ids.index(step.text)
    if step.text.isdecimal() and len(step.text) < 6 and int(step.text) < len(ids):
        return int(step.text)
    fix = did_you_mean(step.text, ids) or "the list is empty"
    raise _faulty(problems, "R051", f"there is no item {shortened(step.text)}", override.at(step), fix)


def _child(tree: Tree, key: str | int) -> Tree | None:
    if isinstance(key, int):
        assert isinstance(tree, ListValue)
        return tree.items[key]
    assert isinstance(tree, MapValue)
    return tree.get(key)


def _with_child(tree: Tree, key: str | int, value: Tree, origin: Origin) -> Tree:
    if isinstance(key, int):
        assert isinstance(tree, ListValue)
        return replace(tree, items=(*tree.items[:key], value, *tree.items[key + 1 :]))
    assert isinstance(tree, MapValue)
    return tree.with_entry(key, Entry(origin, value))


def _read(override: _Override, takes: Sequence[Accepts], problems: Problems) -> Tree:
    """Read the argument's value as something that all of `takes` accept."""
    text, origin = override.value, override.value_origin
    if "$params." in text or "${" in text:
        return Scalar(text, origin)  # a reference, as in a recipe; the field is checked once it is resolved
    if text.startswith("[") and all(use.has_list for use in takes):
        return _read_list(override, problems)
    for value in _readings(text):
        if all(use.takes(value) for use in takes):
            return Scalar(value, origin, is_quoted=True)
    if any(use.is_input for use in takes):
        return Scalar(text, origin)
    expected = " and ".join(dict.fromkeys(use.described() for use in takes))
    match = nearest(text, dict.fromkeys(word for use in takes for word in use.words))
    message = f"{shortened(override.path)}: expected {expected}, got {shown(text)}"
    fix = f"did you mean {match}?" if match else None
    if any(use.has_list for use in takes):
        fix = "write a list in brackets: [1, 2]"
    raise _faulty(problems, "R052", message, origin, fix)


def _readings(text: str) -> Iterator[ScalarValue]:
    """Yield what a text can be read as: the number, truth value or null that YAML makes of it, then the text itself."""
    try:
        value = read_scalar(text)
    except ValueError:
        value = text
    if not isinstance(value, str):
        yield value
    yield text


def _read_list(override: _Override, problems: Problems) -> Tree:
    source = replace(override.source, column=len(override.path) + 2)
    found = Problems()
    try:
        tree = read_yaml(override.value.encode(), source, found)
    except StopReadingError as error:
        raise _FaultyOverrideError from error
    finally:
        problems.extend(found)
    if not isinstance(tree, ListValue):
        raise _faulty(problems, "R052", "expected a list in brackets", override.value_origin, "write [1, 2]")
    return tree


def _param_takes(name: str, value: Tree, body: Body, kinds: Mapping[str, type[Node]]) -> list[Accepts]:
    """Return what a parameter may become: what all the fields take in which it is a whole value, and what it is now.

    The type that it has now decides alone where it is text that fields take as free text, and where no field uses it
    whole. A parameter that holds 6 and is used only where any number will do may become 4.5.
    """
    uses = list(_uses(name, body, kinds))
    scalars: frozenset[type] = frozenset()
    if isinstance(value, Scalar):
        scalars = frozenset({float, int} if isinstance(value.value, float) else {type(value.value)})
    own = Accepts(scalars, has_list=isinstance(value, ListValue), item=_item_type(value))
    is_text = isinstance(value, Scalar) and isinstance(value.value, str)
    if is_text and all(str in use.scalars for use in uses):
        return [own]
    if isinstance(value, Scalar) and value.value is None and not uses:
        return [Accepts(frozenset({str, type(None)}))]
    return uses or [own]


def _item_type(value: Tree) -> Accepts | None:
    if not isinstance(value, ListValue):
        return None
    types = {type(item.value) for item in value.items if isinstance(item, Scalar)}
    return Accepts(frozenset(types | ({int} if float in types else set())))


def _uses(name: str, body: Body, kinds: Mapping[str, type[Node]]) -> Iterator[Accepts]:
    """Yield what each field takes whose whole value is the parameter, directly or through other parameters."""
    aliases = {name}
    size = 0
    while len(aliases) > size:
        size = len(aliases)
        for other, entry in body.params.entries.items():
            whole = whole_reference(entry.value.value) if isinstance(entry.value, Scalar) else None
            if whole in aliases:
                aliases.add(other)
    for entry in body.nodes.entries.values():
        kind = entry.value.get("kind") if isinstance(entry.value, MapValue) else None
        model = kinds.get(str(kind.value)) if isinstance(kind, Scalar) else None
        if model is not None:
            for path in _paths_of(aliases, entry.value, ()):
                found = field_at(model, path)
                if found is not None:
                    yield found


def _paths_of(names: set[str], tree: Tree, path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    if isinstance(tree, MapValue):
        for key, entry in tree.entries.items():
            yield from _paths_of(names, entry.value, (*path, key))
    elif isinstance(tree, ListValue):
        for index, item in enumerate(tree.items):
            yield from _paths_of(names, item, (*path, index))
    elif whole_reference(tree.value) in names:
        yield path


def _faulty(
    problems: Problems, code: str, message: str, origin: Origin, fix: str | None = None
) -> _FaultyOverrideError:
    problems.add(code, message, origin, inside=None, fix=fix)
    return _FaultyOverrideError()
