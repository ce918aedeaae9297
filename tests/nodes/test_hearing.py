"""Voices of any length: what they are stored as, what chunks read of them, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from recipes_for_tests import options, tiny, write_recipe, write_voice
from safetensors.torch import load_file
from torch import Tensor

from s2v_flow import api
from s2v_flow.errors import MediaError
from s2v_flow.graph.status import Selection
from s2v_flow.models import load
from s2v_flow.models.encoders import normalise, require_state
from s2v_flow.models.speech import SpeechTable, chunk_embed, joined
from s2v_flow.nodes.chunk import Chunk
from s2v_flow.nodes.encode import EncodeAudio


class SummingEncoder(torch.nn.Module):
    """Two layers, [T, 4] each: sums of 400 samples, so that a state depends on its own sound only."""

    def mono(self, waveform: Tensor, conditioning: str) -> Tensor:
        require_state(len(waveform))
        return normalise(waveform, unbiased=conditioning == "comfyui")

    def states(self, samples: Tensor, *, final_norm: bool) -> list[Tensor]:
        sums = samples.unfold(0, 400, 320).mean(1, keepdim=True).expand(-1, 4)
        return [sums, 2 * sums]


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "load_audio_encoder", lambda *_, **__: SummingEncoder())


def encode(folder: Path, models: Path, **fields: Any) -> tuple[api.RunResult, list[dict[str, Tensor]]]:
    """Encode folder/voice.wav and nothing else; return the run and the segments that were stored."""
    changes = tiny(speech=fields, frames=None, video=None, talk=None)
    chosen = options(folder, models, selection=Selection(only=("speech",)))
    result = api.run(write_recipe(folder, changes), chosen)
    outputs = result.entries["speech"].outputs
    assert list(outputs) == [f"{index:05}" for index in range(len(outputs))]
    store = folder / "cache" / "objects"
    return result, [load_file(store / item.sha256[:2] / item.file_name) for item in outputs.values()]


@pytest.mark.usefixtures("encoder")
def test_windows_give_the_rows_of_the_whole_where_the_encoder_hears_no_farther(
    tmp_path: Path, tiny_models: Path
) -> None:
    """Up to what is rounded: loudness, and 14 ms of place."""
    time = np.arange(16_000 * 70) / 16_000
    soundfile.write(tmp_path / "voice.wav", (0.5 * np.sin(2 * np.pi * 0.1 * time)).astype(np.float32), 16_000)
    _, whole = encode(tmp_path, tiny_models, window_seconds=80.0)
    _, parts = encode(tmp_path, tiny_models, window_seconds=20.0)
    assert [len(part["rows"]) for part in parts] == [len(part["rows"]) for part in whole] == [320, 320, 320, 163]
    assert [int(part["first_row"]) for part in parts] == [0, 320, 640, 960]
    assert ["num_features_30hz" in part for part in parts] == [False, False, False, True]
    assert int(parts[-1]["num_features_30hz"]) == int(whole[-1]["num_features_30hz"])
    left, right = (torch.cat([part["rows"] for part in table]) for table in (parts, whole))
    scale = float((left * right).sum() / right.square().sum())
    assert 2 ** (-1 / 16) < scale < 2 ** (1 / 16)
    assert float((left / scale - right).abs().max()) < 0.05


@pytest.mark.usefixtures("encoder")
def test_an_edit_late_in_a_voice_runs_late_chunks_only(tmp_path: Path, tiny_models: Path) -> None:
    """In windows: the first segments are stored with the same digests, so what reads them is stored too."""
    voice = 0.3 * np.sin(np.arange(16_000 * 90) ** 1.1 / 50)
    soundfile.write(tmp_path / "voice.wav", voice, 16_000)
    before, _ = encode(tmp_path, tiny_models, window_seconds=20.0)
    voice[16_000 * 70 :] *= 0.9
    soundfile.write(tmp_path / "voice.wav", voice[: 16_000 * 85], 16_000)
    after, _ = encode(tmp_path, tiny_models, window_seconds=20.0)
    digests = [[item.sha256 for item in run.entries["speech"].outputs.values()] for run in (before, after)]
    assert len(digests[0]) == len(digests[1]) == 5
    assert [one == other for one, other in zip(*digests, strict=True)] == [True, True, True, False, False]


def test_chunks_are_planned_on_their_own_part_of_the_voice(tmp_path: Path) -> None:
    write_voice(tmp_path / "voice.wav", 45)
    plan = api.plan(write_recipe(tmp_path), options(tmp_path, tmp_path / "models")).plan
    ports = {
        node.name: [source.port for source in node.inputs["speech"]]
        for node in plan.nodes
        if isinstance(node.inputs.get("speech"), tuple)
    }
    assert ports["first"] == ports["talk[3]"] == ["00000"]
    assert ports["talk[4]"] == ports["talk[7]"] == ["00001"]
    assert ports["talk[8]"] == ports["talk[9]"] == ["00002"]


@pytest.mark.parametrize(
    ("seconds", "window", "expected"),
    [(600.0, "auto", None), (600.1, "auto", 6000), (1.0, 20.0, None), (20.1, 20.0, 1000), (7200.0, 86_400.0, None)],
)
def test_a_long_voice_is_encoded_in_windows(seconds: float, window: Any, expected: int | None) -> None:
    node = EncodeAudio.model_construct(audio_encoder=None, audio=None, window_seconds=window)
    assert node.window_states(round(seconds * 16_000)) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "warmup", "num_frames"), [(0.03, 0, 1), (0.05, 3, 1), (0.3, 0, 5)])
def test_a_sound_shorter_than_a_chunk_works(
    seconds: float, warmup: int, num_frames: int, tmp_path: Path, tiny_models: Path
) -> None:
    write_voice(tmp_path / "voice.wav", seconds)
    changes = tiny(speech={"warmup_frames": warmup}, video={"preset": "ultrafast"})
    result = api.run(write_recipe(tmp_path, changes), options(tmp_path, tiny_models))
    assert result.entries["video"].facts["frames"] == num_frames
    assert result.outputs["video"][0].is_file()


@pytest.mark.slow
def test_silence_works(tmp_path: Path, tiny_models: Path) -> None:
    soundfile.write(tmp_path / "voice.wav", np.zeros(3200), 16_000)
    result = api.run(write_recipe(tmp_path, tiny(video={"preset": "ultrafast"})), options(tmp_path, tiny_models))
    assert result.outputs["video"][0].is_file()


def test_a_sound_without_samples_or_too_short_to_hear_is_refused(tmp_path: Path, tiny_models: Path) -> None:
    soundfile.write(tmp_path / "voice.wav", np.zeros(0), 16_000)
    with pytest.raises(MediaError, match="no samples"):
        api.plan(write_recipe(tmp_path, tiny()), options(tmp_path, tiny_models))
    write_voice(tmp_path / "voice.wav", 0.02)
    with pytest.raises(MediaError, match="320 samples at 16 kHz"):
        api.run(write_recipe(tmp_path, tiny(speech={"warmup_frames": 0})), options(tmp_path, tiny_models))


@pytest.mark.slow
@pytest.mark.usefixtures("encoder")
def test_twenty_minutes_of_sound_are_encoded_in_windows_and_every_chunk_finds_its_rows(
    tmp_path: Path, tiny_models: Path
) -> None:
    """From a file at 22.05 kHz to each of 241 chunks: row i holds the sound at i/16 s, up to the end, then nothing."""
    seconds, rate = 1200, 22_050
    level = np.linspace(0.1, 0.9, seconds * rate, dtype=np.float32)
    soundfile.write(tmp_path / "voice.wav", level, rate, subtype="FLOAT")
    _, segments = encode(tmp_path, tiny_models)
    assert len(segments) == 61  # the warm-up begins one more
    plan = api.plan(write_recipe(tmp_path), options(tmp_path, tmp_path / "models")).plan
    table = [SpeechTable(part["rows"], None, int(part["first_row"])) for part in segments]
    table[-1] = replace(table[-1], num_features_30hz=int(segments[-1]["num_features_30hz"]))
    chunks = [node for node in plan.nodes if isinstance(node.node, Chunk)]
    assert len(chunks) == 241
    heard = []
    for node in chunks:
        parts = node.inputs["speech"]
        assert isinstance(parts, tuple)
        embed = chunk_embed(joined([table[int(part.port)] for part in parts]), node.node.audio_offset, 20)
        assert embed is not None
        heard.append(embed[0, 0, 0])
    voice = torch.cat(heard)[3 : 3 + seconds * 16]  # without the warm-up
    slope = (voice[-20] - voice[20]) / (len(voice) - 40)
    expected = voice[20] + slope * (torch.arange(20, len(voice) - 20) - 20)
    assert float((voice[20:-20] - expected).abs().max() / slope) < 1  # of a frame's rise
