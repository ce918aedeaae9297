"""A video longer than ComfyUI's 4,096 frames: `make soak`, some three minutes."""

from __future__ import annotations

import sys
from pathlib import Path

import av
import pytest
from recipes_for_tests import options, write_recipe, write_voice

from s2v_flow import api


@pytest.mark.soak
def test_a_video_of_more_than_4096_frames_is_as_long_as_its_voice(tmp_path: Path, tiny_models: Path) -> None:
    """261.3 s: ceil(261.3 * 16) frames, and the sound to its end."""
    write_voice(tmp_path / "voice.wav", 261.3)
    recipe = write_recipe(tmp_path, {"first": {"steps": 1, "cfg": 1.0}, "video": {"preset": "ultrafast"}})
    result = api.run(recipe, options(tmp_path, tiny_models))
    with av.open(str(result.outputs["video"][0])) as film:
        sound = film.streams.audio[0]
        assert sound.duration is not None
        assert sound.time_base is not None
        seconds = float(sound.duration * sound.time_base)
        frames = sum(1 for _ in film.decode(video=0))
    sys.stdout.write(f"\n{frames} frames, {seconds:.2f} s of sound\n")
    assert frames == 4181
    assert abs(seconds - 261.3) < 0.03
