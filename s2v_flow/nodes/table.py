"""The table of node kinds. Adding a kind = one class, one row here, one test."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from s2v_flow.graph.node import Node
from s2v_flow.nodes.decode import Decode
from s2v_flow.nodes.edit import (
    FramesConcat,
    FramesDelay,
    FramesFromImage,
    FramesSlice,
    ImageFromFrames,
    LatentConcat,
    LatentCut,
)
from s2v_flow.nodes.encode import EncodeAudio, EncodeImage, EncodeText
from s2v_flow.nodes.load import LoadAudioEncoder, LoadDiffusionModel, LoadLatent, LoadTextEncoder, LoadVae
from s2v_flow.nodes.load_media import LoadAudio, LoadImage, LoadVideo
from s2v_flow.nodes.sample import Extend, Sample
from s2v_flow.nodes.save import SaveImages, SaveLatent, SaveVideo
from s2v_flow.nodes.scale import FramesScale, ImageScale

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
        "R132": "a side of an mp4 is odd",
        "R133": "nothing is left of a picture that is scaled",
        "R134": "a video that goes on has a side that is no multiple of 16",
        "R135": "shift and steps give no falling schedule",
    }
)


NODE_KINDS: tuple[type[Node], ...] = (
    LoadDiffusionModel,
    LoadTextEncoder,
    LoadAudioEncoder,
    LoadVae,
    LoadImage,
    LoadAudio,
    LoadVideo,
    LoadLatent,
    EncodeText,
    EncodeAudio,
    EncodeImage,
    Sample,
    Extend,
    Decode,
    LatentConcat,
    LatentCut,
    FramesSlice,
    FramesDelay,
    FramesScale,
    FramesFromImage,
    ImageScale,
    ImageFromFrames,
    FramesConcat,
    SaveVideo,
    SaveImages,
    SaveLatent,
)
