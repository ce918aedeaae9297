"""What a training run keeps between calls: weights, their moving average, the optimiser, the step; whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

DEFAULT = Path.home() / ".cache" / "s2vflow-training"


def save_weights(weights: dict[str, Tensor], path: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write weights in half precision."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    save_file({key: value.detach().to(dtype).contiguous() for key, value in weights.items()}, beside)
    os.replace(beside, path)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read weights as float32."""
    return {key: value.float() for key, value in load_file(path).items()}


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write everything that a later call continues from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    torch.save(state, beside)
    os.replace(beside, path)


def load_state(path: Path) -> dict[str, Any] | None:
    """Read what `save_state` wrote, or None."""
    return torch.load(path, weights_only=True) if path.exists() else None
