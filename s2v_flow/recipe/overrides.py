"""Changes from outside the layers (`--set`, `--set-json`, `--set-file`, `--unset`, a matrix), applied one by one.

Nothing is ever added that the schema or the recipe does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic.fields import FieldInfo

from s2v_flow.errors import Origin
from s2v_flow.graph.node import Node
from s2v_flow.graph.ports import FieldPath
from s2v_flow.recipe.argument import Argument, FaultyOverrideError, Step, faulty, read_value
from s2v_flow.recipe.fields import Accepts, field_at
from s2v_flow.recipe.layers import Body
from s2v_flow.recipe.params import param_takes
from s2v_flow.recipe.problems import Problems
from s2v_flow.recipe.tree import Entry, ListValue, MapValue, Scalar, Tree, kind_of, tree_at
from s2v_flow.wording import did_you_mean, listed, nearest, shortened


def apply_overrides(
    body: Body,
    arguments: Iterable[Argument],
    recipe_params: MapValue,
    kinds: Mapping[str, type[Node]],
    problems: Problems,
) -> Body:
    """Apply changes in order, later ones over earlier ones. Faulty ones are collected and left out.

    `recipe_params`: the parameters without profiles and override files: what "unset" goes back to.
    """
    for argument in arguments:
        try:
            body = _Change(argument, recipe_params, kinds, problems).apply(body)
        except FaultyOverrideError:
            continue
    return body


@dataclass(frozen=True)
class _Trail:
    """The way to a value: what it passes, each with the step taken there, and the value, if there is one."""

    passed: tuple[tuple[Tree, str | int, Origin], ...]
    value: Tree | None

    @property
    def path(self) -> FieldPath:
        return tuple(step for _, step, _ in self.passed)

    def exchanged(self, value: Tree | None) -> Tree:
        """Return the tree at the trail's start with another value at its end, or with None without that."""
        for parent, step, origin in reversed(self.passed):
            value = _with_child(parent, step, value, origin)
        assert value is not None
        return value


@dataclass(frozen=True)
class _Change:
    """One change of a body."""

    argument: Argument
    recipe_params: MapValue
    kinds: Mapping[str, type[Node]]
    problems: Problems

    def apply(self, body: Body) -> Body:
        """Return the changed body.

        Raises:
            FaultyOverrideError: There is no such value, or it cannot become that.
        """
        first, *rest = self.argument.steps
        if first.text == "params" and rest and not rest[0].is_item:
            return replace(body, params=self._param(body, rest))
        if first.text == "nodes" and rest and not rest[0].is_item:
            return replace(body, nodes=self._field(body, rest))
        if first.text in body.params.entries:
            return replace(body, params=self._param(body, self.argument.steps))
        of_nodes = self._having(body, "seed").items() if self.argument.kind == "seed" else ()
        if seeded := [name for name, field in of_nodes if field.default is not None]:
            for name in seeded:
                steps = (Step("nodes", False, 0), Step(name, False, 0), *self.argument.steps)
                body = replace(self, argument=replace(self.argument, steps=steps)).apply(body)
            return body
        is_section = first.text in ("params", "nodes")
        if is_section:
            fix = did_you_mean("", [f"{first.text}.{name}" for name in getattr(body, first.text).entries])
        elif first.text in body.nodes.entries:
            fix = f"did you mean nodes.{self.path}?"
        else:
            match = nearest(first.text, body.params.entries)
            known = listed(body.params.entries)
            meant = [match] if match else [f"nodes.{name}.{first.text}" for name in self._having(body, first.text)]
            question = f"did you mean {' or '.join(meant)}? " if meant else ""
            fix = f"{question}parameters: {known or 'none'}; fields: nodes.NODE.FIELD"
        message = f"{self.path}: {'name a value in it' if is_section else 'there is no such parameter'}"
        raise self._faulty(message, first, fix)

    def _having(self, body: Body, wanted: str) -> dict[str, FieldInfo]:
        """Return a field of each node whose kind has it."""
        models = {name: self.kinds.get(kind_of(entry.value)) for name, entry in body.nodes.entries.items()}
        fields = {name: model.model_fields.get(wanted) for name, model in models.items() if model}
        return {name: field for name, field in fields.items() if field is not None}

    @property
    def path(self) -> str:
        return shortened(self.argument.path)

    def _faulty(self, message: str, step: Step, fix: str | None, code: str = "R051") -> FaultyOverrideError:
        return faulty(self.problems, code, message, self.argument.at(step), fix)

    def _param(self, body: Body, steps: Sequence[Step]) -> MapValue:
        name, *items = steps
        entry = body.params.entries.get(name.text)
        if entry is None:
            fix = did_you_mean(name.text, body.params.entries) or "the recipe has no params"
            raise self._faulty(f"there is no parameter {shortened(name.text)}", name, fix)
        trail = self._walk(entry.value, None, items)
        if self.argument.kind == "unset":
            if items:
                return body.params.with_entry(name.text, replace(entry, value=trail.exchanged(None)))
            before = self.recipe_params.entries.get(name.text)  # else only a profile or a file has it
            return body.params.with_entry(name.text, before) if before else body.params.without(name.text)
        takes = param_takes(name.text, entry.value, body, self.kinds)
        if items:
            takes = [use.item for use in takes if use.item is not None]
        value = trail.exchanged(read_value(self.argument, takes, self.problems))
        return body.params.with_entry(name.text, replace(entry, value=value))

    def _field(self, body: Body, steps: Sequence[Step]) -> MapValue:
        name, *fields = steps
        entry = body.nodes.entries.get(name.text)
        if entry is None:
            fix = did_you_mean(name.text, body.nodes.entries, "nodes") or "the recipe has no nodes"
            raise self._faulty(f"there is no node {shortened(name.text)}", name, fix)
        model = self.kinds.get(kind_of(entry.value))
        if model is None:  # the recipe is wrong, which is said elsewhere
            raise FaultyOverrideError
        is_unset = self.argument.kind == "unset"
        if not fields or fields[0].text == "kind":
            what = "a node as a whole" if not fields else "the kind of a node"
            fix = f"{'unset' if is_unset else 'set'} one of its fields: {listed(model.model_fields)}"
            fix += "" if is_unset else "; or use an override file (-f)"
            raise self._faulty(f"{what} cannot be {'unset' if is_unset else 'set'}", (fields or [name])[0], fix)
        trail = self._walk(entry.value, model, fields)
        if is_unset:
            self._check_optional(model, trail.path, fields[-1])
            value = trail.exchanged(None)
        else:
            taken = field_at(model, trail.path)
            takes: list[Accepts] = [taken] if taken is not None else []
            value = trail.exchanged(read_value(self.argument, takes, self.problems))
        return body.nodes.with_entry(name.text, replace(entry, value=value))

    def _check_optional(self, model: type[Node], path: FieldPath, step: Step) -> None:
        """Refuse to remove a field that has no default; items of lists can always go."""
        around = field_at(model, path[:-1]) if isinstance(path[-1], str) else None
        if around is not None and around.model is not None and around.model.model_fields[step.text].is_required():
            message = f"{self.path}: this is required and has no default"
            raise self._faulty(message, step, "set it to another value", code="R053")

    def _walk(self, tree: Tree, model: type[Node] | None, steps: Sequence[Step]) -> _Trail:
        """Follow the path from a node, by its schema, or from a parameter, which has none."""
        passed: list[tuple[Tree, str | int, Origin]] = []
        here: Tree | None = tree
        for step in steps:
            key: str | int = self._item_index(here, step) if step.is_item else step.text
            if not step.is_item:
                self._check_field(here, model, [taken for _, taken, _ in passed], step)
            assert here is not None
            passed.append((here, key, self.argument.at(step)))
            here = tree_at(here, (key,))
        return _Trail(tuple(passed), here)

    def _check_field(
        self, tree: Tree | None, model: type[Node] | None, walked: Sequence[str | int], step: Step
    ) -> None:
        """Refuse a field that the schema does not have, or whose surroundings are not in the recipe."""
        around = field_at(model, tuple(walked)) if model is not None else None
        if around is None or around.model is None:
            message = f"{self.path}: there are no fields here, so no {shortened(step.text)}"
            fix = "an item of a list is named by its id: loras[lightning].strength" if around and around.item else None
            raise self._faulty(message, step, fix)
        if step.text not in around.model.model_fields:
            fix = did_you_mean(step.text, around.model.model_fields)
            raise self._faulty(f"there is no field {shortened(step.text)}", step, fix)
        if not isinstance(tree, MapValue):
            raise self._faulty(f"{self.path}: the recipe has no map here", step, "set the whole value")

    def _item_index(self, tree: Tree | None, step: Step) -> int:
        """Return the index of a list's item by its id, or by its position from 0."""
        if not isinstance(tree, ListValue):
            raise self._faulty(f"{self.path}: the recipe has no list here", step, "set the whole value")
        ids: list[str] = []
        for index, item in enumerate(tree.items):
            name = item.get("id") if isinstance(item, MapValue) else None
            ids.append(str(name.value) if isinstance(name, Scalar) else str(index))
        if step.text in ids:
            return ids.index(step.text)
        if step.text.isdecimal() and len(step.text) < 6 and int(step.text) < len(ids):
            return int(step.text)
        fix = did_you_mean(step.text, ids) or "the list is empty"
        raise self._faulty(f"there is no item {shortened(step.text)}", step, fix)


def _with_child(tree: Tree, key: str | int, value: Tree | None, origin: Origin) -> Tree:
    if isinstance(key, int):
        assert isinstance(tree, ListValue)
        items = () if value is None else (value,)
        return replace(tree, items=(*tree.items[:key], *items, *tree.items[key + 1 :]))
    assert isinstance(tree, MapValue)
    return tree.without(key) if value is None else tree.with_entry(key, Entry(origin, value))
