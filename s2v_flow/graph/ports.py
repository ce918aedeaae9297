"""What nodes say to each other, references and typed ports; and their files: where they lie, where results may go."""

from __future__ import annotations

import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic_core import core_schema

from s2v_flow.errors import RefusedError

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


@dataclass(frozen=True)
class Missing:
    """A file that is needed and was not found: its name, what it is, where it can be had, where it was looked for."""

    file: str
    kind: str
    homes: tuple[str, ...] = ()
    looked_in: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelFolder:
    """One more folder with models of a kind, "vae" or "loras"; `is_default`: searched before the models folders."""

    kind: str
    path: Path
    is_default: bool = False


@dataclass(frozen=True)
class Locations:
    """The folders of one run.

    `models_dirs` have ComfyUI's layout; `model_folders` are single folders beside them; `input_dirs` are searched after
    the folder of the file that wrote a path; relative outputs go to `output_dir` where it is given; `homes` knows where
    well-known model files can be had; `made_models` maps names of models that this program makes itself on first use to
    where they will stand; `output_file` is where the only output goes, whatever the recipe says; `output_tag` stands
    before the suffix of outputs' names, so that a matrix's cells do not overwrite each other.
    """

    models_dirs: Sequence[Path] = ()
    model_folders: Sequence[ModelFolder] = ()
    input_dirs: Sequence[Path] = ()
    output_dir: Path | None = None
    cache_dir: Path = Path("cache")
    homes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    made_models: Mapping[str, Path] = field(default_factory=dict)
    output_tag: str = ""
    output_file: Path | None = None

    def find(self, mark: FileField, text: str, base_dir: Path) -> Path | Missing:
        """Find a model or an input: the file's path, or what is missing.

        `base_dir`: the folder of the file that says it.
        """
        name = Path(os.path.expanduser(text))
        if mark.role == "model":
            folders = [folder for folder in self.model_folders if folder.kind in mark.folders]
            candidates = [folder.path / name for folder in folders if folder.is_default]
            candidates += [root / folder / name for root in self.models_dirs for folder in mark.folders]
            candidates += [folder.path / name for folder in folders if not folder.is_default]
            made = self.made_models.get(text)
            candidates += [made] if made is not None and made.parent.name in mark.folders else []
        else:
            candidates = [base_dir / name, *(root / name for root in self.input_dirs)]
        for candidate in dict.fromkeys(candidates):
            # isfile: what cannot even be looked at (a name too long, a forbidden folder) is not there
            if os.path.isfile(candidate) or candidate == self.made_models.get(text):
                return candidate
        kind = mark.folders[0] if mark.role == "model" else mark.what
        looked_in = tuple(dict.fromkeys(str(candidate.parent) for candidate in candidates))
        return Missing(text, kind, tuple(self.homes.get(name.name, ())), looked_in)

    def output(self, text: str, base_dir: Path, *, typed_by_user: bool) -> Path:
        """Return where to write a result.

        Args:
            base_dir: The folder of the file that says it.
            typed_by_user: Whether it was given on the command line, where any path is the user's own choice.

        Raises:
            RefusedError: The path leaves the folders in which a recipe may write.
        """
        root = self.output_dir if self.output_dir is not None else base_dir
        if self.output_file is not None:
            root, text, typed_by_user = Path(), str(self.output_file), True
        if self.output_tag:
            text = str(Path(text).with_suffix(f".{self.output_tag}{Path(text).suffix}"))
        named = Path(os.path.abspath(root / os.path.expanduser(text)))
        target = Path(os.path.realpath(named))
        if typed_by_user or target.is_relative_to(os.path.realpath(root)):
            links = filter(os.path.islink, named.parents)
            is_lost = any(not os.path.lexists(os.path.realpath(link)) for link in links)
            is_lost = is_lost or (os.path.islink(named) and not target.parent.is_dir())
            return named if is_lost else target  # what a link stands for, such as a disk, is never made
        fix = f"use a path inside {root}, or say --output-dir {target.parent}"
        raise RefusedError(f"the recipe wants to write outside its folder: {text} is {target}", fix)
