"""How large an input may be: checked before it is decoded, so that a small file cannot fill the memory.

What lies outside a format's limits (rate, channels) is a `MediaError`; what is too large is a `RefusedError`.
"""

from __future__ import annotations

MAX_IMAGE_PIXELS = 64 * 2**20
"""Pixels of an image, or of one frame of a video (64 megapixels)."""

MAX_AUDIO_SECONDS = 24 * 3600
"""Length of a sound that is read as it is used."""

MAX_AUDIO_VALUES = 1_500_000_000
"""Samples times channels of a sound that is held whole: 4 hours of 48 kHz stereo fit; float32 takes 6 GB."""

MAX_AUDIO_CHANNELS = 8

MIN_SAMPLE_RATE_HZ = 8_000

MAX_SAMPLE_RATE_HZ = 192_000

MAX_VIDEO_SECONDS = 24 * 3600
"""Length of an input video: at a constant rate, a few frames that are shown for years are billions."""

MAX_VIDEO_FRAMES = MAX_VIDEO_SECONDS * 60
"""Frames of an input video: 24 hours at 60 frames a second."""
