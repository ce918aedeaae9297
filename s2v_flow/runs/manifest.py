"""What is kept of a run: its manifest, and the essence of it that travels inside the video."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import inf
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from s2v_flow.quality import known

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # it makes a file's name in the cache
PartT = TypeVar("PartT", bound="Part")
_MAX_DIGITS = 300
NodeState = Literal["computed", "stored", "live", "skipped", "failed", "interrupted", "not_reached"]


class Part(BaseModel):
    """A part of a manifest. What a later version adds is passed over on reading."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class NamedDigest(Part):
    """A file by its name and content."""

    name: str = Field(description="As it was named; the home folder is written as ~.")
    sha256: str | None = Field(None, description="Of its bytes; null where it was not needed and is not known.")


class FileRecord(NamedDigest):
    """A model or an input."""

    at: str = Field(description="The field that names it: nodes.dit.checkpoint, nodes.dit.loras[lightning].file.")
    role: Literal["model", "input"] = Field(description="Where it is looked for.")
    size: int | None = Field(None, description="In bytes.")


class RecipeRecord(Part):
    """The recipe with all its layers applied."""

    path: str = Field(description="As it was given.")
    files: list[NamedDigest] = Field(description="Every recipe file that was read, the innermost base first.")
    text: str = Field(description="The recipe after profiles, override files and --set: it can be run as it is.")
    values: dict[str, JsonValue] = Field(description="Every value by its path, parameters put in, defaults included.")
    origins: dict[str, str] = Field(description="Where each value was written: path -> file:line:column.")


class GivenRecord(Part):
    """What the command line laid over the recipe."""

    profiles: list[str] = Field(description="Names of profiles, in their order.")
    files: list[NamedDigest] = Field(description="Override files.")
    overrides: list[str] = Field(description="--set and its like, as they were given.")


class GitRecord(Part):
    """The state of the git repository in which the recipe stands."""

    commit: str | None = Field(description="The commit that is checked out; null before the first one.")
    is_dirty: bool = Field(description="Whether a tracked file differs from it, or a recipe file is not tracked.")


class EnvironmentRecord(Part):
    """What the run ran on and with."""

    s2vflow: str
    python: str
    torch: str | None = Field(description="The installed version; null where there is none.")
    system: str
    machine: str
    device: str = Field(description="The class of device: cpu or cuda.")
    gpu: str | None = Field(None, description="The GPU's name, where the run used one.")
    host: str | None = Field(None, description="Only with --record-host.")
    user: str | None = Field(None, description="Only with --record-host.")


class LoraRecord(Part):
    """How much of a LoRA file found its place in the model."""

    node: str = Field(description="The plan node that used the model.")
    id: str
    matched: int = Field(description="How many of its keys have a home in the model.")
    total: int
    blocks: dict[str, int] = Field(
        {}, description="How many weights it changes in each of the model's blocks, and in `others`."
    )


class NodeRecord(Part):
    """A plan node in this run."""

    name: str
    kind: str
    status: NodeState = Field(description="live: made as it was used. skipped: nothing needed it.")
    fingerprint: Digest | None = Field(description="Its identity; null where it was not found out.")
    seconds: float | None = Field(None, description="Wall time, where it was computed in this run.")
    peak_bytes: int | None = Field(None, description="The process's peak memory when it was done.")
    peak_device_bytes: int | None = Field(None, description="The most on one GPU so far, where the run used one.")
    outputs: dict[str, Digest] = Field(description="The stored results' sha256 by port.")
    kept: bool = Field(True, description="false: the cache could not be written; the result ended with the run.")
    step_cache: dict[str, int] | None = Field(
        None, description="How many of a chunk's steps reused an earlier one's model output: it is approximate."
    )
    degraded: dict[str, JsonValue] | None = Field(
        None, description="What it was made with for lack of memory; its fingerprint is not that of what was asked for."
    )


class OutputRecord(NamedDigest):
    """A file that the run was for."""

    node: str
    size: int | None = Field(description="In bytes; null where the file was gone when the run ended.")
    changed: bool = Field(description="Whether it had to be written.")
    frames: int | None = Field(None, description="How many frames it has.")
    frames_sha256: str | None = Field(
        None, description="Of the frames before encoding, uint8 RGB, one after the other."
    )


class Manifest(Part):
    """One run: what went in, what was done, what came out."""

    manifest: Literal[1] = Field(description="The version of this format.")
    id: str = Field(description="UTC time and four random digits: 20261122-161502-7f3a.")
    status: Literal["running", "finished", "failed", "interrupted", "killed"] = Field(
        description="running: written at the start. killed: never written, found on reading: running, but no longer."
    )
    error: str | None = Field(None, description="Why it failed.")
    started: str = Field(description="UTC, ISO 8601.")
    ended: str | None = Field(description="UTC, ISO 8601; null until it ends.")
    seconds: float | None = Field(description="null until it ends.")
    recipe: RecipeRecord
    given: GivenRecord
    git: GitRecord | None = Field(None, description="null where there is no repository, or no git.")
    cells: list[str] = Field([], description="The cells of the matrix, by their labels.")
    seeds: dict[str, int] = Field(description="The seed of every chunk, by plan node.")
    files: list[FileRecord] = Field(description="Every model and input.")
    loras: list[LoraRecord]
    environment: EnvironmentRecord
    packages: dict[str, str] = Field({}, description="Others whose kinds or samplers were used: name -> version.")
    nodes: list[NodeRecord] = Field(description="Every plan node, in order.")
    outputs: list[OutputRecord]
    quality: dict[str, JsonValue] | None = Field(
        None, description="As `quality --json` prints it; by plan node in `videos` where there are several."
    )

    @field_validator("quality", mode="before")
    @classmethod
    def check_quality(cls, quality: object) -> dict[str, Any] | None:
        """Take what are no figures for none."""
        return known(quality)

    @model_validator(mode="after")
    def check_outputs(self) -> Manifest:
        """Refuse an output of a node that is not there."""
        if {item.node for item in self.outputs} - {node.name for node in self.nodes}:
            raise ValueError("an output is of no node")
        return self


class EssenceNode(Part):
    """A stored result on the way to a video."""

    kind: str
    fingerprint: Digest
    outputs: dict[str, Digest] = Field(description="sha256 by port.")


class Essence(Part):
    """What a video says of itself: enough to make it again. The same recipe and results give the same bytes."""

    essence: Literal[1] = Field(description="The version of this format.")
    node: str = Field(description="The recipe's node that wrote the video.")
    recipe: str = Field(description="The recipe with all its layers applied, without what writes other files.")
    files: list[FileRecord] = Field(description="Every model and input that went in.")
    device: str = Field(description="The class of device.")
    software: dict[str, list[str]] = Field(description="The versions of s2vflow and torch that computed the parts.")
    nodes: dict[str, EssenceNode] = Field(description="Every stored result that went in, in order; {} if too many.")
    frames: int | None = None
    frames_sha256: str | None = Field(
        None, description="Of the frames before encoding, uint8 RGB, one after the other."
    )
    chunk_starts: list[int] = Field([], description="The first frame of each chunk but the first.")


def from_text(kind: type[PartT], text: bytes) -> PartT:
    """Read what `to_text` or `to_note` wrote.

    Raises:
        ValueError, RecursionError: It is damaged, or of another version.
    """
    # not by pydantic: it may hold names that are no UTF-8, escaped; and what no float can be is no count
    found = json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < _MAX_DIGITS else inf)
    return kind.model_validate(found)


def to_text(part: Part) -> str:
    """Return a manifest as the JSON text that is stored."""
    return json.dumps(part.model_dump(mode="json"), indent=1) + "\n"


def to_note(essence: Essence) -> bytes:
    """Return an essence as the bytes that are put into a video: the same for the same content."""
    return json.dumps(essence.model_dump(mode="json"), separators=(",", ":")).encode()


def manifest_schema() -> Mapping[str, Any]:
    """Return the JSON Schema of a manifest."""
    schema = Manifest.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
