"""What a node is: fields checked by pydantic, typed ports, a kind and a version.

A kind is a subclass of `Node` with a docstring, described fields and its output ports. Fields come in four sorts:

- inputs: `Annotated[Ref, Port("vae")]`, optional ones `Annotated[Ref, Port("vae")] | None`;
- files: `Annotated[str, FileField(...)]`, whose content (never the path) counts in the fingerprint;
- neutral fields: `Annotated[..., Neutral()]`, which cannot change the result's bytes and stay out of the fingerprint;
- everything else: plain values, all of which count.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from pydantic_core import core_schema

if TYPE_CHECKING:
    from s2v_flow.graph.plan import PlanBuilder, Value
    from s2v_flow.graph.run import Artifact, RunContext

NAME = r"[A-Za-z_][A-Za-z0-9_-]*"
_REF = re.compile(rf"\$(?P<node>{NAME})(?:\.(?P<port>{NAME}))?")


@dataclass(frozen=True)
class Ref:
    """A reference to another node's output: `$node`, or `$node.port` where the node has several ports."""

    node: str
    port: str | None = None

    @classmethod
    def parse(cls, text: str) -> Ref:
        """Read `$node` or `$node.port`.

        Raises:
            ValueError: The text is no reference.
        """
        match = _REF.fullmatch(text)
        if match is None:
            raise ValueError(f"expected a reference like $node or $node.port, got {text!r}")
        return cls(match["node"], match["port"])

    def __str__(self) -> str:
        return f"${self.node}" if self.port is None else f"${self.node}.{self.port}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        def check(value: object) -> Ref:
            if isinstance(value, Ref):
                return value
            if not isinstance(value, str):
                raise ValueError(f"expected a reference like $node, got {value!r}")
            return cls.parse(value)

        return core_schema.no_info_plain_validator_function(
            check, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core_schema.CoreSchema, handler: Any) -> dict[str, Any]:
        return {"type": "string", "pattern": rf"^\${NAME}(\.{NAME})?$"}


PortType = Literal[
    "diffusion_model", "text_encoder", "audio_encoder", "vae", "image", "audio", "frames",
    "conditioning", "speech", "reference", "latent",
]  # fmt: skip


@dataclass(frozen=True)
class Port:
    """Marks a field as an input that takes values of one type."""

    type: PortType


@dataclass(frozen=True)
class FileField:
    """Marks a text field as a file's name.

    role "model": looked for by name under the models folders, in `folders` (the first is the usual one);
    role "input": a path relative to the file that wrote it, else under the input folders;
    role "output": a path relative to the output folder, else to the file that wrote it.
    `what` names the content in messages ("image", "LoRA").
    """

    role: Literal["model", "input", "output"]
    what: str
    folders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Neutral:
    """Marks a field that cannot change the result's bytes."""


class Node(BaseModel):
    """The common part of all kinds. Fields are strict: nothing is guessed from text."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: ClassVar[str]
    version: ClassVar[int] = 1  # to be raised by hand whenever the same fields give other bytes
    outputs: ClassVar[Mapping[str, PortType]] = {}  # port name -> type; the first is what `$node` means
    is_sink: ClassVar[bool] = False  # its effect is a file: it is what a run is for
    is_stored: ClassVar[bool] = False  # its outputs are kept as artifacts
    stage: ClassVar[int] = 0  # where the graph leaves a choice, lower stages run first: encoders before the big model
    has_numerics: ClassVar[bool] = False  # computes with tensors: the numerics policy is part of its identity

    @classmethod
    def input_ports(cls) -> dict[str, tuple[Port, bool]]:
        """Return the input fields: name -> (port, whether it is required)."""
        return {
            name: (port, info.is_required()) for name, info in cls.model_fields.items() for port in _marks(info, Port)
        }

    @classmethod
    def file_fields(cls) -> dict[str, FileField]:
        """Return the top-level fields that name files: name -> mark."""
        return {name: mark for name, info in cls.model_fields.items() for mark in _marks(info, FileField)}

    @classmethod
    def neutral_fields(cls) -> frozenset[str]:
        """Return the names of the fields that stay out of the fingerprint."""
        return frozenset(name for name, info in cls.model_fields.items() for _ in _marks(info, Neutral))

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

    def plan(self, builder: PlanBuilder, name: str) -> dict[str, Value]:
        """Add this node to the plan and return what each output port means there. One vertex, unless overridden."""
        return builder.add_simple(name, self)

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Compute the outputs: port name -> value. `inputs` holds one value (or a list of chunks) per input field.

        Raises:
            S2VFlowError: The node cannot be computed; the message says why and what to do.
        """
        raise RuntimeError(f"{self.kind} is planned as other nodes and never runs itself")

    def check(self, files: Mapping[tuple[str | int, ...], Path]) -> None:
        """Look at this node's files before anything heavy starts.

        Raises:
            S2VFlowError: One of them cannot be used.
        """

    def deliver(
        self, files: Mapping[tuple[str | int, ...], Path], artifacts: Mapping[str, Artifact], note: bytes
    ) -> list[tuple[Path, bool]]:
        """Put a sink's stored result where the recipe wants it.

        Args:
            files: Where to write, by field path.
            artifacts: The node's stored outputs by name.
            note: What the result was made of, for kinds of files that can hold it; may be empty.

        Returns:
            The files written and whether each had to change.
        """
        return []


Precision = Callable[[str, str], str]  # (kind of loader, what the recipe says) -> fp32, bf16 or fp16


def _files(record: BaseModel, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], FileField, str]]:
    for name, info in type(record).model_fields.items():
        value = getattr(record, name)
        for mark in _marks(info, FileField):
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
        if any(_marks(info, Neutral)) or any(_marks(info, Port)):
            continue
        if any(_marks(info, FileField)) and value is not None:
            fields[name] = digests[here]
        elif isinstance(value, list):
            fields[name] = [
                _identity(item, (*here, index), digests) if isinstance(item, BaseModel) else item
                for index, item in enumerate(value)
            ]
        else:
            fields[name] = value
    return fields


MarkT = typing.TypeVar("MarkT")


def _marks(info: Any, mark: type[MarkT]) -> Iterator[MarkT]:
    """Yield the marks of one type on a field, also where they stand inside `X | None`."""
    yield from (item for item in info.metadata if isinstance(item, mark))
    pending = [info.annotation]
    while pending:
        annotation = pending.pop()
        if typing.get_origin(annotation) is typing.Annotated:
            yield from (item for item in annotation.__metadata__ if isinstance(item, mark))
            pending.append(typing.get_args(annotation)[0])
        elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
            pending.extend(typing.get_args(annotation))
