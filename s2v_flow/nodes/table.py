"""The table of node kinds. Adding a kind = one class, one row here, one test; or a package of its own (`plugins`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
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
from s2v_flow.sampling import SAMPLERS as OWN_SAMPLERS

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
        plugins(SAMPLERS, OWN_SAMPLERS)  # names that are taken are an error at once
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
