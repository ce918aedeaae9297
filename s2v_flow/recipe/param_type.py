"""What a parameter may become: its type is what it holds and where it is used, for it has no schema of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from s2v_flow.graph.node import Node
from s2v_flow.recipe.fields import Accepts, field_at
from s2v_flow.recipe.params import whole_reference
from s2v_flow.recipe.sections import Body
from s2v_flow.recipe.tree import ListValue, MapValue, Scalar, Tree


def param_takes(name: str, value: Tree, body: Body, kinds: Mapping[str, type[Node]]) -> list[Accepts]:
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
