"""The table of node kinds. Adding a kind = one class, one row here, one test; or a package of its own (`plugins`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar

from s2v_flow.errors import S2VFlowError
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
from s2v_flow.nodes.load_media import AudioConcat, LoadAudio, LoadImage, LoadVideo, Speak
from s2v_flow.nodes.sample import Extend, Sample
from s2v_flow.nodes.save import SaveImages, SaveLatent, SaveVideo
from s2v_flow.nodes.scale import FramesScale, ImageScale
from s2v_flow.plugins import NODES, SAMPLERS, Plugin, plugins
from s2v_flow.sampling import catalog

PLANNING_CODES: Mapping[str, str] = MappingProxyType(
    {
        "R100": "motion: pixels cannot follow chunks that hand over latents",
        "R101": "the length of chunks changes under motion: pixels",
        "R102": "there are not as many seeds as chunks",
        "R103": "chunks: auto without a voice",
        "R104": "a reference has another size than the video",
        "R105": "two videos cannot be joined, because their sizes differ",
        "R106": "a prompt of a timeline has weights that cannot be computed",
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
        "R134": "a video that goes on has a side that is too small, or no multiple of 16",
        "R135": "shift and steps give no falling schedule",
        "R136": "a file cannot be written under its name",
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
    AudioConcat,
    Speak,
    SaveVideo,
    SaveImages,
    SaveLatent,
)

_WITHIN = ("chunk", "encode_motion", "encode_control", "decode_chunk", "decode_frames")  # what kinds are planned as


class Kinds(Mapping[str, type[Node]]):
    """All kinds by name: this table's, then those of installed packages, each imported when it is looked up.

    Raises:
        S2VFlowError: On every use, if a name is declared twice; on a look-up, if that plug-in cannot be used.
    """

    _own: ClassVar = {kind.kind: kind for kind in NODE_KINDS}

    @cached_property
    def plugins(self) -> Mapping[str, Plugin]:
        """The kinds of other packages."""
        plugins(SAMPLERS, catalog.SAMPLERS)  # names that are taken are an error at once
        return plugins(NODES, (*self._own, *_WITHIN))

    def __getitem__(self, name: str) -> type[Node]:
        plugin = self.plugins.get(name)
        if plugin is None:
            return self._own[name]
        kind = plugin.load()
        if not (isinstance(kind, type) and issubclass(kind, Node) and kind.kind == plugin.name):
            raise plugin.faulty(f"is no subclass of s2v_flow.graph.node.Node with the kind {plugin.name}")
        return kind

    def __iter__(self) -> Iterator[str]:
        return iter((*self._own, *self.plugins))

    def __len__(self) -> int:
        return len(self._own) + len(self.plugins)

    def usable(self) -> dict[str, type[Node] | S2VFlowError]:
        """Return all kinds, imported, and in place of those that cannot be the reason."""
        found: dict[str, type[Node] | S2VFlowError] = {}
        for name in self:
            try:
                found[name] = self[name]
            except S2VFlowError as error:
                found[name] = error
        return found


KINDS = Kinds()
