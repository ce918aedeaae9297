"""The table of node kinds. Adding a kind = one class, one row here, one test."""

from __future__ import annotations

from s2v_flow.graph.node import Node
from s2v_flow.nodes.decode import Decode
from s2v_flow.nodes.edit import FramesDelay, FramesFromImage, FramesSlice, ImageFromFrames, LatentConcat, LatentCut
from s2v_flow.nodes.encode import EncodeAudio, EncodeImage, EncodeText
from s2v_flow.nodes.load import (
    LoadAudio,
    LoadAudioEncoder,
    LoadDiffusionModel,
    LoadImage,
    LoadLatent,
    LoadTextEncoder,
    LoadVae,
    LoadVideo,
)
from s2v_flow.nodes.sample import Extend, Sample
from s2v_flow.nodes.save import SaveImages, SaveLatent, SaveVideo
from s2v_flow.nodes.scale import FramesScale, ImageScale

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
    SaveVideo,
    SaveImages,
    SaveLatent,
)
