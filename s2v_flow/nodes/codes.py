"""The codes of mistakes that only planning can see. Stable: a code keeps its meaning, and is never given away again."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

PLANNING_CODES: Mapping[str, str] = MappingProxyType(
    {
        "R100": "motion: pixels cannot follow chunks that hand over latents",
        "R101": "the length of chunks changes under motion: pixels",
        "R102": "there are not as many seeds as chunks",
        "R103": "chunks: auto without a voice",
        "R104": "a reference has another size than the video",
        "R105": "two videos cannot be joined, because their sizes differ",
        "R110": "picture and sound cannot be kept in time with this prefix and warm-up",
        "R111": "no frame is left to show",
        "R120": "an input is missing and cannot be inherited",
        "R121": "the video's size is unknown",
        "R122": "guidance without a negative prompt",
        "R123": "the VAE is missing",
        "R124": "the reference is missing",
        "R125": "two settings exclude each other",
        "R126": "too few steps for this sampler and scheduler",
        "R127": "a setting is missing and cannot be inherited",
        "R128": "a size contradicts the reference's",
        "R130": "nothing is left of the sound",
        "R131": "two nodes write the same file",
    }
)
