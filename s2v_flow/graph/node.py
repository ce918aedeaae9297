"""What a node is, how it plans itself, and the plan: the graph unrolled, in an order in which it can run.

A kind is a subclass of `Node` with a docstring, described fields and its output ports. Fields come in four sorts:

- inputs: `Annotated[Ref, Port("vae")]`, optional ones `Annotated[Ref, Port("vae")] | None`;
- files: `Annotated[str, FileField(...)]`, whose content (never the path) counts in the fingerprint;
- neutral fields: `Annotated[..., Neutral()]`, which cannot change the result's bytes and stay out of the fingerprint;
- everything else: plain values, all of which count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from s2v_flow.errors import Diagnostic, Origin, Place
from s2v_flow.graph.context import Artifact, RunContext
from s2v_flow.graph.locations import Locations, Missing
from s2v_flow.graph.ports import FieldPath, FileField, Neutral, Port, PortType, Ref, Source, Value, marks
from s2v_flow.wording import WARNING

Given = Value | Source | tuple[Source, ...] | None
"""What a plan node's input may be given as; None: nothing."""


class Node(BaseModel):
    """The common part of all kinds. Fields are strict: nothing is guessed from text."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: ClassVar[str]
    version: ClassVar[int] = 1  # to be raised by hand whenever the same fields give other bytes
    outputs: ClassVar[Mapping[str, PortType]] = {}  # port name -> type; the first is what `$node` means
    is_sink: ClassVar[bool] = False  # its effect is a file: it is what a run is for
    is_stored: ClassVar[bool] = False  # its outputs are kept as artifacts
    is_kept: ClassVar[bool] = False  # not stored, but kept where there is room: see `graph.context.Keep`
    stage: ClassVar[int] = 0  # where the graph leaves a choice, lower stages run first: encoders before the big model
    slow_imports: ClassVar[tuple[str, ...]] = ()  # modules of other packages that its run imports, in seconds
    has_numerics: ClassVar[bool] = False  # computes with tensors: the numerics policy is part of its identity

    @classmethod
    @cache
    def input_ports(cls) -> dict[str, tuple[Port, bool]]:
        """Return the input fields: name -> (port, whether it is required)."""
        return {
            name: (port, info.is_required()) for name, info in cls.model_fields.items() for port in marks(info, Port)
        }

    @classmethod
    @cache
    def file_fields(cls) -> dict[str, FileField]:
        """Return the top-level fields that name files: name -> mark."""
        return {name: mark for name, info in cls.model_fields.items() for mark in marks(info, FileField)}

    @classmethod
    @cache
    def neutral_fields(cls) -> frozenset[str]:
        """Return the names of the fields that stay out of the fingerprint."""
        return frozenset(name for name, info in cls.model_fields.items() for _ in marks(info, Neutral))

    def files(self) -> Iterator[tuple[FieldPath, FileField, str]]:
        """Yield the files that are named, also inside lists of records: (field path, mark, text)."""
        yield from _files(self, ())

    def identity(self, digests: Mapping[FieldPath, str], precision: Precision) -> dict[str, Any]:
        """Return the fields that determine the result, with files replaced by their `digests`, by field path.

        `precision` resolves `precision: auto` on this run's device.
        """
        fields = _identity(self, (), digests)
        if "precision" in fields:
            fields["precision"] = precision(self.kind, fields["precision"])
        return fields

    def refs(self) -> dict[str, Ref]:
        """Return the references that are given: input field -> reference."""
        given = {name: getattr(self, name) for name in self.input_ports()}
        return {name: ref for name, ref in given.items() if ref is not None}

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Add this node to the plan and return what each output port means there. One vertex, unless overridden."""
        return planner.add_simple(name, self)

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Compute the outputs: port name -> value. `inputs` holds one value (or a list of chunks) per input field.

        Raises:
            S2VFlowError: The node cannot be computed; the message says why and what to do.
        """
        raise NotImplementedError(f"{self.kind} is planned as other nodes and never runs itself")

    def check(self, files: Mapping[FieldPath, Path]) -> None:
        """Look at this node's files before anything heavy starts.

        Raises:
            S2VFlowError: One of them cannot be used.
        """

    def targets(self, files: Mapping[FieldPath, Path], ports: Iterable[str] | None = None) -> dict[str, Path]:
        """Return where a sink's stored outputs go, by port; without `ports`, not known yet, the first of them."""
        return dict.fromkeys(ports or ["file"], files["file",])

    def surplus(self, files: Mapping[FieldPath, Path], ports: Iterable[str] | None = None) -> list[Path]:
        """Return what stands beside a sink's files, and would seem to be of its result: the rest of a longer one."""
        return []

    def deliver(
        self, files: Mapping[FieldPath, Path], artifacts: Mapping[str, Artifact], note: bytes
    ) -> list[tuple[Path, bool]]:
        """Put a sink's stored result where the recipe wants it: the files written and whether each had to change.

        `note`: what the result was made of, as boxes behind an mp4, for kinds that are such; may be empty.
        """
        return [(target, artifacts[port].copy_to(target)) for port, target in self.targets(files, artifacts).items()]


Precision = Callable[[str, str], str]  # (kind of loader, what the recipe says) -> fp32, bf16 or fp16


@cache
def _roles(record: type[BaseModel]) -> dict[str, tuple[FileField | None, bool]]:
    """Return a record's fields: name -> (what file it names, whether it stays out of the identity)."""
    return {
        name: (next(marks(info, FileField), None), any(marks(info, Neutral)) or any(marks(info, Port)))
        for name, info in record.model_fields.items()
    }


def _files(record: BaseModel, path: FieldPath) -> Iterator[tuple[FieldPath, FileField, str]]:
    for name, (mark, _) in _roles(type(record)).items():
        value = getattr(record, name)
        if mark is not None and value is not None:
            yield (*path, name), mark, value
        if isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, BaseModel):
                    yield from _files(item, (*path, name, index))


def _identity(record: BaseModel, path: FieldPath, digests: Mapping[FieldPath, str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, (mark, is_neutral) in _roles(type(record)).items():
        value = getattr(record, name)
        here = (*path, name)
        if is_neutral:
            continue
        if mark is not None:
            fields |= {} if value is None else {name: digests[here]}  # a file that is not given is as no field
        elif isinstance(value, list):
            fields[name] = [
                _identity(item, (*here, index), digests) if isinstance(item, BaseModel) else item
                for index, item in enumerate(value)
            ]
        else:
            fields[name] = value
    return fields


Inputs = Mapping[str, Source | tuple[Source, ...]]


@dataclass(frozen=True)
class PlanNode:
    """One vertex of the plan.

    `name` is unique ("talk[2]", "talk[2].pixels"), `recipe_node` and `kind` are the recipe's words for it, `node` is
    what runs, `files` maps field paths to the files found for them, `facts` are for people (chunk, frames, seconds),
    `place` is where the recipe has it.
    """

    name: str
    recipe_node: str
    kind: str
    node: Node
    inputs: Inputs
    files: Mapping[FieldPath, Path]
    facts: Mapping[str, Any]
    place: Place | None = None

    def sources(self) -> Iterator[Source]:
        """Yield every part of every input."""
        for given in self.inputs.values():
            yield from (given,) if isinstance(given, Source) else given

    def renamed(self, name_of: Callable[[str], str]) -> PlanNode:
        """Return this node with other names for itself and for the nodes of its inputs."""
        inputs: dict[str, Source | tuple[Source, ...]] = {}
        for key, given in self.inputs.items():
            parts = (given,) if isinstance(given, Source) else given
            named = tuple(Source(name_of(part.node), part.port) for part in parts)
            inputs[key] = named[0] if isinstance(given, Source) else named
        return replace(self, name=name_of(self.name), inputs=inputs)


@dataclass(frozen=True)
class Plan:
    """What is to be done, in order; `missing` lists the files that are not there."""

    nodes: tuple[PlanNode, ...]
    missing: tuple[Missing, ...]
    notes: tuple[str, ...]

    def node(self, name: str) -> PlanNode:
        """Return the plan node of that name."""
        return self._by_name[name]

    def before(self, names: Iterable[str]) -> set[str]:
        """Return everything that these nodes depend on."""
        found, wanted = set[str](), set(names)
        for node in reversed(self.nodes):
            if node.name in wanted or node.name in found:
                found.update(source.node for source in node.sources())
        return found

    def made_of(self, name: str) -> list[PlanNode]:
        """Return a plan node behind all that it depends on, in the plan's order."""
        wanted = {name, *self.before([name])}
        return [node for node in self.nodes if node.name in wanted]

    def after(self, names: Iterable[str]) -> set[str]:
        """Return everything that depends on these nodes."""
        start, found = set(names), set[str]()
        for node in self.nodes:
            if any(source.node in start or source.node in found for source in node.sources()):
                found.add(node.name)
        return found - start

    @cached_property
    def _by_name(self) -> dict[str, PlanNode]:
        return {node.name: node for node in self.nodes}


@dataclass(frozen=True)
class NodeSpec:
    """A node of a recipe. `origins` says where each field's value was written; `()` is the node's name itself."""

    name: str
    kind: str
    node: Node
    place: Place
    origins: Mapping[FieldPath, Origin]

    def origin(self, field: str | FieldPath) -> Origin:
        """Return where a field's value was written, or the nearest thing around it: the node, for a default.

        A value that came from a parameter was written where the parameter's value was: in a recipe, a profile, or on
        the command line.
        """
        path = (field,) if isinstance(field, str) else field
        while path not in self.origins:
            path = path[:-1]
        return self.origins[path]

    def base_dir(self, field: str | FieldPath) -> Path:
        """Return the absolute directory at which a relative path in this field starts."""
        return self.origin(field).base_dir

    def diagnostic(self, field: str | FieldPath, code: str, message: str, fix: str | None = None) -> Diagnostic:
        """Return a mistake that was found later (in planning, say), marked at a field's value."""
        path = (field,) if isinstance(field, str) else field
        text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
        inside = f"nodes.{self.name}{text} (kind: {self.kind})"
        return self.origin(path).diagnostic(code, message, inside=inside, fix=fix)


Remember = Callable[[str, Path, Callable[[], dict[str, Any]]], dict[str, Any]]
"""`remember(what, file, compute)`: a small fact about a file's content, computed if it is not remembered."""


@dataclass
class Planner:
    """What a node asks and says while it plans itself: plan nodes, values, missing files and mistakes are collected."""

    specs: Mapping[str, NodeSpec]
    locations: Locations
    remember: Remember
    values: dict[str, dict[str, Value]] = field(default_factory=dict)
    nodes: dict[str, PlanNode] = field(default_factory=dict)
    missing: dict[str, list[Missing]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    diagnostics: list[Diagnostic] = field(default_factory=list)

    def value(self, ref: Ref | None) -> Value | None:
        """Return what a reference means; None for no reference, or where planning its node failed."""
        if ref is None:
            return None
        values = self.values.get(ref.node, {})
        return values.get(ref.port) if ref.port is not None else next(iter(values.values()), None)

    def facts(self, ref: Ref | None) -> Mapping[str, Any]:
        """Return what planning knows of what a reference means; an empty map where nothing is known."""
        value = self.value(ref)
        return value.facts if value else {}

    def add(
        self,
        name: str,
        node: Node,
        inputs: Mapping[str, Given],
        *,
        recipe_node: str,
        facts: Mapping[str, Any] | None = None,
    ) -> dict[str, Value]:
        """Add one plan node and return a value for each of its ports. Inputs that are None are left out."""
        sources: dict[str, Source | tuple[Source, ...]] = {}
        for key, given in inputs.items():
            if isinstance(given, Value):
                sources[key] = given.sources if given.type == "latent" else given.source
            elif given is not None:
                sources[key] = given
        kind = node.kind if name.startswith(f"{recipe_node}.") else self.specs[recipe_node].node.kind
        files = dict(self._find_files(name, recipe_node, node))
        place = self.specs[recipe_node].origin(()).place
        self.nodes[name] = PlanNode(name, recipe_node, kind, node, sources, files, dict(facts or {}), place)
        return {port: Value(type_, (Source(name, port),)) for port, type_ in node.outputs.items()}

    def add_simple(self, name: str, node: Node, facts: Mapping[str, Any] | None = None) -> dict[str, Value]:
        """Add a node that is one vertex with its references as inputs; `facts` go with its outputs."""
        inputs = {key: self.value(ref) for key, ref in node.refs().items()}
        values = self.add(name, node, inputs, recipe_node=name)
        return {port: replace(value, facts=dict(facts or {})) for port, value in values.items()}

    def problem(self, name: str, field_name: str, code: str, message: str, fix: str | None = None) -> None:
        """Record a mistake that only planning can see, at a field of a recipe's node."""
        self.diagnostics.append(self.specs[name].diagnostic(field_name, code, message, fix))

    def describe(self, name: str, **facts: Any) -> None:
        """Add facts to a plan node."""
        node = self.nodes[name]
        self.nodes[name] = replace(node, facts={**node.facts, **facts})

    def note(self, name: str, text: str, *, is_warning: bool = False) -> None:
        """Record something a person should know before running, about a recipe's node."""
        self.notes.setdefault(name, []).append(f"{WARNING}{text}" if is_warning else text)

    def file(self, name: str, *field_path: str | int) -> Path | None:
        """Return the file found for a field of a plan node, or None where it is missing."""
        return self.nodes[name].files.get(field_path)

    def _find_files(self, name: str, recipe_node: str, node: Node) -> Iterator[tuple[FieldPath, Path]]:
        spec = self.specs[recipe_node]
        for path, mark, text in node.files():
            if mark.role == "output":
                origin, option = spec.origin(path), spec.origin(path).place.file
                is_given = option in ("--set", "--set-json", "-m") or option.startswith("<params>:")
                is_typed = is_given and not (origin.base_dir / option).exists()  # a recipe may extend a file so named
                yield path, self.locations.output(text, origin.base_dir, typed_by_user=is_typed)
                continue
            found = self.locations.find(mark, text, spec.origin(path).base_dir)
            if isinstance(found, Missing):
                self.missing.setdefault(name, []).append(found)
            else:
                yield path, found
