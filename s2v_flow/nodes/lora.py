"""A LoRA in a recipe, and how much of it finds a home in the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
        "T2V). What matched is reported either way.",
    )


def matched(lora: Lora, checkpoint: Path | None, file: Path | None) -> LoraReport | None:
    """Match a LoRA with a model by the files' headers; None where one of the files is missing.

    Raises:
        CheckpointError: The LoRA has keys without a home, and the recipe does not allow that.
    """
    if checkpoint is None or file is None or not (checkpoint.is_file() and file.is_file()):
        return None
    from s2v_flow.models.lora import LoraSpec, open_loras
    from s2v_flow.weights.quantization import read_quantization
    from s2v_flow.weights.reader import Checkpoint

    model = Checkpoint.open(checkpoint)
    quantization = read_quantization(model)
    shapes = {key: quantization.shape(model, key) for key in model.entries if key not in quantization.bookkeeping}
    (report,) = open_loras([LoraSpec(file, lora.strength)], shapes).reports
    coverage_text(lora, report)
    return report


def coverage_text(lora: Lora, report: LoraReport) -> str:
    """Say how much of a LoRA found a home; which keys did not, `unmatched_text` says.

    Raises:
        CheckpointError: Not all of it did, and the recipe does not allow that.
    """
    text = f"LoRA {lora.id}: {report.matched} of {report.total} tensors applied ({report.coverage:.0%})"
    if report.unmatched and not lora.allow_partial:
        fix = f"set allow_partial: true for the LoRA {lora.id} if that is meant"
        raise CheckpointError(f"{text}; {unmatched_text(report)}", fix=fix)
    return text


def unmatched_text(report: LoraReport) -> str:
    """Say which of a LoRA's keys found no home: "54 have no home in this model: ..."."""
    shown = ", ".join(report.unmatched[:5]) + (", ..." if len(report.unmatched) > 5 else "")
    return f"{len(report.unmatched)} have no home in this model: {shown}"
