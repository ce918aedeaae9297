"""Where sound and the audio encoder meet: a voice, as a whole or in windows, to files. Imports torch: used in run()."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from s2v_flow.media.resample import speech_blocks
from s2v_flow.models import speech
from s2v_flow.models.audio_encoder import AudioEncoder, require_state
from s2v_flow.models.speech import Loudness, SpeechTable
from s2v_flow.models.speech_rate import SAMPLES_PER_FRAME, segment_port

if TYPE_CHECKING:
    from s2v_flow.media.audio import Sound
    from s2v_flow.nodes.encode import EncodeAudio


def hear(node: EncodeAudio, scratch: Path, sound: Sound, encoder: AudioEncoder) -> Iterator[Path]:
    """Encode a voice and write its segments, one safetensors file each, as they come.

    Args:
        node: How.
        scratch: A folder for the files.
        sound: The voice.
        encoder: The audio encoder.

    Raises:
        MediaError: The voice is shorter than one state of the encoder.
    """
    num_samples = node.num_samples(sound.num_samples, sound.sample_rate_hz)
    require_state(num_samples)
    window = node.window_states(num_samples)
    if window is None:
        waveform = torch.from_numpy(np.concatenate([*_waveform(node, sound)]))
        mono = encoder.mono(waveform, node.conditioning)
        tables = speech.to_video_rate(encoder.states(mono, final_norm=node.final_norm)).segments()
    else:
        tables = _in_windows(node, scratch / "waveform", sound, encoder, window)
    for index, table in enumerate(tables):
        path = scratch / f"{segment_port(index)}.safetensors"
        save_file(_tensors(table), path)
        yield path


def _waveform(node: EncodeAudio, sound: Sound) -> Iterator[np.ndarray]:
    """Yield what the encoder hears: silence, then the voice, mono float32 [n] at 16 kHz."""
    yield np.zeros(node.warmup_frames * SAMPLES_PER_FRAME, np.float32)
    yield from speech_blocks(sound, node.conditioning)


def _in_windows(
    node: EncodeAudio, path: Path, sound: Sound, encoder: AudioEncoder, window_states: int
) -> Iterator[SpeechTable]:
    """Encode in windows; the waveform lies in a file at `path`, so that memory does not grow with its length."""
    loudness = Loudness()
    with path.open("wb") as file:
        for block in _waveform(node, sound):
            loudness.add(torch.from_numpy(block))
            file.write(np.ascontiguousarray(block).tobytes())

    def read(start: int, stop: int) -> Tensor:
        samples = np.fromfile(path, np.float32, stop - start, offset=start * 4)
        return loudness.normalise(torch.from_numpy(samples))

    return speech.windowed_video_rate(encoder, read, loudness.count, window_states, final_norm=node.final_norm)


def _tensors(table: SpeechTable) -> dict[str, Tensor]:
    """Return what is stored of a segment; only the last one tells where the voice ends."""
    numbers = {"first_row": table.first_row, "num_features_30hz": table.num_features_30hz}
    scalars = {name: torch.tensor(number, dtype=torch.int64) for name, number in numbers.items() if number is not None}
    return {"rows": table.rows.contiguous(), **scalars}
