"""Speak sentences by espeak-ng, and measure what the mouth does: loudness opens it, the spectrum rounds it.

Only training needs espeak-ng. Waveforms are mono at 16 kHz; frames are 1,000 samples, 16 a second.
"""

from __future__ import annotations

import io
import random
import subprocess

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

SAMPLE_RATE_HZ = 16_000
SAMPLES_PER_FRAME = 1_000
_TEXT = """
the man woman is playing guitar sings softly about rain window old sailor tells story fire robot reads news stage quick
brown fox jumps over lazy dog hello my name and today we will talk how to make video from voice picture light music river
mountain seven blue horses run across open field while children laugh under tall trees never forget what you have learned
because time moves on good morning everyone thank you for listening please open a door bread water summer winter why who
where nothing always maybe again house garden moon
"""
WORDS = tuple(_TEXT.split())
VOICES = (
    *("en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en+f2", "en+f3", "en+f4", "en+f5", "en+m2", "en+m3", "en+m4"),
    *("en-us+f1", "en-us+f2", "en-us+f3", "en-us+m1", "en-us+m5", "en-us+m7", "de", "fr", "it+f2", "es+m3"),
)


def speak(seconds: float, rng: random.Random) -> np.ndarray:
    """Make speech with pauses, float32 [seconds * 16000]."""
    parts: list[np.ndarray] = [np.zeros(int(SAMPLE_RATE_HZ * rng.uniform(0.05, 0.5)), np.float32)]
    voice, level = rng.choice(VOICES), rng.uniform(0.4, 1.0)
    speed, pitch = str(rng.randint(110, 280)), str(rng.randint(20, 80))
    wanted = int(seconds * SAMPLE_RATE_HZ)
    while sum(map(len, parts)) < wanted:
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 11)))
        command = ["espeak-ng", "-v", voice, "-s", speed, "-p", pitch, "--stdout", text]
        sound, rate = soundfile.read(
            io.BytesIO(subprocess.run(command, capture_output=True, check=True).stdout), dtype="float32"
        )
        parts.append(soxr.resample(sound, rate, SAMPLE_RATE_HZ).astype(np.float32) * level)
        parts.append(np.zeros(int(SAMPLE_RATE_HZ * rng.uniform(0.1, 0.8)), np.float32))
    speech = np.concatenate(parts)[:wanted]
    return speech + rng.uniform(0, 0.002) * np.random.default_rng(rng.getrandbits(32)).standard_normal(wanted).astype(
        np.float32
    )


def loudness(waveform: np.ndarray, hop: int = SAMPLES_PER_FRAME, delay: int = 0) -> Tensor:
    """Measure the root mean square of 1,000 samples from every `hop`-th on, in units of the whole clip's: [F]."""
    windows = _windows(waveform, hop, delay).astype(np.float64)
    return torch.from_numpy(np.sqrt((windows**2).mean(1)) / (waveform.std() + 1e-4)).float()


def mouth(waveform: np.ndarray, hop: int = SAMPLES_PER_FRAME) -> tuple[Tensor, Tensor]:
    """Tell what a mouth does: how far it opens and how round it is, both 0..1, [F]; frame i begins at sample i `hop`."""
    taps = ((-SAMPLES_PER_FRAME, 0.2), (0, 0.6), (SAMPLES_PER_FRAME, 0.2))
    level = sum(weight * loudness(waveform, hop, delay) for delay, weight in taps)
    assert isinstance(level, Tensor)
    opening = ((level - 0.08) / 2.0).clamp(0, 1)
    ratio = sum(_darkness(_windows(waveform, hop, delay)) / 3 for delay, _ in taps)
    roundness = ((ratio - 0.6) / 1.4).clamp(0, 1) * (opening * 4).clamp(0, 1)
    return opening, roundness


def _windows(waveform: np.ndarray, hop: int, delay: int) -> np.ndarray:
    """Cut windows of 1,000 samples from `delay` on, every `hop`; silence lies around the clip."""
    count = (len(waveform) - SAMPLES_PER_FRAME) // hop + 1
    padded = np.pad(waveform, SAMPLES_PER_FRAME)
    every = np.lib.stride_tricks.sliding_window_view(padded, SAMPLES_PER_FRAME)
    return every[SAMPLES_PER_FRAME + delay :: hop][:count]


def _darkness(windows: np.ndarray) -> Tensor:
    """Compare 240 to 960 Hz with 1200 to 3040 Hz: the logarithm of the ratio of powers, [F]."""
    power = np.abs(np.fft.rfft(windows * np.hanning(SAMPLES_PER_FRAME))) ** 2
    low, high = power[:, 15:60].sum(1), power[:, 75:190].sum(1)
    return torch.from_numpy(np.log10((low + 1e-6) / (high + 1e-6))).float()
