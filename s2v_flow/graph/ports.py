"""What nodes say to each other: references, typed ports, files, and what a port means while planning."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic_core import core_schema

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


MarkT = typing.TypeVar("MarkT")


def marks(info: Any, mark: type[MarkT]) -> Iterator[MarkT]:
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


FieldPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Source:
    """One output of one plan node."""

    node: str
    port: str


@dataclass(frozen=True)
class Value:
    """What an output port means at planning: its parts (one; for a video's latent one per chunk) and known facts."""

    type: PortType
    sources: tuple[Source, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> Source:
        """The only part."""
        (source,) = self.sources
        return source
