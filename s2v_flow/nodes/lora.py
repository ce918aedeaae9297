"""A LoRA in a recipe, and how much of it finds a home in the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from s2v_flow.errors import CheckpointError
from s2v_flow.graph.ports import Neutral
from s2v_flow.nodes.fields import model_file

if TYPE_CHECKING:
    from s2v_flow.models.lora import LoraReport


class Lora(BaseModel):
    """A LoRA file to put on a diffusion model."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: Annotated[str, Neutral()] = Field(
        description="A name of your choice, by which overrides address this LoRA: loras[lightning].strength.",
        pattern=r"^[A-Za-z0-9_-]+$",
    )
    file: Annotated[str, model_file("LoRA", "loras")] = Field(description="File name under the models folder's loras/.")
    strength: float = Field(1.0, ge=-10, le=10, description="Factor on the LoRA's update; 0 switches it off.")
    allow_partial: Annotated[bool, Neutral()] = Field(
        False,
        description="Accept that some of the file's keys have no home in the model (Lightning LoRAs were trained for "
        "T2V). What matched is reported either way. A LoRA of which nothing has a home is an error in any case.",
    )


def matched(loras: Sequence[Lora], checkpoint: Path | None, files: Sequence[Path | None]) -> list[LoraReport | None]:
    """Match LoRAs with a model by the files' headers; None where one of the two files is missing.

    Raises:
        CheckpointError: See `coverage_text`.
    """
    pairs = list(zip(loras, files, strict=True))
    if checkpoint is None or not checkpoint.is_file() or not pairs:
        return [None] * len(pairs)
    from s2v_flow.models.lora import LoraSpec, open_loras
    from s2v_flow.weights.quantization import read_quantization
    from s2v_flow.weights.reader import Checkpoint

    model = Checkpoint.open(checkpoint)
    quantization = read_quantization(model)
    shapes = {key: quantization.shape(model, key) for key in model.entries if key not in quantization.bookkeeping}
    reports: list[LoraReport | None] = []
    for lora, file in pairs:
        report = None
        if file is not None and file.is_file():
            (report,) = open_loras([LoraSpec(file, lora.strength)], shapes).reports
            coverage_text(lora, report)
        reports.append(report)
    return reports


def coverage(lora: Lora, report: LoraReport | None) -> dict[str, Any]:
    """Return how much of a LoRA has a home in the model, in tensors; without a report nothing is known of that."""
    known = (None, None, None) if report is None else (report.matched, report.total, list(report.unmatched))
    return {"id": lora.id, "file": lora.file, **dict(zip(("matched", "total", "unmatched"), known, strict=True))}


def coverage_text(lora: Lora, report: LoraReport) -> str:
    """Say how much of a LoRA found a home; which keys did not, `unmatched_text` says.

    Raises:
        CheckpointError: Nothing did; or not all of it, and the recipe does not allow that.
    """
    text = f"LoRA {lora.id}: {report.matched} of {report.total} tensors applied ({report.coverage:.0%})"
    if report.unmatched:
        if not report.matched:
            why = "".join(f"; {mismatch}" for mismatch in report.misshapen[:1])
            fix = f"it is for another model: name another file, or remove the LoRA {lora.id}"
            raise CheckpointError(f"{text}; {unmatched_text(report)}{why}", fix=fix)
        if not lora.allow_partial:
            fix = f"set allow_partial: true for the LoRA {lora.id} if that is meant"
            raise CheckpointError(f"{text}; {unmatched_text(report)}", fix=fix)
    return text


def unmatched_text(report: LoraReport) -> str:
    """Say which of a LoRA's keys found no home: "54 have no home in this model: ..."."""
    shown = ", ".join(report.unmatched[:5]) + (", ..." if len(report.unmatched) > 5 else "")
    return f"{len(report.unmatched)} have no home in this model: {shown}"
