"""How a voice's samples, the audio encoder's states and the video's frames count: plain arithmetic, without torch.

16,000 samples a second make about 50 states a second; these are interpolated to 30 features a second, and the feature
nearest to each video frame (16 a second) becomes a row. Rows are stored in segments, so that a chunk reads its own
part of a long voice only.

Source: Wan2.2, wan/modules/s2v/audio_encoder.py, linear_interpolation and get_audio_embed_bucket_fps.
"""

from __future__ import annotations

SAMPLE_RATE_HZ = 16_000
SAMPLES_PER_STATE = 320
RECEPTIVE_FIELD = 400  # samples that one state sees
STATES_HZ = 50
FEATURES_HZ = 30
VIDEO_HZ = 16
SAMPLES_PER_FRAME = SAMPLE_RATE_HZ // VIDEO_HZ
SEGMENT_ROWS = 320  # 20 s: four chunks of length 77, 33 MB of the full-size encoder's features


def num_states(num_samples: int) -> int:
    """Return how many states the audio encoder makes of a waveform at 16 kHz."""
    return max((num_samples - RECEPTIVE_FIELD) // SAMPLES_PER_STATE + 1, 0)


def num_features(states: int) -> int:
    """Return the length of the 30 Hz sequence."""
    return int(states / STATES_HZ * FEATURES_HZ)


def feature_of(row: int) -> int:
    """Return the feature that is nearest to a video frame; halves go to the even one."""
    return round(row * FEATURES_HZ / VIDEO_HZ)


def num_rows(features: int) -> int:
    """Return how many video frames have a feature."""
    rows = max(int(features * VIDEO_HZ / FEATURES_HZ) - 1, 0)
    while feature_of(rows) < features:
        rows += 1
    return rows


def num_segments(num_samples: int) -> int:
    """Return in how many segments a waveform's rows are stored; there is always one."""
    return max(-(-num_rows(num_features(num_states(num_samples))) // SEGMENT_ROWS), 1)


def segment_port(index: int) -> str:
    """Return the name under which a segment is stored."""
    return f"{index:05}"


def segments_of(offset: int, num_frames: int, count: int) -> range:
    """Return the segments that hold rows `offset` to `offset + num_frames`; past the end, the last of `count`."""
    first, last = offset // SEGMENT_ROWS, (offset + num_frames - 1) // SEGMENT_ROWS
    return range(min(first, count - 1), min(last, count - 1) + 1)
