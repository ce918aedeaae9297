"""Teach the DiT to read what expression a prompt asks for: `python -m training.train_text --state DIR --steps N`.

The small UMT5 stays as it is generated; the text embedding and block 0's cross-attention are learned.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from s2v_flow.demo import plan
from s2v_flow.models.load import load_text_encoder
from training import loop, state
from training.sentences import sentence

TEXT_TOKENS = 512
SEED = 21
PREFIX = "blocks.0.cross_attn"
LEARNED = (
    *("text_embedding.0.weight", "text_embedding.0.bias", "text_embedding.2.weight"),
    *(f"{PREFIX}.k.weight", f"{PREFIX}.k.bias", f"{PREFIX}.norm_k.weight", f"{PREFIX}.o.weight", f"{PREFIX}.o.bias"),
)


def main() -> None:
    """Train; it takes minutes and starts anew with every call."""
    reader = loop.parser(__doc__, steps=1500)
    reader.add_argument("--text-encoder", type=Path, required=True, help="tiny_umt5.safetensors, as it is generated")
    reader.add_argument("--sentences", type=int, default=4000)
    loop.start(reader, train)


def initial() -> dict[str, Tensor]:
    """Return what is learned, where it begins."""
    weights = {key: value for key, value in plan.built_in().items() if key in LEARNED}
    generator = torch.Generator().manual_seed(SEED)
    for key, scale in (("text_embedding.0.weight", 1 / 8), (f"{PREFIX}.k.weight", 1 / 16)):
        weights[key] = torch.randn(weights[key].shape, generator=generator) * scale
    weights[f"{PREFIX}.k.bias"] = torch.randn(plan.D, generator=generator) * 0.5
    out = torch.zeros(plan.D, plan.D)
    out[plan.EXPRESSION] = torch.randn(4, plan.D, generator=generator) / 16
    weights[f"{PREFIX}.o.weight"] = out
    return weights


def read(weights: dict[str, Tensor], tokens: Tensor, lengths: Tensor) -> Tensor:
    """Return what block 0's cross-attention adds to the expression channels.

    Args:
        weights: Those of `LEARNED`.
        tokens: [B, S, 64], zero past a prompt's end.
        lengths: [B]; the rest of 512 tokens is zero too, and attended to.

    Returns:
        [B, 4].
    """
    hidden = F.gelu(
        F.linear(tokens, weights["text_embedding.0.weight"], weights["text_embedding.0.bias"]), approximate="tanh"
    )
    hidden = F.linear(hidden, weights["text_embedding.2.weight"])  # [B, S, D]
    keys = F.linear(hidden, weights[f"{PREFIX}.k.weight"], weights[f"{PREFIX}.k.bias"])
    keys = keys * (keys.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weights[f"{PREFIX}.norm_k.weight"]
    logits = keys.unflatten(-1, (2, 128)).sum(-1) / 128**0.5  # queries are all ones: [B, S, 2]
    size = tokens.shape[1]
    count = torch.ones(len(tokens), size)
    count[:, -1] += TEXT_TOKENS - size  # the last token is zero in all, and stands for the rest
    share = (logits + count.log()[..., None]).softmax(1)  # [B, S, 2]
    attended = torch.einsum("bsh,bshk->bhk", share, hidden.unflatten(-1, (2, 128))).flatten(1)
    rows = slice(*plan.EXPRESSION.indices(plan.D)[:2])
    return F.linear(attended, weights[f"{PREFIX}.o.weight"][rows], weights[f"{PREFIX}.o.bias"][rows])


def train(options: argparse.Namespace) -> list[float]:
    """Train and return the loss of every step."""
    encoder = load_text_encoder(options.text_encoder, dtype=torch.float32, device="cpu", quantized=False)
    rng = random.Random(SEED)
    asked = {sentence(number, rng): number for number in [0, 0, 1, 2, 3, 4] * (options.sentences // 6)}
    judged = {sentence(number, rng): number for number in [0, 0, 1, 2, 3, 4] * 50}
    judged = {text: number for text, number in judged.items() if text not in asked}
    tokens, lengths, wanted = _encoded(encoder, asked)
    held_tokens, held_lengths, held_wanted = _encoded(encoder, judged)
    weights = {key: torch.nn.Parameter(value) for key, value in initial().items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=2e-3, weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, options.steps, pct_start=0.05)
    losses, start = [], time.monotonic()
    generator = torch.Generator().manual_seed(SEED)
    for step in range(options.steps):
        picked = torch.tensor([rng.randrange(len(tokens)) for _ in range(64)])
        given = tokens[picked] * (1 + 0.2 * torch.randn(tokens[picked].shape, generator=generator))
        loss = (read(weights, given, lengths[picked]) - wanted[picked]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for key in (f"{PREFIX}.o.weight", f"{PREFIX}.o.bias"):
            _only_expression(weights[key].grad)
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == options.steps:
            with torch.no_grad():
                found = read(weights, held_tokens, held_lengths)
            error = (found - held_wanted).square().mean().item()
            right = (_number(found) == _number(held_wanted)).float().mean().item()
            minutes = (time.monotonic() - start) / 60
            print(
                f"{step + 1} {minutes:.1f} min loss {losses[-1]:.4f} held out {error:.4f}, right {right:.3f}",
                flush=True,
            )
            state.save_weights(dict(weights), options.state / "text.safetensors", torch.float32)
    return losses


def _encoded(encoder: object, sentences: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    rows = [encoder.encode(text)[0] for text in sentences]  # type: ignore[attr-defined]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.nn.utils.rnn.pad_sequence([F.pad(row, (0, 0, 0, 1)) for row in rows], batch_first=True)
    tokens = F.pad(tokens, (0, 0, 0, 1))
    numbers = torch.tensor(list(sentences.values()))
    return tokens, lengths, F.one_hot(numbers, 5)[:, 1:].float() * plan.EXPRESSION_SIZE


def _number(code: Tensor) -> Tensor:
    return torch.cat([torch.full((len(code), 1), plan.EXPRESSION_SIZE / 2), code], 1).argmax(1)


def _only_expression(grad: Tensor | None) -> None:
    assert grad is not None
    kept = grad[plan.EXPRESSION].clone()
    grad.zero_()
    grad[plan.EXPRESSION] = kept


if __name__ == "__main__":
    main()
