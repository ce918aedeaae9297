"""The DiT's video tokens, differentiably: what is constant or fixed by the plan is worked out once.

It computes what the package's model computes with the same weights, to a few parts in ten thousand; a test compares.
B batch, F latent frames, S tokens of a frame (64), D width, P patch values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from s2v_flow.demo import plan
from s2v_flow.models.attention import Grid, rotation_table
from s2v_flow.models.conditioning import Branch
from s2v_flow.models.dit import WanS2V

SIDE = 8  # tokens in a row or column
NUM_FRAMES = 10


def patches(latent: Tensor) -> Tensor:
    """Cut a latent [B, 16, F, 16, 16] into patches [B, F, S, P], values in the order channel, row, column."""
    cut = latent.unflatten(-1, (SIDE, 2)).unflatten(-3, (SIDE, 2))  # [B, C, F, 8, 2, 8, 2]
    return cut.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(2, 3)


def unpatched(values: Tensor) -> Tensor:
    """Undo `patches`."""
    cut = values.unflatten(2, (SIDE, SIDE)).unflatten(-1, (16, 2, 2))  # [B, F, 8, 8, C, 2, 2]
    return cut.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)


@dataclass(frozen=True)
class Codes:
    """What blocks 1 and 2 write: time [F, S, 2] and place [F, S, 2]; and which neighbours blocks 3 and 4 see."""

    time: Tensor
    place: Tensor
    neighbours: Mapping[int, Tensor]


@torch.no_grad()
def measure_codes(weights: Mapping[str, Tensor]) -> Codes:
    """Run the package's model on a grey portrait and read the codes."""
    model = WanS2V(plan.CONFIG)
    model.load_state_dict(dict(weights))
    model.eval()
    streams: dict[int, Tensor] = {}
    for index in (1, 2):
        block = cast("torch.nn.ModuleList", model.blocks)[index]
        block.register_forward_hook(lambda _, __, out, index=index: streams.__setitem__(index, out[0].clone()))
        for name in ("ffn.2.weight", "ffn.2.bias"):
            block.get_parameter(name).zero_()
    generator = torch.Generator().manual_seed(0)
    portrait, noise = (torch.randn(1, 16, frames, 16, 16, generator=generator) for frames in (1, NUM_FRAMES))
    chunk = model.prepare_chunk(
        num_latent_frames=NUM_FRAMES,
        height=2 * SIDE,
        width=2 * SIDE,
        reference_latent=portrait,
        control_latent=torch.zeros(1, 16, 1, 2, 2),
        conditioning="official",
    )
    text = model.prepare_text(torch.zeros(1, 8, plan.CONFIG.text_dim))
    model(noise, torch.tensor([900.0]), chunk, [Branch(text)])
    video = {
        index: stream[0, : NUM_FRAMES * SIDE * SIDE].unflatten(0, (NUM_FRAMES, -1)) for index, stream in streams.items()
    }
    seen = {index: _attention(weights, index) for index in plan.LEARNED_ATTENTION}
    return Codes(video[1][..., list(plan.TIME)], video[2][..., list(plan.PLACE)], seen)


def _attention(weights: Mapping[str, Tensor], index: int) -> Tensor:
    """Return how a frame's tokens attend to one another: [2 heads, S, S]."""
    prefix = f"blocks.{index}.self_attn"
    rotations = torch.view_as_complex(rotation_table([Grid.dense(1, SIDE, SIDE)])[:, 0])  # [S, 64]
    q, k = (
        torch.view_as_complex(
            (weights[f"{prefix}.{name}.bias"] * weights[f"{prefix}.norm_{name}.weight"]).view(2, 64, 2)
        )
        for name in ("q", "k")
    )
    turned_q, turned_k = q[:, None] * rotations, k[:, None] * rotations
    return ((turned_q @ turned_k.mH).real / 128**0.5).softmax(-1)


class Student:
    """The model on video tokens alone.

    Args:
        weights: All weights; those in `learned_keys` may require gradients.
        codes: From `measure_codes`.
    """

    def __init__(self, weights: Mapping[str, Tensor], codes: Codes) -> None:
        self.weights = weights
        self.codes = codes
        self.basis = plan.basis()
        self.copied = _attention(weights, 0)[0]

    def __call__(
        self, noisy: Tensor, portrait: Tensor, before: Tensor, mouth: Tensor, expression: Tensor, first: Tensor
    ) -> Tensor:
        """Predict the clean latent.

        Args:
            noisy: [B, 16, F, 16, 16].
            portrait: [B, 16, 1, 16, 16].
            before: The newest frame of motion, or the portrait again; [B, 16, 1, 16, 16].
            mouth: [B, F, 8], as the injector adds it.
            expression: [B, 4], as the cross-attention adds it.
            first: Which latent frame of the chunk the first one is, [B], int64.
        """
        w = self.weights
        batch, _, frames = noisy.shape[:3]
        x = noisy.new_zeros(batch, frames, SIDE * SIDE, plan.D)
        x[..., plan.NOISY] = patches(noisy) @ self.basis
        x[..., plan.CONSTANT] = w["trainable_cond_mask.weight"][0, plan.CONSTANT]
        x[..., plan.PORTRAIT] = self._fetched(portrait)
        x[..., plan.BEFORE] = self._fetched(before)
        x[..., plan.MOUTH] = mouth[:, :, None]
        x[..., plan.EXPRESSION] = expression[:, None, None]
        numbers = first[:, None] + torch.arange(frames)  # [B, F]
        for index in range(1, plan.CONFIG.num_layers):
            prefix = f"blocks.{index}"
            if index == 1:
                x = _written(x, plan.TIME, self.codes.time[numbers])
            elif index == 2:
                x = _written(x, plan.PLACE, self.codes.place[numbers])
            else:
                values = F.linear(
                    self._norm(index, x, 0), w[f"{prefix}.self_attn.v.weight"], w[f"{prefix}.self_attn.v.bias"]
                )
                seen = torch.einsum("hsz,bfzhk->bfshk", self.codes.neighbours[index], values.unflatten(-1, (2, 128)))
                x = x + F.linear(seen.flatten(-2), w[f"{prefix}.self_attn.o.weight"], w[f"{prefix}.self_attn.o.bias"])
            hidden = F.linear(self._norm(index, x, 3), w[f"{prefix}.ffn.0.weight"], w[f"{prefix}.ffn.0.bias"])
            hidden = F.gelu(hidden, approximate="tanh")
            x = x + F.linear(hidden, w[f"{prefix}.ffn.2.weight"], w[f"{prefix}.ffn.2.bias"])
        normed = F.layer_norm(x, (plan.D,), eps=1e-6) * plan.GAIN
        # velocity is (noisy - clean) / sigma, and the head's gain 1 / sigma: this is sigma times the velocity
        return noisy - unpatched((normed[..., plan.NOISY] - normed[..., plan.PORTRAIT]) @ self.basis.T)

    def _fetched(self, latent: Tensor) -> Tensor:
        """Return a still frame's patches as block 0 copies them: [B, 1, S, 72]."""
        values = patches(latent) @ self.basis  # [B, 1, S, 72]
        square = values.square().sum(-1, keepdim=True) + 16 * plan.CONSTANT_SIZE**2 + 2 * plan.FLAG**2
        gain = plan.GAIN / (square / plan.D).sqrt()
        return self.copied @ (values * gain)

    def _norm(self, index: int, x: Tensor, row: int) -> Tensor:
        modulation = self.weights[f"blocks.{index}.modulation"][0]
        return F.layer_norm(x, (plan.D,), eps=1e-6) * (1 + modulation[row + 1]) + modulation[row]


def _written(x: Tensor, channels: tuple[int, int], code: Tensor) -> Tensor:
    added = x.new_zeros(*code.shape[:-1], plan.D)
    added[..., list(channels)] = code
    return x + added


def learned_keys() -> list[str]:
    """Return the keys that `train_dit` learns."""
    keys = [
        f"blocks.{index}.ffn.{part}.{kind}"
        for index in plan.LEARNED_FFN
        for part in (0, 2)
        for kind in ("weight", "bias")
    ]
    return keys + [
        f"blocks.{index}.self_attn.{part}.{kind}"
        for index in plan.LEARNED_ATTENTION
        for part in "vo"
        for kind in ("weight", "bias")
    ]


def keep_flags(weights: Mapping[str, Tensor]) -> None:
    """Let nothing learned write to the flags: attention reads them. In place."""
    for key in learned_keys():
        if ".ffn.2." in key or ".self_attn.o." in key:
            weights[key].data[[*plan.REFERENCE_FLAG, *plan.MOTION_FLAG]] = 0
