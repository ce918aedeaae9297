"""LoRA files: reading every spelling in use, and their update of a weight.

The update is W + strength * (alpha / r) * up @ down, with alpha = r where the file has none; `diff` is added to a
weight (or to a parameter itself) and `diff_b` to a bias. LoHa's update is the element-wise product of two such
products, LoKr's the Kronecker product of two factors; DoRA gives the changed weight's rows a magnitude of their own.
Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1; Yeh et al., "Navigating
Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", 2023, section 3; Liu et al., "DoRA:
Weight-Decomposed Low-Rank Adaptation", 2024, equation 5.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from s2v_flow.errors import CheckpointError
from s2v_flow.weights.family import describe_mismatch
from s2v_flow.weights.names import Layers, other_method, read_key
from s2v_flow.weights.reader import Checkpoint, Shapes

if TYPE_CHECKING:  # planning matches files by their headers, without torch
    import torch
    from torch import Tensor

_FIX = "download the file again, or use another"
_OTHER_FILE = "use a LoRA, LoKr, LoHa or DoRA"
_LOW_RANK = {"down", "up", "alpha"}
LIVE_AVATAR_RANK = 128
_LIVE_AVATAR_NAME = re.compile(r"live[-_ ]?avatar", re.IGNORECASE)
_LIVE_AVATAR = {
    *(f"blocks.N.{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"),
    *("blocks.N.ffn.0", "blocks.N.ffn.2"),
    *(f"audio_injector.injector.N.{name}" for name in "qkvo"),
}
# What each way of changing a weight needs; LoKr's factors may be products themselves.
_WHOLE = (
    {"down", "up"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    {"lokr_w1", "lokr_w2"},
    {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
)


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA file and how strongly it is applied."""

    path: Path
    strength: float = 1.0


@dataclass(frozen=True)
class LoraReport:
    """How much of a LoRA found a home: tensors matched of all, and the keys that did not, sorted.

    `misshapen` are those among `unmatched` whose target exists in another shape, each with both shapes.
    `is_causal`: it is LiveAvatar's, by the file's name or what its metadata says, or by layers, rank and lack of alpha.
    `blocks`: how many weights it changes in each block of the model ("0", "1", ...), and in "others".
    `updates`: what it does to each of them. `told_scale`: alpha / rank as its metadata says, where nothing applies it.
    """

    path: Path
    strength: float
    matched: int
    total: int
    unmatched: tuple[str, ...]
    misshapen: tuple[str, ...] = ()
    is_causal: bool = False
    blocks: Mapping[str, int] = field(default_factory=dict)
    updates: Collection[LoraUpdate] = ()
    told_scale: float = 1.0

    def is_idle(self) -> bool:
        """Tell whether it changes no weight, by its strength or its values, which are read up to the first change."""
        return self.strength == 0 or all(update.is_zero() for update in self.updates)

    @property
    def coverage(self) -> float:
        """The share of the file's tensors that were used, 0 to 1."""
        return self.matched / self.total if self.total else 0.0


@dataclass(frozen=True)
class LoraUpdate:
    """What one LoRA does to one parameter; tensors are read when asked for."""

    checkpoint: Checkpoint
    strength: float
    keys: Mapping[str, str]

    @property
    def is_low_rank(self) -> bool:
        """Whether the update is a product of two factors and nothing else."""
        return set(self.keys) <= _LOW_RANK

    def is_zero(self) -> bool:
        """Tell by the values whether it adds nothing at any strength; a magnitude always may."""
        has = {role: bool(self._read(role, "cpu").any()) for role in self.keys}
        added = [has.pop(role) for role in ("diff", "diff_b") if role in has]
        return "magnitude" not in has and not any(added) and not (has and all(has.values()))

    def factors(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Return `down` [r, in...] and `up` [out, r] (strength and alpha / r included), float32."""
        down, up = self._read("down", device), self._read("up", device).flatten(1)
        return down, up * (self.strength * self._scale(down.shape[0], device))

    def add_to(self, weight: Tensor) -> Tensor:
        """Return the float32 `weight` with this update added; the argument is not changed."""
        device, changed = weight.device, weight
        if "magnitude" in self.keys:
            changed = changed + self.strength * (self._decomposed(weight) - weight)
        elif "down" in self.keys:
            down, up = self.factors(device)
            changed = changed + (up @ down.flatten(1)).reshape(weight.shape)
        elif "hada_w1_a" in self.keys:
            one, two = (self._read(f"hada_w{n}_a", device) @ self._read(f"hada_w{n}_b", device) for n in (1, 2))
            rank = self.checkpoint.shapes[self.keys["hada_w1_b"]][0]
            changed = changed + (one * two * (self.strength * self._scale(rank, device))).reshape(weight.shape)
        elif "lokr_w1" in self.keys or "lokr_w1_a" in self.keys:
            changed = changed + self._kronecker(device).reshape(weight.shape)
        for role in ("diff", "diff_b"):
            if role in self.keys:
                changed = changed + self.strength * self._read(role, device)
        return changed

    def _read(self, role: str, device: torch.device | str) -> Tensor:
        return self.checkpoint.tensor(self.keys[role]).to(device).float()

    def _scale(self, rank: int, device: torch.device | str) -> float:
        """Return alpha / rank; 1 where the file has no alpha."""
        return float(self._read("alpha", device).reshape(())) / rank if "alpha" in self.keys else 1.0

    def _decomposed(self, weight: Tensor) -> Tensor:
        """Return DoRA's weight: the direction of W with the factors' change, and a magnitude for each row or column."""
        import torch

        keys = {role: key for role, key in self.keys.items() if role not in ("magnitude", "diff")}
        moved = replace(self, strength=1.0, keys=keys).add_to(weight)
        magnitude = self._read("magnitude", weight.device)
        by_row = magnitude.shape[0] == weight.shape[0]
        axes = [axis for axis in range(weight.ndim) if axis != (0 if by_row else 1)]
        length: Tensor = torch.linalg.vector_norm(moved, dim=axes, keepdim=True)
        decomposed: Tensor = moved * (magnitude.reshape(length.shape) / length)
        return decomposed

    def _kronecker(self, device: torch.device | str) -> Tensor:
        """Return LoKr's change of a weight, strength included."""
        import torch

        factors, rank = [], None
        for n in (1, 2):
            if f"lokr_w{n}" in self.keys:
                factors.append(self._read(f"lokr_w{n}", device))
            else:
                first, second = (self._read(f"lokr_w{n}_{part}", device) for part in "ab")
                rank = second.shape[0]
                factors.append(first @ second)
        scale = 1.0 if rank is None else self._scale(rank, device)
        return torch.kron(factors[0], factors[1].flatten(1)) * (self.strength * scale)


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
        import torch

        factors = [update.factors(device) for update in self.updates.get(key, ())]
        if not factors:
            return None
        down = torch.cat([down.flatten(1) for down, _ in factors]).to(dtype)  # [R, in]
        up = torch.cat([up for _, up in factors], dim=1).to(dtype)  # [out, R]
        return down, up


def open_loras(specs: Iterable[LoraSpec], shapes: Shapes) -> LoraStack:
    """Open LoRA files, in the order in which they are applied, and match them with a model; no tensor is read.

    Keys without a home are reported, not an error. `shapes`: the model's parameters: key to shape.

    Raises:
        MissingError, RefusedError, CheckpointError: A file is missing, a pickle, damaged, or no LoRA.
    """
    stack = LoraStack()
    for spec in specs:
        checkpoint = Checkpoint.open(spec.path)
        if mismatch := describe_mismatch("lora", checkpoint.shapes):
            raise CheckpointError(f"{spec.path}: {mismatch}", _OTHER_FILE)
        _match(spec, checkpoint, shapes, stack)
    return stack


def _match(spec: LoraSpec, checkpoint: Checkpoint, shapes: Shapes, stack: LoraStack) -> None:
    unmatched: list[str] = []
    misshapen: list[str] = []
    updates: dict[str, LoraUpdate] = {}
    for parameter, keys in _targets(checkpoint, shapes, unmatched).items():
        sizes = {role: checkpoint.shapes[key] for role, key in keys.items()}
        if mismatch := _shape_mismatch(sizes, shapes[parameter]):
            misshapen.append(f"{parameter}: {mismatch}")
            unmatched.extend(keys.values())
        else:
            updates[parameter] = LoraUpdate(checkpoint, spec.strength, keys)
            stack.updates.setdefault(parameter, []).append(updates[parameter])
    found = (re.match(r"blocks\.(\d+)\.", name) for name in updates)
    blocks = dict(Counter("others" if block is None else block[1] for block in found))
    total = len(checkpoint.entries)
    lost, unfit = tuple(sorted(unmatched)), tuple(sorted(misshapen))
    told = (_is_causal(checkpoint, updates), blocks, tuple(updates.values()), _told_scale(checkpoint))
    stack.reports.append(LoraReport(spec.path, spec.strength, total - len(unmatched), total, lost, unfit, *told))


def _told_scale(checkpoint: Checkpoint) -> float:
    """Return alpha / rank from the metadata that diffusers writes and ComfyUI does not read; 1 where tensors say it."""
    try:
        told = json.loads(checkpoint.metadata["lora_adapter_metadata"])
        own = {name.rpartition(".")[2]: value for name, value in told.items() if not name.startswith("text_encoder")}
        scale = float(own["lora_alpha"] / (math.sqrt(own["r"]) if own.get("use_rslora") else own["r"]))
    except (KeyError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return 1.0
    return 1.0 if any(key.endswith(".alpha") for key in checkpoint.entries) else scale


def _is_causal(checkpoint: Checkpoint, updates: Mapping[str, LoraUpdate]) -> bool:
    """Source: Alibaba-Quark/LiveAvatar, liveavatar/configs/s2v_causal_sft.yaml: rank 128 on these layers."""
    if any(_LIVE_AVATAR_NAME.search(text) for text in (checkpoint.path.name, *checkpoint.metadata.values())):
        return True
    layers = {re.sub(r"\d+", "N", name.removesuffix(".weight"), count=1) for name in updates}
    ranks = {checkpoint.shapes[update.keys["down"]][0] for update in updates.values() if "down" in update.keys}
    is_plain = all(set(update.keys) == {"down", "up"} for update in updates.values())
    return layers == _LIVE_AVATAR and is_plain and ranks == {LIVE_AVATAR_RANK}


def _targets(checkpoint: Checkpoint, shapes: Shapes, unmatched: list[str]) -> dict[str, dict[str, str]]:
    """Group a LoRA's keys by the parameter they change, and by role; those without a home are added to `unmatched`."""
    layers = Layers(shapes)
    groups: dict[str, dict[str, str]] = {}
    for key in checkpoint.entries:
        if method := other_method(key):
            raise CheckpointError(f"{checkpoint.path}: is {method} ({key!r}), which is not supported", _OTHER_FILE)
        found = read_key(key)
        parameter = None if found is None else layers.parameter(*found)
        if found is None or parameter is None:
            unmatched.append(key)
        elif groups.setdefault(parameter, {}).setdefault(found[1], key) != key:
            both = f"{groups[parameter][found[1]]!r} and {key!r}"
            raise CheckpointError(f"{checkpoint.path}: damaged: {both} are the same part of {parameter!r}", _FIX)
    for parameter, keys in groups.items():
        _check_whole(checkpoint, parameter, keys)
    return groups


def _check_whole(checkpoint: Checkpoint, parameter: str, keys: Mapping[str, str]) -> None:
    parts = set(keys) - {"alpha", "diff", "diff_b", "magnitude"}
    if parts and parts not in _WHOLE:
        found = ", ".join(repr(key) for key in sorted(keys.values()))
        raise CheckpointError(f"{checkpoint.path}: damaged: {parameter!r} has {found}, but not both factors", _FIX)
    unread = [key for role, key in keys.items() if role != "alpha" and checkpoint.dtypes[key][:1] not in "FB"]
    if unread:
        what = f"{unread[0]!r} is {checkpoint.dtypes[unread[0]]}: factors are read in float only"
        raise CheckpointError(f"{checkpoint.path}: {what}", "use a file in bf16 or fp16")


def _shape_mismatch(sizes: Shapes, expected: tuple[int, ...]) -> str | None:
    """Compare the shapes of tensors, by role, with the parameter's; return both shapes if they do not fit."""
    flat = (*expected[:1], math.prod(expected[1:]))
    if "down" in sizes:
        down, up = sizes["down"], sizes["up"]
        product = (*up[:1], math.prod(down[1:]))
        if len(down) < 2 or product != flat or up[1:2] != down[:1] or any(size != 1 for size in up[2:]):
            return f"up {list(up)} times down {list(down)} does not give {list(expected)}"
        if down[0] < 1:
            return "the factors have the rank 0"
    elif "hada_w1_a" in sizes:
        pairs = [(sizes[f"hada_w{n}_a"], sizes[f"hada_w{n}_b"]) for n in (1, 2)]
        if any(_product(a, b) != flat for a, b in pairs):
            return f"{[list(part) for pair in pairs for part in pair]} do not give {list(expected)}"
    elif "lokr_w1" in sizes or "lokr_w1_a" in sizes:
        one, two = (sizes.get(f"lokr_w{n}") or _product(sizes[f"lokr_w{n}_a"], sizes[f"lokr_w{n}_b"]) for n in (1, 2))
        two = two and (*two[:1], math.prod(two[1:]))
        if not one or not two or len(one) != 2 or (one[0] * two[0], one[1] * two[1]) != flat:
            return f"the Kronecker product of {list(one or ())} and {list(two or ())} does not give {list(expected)}"
    if "alpha" in sizes and math.prod(sizes["alpha"]) != 1:
        return f"alpha has the shape {list(sizes['alpha'])}"
    if "magnitude" in sizes and not sizes.keys() - {"magnitude", "alpha", "diff"}:
        return "a magnitude stands without factors"
    if "magnitude" in sizes and math.prod(sizes["magnitude"]) not in expected[:2]:
        return f"the magnitude has the shape {list(sizes['magnitude'])}, expected {expected[0]} rows"
    for role in ("diff", "diff_b"):
        if role in sizes and sizes[role] != expected:
            return f"{role} has the shape {list(sizes[role])}, expected {list(expected)}"
    return None


def _product(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape of a @ b, None where they do not fit."""
    return (a[0], b[1]) if len(a) == len(b) == 2 and a[1] == b[0] and b[0] > 0 else None
