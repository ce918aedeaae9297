"""The stored reference outputs, and the figure that says how near we are to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from s2v_flow.demo.weights import fill_all

GOLDEN = Path(__file__).parent / "golden"


def load_golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Return the tensors `in.*` and `out.*` of golden/<name>.safetensors, and the metadata's `case`."""
    inputs, outputs = {}, {}
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        case = json.loads((file.metadata() or {}).get("case", "{}"))
        for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            side, _, rest = key.partition(".")
            {"in": inputs}.get(side, outputs)[rest if side in ("in", "out") else key] = file.get_tensor(key)
    return inputs, outputs, case


def load_keys(name: str) -> dict[str, tuple[int, ...]]:
    """Return a full-size checkpoint's keys and shapes from golden/keys/<name>.json."""
    return {key: tuple(shape) for key, shape in json.loads((GOLDEN / "keys" / f"{name}.json").read_text()).items()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ||actual - expected|| / ||expected|| in float64; shapes must be equal."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm())


def fill_module(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give a module (on the meta device or not) the deterministic weights, strictly, and put it into eval mode."""
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    module.load_state_dict(fill_all(shapes, seed), strict=True, assign=True)
    return module.eval().requires_grad_(False)
