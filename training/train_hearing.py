"""Teach the DiT's audio encoder to hear what the mouth does: `python -m training.train_hearing --state DIR`.

After `train_audio`. The sound goes the way it goes in the pipeline: Wav2Vec2, 16 rows a second, a chunk's rows with the
first one repeated in front. Learned are the convolutions and the first injector's last layer; attention there is even.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from torch import Tensor

from s2v_flow.demo import plan
from s2v_flow.demo.plan import WAV2VEC2_SIZES, generated_wav2vec2
from s2v_flow.models.dit_block import CausalAudioEncoder
from s2v_flow.models.encoders import AudioEncoder, build_wav2vec2
from s2v_flow.models.speech import to_video_rate
from training import loop, state
from training.clips import CHUNK_FRAMES
from training.train_dit import mouth_code
from training.voices import SAMPLES_PER_FRAME, mouth, speak

SEED = 31
SECONDS = 12.0
WARMUP_FRAMES = 3
STRETCH = 1.25  # of what differs within a latent frame: the DiT and the decoder, being unsure, show less of it
LEAD_IN, CUT = 9, 3  # the convolutions see 9 frames: so few copies in front give what the model's 73 give
ENCODER = "casual_audio_encoder."
INJECTOR = "audio_injector.injector.0.o"


def main() -> None:
    """Train; it takes minutes, and begins with what stands in the state folder."""
    reader = loop.parser(__doc__, steps=1200)
    reader.add_argument("--voices", type=int, default=40)
    loop.start(reader, train)


class Hearing:
    """The DiT's audio path, from a chunk's mixed features to what the injector adds to the mouth channels."""

    def __init__(self) -> None:
        self.encoder = CausalAudioEncoder(plan.CONFIG.audio_dim, plan.D)
        self.out = torch.nn.Linear(plan.D, plan.MOUTH.stop - plan.MOUTH.start)
        generator = torch.Generator().manual_seed(SEED)
        built = plan.built_in()
        weights = {key.removeprefix(ENCODER): value for key, value in built.items() if key.startswith(ENCODER)}
        for key, value in weights.items():
            if key.endswith("conv.weight"):
                weights[key] = torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
        self.encoder.load_state_dict(weights)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take the learned weights of a model."""
        for key, value in self.learned().items():
            value.data.copy_(weights[key][plan.MOUTH] if key.startswith(INJECTOR) else weights[key])

    def learned(self) -> dict[str, Tensor]:
        """Return what is learned, by key; of the injector's layer the rows of the mouth channels."""
        parts = ("conv1_local", "conv2", "conv3")
        found = {
            ENCODER + key: value for key, value in self.encoder.named_parameters() if any(part in key for part in parts)
        }
        return found | {f"{INJECTOR}.{key}": value for key, value in self.out.named_parameters()}

    def __call__(self, features: Tensor) -> Tensor:
        """Hear features [B, 4 F, E], mixed over the layers: [B, F, 8]."""
        lead_in = features[:, :1].expand(-1, LEAD_IN, -1)
        _, local = self.encoder.encoder(torch.cat([lead_in, features], dim=1), torch.float32)
        result: Tensor = self.out(local[:, CUT:].mean(2))
        return result

    def weights(self) -> dict[str, Tensor]:
        """Return the learned weights as the model's."""
        weights = {key: value.detach() for key, value in self.learned().items()}
        for kind, size in (("weight", (plan.D, plan.D)), ("bias", (plan.D,))):
            full = torch.zeros(size)
            full[plan.MOUTH] = weights[f"{INJECTOR}.{kind}"]
            weights[f"{INJECTOR}.{kind}"] = full
        return weights


def audio_encoder(path: Path) -> AudioEncoder:
    """Load the trained Wav2Vec2."""
    module = build_wav2vec2(WAV2VEC2_SIZES)
    module.load_state_dict(generated_wav2vec2() | state.load_weights(path), assign=True)
    return AudioEncoder(module.eval())


def rows(encoder: AudioEncoder, waveform: Tensor) -> Tensor:
    """Return a voice's features, evenly mixed over the layers, [T, E], after the pipeline's warm-up of silence."""
    silence = torch.zeros(WARMUP_FRAMES * SAMPLES_PER_FRAME)
    sound = encoder.mono(torch.cat([silence, waveform]), "official")
    return to_video_rate(encoder.states(sound)).rows.mean(1)


def train(options: argparse.Namespace) -> list[float]:
    """Train and return the loss of every step."""
    rng = random.Random(SEED)
    encoder = audio_encoder(options.state / "wav2vec2.safetensors")
    voices = []
    start = time.monotonic()
    for _ in range(options.voices):
        waveform = speak(SECONDS, rng)
        heard = rows(encoder, torch.from_numpy(waveform))
        padded = torch.cat([torch.zeros(WARMUP_FRAMES * SAMPLES_PER_FRAME), torch.from_numpy(waveform)]).numpy()
        opening, roundness = mouth(padded)
        count = min(len(heard), len(opening))
        voices.append((heard[:count], opening[:count], roundness[:count]))
    print(f"{len(voices)} voices in {time.monotonic() - start:.0f} s", flush=True)
    hearing = Hearing()
    path = options.state / "hearing.safetensors"
    if path.exists():
        hearing.load(state.load_weights(path))
    learned = hearing.learned()
    optimizer = torch.optim.AdamW(learned.values(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, options.steps, pct_start=0.05)
    used, held = voices[: -len(voices) // 8], voices[-len(voices) // 8 :]
    losses = []
    for step in range(options.steps):
        features, wanted = _excerpts(used, 8, rng)
        loss = (hearing(features) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned.values(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == options.steps:
            with torch.no_grad():
                features, wanted = _excerpts(held, 40, random.Random(0))
                found = hearing(features)
            sides = [
                torch.stack([part.flatten() for part in (found[..., side], wanted[..., side])])
                for side in (slice(4), slice(4, 8))
            ]
            numbers = [round(torch.corrcoef(side)[0, 1].item(), 3) for side in sides]
            print(f"{step + 1} loss {losses[-1]:.4f} held out: correlation {numbers}", flush=True)
            state.save_weights(hearing.weights(), path, torch.float32)
    return losses


def stretched(code: Tensor) -> Tensor:
    """Say what differs among the openings of each latent frame, the first four of [..., 8], `STRETCH` times as large."""
    mean = code[..., :4].mean(-1, keepdim=True)
    return torch.cat([mean + STRETCH * (code[..., :4] - mean), code[..., 4:]], -1)


def _excerpts(voices: list[tuple[Tensor, Tensor, Tensor]], count: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    features, wanted = [], []
    for _ in range(count):
        heard, opening, roundness = voices[rng.randrange(len(voices))]
        first = 0 if rng.random() < 0.1 else rng.randrange(len(heard) - CHUNK_FRAMES + 1)
        part = slice(first, first + CHUNK_FRAMES)
        rows, *shape = heard[part].clone(), opening[part].clone(), roundness[part].clone()
        if rng.random() < 0.2:  # the voice ends: the pipeline fills the chunk with zeros
            end = rng.randrange(CHUNK_FRAMES)
            for values in (rows, *shape):
                values[end:] = 0
        features.append(rows)
        wanted.append(stretched(mouth_code(*shape)))
    return torch.stack(features), torch.stack(wanted)


if __name__ == "__main__":
    main()
