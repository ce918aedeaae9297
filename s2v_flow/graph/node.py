"""What a node is: fields checked by pydantic, typed ports, a kind and a version.

A kind is a subclass of `Node` with a docstring, described fields and its output ports. Fields come in four sorts:

- inputs: `Annotated[Ref, Port("vae")]`, optional ones `Annotated[Ref, Port("vae")] | None`;
- files: `Annotated[str, FileField(...)]`, whose content (never the path) counts in the fingerprint;
- neutral fields: `Annotated[..., Neutral()]`, which cannot change the result's bytes and stay out of the fingerprint;
- everything else: plain values, all of which count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

from s2v_flow.graph.context import Artifact, RunContext
from s2v_flow.graph.ports import FileField, Neutral, Port, PortType, Ref, Source, Value, marks

Given = Value | Source | tuple[Source, ...] | None
"""What a plan node's input may be given as; None: nothing."""


class Planner(Protocol):
    """What a node may ask and say while it plans itself."""

    def value(self, ref: Ref | None) -> Value | None:
        """Return what a reference means; None for no reference, or where planning its node failed."""

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

    def add_simple(self, name: str, node: Node, facts: Mapping[str, Any] | None = None) -> dict[str, Value]:
        """Add a node that is one vertex with its references as inputs; `facts` go with its outputs."""

    def problem(self, name: str, field_name: str, code: str, message: str, fix: str | None = None) -> None:
        """Record a mistake that only planning can see, at a field of a recipe's node."""

    def describe(self, name: str, **facts: Any) -> None:
        """Add facts to a plan node."""

    def note(self, name: str, text: str, *, is_warning: bool = False) -> None:
        """Record something a person should know before running, about a recipe's node."""

    def file(self, name: str, *field_path: str | int) -> Path | None:
        """Return the file found for a field of a plan node, or None where it is missing."""

    def made_model(self, name: str) -> Path | None:
        """Return where a model of that name will stand that is made on first use, None if it is not of that sort."""

    def remember(self, what: str, file: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a small fact about a file's content, computed if it is not remembered."""


class Node(BaseModel):
    """The common part of all kinds. Fields are strict: nothing is guessed from text."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: ClassVar[str]
    version: ClassVar[int] = 1  # to be raised by hand whenever the same fields give other bytes
    outputs: ClassVar[Mapping[str, PortType]] = {}  # port name -> type; the first is what `$node` means
    is_sink: ClassVar[bool] = False  # its effect is a file: it is what a run is for
    is_stored: ClassVar[bool] = False  # its outputs are kept as artifacts
    is_kept: ClassVar[bool] = False  # not stored, but what it gives out is kept where there is room: see `graph.keep`
    stage: ClassVar[int] = 0  # where the graph leaves a choice, lower stages run first: encoders before the big model
    has_numerics: ClassVar[bool] = False  # computes with tensors: the numerics policy is part of its identity

    @classmethod
    def input_ports(cls) -> dict[str, tuple[Port, bool]]:
        """Return the input fields: name -> (port, whether it is required)."""
        return {
            name: (port, info.is_required()) for name, info in cls.model_fields.items() for port in marks(info, Port)
        }

    @classmethod
    def file_fields(cls) -> dict[str, FileField]:
        """Return the top-level fields that name files: name -> mark."""
        return {name: mark for name, info in cls.model_fields.items() for mark in marks(info, FileField)}

    @classmethod
    def neutral_fields(cls) -> frozenset[str]:
        """Return the names of the fields that stay out of the fingerprint."""
        return frozenset(name for name, info in cls.model_fields.items() for _ in marks(info, Neutral))

    def files(self) -> Iterator[tuple[tuple[str | int, ...], FileField, str]]:
        """Yield the files that are named, also inside lists of records: (field path, mark, text)."""
        yield from _files(self, ())

    def identity(self, digests: Mapping[tuple[str | int, ...], str], precision: Precision) -> dict[str, Any]:
        """Return the fields that determine the result, with files replaced by their digests.

        Args:
            digests: sha256 of every file the node reads, by field path.
            precision: Resolves `precision: auto` on this run's device.
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

    def check(self, files: Mapping[tuple[str | int, ...], Path]) -> None:
        """Look at this node's files before anything heavy starts.

        Raises:
            S2VFlowError: One of them cannot be used.
        """

    def targets(
        self, files: Mapping[tuple[str | int, ...], Path], ports: Iterable[str] | None = None
    ) -> dict[str, Path]:
        """Return where a sink's stored outputs go, by port; without `ports`, before they are known, the first of them."""
        return dict.fromkeys(ports or ["file"], files["file",])

    def deliver(
        self, files: Mapping[tuple[str | int, ...], Path], artifacts: Mapping[str, Artifact], note: bytes
    ) -> list[tuple[Path, bool]]:
        """Put a sink's stored result where the recipe wants it.

        Args:
            note: What the result was made of, as boxes behind an mp4, for kinds that are such; may be empty.

        Returns:
            The files written and whether each had to change.
        """
        return [(target, artifacts[port].copy_to(target)) for port, target in self.targets(files, artifacts).items()]


Precision = Callable[[str, str], str]  # (kind of loader, what the recipe says) -> fp32, bf16 or fp16


def _files(record: BaseModel, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], FileField, str]]:
    for name, info in type(record).model_fields.items():
        value = getattr(record, name)
        for mark in marks(info, FileField):
            if value is not None:
                yield (*path, name), mark, value
        if isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, BaseModel):
                    yield from _files(item, (*path, name, index))


def _identity(
    record: BaseModel, path: tuple[str | int, ...], digests: Mapping[tuple[str | int, ...], str]
) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, info in type(record).model_fields.items():
        value = getattr(record, name)
        here = (*path, name)
        if any(marks(info, Neutral)) or any(marks(info, Port)):
            continue
        if any(marks(info, FileField)):
            fields |= {} if value is None else {name: digests[here]}  # a file that is not given is as no field
        elif isinstance(value, list):
            fields[name] = [
                _identity(item, (*here, index), digests) if isinstance(item, BaseModel) else item
                for index, item in enumerate(value)
            ]
        else:
            fields[name] = value
    return fields
