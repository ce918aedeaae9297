"""Frames that are kept come back bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from s2v_flow.media.writer import LosslessWriter, read_lossless


@pytest.mark.parametrize(("width", "height", "count"), [(64, 48, 9), (8, 8, 1), (33, 17, 5)])
def test_noise_gradients_and_extremes_come_back_bit_for_bit(
    width: int, height: int, count: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    still = np.repeat(noise[:1], count, axis=0)
    ramp = np.broadcast_to(np.arange(count * width).reshape(count, 1, width, 1) % 256, noise.shape).astype(np.uint8)
    ends = rng.integers(0, 2, noise.shape, dtype=np.uint8) * 255
    frames = np.concatenate([noise, still, ramp, ends])
    writer = LosslessWriter(tmp_path / "kept.mkv", width, height)
    for start in range(0, len(frames), 3):
        writer.write(frames[start : start + 3])
    writer.finish()
    assert (np.concatenate(list(read_lossless(tmp_path / "kept.mkv"))) == frames).all()


def test_what_cannot_be_written_or_read_is_an_error_of_the_system(tmp_path: Path) -> None:
    """A full disk, and a file that is something else."""
    frames = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)
    writer = LosslessWriter(Path("/dev/full"), 64, 64)
    with pytest.raises(OSError, match="space"):
        writer.write(frames)
    writer.close()
    (tmp_path / "other.mkv").write_bytes(b"no film")
    with pytest.raises(OSError):  # noqa: PT011 (FFmpeg's words)
        list(read_lossless(tmp_path / "other.mkv"))
