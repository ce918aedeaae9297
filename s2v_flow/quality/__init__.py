"""Figures of a finished video: lips and voice, drift, seams, pictures that show nothing. Needs no model's weights.

Here is what a recipe may require of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

Figures = Mapping[str, Any]

GATES: Mapping[str, str] = {
    "max_lag_frames": "how many frames picture and sound are apart",
    "min_correlation": "correlation of the mouth with the voice",
    "min_confidence": "confidence that mouth and voice belong together",
    "max_silence_activity": "how much the mouth moves in silence, of what it moves with the voice",
    "max_colour_per_minute": "drift of colour per minute",
    "max_contrast_per_minute": "drift of contrast per minute",
    "max_sharpness_per_minute": "drift of sharpness per minute",
    "max_likeness_per_minute": "drift of likeness per minute",
    "max_seam": "the largest change at a chunk's border, of the change around it",
    "max_guards": "how many of black, flat and frozen are so",
}
"""What `require` may name, and what it measures."""


_OPTIONAL = "a number, or null"
_SHAPE: Mapping[str, Any] = {
    "sync": {"lag_frames": _OPTIONAL, "correlation": 0, "confidence": 0, "silence_activity": _OPTIONAL},
    "drift": {key: {"per_minute": 0, "per_chunk": [0]} for key in ("colour", "contrast", "sharpness", "likeness")},
    "seams": [{"seconds": 0, "frame": 0, "ratio": 0}],
    "guards": {"black": 0, "flat": 0, "frozen": 0},
    "timing": {"frames": 0, "fps": 0, "seconds": 0}
    | dict.fromkeys(("audio_seconds", "audio_longer_seconds"), _OPTIONAL),
}


def known(figures: Any) -> dict[str, Any] | None:
    """Return figures from a file as far as this version has them, of one video or several; None where they are none."""
    try:
        if "videos" in figures:
            return {"videos": {name: _known(each, _SHAPE) for name, each in figures["videos"].items()}}
        return dict(_known(figures, _SHAPE))
    except (KeyError, TypeError, AttributeError, OverflowError):
        return None


def _known(value: Any, shape: Any) -> Any:
    if isinstance(shape, Mapping):
        return {name: _known(value[name], part) for name, part in shape.items()}
    if isinstance(shape, list):
        return [_known(item, shape[0]) for item in value]
    if (value is None and shape is _OPTIONAL) or isfinite(value):
        return value
    raise TypeError(value)


def unmet(figures: Figures, require: Mapping[str, float]) -> Iterator[str]:
    """Yield what a video does not meet: "correlation of the mouth with the voice is 0.31, min_correlation is 0.5".

    What cannot be told (a lag without a voice) meets no maximum, but that there is no silence, or no seam, meets it.
    """
    for name, wanted in require.items():
        value = _value(figures, name)
        if value is None or (value < wanted if name.startswith("min_") else value > wanted):
            yield f"{GATES[name]} {'cannot be told' if value is None else f'is {value:g}'}, {name} is {wanted:g}"


def _value(figures: Figures, name: str) -> float | None:
    sync, subject = figures["sync"], name[4:]
    if subject == "lag_frames":
        return None if sync["lag_frames"] is None else float(abs(sync["lag_frames"]))
    if subject == "silence_activity":
        return float(sync[subject] or 0)
    if subject == "seam":
        return max((seam["ratio"] for seam in figures["seams"]), default=0.0)
    if subject == "guards":
        return float(sum(figures["guards"].values()))
    if subject in sync:
        return float(sync[subject])
    return abs(float(figures["drift"][subject.removesuffix("_per_minute")]["per_minute"]))


def of_videos(figures: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a run's videos, by plan node: a single one's by themselves."""
    return next(iter(figures.values())) if len(figures) == 1 else {"videos": dict(figures)}
