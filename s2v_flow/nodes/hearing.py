"""Encoding a voice, as a whole or in windows, into files. Imports torch: used in run()."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from s2v_flow.media.resample import speech_blocks
from s2v_flow.models import speech
from s2v_flow.models.audio_encoder import AudioEncoder
from s2v_flow.models.speech import Loudness, SpeechTable
from s2v_flow.models.speech_rate import SAMPLES_PER_FRAME, segment_port
from s2v_flow.nodes.tensors import pack_finite

if TYPE_CHECKING:
    from s2v_flow.media.audio import Sound
    from s2v_flow.nodes.fields import Conditioning


def hear(
    sound: Sound,
    encoder: AudioEncoder,
    scratch: Path,
    *,
    warmup_frames: int,
    conditioning: Conditioning,
    final_norm: bool,
    window_states: int | None,
) -> Iterator[Path]:
    """Encode a voice and write its segments, one safetensors file each, as they come.

    Args:
        warmup_frames: So many frames of silence stand in front.
        window_states: A window's length in states; None: the voice is encoded as a whole.

    Raises:
        MediaError: The voice is shorter than one state of the encoder.
    """
    silence = np.zeros(warmup_frames * SAMPLES_PER_FRAME, np.float32)
    blocks = chain([silence], speech_blocks(sound, conditioning))  # what the encoder hears: mono float32 at 16 kHz
    if window_states is None:
        waveform = torch.from_numpy(np.concatenate([*blocks]))
        mono = encoder.mono(waveform, conditioning)
        tables = speech.to_video_rate(encoder.states(mono, final_norm=final_norm)).segments()
    else:
        read, count = _normalised(blocks, scratch / "waveform")
        tables = speech.windowed_video_rate(encoder, read, count, window_states, final_norm=final_norm)
    for index, table in enumerate(tables):
        path = scratch / f"{segment_port(index)}.safetensors"
        path.write_bytes(pack_finite(_tensors(table)))
        yield path


def _normalised(blocks: Iterable[np.ndarray], path: Path) -> tuple[Callable[[int, int], Tensor], int]:
    """Put a waveform into a file at `path`, so that memory does not grow with its length.

    Returns:
        What reads samples from start to stop, float32 [n], normalised by the whole waveform's loudness; and how many
        there are.
    """
    loudness = Loudness()
    with path.open("wb") as file:
        for block in blocks:
            loudness.add(torch.from_numpy(block))
            file.write(np.ascontiguousarray(block).tobytes())

    def read(start: int, stop: int) -> Tensor:
        samples = np.fromfile(path, np.float32, stop - start, offset=start * 4)
        return loudness.normalise(torch.from_numpy(samples))

    return read, loudness.count


def _tensors(table: SpeechTable) -> dict[str, Tensor]:
    """Return what is stored of a segment; only the last one tells where the voice ends."""
    numbers = {"first_row": table.first_row, "num_features_30hz": table.num_features_30hz}
    scalars = {name: torch.tensor(number, dtype=torch.int64) for name, number in numbers.items() if number is not None}
    return {"rows": table.rows.contiguous(), **scalars}
