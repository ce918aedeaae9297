"""LoRA files: reading every spelling in use, and their update of a weight.

The update is W + strength * (alpha / r) * up @ down, with alpha = r where the file has none; `diff` is added to a
weight (or to a parameter itself) and `diff_b` to a bias.
Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from s2v_flow.errors import CheckpointError
from s2v_flow.weights.family import describe_mismatch
from s2v_flow.weights.reader import Checkpoint, Shapes

# (suffix, role), tried in order; "down" and "up" are the two factors
_ROLES: Sequence[tuple[str, str]] = (
    (".lora_down.weight", "down"),
    (".lora_up.weight", "up"),
    (".lora_A.weight", "down"),
    (".lora_B.weight", "up"),
    (".alpha", "alpha"),
    (".diff_b", "diff_b"),
    (".diff", "diff"),
)
_OTHER_METHODS: Sequence[tuple[str, str]] = (
    (".lokr_", "LoKr"),
    (".hada_", "LoHa"),
    (".oft_", "OFT"),
    (".dora_scale", "DoRA"),
    (".lora_magnitude_vector", "DoRA"),
    (".lora_mid.", "LoRA with a Tucker core"),
)
_DOTTED_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_UNDERSCORED_PREFIX = "lora_unet_"


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA file and how strongly it is applied."""

    path: Path
    strength: float = 1.0


@dataclass(frozen=True)
class LoraReport:
    """How much of a LoRA found a home: tensors matched of all, and the keys that did not, sorted.

    `misshapen` are those among `unmatched` whose target exists in another shape, each with both shapes.
    """

    path: Path
    strength: float
    matched: int
    total: int
    unmatched: tuple[str, ...]
    misshapen: tuple[str, ...] = ()

    @property
    def coverage(self) -> float:
        """The share of the file's tensors that were used, 0 to 1."""
        return self.matched / self.total if self.total else 0.0


@dataclass(frozen=True)
class _Target:
    """The tensors of one LoRA that change one parameter: keys in the file, by role."""

    parameter: str
    keys: Mapping[str, str]


@dataclass(frozen=True)
class LoraUpdate:
    """What one LoRA does to one parameter; tensors are read when asked for."""

    checkpoint: Checkpoint
    strength: float
    keys: Mapping[str, str]

    @property
    def is_low_rank(self) -> bool:
        """Whether the update is a product of two factors and nothing else."""
        return set(self.keys) <= {"down", "up", "alpha"}

    def factors(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Return `down` [r, in...] and `up` [out, r] (strength and alpha / r included), float32."""
        down = self.checkpoint.tensor(self.keys["down"]).to(device, torch.float32)
        up = self.checkpoint.tensor(self.keys["up"]).to(device, torch.float32).flatten(1)
        rank = down.shape[0]
        alpha = float(self.checkpoint.tensor(self.keys["alpha"]).reshape(())) if "alpha" in self.keys else float(rank)
        return down, up * (self.strength * alpha / rank)

    def add_to(self, weight: Tensor) -> Tensor:
        """Return the float32 `weight` with this update added; the argument is not changed."""
        if "down" in self.keys:
            down, up = self.factors(weight.device)
            weight = weight + (up @ down.flatten(1)).reshape(weight.shape)
        for role in ("diff", "diff_b"):
            if role in self.keys:
                difference = self.checkpoint.tensor(self.keys[role]).to(weight.device, torch.float32)
                weight = weight + self.strength * difference
        return weight


@dataclass
class LoraStack:
    """Several LoRAs on one model: the updates of each parameter in order, and a report for each file."""

    updates: dict[str, list[LoraUpdate]] = field(default_factory=dict)
    reports: list[LoraReport] = field(default_factory=list)

    def merge(self, key: str, weight: Tensor) -> Tensor:
        """Return the float32 `weight` named `key` with every update added, in order."""
        for update in self.updates.get(key, ()):
            weight = update.add_to(weight)
        return weight

    def is_low_rank(self, key: str) -> bool:
        """Whether every update of `key` is a product of two factors."""
        return all(update.is_low_rank for update in self.updates.get(key, ()))

    def side_branch(self, key: str, device: torch.device | str, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Join the factors of every update of `key`: down [R, in] and up [out, R], or None where there is none."""
        factors = [update.factors(device) for update in self.updates.get(key, ())]
        if not factors:
            return None
        down = torch.cat([down.flatten(1) for down, _ in factors]).to(dtype)  # [R, in]
        up = torch.cat([up for _, up in factors], dim=1).to(dtype)  # [out, R]
        return down, up


def open_loras(specs: Iterable[LoraSpec], shapes: Shapes) -> LoraStack:
    """Open LoRA files and match them with a model; no tensor is read.

    Args:
        specs: The files with their strengths, in the order in which they are applied.
        shapes: The model's parameters: key to shape.

    Returns:
        The updates by parameter, and a report for each file. Keys without a home are reported, not an error.

    Raises:
        MissingError, RefusedError, CheckpointError: A file is missing, a pickle, damaged, or no LoRA.
    """
    stack = LoraStack()
    for spec in specs:
        checkpoint = Checkpoint.open(spec.path)
        mismatch = describe_mismatch("lora", checkpoint.shapes)
        if mismatch:
            raise CheckpointError(f"{spec.path}: {mismatch}")
        _match(spec, checkpoint, shapes, stack)
    return stack


def _match(spec: LoraSpec, checkpoint: Checkpoint, shapes: Shapes, stack: LoraStack) -> None:
    unmatched: list[str] = []
    misshapen: list[str] = []
    for target in _targets(checkpoint, shapes, unmatched):
        mismatch = _shape_mismatch(target, checkpoint.shapes, shapes[target.parameter])
        if mismatch:
            misshapen.append(f"{target.parameter}: {mismatch}")
            unmatched.extend(target.keys.values())
        else:
            update = LoraUpdate(checkpoint, spec.strength, target.keys)
            stack.updates.setdefault(target.parameter, []).append(update)
    total = len(checkpoint.entries)
    report = LoraReport(
        spec.path, spec.strength, total - len(unmatched), total, tuple(sorted(unmatched)), tuple(sorted(misshapen))
    )
    stack.reports.append(report)


def _targets(checkpoint: Checkpoint, shapes: Shapes, unmatched: list[str]) -> list[_Target]:
    """Group a LoRA's keys by the parameter they change; keys without a home are added to `unmatched`."""
    underscored = {key.removesuffix(".weight").replace(".", "_"): key.removesuffix(".weight") for key in shapes}
    groups: dict[str, dict[str, str]] = {}
    for key in checkpoint.entries:
        for mark, method in _OTHER_METHODS:
            if mark in key:
                raise CheckpointError(f"{checkpoint.path}: is a {method} file ({key!r}), which is not supported")
        suffix, role = next(((suffix, role) for suffix, role in _ROLES if key.endswith(suffix)), ("", ""))
        module = _module_path(key.removesuffix(suffix), underscored) if role else ""
        parameter = module + ".bias" if role == "diff_b" else module + ".weight"
        if role == "diff" and parameter not in shapes:
            parameter = module  # a parameter of its own, such as blocks.0.modulation
        if role and parameter in shapes:
            groups.setdefault(parameter, {})[role] = key
        else:
            unmatched.append(key)
    for parameter, keys in groups.items():
        _check_pair(checkpoint, parameter, keys)
    return [_Target(parameter, keys) for parameter, keys in groups.items()]


def _module_path(name: str, underscored: Mapping[str, str]) -> str:
    if name.startswith(_UNDERSCORED_PREFIX):
        name = name.removeprefix(_UNDERSCORED_PREFIX)
        return underscored.get(name, name)
    for prefix in _DOTTED_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _check_pair(checkpoint: Checkpoint, parameter: str, keys: Mapping[str, str]) -> None:
    if ("down" in keys) != ("up" in keys):
        found = ", ".join(repr(key) for key in sorted(keys.values()))
        raise CheckpointError(f"{checkpoint.path}: damaged: {parameter!r} has {found}, but not both factors")


def _shape_mismatch(target: _Target, shapes: Shapes, expected: tuple[int, ...]) -> str | None:
    """Compare a target's tensors with the parameter's shape; return both shapes if they do not fit."""
    if "down" in target.keys:
        down, up = shapes[target.keys["down"]], shapes[target.keys["up"]]
        product = (*up[:1], *down[1:])
        if not down or product != expected or up[1:2] != down[:1] or any(size != 1 for size in up[2:]):
            return f"up {list(up)} times down {list(down)} does not give {list(expected)}"
        alpha = shapes[target.keys["alpha"]] if "alpha" in target.keys else ()
        if math.prod(alpha) != 1 or down[0] < 1:
            return f"alpha has the shape {list(alpha)} and the factors the rank {down[0]}"
    for role in ("diff", "diff_b"):
        if role in target.keys and shapes[target.keys[role]] != expected:
            return f"{role} has the shape {list(shapes[target.keys[role]])}, expected {list(expected)}"
    return None
