"""From a node's text to a validated node, or to all of its mistakes, each at its place and in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from s2v_flow.errors import Origin
from s2v_flow.graph.node import Node, NodeSpec
from s2v_flow.graph.ports import FieldPath, Ref
from s2v_flow.recipe.fields import Accepts, field_at
from s2v_flow.recipe.params import Parameters, whole_reference
from s2v_flow.recipe.problems import Problems
from s2v_flow.recipe.tree import Entry, MapValue, Scalar, Tree, origins_of, path_text, plain, tree_at
from s2v_flow.wording import did_you_mean, listed, nearest, shortened, shown

_RANGES = {
    "greater_than_equal": ("at least {ge}", "ge"),
    "greater_than": ("more than {gt}", "gt"),
    "less_than_equal": ("at most {le}", "le"),
    "less_than": ("less than {lt}", "lt"),
    "multiple_of": ("a multiple of {multiple_of}", "multiple_of"),
}


def check_node(
    name: str,
    entry: Entry,
    kinds: Mapping[str, type[Node]],
    params: Parameters,
    node_names: Mapping[str, object],
    problems: Problems,
) -> tuple[NodeSpec, bool] | None:
    """Return a node as far as it can be linked, and whether it is valid; None where not even its kind is known.

    What is wrong is collected. A node that is not valid is built without checks.
    """
    inside = f"nodes.{name}"
    if not isinstance(entry.value, MapValue):
        message = f"{name}: a node is a map of fields, got {shown(plain(entry.value))}"
        problems.add("R012", message, entry.value.origin, inside=inside, fix="begin with `kind:`")
        return None
    kind = entry.value.get("kind")
    if kind is None:
        match = nearest(name, [other for other in node_names if other != name])
        fix = f"{f'did you mean the node {match}? ' if match else ''}kinds: {listed(kinds)}"
        problems.add("R015", f"{name}: kind is missing", entry.key_origin, inside=inside, fix=fix)
        return None
    value = kind.value if isinstance(kind, Scalar) else None
    if not isinstance(value, str):
        message = f"kind: expected the name of a kind, got {shown(plain(kind))}"
        problems.add("R012", message, kind.origin, inside=inside, fix=f"kinds: {listed(kinds)}")
        return None
    if value not in kinds:
        advice = did_you_mean(value, kinds, "kinds")
        advice = f"a kind cannot be a parameter; {advice}" if "$" in value else advice
        problems.add("R018", f"there is no kind {shown(value)}", kind.origin, inside=inside, fix=advice)
        return None
    return _NodeCheck(name, entry.key_origin, entry.value, kinds[value], params, node_names, problems).run()


def check_profile(
    profile: str, changes: MapValue, nodes: MapValue, kinds: Mapping[str, type[Node]], problems: Problems
) -> None:
    """Check the kinds and the names of fields in a profile, whether it is chosen or not.

    Its values are checked when it is chosen: what they mean may hang on what else is chosen.
    """
    for name, entry in changes.entries.items():
        below = nodes.get(name)
        written = entry.value if isinstance(entry.value, MapValue) else MapValue({}, entry.value.origin)
        kind = written.get("kind") or (below.get("kind") if isinstance(below, MapValue) else None)
        value = kind.value if isinstance(kind, Scalar) else None
        if not isinstance(value, str):
            continue
        inside = f"profiles.{profile}.nodes.{name}"
        if value not in kinds and "kind" in written.entries and kind is not None:
            fix = did_you_mean(value, kinds, "kinds")
            problems.add("R018", f"there is no kind {shown(value)}", kind.origin, inside=inside, fix=fix)
        for field, field_entry in written.entries.items():
            if field != "kind" and value in kinds and field not in kinds[value].model_fields:
                fix = did_you_mean(field, kinds[value].model_fields)
                message = f"{value} has no field {shortened(field)}"
                problems.add("R011", message, field_entry.key_origin, inside=inside, fix=fix)


@dataclass
class _NodeCheck:
    """The check of one node whose kind is known."""

    name: str
    name_origin: Origin
    written: MapValue
    model: type[Node]
    params: Parameters
    node_names: Mapping[str, object]
    problems: Problems

    def __post_init__(self) -> None:
        self.inputs = self.model.input_ports()
        self.faulty: set[str] = set()  # fields whose mistake has been said
        self.refs: dict[str, Ref] = {}
        self.resolved = self.written

    def run(self) -> tuple[NodeSpec, bool]:
        values: dict[str, Entry] = {}
        for field, entry in self.written.entries.items():
            if field == "kind":
                continue
            value = self._read_field(field, entry)
            if value is None:
                self.faulty.add(field)
            else:
                values[field] = Entry(entry.key_origin, value)
        self.resolved = MapValue(values, self.written.origin)
        node: Node | None = None
        try:
            node = self.model.model_validate(plain(self.resolved))
        except ValidationError as error:
            self._translate(error)
        origins = origins_of(self.resolved)
        origins[()] = self.name_origin
        origins["kind",] = self.written.entries["kind"].value.origin
        is_valid = node is not None and not self.faulty
        if node is None or not is_valid:
            faulty = self.faulty & self.written.entries.keys()
            origins.update({(field,): self.written.entries[field].value.origin for field in faulty})
            node = self.model.model_construct(None, **{field: self.refs.get(field) for field in self.inputs})
        return NodeSpec(self.name, node.kind, node, self.name_origin.place, origins), is_valid

    def _read_field(self, field: str, entry: Entry) -> Tree | None:
        if field not in self.model.model_fields:
            message = f"{self.model.kind} has no field {shortened(field)}"
            fix = did_you_mean(field, self.model.model_fields)
            self.problems.add("R011", message, entry.key_origin, inside=self._inside((field,)), fix=fix)
            meant = nearest(field, self.model.model_fields)
            self.faulty.update({meant} if meant is not None else ())  # which is then not called missing as well
            return None
        if field in self.inputs:
            return self._read_input(field, entry.value)
        if isinstance(entry.value, Scalar) and "$" not in str(entry.value.value):
            return entry.value
        return self.params.substitute(entry.value, self._inside((field,)))

    def _read_input(self, field: str, value: Tree) -> Tree | None:
        """Return an input's reference, or None where it is none; null is an optional input that is not given."""
        text = value.value if isinstance(value, Scalar) else plain(value)
        if text is None and not self.inputs[field][1]:
            return value
        fix = None
        if isinstance(text, str) and whole_reference(text) is None:
            try:
                self.refs[field] = Ref.parse(text)
                return value
            except ValueError:
                match = nearest(text.strip("${}"), self.node_names)
                fix = f"write ${match}" if match is not None else None
        elif isinstance(text, str):
            fix = "inputs take a node's output, $node, not a parameter"
        message = f"{field}: expected a reference like $node or $node.port, got {shown(text)}"
        self.problems.add("R024", message, value.origin, inside=self._inside((field,)), fix=fix)
        return None

    def _translate(self, error: ValidationError) -> None:
        """Group pydantic's errors by the value they are about (each member of a union has its own); say each once."""
        groups: dict[FieldPath, list[dict[str, Any]]] = {}
        for details in error.errors(include_url=False):
            path = _value_path(details["loc"], self.model)
            if not path and not self.faulty:  # it is about the fields together
                message = f"{self.name}: {_rule(details['type'], details.get('ctx', {}), details['msg'])}"
                inside = f"nodes.{self.name} (kind: {self.model.kind})"
                self.problems.add("R016", message, self.name_origin, inside=inside)
            elif path and path[0] not in self.faulty:
                groups.setdefault(path, []).append(dict(details))
        for path, group in groups.items():
            taken = field_at(self.model, path)
            ranges = [details for details in group if not _is_about_type(details)]
            if ranges:
                self._say(path, ranges[0], taken)
            elif taken is None or not taken.takes(group[0]["input"]):  # else the mistake is deeper inside
                self._say(path, group[0], taken)

    def _say(self, path: FieldPath, details: dict[str, Any], taken: Accepts | None) -> None:
        kind, value = details["type"], details["input"]
        label = path_text(self.resolved, path)
        tree = tree_at(self.resolved, path)
        origin = tree.origin if tree is not None else self._nearest_origin(path)
        context = details.get("ctx", {})
        fix: str | None = None
        if kind == "missing":
            code, message = "R015", f"{label} is missing"
            fix = self._advise_missing(path, taken)
        elif kind == "extra_forbidden":
            code, message = "R011", f"{label}: there is no such field"
            parent = field_at(self.model, path[:-1])
            fix = did_you_mean(str(path[-1]), parent.model.model_fields) if parent and parent.model else None
            around = tree_at(self.resolved, path[:-1])
            assert isinstance(around, MapValue)
            origin = around.entries[str(path[-1])].key_origin
        elif kind in _RANGES:
            words, bound = _RANGES[kind]
            limit = {bound: _canonical(context[bound])}
            code, message = "R013", f"{label}: must be {words.format(**limit)}, got {shown(value)}"
            fix = _nearest_multiple(value, context["multiple_of"]) if kind == "multiple_of" else None
        elif _is_about_type(details) and taken is not None:
            is_word = isinstance(value, str) and bool(taken.words)
            code = "R014" if is_word else "R012"
            message = f"{label}: expected {taken.described()}, got {shown(value)}"
            fix = self._advise_type(path, value, tree, taken)
        else:
            got = "" if isinstance(value, (list, dict)) else f", got {shown(value)}"
            code, message = "R016", f"{label}: {_rule(kind, context, details['msg'])}{got}"
        self.problems.add(code, message, origin, inside=self._inside(path), fix=fix)

    def _advise_missing(self, path: FieldPath, taken: Accepts | None) -> str | None:
        if len(path) == 1 and path[0] in self.inputs:
            return f"add `{path[0]}: $NODE`, a node that gives {self.inputs[str(path[0])][0].type.replace('_', ' ')}"
        return f"add `{path[-1]}:` with {taken.described()}" if taken is not None else None

    def _advise_type(self, path: FieldPath, value: Any, tree: Tree | None, taken: Accepts) -> str | None:
        """Say how to mend a value of the wrong type, where the usual slips explain it."""
        written = tree_at(self.written, path)
        if isinstance(written, Scalar) and isinstance(written.value, str) and "${params." in written.value:
            value = written.value.replace("${", "$").replace("}", "")
            return f"${{...}} makes text; write {value} for the value itself"
        if value is None:
            return self._advise_null(path)
        if isinstance(value, str):
            return taken.advice(value, is_quoted=isinstance(tree, Scalar) and tree.is_quoted)
        if isinstance(value, float) and value.is_integer() and int in taken.scalars:
            return f"write {int(value)}"
        if str in taken.scalars and isinstance(value, (bool, int, float)):
            return "put it in quotes if it is text"
        if taken.has_list and not isinstance(value, (list, dict)):
            return f"write [{shown(value)}]"
        return None

    def _advise_null(self, path: FieldPath) -> str | None:
        parent = field_at(self.model, path[:-1]) if isinstance(path[-1], str) else None
        info = parent.model.model_fields[str(path[-1])] if parent is not None and parent.model is not None else None
        if info is None or info.is_required():
            return None
        return f"leave it out to get the default, {shown(info.default)}"

    def _nearest_origin(self, path: FieldPath) -> Origin:
        """Return where something that is missing should have been: its item of a list, or else the node's name."""
        while len(path) > 1:
            path = path[:-1]
            tree = tree_at(self.resolved, path)
            if tree is not None:
                return tree.origin
        return self.name_origin

    def _inside(self, path: FieldPath) -> str:
        """Name a value and, where it came from a parameter, that too."""
        source = tree_at(self.written, path[:1])
        is_resolved = tree_at(self.resolved, path[:1]) is not source
        name = whole_reference(source.value) if isinstance(source, Scalar) and is_resolved else None
        label = path_text(self.resolved, path)
        via = f", from params.{name}" if name is not None else ""
        return f"nodes.{self.name}.{label} (kind: {self.model.kind}){via}"


def _value_path(location: tuple[int | str, ...], model: type[Node]) -> FieldPath:
    """Return the path of the value that an error is about, without the tags that unions put in."""
    path: FieldPath = ()
    for part in location:
        around = field_at(model, path)
        if around is None:  # below a field that does not exist
            break
        if (around.model is not None) if isinstance(part, str) else around.has_list:
            path = (*path, part)
    return path


def _is_about_type(details: Mapping[str, Any]) -> bool:
    return details["type"].endswith("_type") or details["type"] in ("int_from_float", "literal_error")


def _canonical(number: Any) -> str:
    return str(int(number)) if isinstance(number, float) and number.is_integer() else str(number)


def _nearest_multiple(value: Any, step: int) -> str:
    lower = int(value // step) * step
    return f"the nearest are {lower} and {lower + step}" if lower else f"the nearest is {step}"


def _rule(kind: str, context: Mapping[str, Any], message: str) -> str:
    if kind == "string_pattern_mismatch":
        suffix = str(context["pattern"])
        if suffix.startswith(r"\.") and suffix.endswith("$"):
            return f"must end in {suffix[1:-1]}"
        return f"must match the pattern {suffix}"
    if kind == "string_too_long":
        return f"must have at most {context['max_length']} characters"
    if kind == "string_too_short":
        return "must not be empty" if context["min_length"] == 1 else f"must have {context['min_length']} characters"
    if kind == "value_error":
        return str(context["error"])
    return message[:1].lower() + message[1:]
