"""Teach the DiT to draw the talking face: `python -m training.train_dit --state DIR --steps N`.

It learns from whatever clips there are and takes up new ones as they come. Mouth and expression are given as they are;
`train_audio` and `train_text` learn to hear and read them.
"""

from __future__ import annotations

import argparse
import random

import torch
import torch.nn.functional as F
from torch import Tensor

from s2v_flow.demo import plan
from training import loop, state
from training.clips import EXCERPT, load_clips
from training.detail import add_detail, directions
from training.dit import SIDE, Student, keep_flags, learned_keys, measure_codes

STEP_SIGMAS = (1.0, 0.96, 8 / 9, 8 / 11)  # of four steps at shift 8
SEED = 3
HELD_OUT = 16  # the first clips judge


def main() -> None:
    """Train until `--steps` are done or `--minutes` are over; every call goes on where the last one stopped."""
    reader = loop.long_parser(__doc__, steps=6000, rate=1.5e-3, save_every=50)
    reader.add_argument("--batch", type=int, default=16)
    loop.start(reader, train)


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
    matrices = [weights[key] for key in keys if weights[key].ndim > 1]
    vectors = [weights[key] for key in keys if weights[key].ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    learned = {key: weights[key] for key in keys}
    run = loop.Loop(options, path, saved, learned, groups, memory=0.995, warmup=50)
    keep_flags(weights)
    student = Student(weights, codes)
    generator, rng = torch.Generator().manual_seed(SEED + run.step), random.Random(SEED + run.step)
    clips: dict[str, dict[str, Tensor]] = {}
    for step in run.steps():
        if not clips or step % 25 == 0:
            load_clips(options.state, clips)
            along = directions(options.state, list(clips.values()))
            for content in clips.values():
                if "detail" not in content:
                    content["latent"] = add_detail(content["latent"].float(), content["opening"], along)
                    content["detail"] = torch.tensor(1)
            names = sorted(clips)
            held, used = names[:HELD_OUT], names[HELD_OUT:] or names
        batch = Batch.of([clips[rng.choice(used)] for _ in range(options.batch)], rng, generator)
        run.learn(batch.loss(student), mend=lambda: keep_flags(weights))
        if run.is_due:
            judged = judge(Student({**weights, **run.average}, codes), [clips[name] for name in held for _ in range(3)])
            print(
                f"{run.step} {run.minutes:.1f} min {len(used)} clips loss {run.recent(run.losses):.4f} held out {judged}",
                flush=True,
            )
            state.save_weights(run.average, options.state / "dit.safetensors", torch.float32)
            run.save()
    return run.losses


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
