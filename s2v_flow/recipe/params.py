"""Parameters: `$params.x` as a whole value, `${params.x}` inside text. References only: no arithmetic, calls or code.

A text that holds neither `$params.` nor `${` is literal, whatever else is in it: `$5 coffee` stays as it is. To write
the two literally, double the dollar: `$${` and `$$params.`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from s2v_flow.errors import Origin
from s2v_flow.graph.node import Node
from s2v_flow.graph.ports import NAME, FieldPath
from s2v_flow.recipe.fields import Accepts, field_at
from s2v_flow.recipe.layers import Body
from s2v_flow.recipe.problems import Problems
from s2v_flow.recipe.tree import Entry, ListValue, MapValue, Scalar, Tree, children, kind_of, plain
from s2v_flow.wording import did_you_mean, nearest, shortened, shown


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
        model = kinds.get(kind_of(entry.value))
        if model is not None:
            for path in _paths_of(aliases, entry.value, ()):
                found = field_at(model, path)
                if found is not None:
                    yield found


def _paths_of(names: set[str], tree: Tree, path: FieldPath) -> Iterator[FieldPath]:
    if isinstance(tree, Scalar) and whole_reference(tree.value) in names:
        yield path
    for part, child in children(tree).items():
        yield from _paths_of(names, child, (*path, part))


MAX_DEPTH = 16
MAX_TEXT = 64_000
_MAX_EXPANDED = 1_000_000  # of all texts and lists together
_LIST_ITEM_WEIGHT = 16
_MEANS_MORE = re.compile(r"\$(?=\{|params\.)")
_WHOLE = re.compile(rf"\$params\.({NAME})")

_SPECIAL = re.compile(
    rf"(?P<escape>\$\$(?=\{{|params\.))|(?P<inside>\$\{{params\.(?P<name>{NAME})\}})|(?P<wrong>\$\{{[^}}]{{0,60}}\}}?|\$params\.[^\s]{{0,60}})"
)


def escaped(text: str) -> str:
    """Return a text as a recipe writes it: what looks like a reference is none."""
    return _MEANS_MORE.sub("$$", text)


def whole_reference(text: object) -> str | None:
    """Return the parameter's name where a value is `$params.name` and nothing else."""
    match = _WHOLE.fullmatch(text) if isinstance(text, str) else None
    return match[1] if match else None


@dataclass(frozen=True)
class _Resolved:
    tree: Tree | None  # None: something is wrong with it, and has been said
    depth: int


class Parameters:
    """Resolves references to the parameters of one recipe."""

    def __init__(self, params: MapValue, problems: Problems) -> None:
        self._params = params
        self._problems = problems
        self._resolved: dict[str, _Resolved] = {}
        self._expanded = 0

    def resolve_all(self) -> dict[str, Tree]:
        """Resolve every parameter, used or not, and return those that are right."""
        resolved = {name: self._resolve(name, ()) for name in self._params.entries}
        return {name: result.tree for name, result in resolved.items() if result.tree is not None}

    def substitute(self, tree: Tree, inside: str) -> Tree | None:
        """Return the value with its references replaced; a replaced value keeps the origin of the parameter.

        Returns None where a reference is wrong; the mistake has been collected then. `inside` names the value in
        messages.
        """
        return self._substitute(tree, inside, ()).tree

    def _resolve(self, name: str, stack: tuple[str, ...]) -> _Resolved:
        if name not in self._resolved:
            value = self._params.entries[name].value
            is_valid = self._is_valid(name, value)
            result = self._substitute(value, f"params.{name}", (*stack, name)) if is_valid else _Resolved(None, 0)
            if result.tree is not None and result.depth > MAX_DEPTH:
                origin = self._params.entries[name].value.origin
                message = f"{name}: parameters may refer to each other {MAX_DEPTH} deep, here it is more"
                self._problems.add("R033", message, origin, inside=f"params.{name}")
                result = _Resolved(None, 0)
            self._resolved.setdefault(name, result)
        return self._resolved[name]

    def _is_valid(self, name: str, value: Tree) -> bool:
        faulty: Tree | None = value if isinstance(value, MapValue) else None
        if isinstance(value, ListValue):
            faulty = next((item for item in value.items if not isinstance(item, Scalar)), None)
        if faulty is not None:
            message = f"{name}: a parameter is a scalar or a list of scalars, got {shown(plain(faulty))}"
            self._problems.add("R034", message, faulty.origin, inside=f"params.{name}")
        return faulty is None

    def _substitute(self, tree: Tree, inside: str, stack: tuple[str, ...]) -> _Resolved:
        if isinstance(tree, Scalar):
            return self._scalar(tree, inside, stack)
        if isinstance(tree, ListValue):
            results = [self._substitute(item, inside, stack) for item in tree.items]
        else:
            results = [self._substitute(entry.value, inside, stack) for entry in tree.entries.values()]
        trees = [result.tree for result in results if result.tree is not None]
        depth = max((result.depth for result in results), default=0)
        if len(trees) < len(results):
            return _Resolved(None, depth)
        if isinstance(tree, MapValue):
            pairs = zip(tree.entries.items(), trees, strict=True)
            entries = {key: Entry(entry.key_origin, value) for (key, entry), value in pairs}
            return _Resolved(MapValue(entries, tree.origin), depth)
        nested = next((item for item in trees if stack and not isinstance(item, Scalar)), None)
        if nested is not None:
            message = "a parameter is a scalar or a list of scalars, this makes it a list of lists"
            self._problems.add("R034", message, tree.origin, inside=inside)
            return _Resolved(None, depth)
        return _Resolved(ListValue(tuple(trees), tree.origin), depth)

    def _scalar(self, scalar: Scalar, inside: str, stack: tuple[str, ...]) -> _Resolved:
        text = scalar.value
        if not isinstance(text, str) or "$" not in text:
            return _Resolved(scalar, 0)
        whole = whole_reference(text)
        if whole is not None:
            result = self._lookup(whole, scalar.origin, inside, stack)
            weight = len(result.tree.items) * _LIST_ITEM_WEIGHT if isinstance(result.tree, ListValue) else 0
            fits = self._fits(weight, scalar.origin, inside)
            return _Resolved(result.tree if fits else None, result.depth + 1)
        return self._text(text, scalar, inside, stack)

    def _text(self, text: str, scalar: Scalar, inside: str, stack: tuple[str, ...]) -> _Resolved:
        parts: list[str] = []
        end = length = depth = 0
        is_right = True
        for match in _SPECIAL.finditer(text):
            parts.append(text[end : match.start()])
            end = match.end()
            if match["escape"]:
                parts.append("$")
                continue
            origin = scalar.origin.around(match[0])
            if match["wrong"]:
                self._misspelt(match["wrong"], origin, inside)
                is_right = False
                continue
            result = self._lookup(match["name"], origin, inside, stack)
            depth = max(depth, result.depth + 1)
            value = plain(result.tree) if result.tree is not None else ""
            if value is None or isinstance(value, list):
                message = f"text cannot take in params.{match['name']}, which is {shown(value)}"
                self._problems.add("R031", message, origin, inside=inside)
            is_right = is_right and result.tree is not None and value is not None and not isinstance(value, list)
            parts.append(value if isinstance(value, str) else shown(value))
            length += len(parts[-1])
            if length > MAX_TEXT or not self._fits(len(parts[-1]), origin, inside):
                if length > MAX_TEXT:
                    message = f"with its parameters put in, this text has more than {MAX_TEXT} characters"
                    self._problems.add("R033", message, origin, inside=inside)
                return _Resolved(None, depth)
        parts.append(text[end:])
        return _Resolved(Scalar("".join(parts), scalar.origin, scalar.is_quoted) if is_right else None, depth)

    def _lookup(self, name: str, origin: Origin, inside: str, stack: tuple[str, ...]) -> _Resolved:
        if name not in self._params.entries:
            fix = did_you_mean(name, self._params.entries) or "the recipe has no params"
            self._problems.add("R030", f"there is no parameter {shortened(name)}", origin, inside=inside, fix=fix)
            return _Resolved(None, 0)
        if name in stack:
            circle = " -> ".join([*stack[stack.index(name) :], name])
            self._problems.add("R032", f"parameters depend on themselves: {circle}", origin, inside=inside)
            for member in stack[stack.index(name) :]:
                self._resolved[member] = _Resolved(None, 0)
            return _Resolved(None, 0)
        if len(stack) > MAX_DEPTH:
            message = f"parameters may refer to each other {MAX_DEPTH} deep, here it is more"
            self._problems.add("R033", message, origin, inside=inside)
            return _Resolved(None, 0)
        return self._resolve(name, stack)

    def _misspelt(self, text: str, origin: Origin, inside: str) -> None:
        name = re.sub(rf"^\$\{{?(?:params\.)?({NAME})?.*$", r"\1", text, flags=re.DOTALL)
        match = nearest(name, self._params.entries) if name else None
        example = f"${{params.{match or 'NAME'}}}"
        if text.startswith("${"):
            message = f"expected {example}, got {shown(text)}"
            fix = f"write {example}, or $${{ for the characters themselves"
        else:
            message = f"inside text a parameter is written {example}, got {shown(text)}"
            fix = f"write {example}, or $$params. for the characters themselves"
        self._problems.add("R031", message, origin, inside=inside, fix=fix)

    def _fits(self, weight: int, origin: Origin, inside: str) -> bool:
        self._expanded += weight
        if self._expanded <= _MAX_EXPANDED:
            return True
        self._problems.add(
            "R033", "all parameters together expand to more than a recipe may hold", origin, inside=inside
        )
        return False
