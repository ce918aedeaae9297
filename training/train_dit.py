"""Teach the DiT to draw the talking face: `python -m training.train_dit --state DIR --steps N`.

It learns from whatever clips there are and takes up new ones as they come. Mouth and expression are given as they are;
`train_audio` and `train_text` learn to hear and read them.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from s2v_flow.demo import plan
from training import state
from training.clips import EXCERPT, load_clips
from training.detail import add_detail, directions
from training.dit import SIDE, Student, keep_flags, learned_keys, measure_codes

STEP_SIGMAS = (1.0, 0.96, 8 / 9, 8 / 11)  # of four steps at shift 8
SEED = 3
HELD_OUT = 16  # the first clips judge


def main() -> None:
    """Train until `--steps` are done or `--minutes` are over; every call goes on where the last one stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, default=state.DEFAULT)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--save-every", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    train(options)


def train(options: argparse.Namespace) -> list[float]:
    """Train and return the loss of every step."""
    path = options.state / "dit.pt"
    saved = state.load_state(path)
    weights = plan.built_in()
    codes = measure_codes(weights)
    keys = learned_keys()
    if saved is not None:
        weights |= saved["weights"]
    for key in keys:
        weights[key] = torch.nn.Parameter(weights[key])
    average = saved["average"] if saved else {key: weights[key].detach().clone() for key in keys}
    step = saved["step"] if saved else 0
    matrices = [weights[key] for key in keys if weights[key].ndim > 1]
    vectors = [weights[key] for key in keys if weights[key].ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.98))
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
    keep_flags(weights)
    student = Student(weights, codes)
    generator, rng = torch.Generator().manual_seed(SEED + step), random.Random(SEED + step)
    clips: dict[str, dict[str, Tensor]] = {}
    losses: list[float] = []
    start = time.monotonic()
    while step < options.steps and (time.monotonic() - start) / 60 < options.minutes:
        if not clips or step % 25 == 0:
            load_clips(options.state, clips)
            along = directions(options.state, list(clips.values()))
            for content in clips.values():
                if "detail" not in content:
                    content["latent"] = add_detail(content["latent"].float(), content["opening"], along)
                    content["detail"] = torch.tensor(1)
            names = sorted(clips)
            held, used = names[:HELD_OUT], names[HELD_OUT:] or names
        left = 1 - step / options.steps
        for group in optimizer.param_groups:
            group["lr"] = options.rate * min(1, (step + 1) / 50) * (0.03 + 0.97 * math.sin(math.pi / 2 * left) ** 2)
        batch = Batch.of([clips[rng.choice(used)] for _ in range(options.batch)], rng, generator)
        loss = batch.loss(student)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(matrices + vectors, 1.0)
        optimizer.step()
        keep_flags(weights)
        step += 1
        losses.append(loss.item())
        with torch.no_grad():
            keep = min(0.995, step / (step + 10))
            for key in keys:
                average[key].lerp_(weights[key], 1 - keep)
        if step % options.save_every == 0 or step == options.steps:
            judged = judge(Student({**weights, **average}, codes), [clips[name] for name in held for _ in range(3)])
            minutes = (time.monotonic() - start) / 60
            recent = losses[-options.save_every :]
            print(
                f"{step} {minutes:.1f} min {len(used)} clips loss {sum(recent) / len(recent):.4f} held out {judged}",
                flush=True,
            )
            state.save_weights(average, options.state / "dit.safetensors", torch.float32)
            learned = {key: weights[key].detach() for key in keys}
            state.save_state(
                {"weights": learned, "average": average, "optimizer": optimizer.state_dict(), "step": step}, path
            )
    return losses


class Batch:
    """Clips, noised."""

    def __init__(self, clean: Tensor, sigma: Tensor, noise: Tensor, conditions: tuple[Tensor, ...]) -> None:
        self.clean, self.sigma, self.noise, self.conditions = clean, sigma, noise, conditions
        self.weight = token_weight()

    @classmethod
    def of(cls, clips: list[dict[str, Tensor]], rng: random.Random, generator: torch.Generator) -> Batch:
        """Take three latent frames of each clip, noise them, and leave the motion out in some."""
        starts = [rng.randrange(clip["latent"].shape[1] - EXCERPT + 1) for clip in clips]
        pairs = list(zip(clips, starts, strict=True))
        clean = torch.stack([clip["latent"][:, start : start + EXCERPT].float() for clip, start in pairs])
        portrait = torch.stack([clip["reference"].float() for clip in clips])[:, :, None]
        before = portrait.clone()
        for index, (clip, start) in enumerate(pairs):
            # without motion a chunk begins with a plain face; a short clip's own frame stands for motion from the third on
            is_needed = clip["is_long"] and clip["expression_before"] and start < 2
            is_fit = clip["is_long"] or clip["first"] >= 2
            if is_needed or (is_fit and rng.random() < 0.5):
                before[index, :, 0] = clip["before"].float()
        before = before + 0.1 * torch.randn(before.shape, generator=generator)
        mouth = torch.stack(
            [mouth_code(clip["opening"], clip["roundness"])[start : start + EXCERPT] for clip, start in pairs]
        )
        mouth = mouth + 0.25 * torch.randn(mouth.shape, generator=generator)
        wanted = [int(clip["expression"]) for clip in clips]
        expression = F.one_hot(torch.tensor(wanted), 5)[:, 1:] * plan.EXPRESSION_SIZE
        expression = expression + 0.25 * torch.randn(expression.shape, generator=generator)
        sigmas = [rng.choice(STEP_SIGMAS) if rng.random() < 0.7 else _shifted(rng.random()) for _ in clips]
        noise = torch.randn(clean.shape, generator=generator)
        first = torch.tensor([int(clip["first"]) + start for clip, start in pairs])
        return cls(clean, torch.tensor(sigmas), noise, (portrait, before, mouth, expression, first))

    def loss(self, student: Student) -> Tensor:
        """Return the weighted squared error of the clean latent."""
        sigma = self.sigma[:, None, None, None, None]
        found = student((1 - sigma) * self.clean + sigma * self.noise, *self.conditions)
        return ((found - self.clean).square() * self.weight).mean()


def mouth_code(opening: Tensor, roundness: Tensor) -> Tensor:
    """Return what the injector shall add for a chunk's frames [4 F]: [F, 8]."""
    both = torch.cat([opening.view(-1, 4), roundness.view(-1, 4)], 1)
    return (both - plan.MOUTH_MIDDLE) * plan.MOUTH_SIZE


def token_weight() -> Tensor:
    """Return how much each place of a latent counts, [16, 16]: the mouth most, then the eyes; 1 on average."""
    weight = torch.ones(2 * SIDE, 2 * SIDE)
    weight[5:13, 4:12] = 2  # the face
    weight[5:9, 4:12] = 3  # brows and eyes
    weight[9:13, 5:11] = 5  # the mouth
    return weight / weight.mean()


@torch.no_grad()
def judge(student: Student, clips: list[dict[str, Tensor]]) -> str:
    """Return the error on held-out clips at sigma 1, beside that of the portrait standing still."""
    batch = Batch.of(clips, random.Random(0), torch.Generator().manual_seed(0))
    batch.sigma = torch.ones(len(clips))
    still = ((batch.conditions[0] - batch.clean).square() * batch.weight).mean()
    return f"{batch.loss(student).item():.4f} (still {still.item():.4f})"


def _shifted(time: float) -> float:
    return max(8 * time / (1 + 7 * time), 0.3)


if __name__ == "__main__":
    main()
