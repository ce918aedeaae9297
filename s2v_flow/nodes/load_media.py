"""Kinds that name an image, a sound or a video, or speak a text: planning decodes enough to know they can be read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module, metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from s2v_flow.errors import MissingError, S2VFlowError
from s2v_flow.graph.context import RunContext
from s2v_flow.graph.node import Node, Planner, Precision
from s2v_flow.graph.ports import FileField, Value
from s2v_flow.nodes.chunk_plan import FRAME_RATE_HZ
from s2v_flow.nodes.fields import AudioInput, Seconds
from s2v_flow.nodes.frames import Frames

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Lazy:
    """A file's content, read when it is asked for."""

    read: Callable[[], Any]


class LoadImage(Node):
    """Read an image: the portrait. Orientation tags are obeyed, colour profiles are not (the plan says where it shows);
    transparency is laid on a background."""

    kind: ClassVar[str] = "load_image"
    outputs: ClassVar = {"image": "image"}

    file: Annotated[str, FileField("input", "image")] = Field(description="PNG, JPEG, WebP or another still image.")
    background: Literal["white", "black", "grey", "ignore"] = Field(
        "white", description="What shows through transparent parts; ignore takes the hidden colours, as ComfyUI does."
    )

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Decode the image, and pass on its size."""
        values = planner.add_simple(name, self)
        return with_facts(values, _probed(planner, name, "picture", _measure_image))

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give out the image, to be read when it is needed: float32 [H, W, 3] in [0, 1]."""
        from s2v_flow.media.image import read_image

        path = context.files["file",]
        return {"image": Lazy(lambda: read_image(path, self.background))}


class LoadAudio(Node):
    """Read sound: the voice. wav, flac, ogg, mp3, m4a, or the sound of a video file; all of it, or a part."""

    kind: ClassVar[str] = "load_audio"
    outputs: ClassVar = {"audio": "audio"}

    file: Annotated[str, FileField("input", "audio")] = Field(description="The sound file.")
    start: Seconds = Field(0.0, description="Where to begin: seconds, or text like 12.5s.")
    end: Seconds | None = Field(None, description="Where to end; unless given, at the file's end.")
    max_duration: Seconds | None = Field(None, description="At most so long.")
    fade: Seconds = Field(0.0, description="Fade in and out over so long.")
    lead: Seconds = Field(0.0, description="Silence before it: the video begins so much earlier, the mouth shut.")
    tail: Seconds = Field(0.0, description="Silence after it: the video goes on for so long, the mouth shut.")
    volume: float = Field(0.0, ge=-100, le=100, description="Louder or softer, in decibels: 6 is twice, -6 half.")

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Count the samples: the voice's length decides how many chunks there are."""
        values = planner.add_simple(name, self)
        known = _probed(planner, name, "sound", _measure_sound)
        if not known:
            return values
        num_samples, rate = known["num_samples"], known["sample_rate_hz"]
        first, last = self._part(num_samples, rate)
        samples = [round(seconds * rate) for seconds in (self.lead, self.tail)]
        count = last - first + sum(samples)
        if first >= last:
            length = f"the file lasts {num_samples / rate:.2f} s"
            planner.problem(name, "start", "R130", f"nothing is left between start and end: {length}")
            return {}
        node = _LoadAudioAnew(**dict(self)) if known.get("is_anew", known["notes"]) else self
        keys = ("num_samples", "sample_rate_hz", "num_channels", "gain")
        planner.add(name, node, {}, recipe_node=name, facts={key: known[key] for key in keys})
        return with_facts(values, sound_facts(count, rate, known["num_channels"]))

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give out the sound, to be read as it is used."""
        from s2v_flow.media.audio import AudioClip

        known = context.planned
        rate = known["sample_rate_hz"]
        part = self._part(known["num_samples"], rate)
        fade, gain = round(self.fade * rate), known["gain"] * 10 ** (self.volume / 20)
        silent = {"num_lead": round(self.lead * rate), "num_tail": round(self.tail * rate)}
        clip = AudioClip(context.files["file",], rate, known["num_channels"], *part, fade, gain=gain, **silent)
        return {"audio": clip}

    def identity(self, digests: Mapping[tuple[str | int, ...], str], precision: Precision) -> dict[str, Any]:
        """Return the fields that determine the result; those that came later only where they are used."""
        later = ("lead", "tail", "volume")
        return {key: value for key, value in super().identity(digests, precision).items() if value or key not in later}

    def _part(self, num_samples: int, rate: int) -> tuple[int, int]:
        first = round(self.start * rate)
        last = num_samples if self.end is None else min(round(self.end * rate), num_samples)
        return first, last if self.max_duration is None else min(last, first + round(self.max_duration * rate))


class _LoadAudioAnew(LoadAudio):
    """A sound that earlier versions read otherwise: mixed down, filled with silence, or from another track."""

    version: ClassVar[int] = 2


class AudioConcat(Node):
    """Join two sounds, one after the other, at the higher of their sample rates; in stereo if either is."""

    kind: ClassVar[str] = "audio_concat"
    outputs: ClassVar = {"audio": "audio"}

    first: AudioInput = Field(description="The sound that comes first.")
    second: AudioInput = Field(description="The sound that follows.")

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Add up how long they are, where both files are there."""
        parts = list(filter(None, map(planner.facts, (self.first, self.second))))
        if len(parts) < 2:
            return planner.add_simple(name, self)
        rate = max(part["sample_rate_hz"] for part in parts)
        count = sum(-(-part["num_samples"] * rate // part["sample_rate_hz"]) for part in parts)
        return planner.add_simple(name, self, sound_facts(count, rate, max(part["num_channels"] for part in parts)))

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give out the sound, to be read as it is used."""
        from s2v_flow.media.resample import Joined

        return {"audio": Joined((inputs["first"], inputs["second"]))}


class LoadVideo(Node):
    """Read a video's frames at 16 frames a second: a pose video, or a clip whose motion is to be continued.

    Rotation, mirroring and non-square pixels are obeyed; where its sound begins before its picture, its first frame
    waits, standing still.
    """

    kind: ClassVar[str] = "load_video"
    outputs: ClassVar = {"frames": "frames"}

    file: Annotated[str, FileField("input", "video")] = Field(description="The video file.")

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Decode a frame, and pass on how large they are and how many."""
        values = planner.add_simple(name, self)
        known = _probed(planner, name, "film 2", _measure_video)  # 2: in square pixels
        if known.get("is_anew"):
            planner.add(name, _LoadVideoAnew(**dict(self)), {}, recipe_node=name)
        return with_facts(values, known)

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give out the frames, read when they are needed; one reader is kept for those that ask for them in order."""
        from s2v_flow.media.video import VideoReader

        path = context.files["file",]
        kept = VideoReader(path, FRAME_RATE_HZ)

        def groups() -> Iterator[np.ndarray]:
            with VideoReader(path, FRAME_RATE_HZ) as reader:
                for frame in reader:
                    yield frame[None]

        return {"frames": Frames(kept.info.width, kept.info.height, len(kept), groups, kept.read, close=kept.close)}


class _LoadVideoAnew(LoadVideo):
    """A video that earlier versions read otherwise: mirrored, late, with a cover in front, with pixels not square."""

    version: ClassVar[int] = 2


def sound_facts(num_samples: int, sample_rate_hz: int, num_channels: int) -> dict[str, Any]:
    """Return what planning knows of a sound: its samples, its seconds, and the video frames that it fills."""
    frames = -(-num_samples * FRAME_RATE_HZ // sample_rate_hz)
    known = {"num_samples": num_samples, "sample_rate_hz": sample_rate_hz, "num_channels": num_channels}
    return {"frames": frames, "seconds": num_samples / sample_rate_hz, **known}


def with_facts(values: Mapping[str, Value], facts: Mapping[str, Any]) -> dict[str, Value]:
    """Return values with what planning knows of them."""
    return {port: replace(value, facts=facts) for port, value in values.items()}


def _probed(planner: Planner, name: str, what: str, measure: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Return what is known of a node's file, measured once for each content; nothing where it is missing."""
    path = planner.file(name, "file")
    if path is None:
        return {}
    try:
        known = planner.remember(what, path, lambda: measure(path))
    except S2VFlowError as error:
        error.message = f"{name}: file: {error.message}"
        raise
    for note in known["notes"]:
        planner.note(name, f"{name}: file: {path.name}: {note}")
    return {**known, "file": str(path)}


def _measure_image(path: Path) -> dict[str, Any]:
    from s2v_flow.media.image import image_remarks, probe_image

    width, height = probe_image(path, decodes=True)
    return {"width": width, "height": height, "notes": [*image_remarks(path)]}


def _measure_sound(path: Path) -> dict[str, Any]:
    from s2v_flow.media.audio import probe_audio

    info = probe_audio(path)
    counts = {"num_samples": info.num_samples, "sample_rate_hz": info.sample_rate_hz, "num_channels": info.num_channels}
    return {**counts, "gain": info.gain, **_told(info.notes)}


def _measure_video(path: Path) -> dict[str, Any]:
    from s2v_flow.media.video import probe_video

    info = probe_video(path)
    size = {"width": info.width, "height": info.height, "frames": info.num_frames_at(FRAME_RATE_HZ)}
    return {**size, **_told(info.notes)}


def _told(notes: Sequence[str]) -> dict[str, Any]:
    from s2v_flow.media.source import Remark

    return {"notes": list(notes), "is_anew": any(not isinstance(note, Remark) for note in notes)}


_RATE_HZ = 24_000


class Speak(Node):
    """Speak a text, in English: the voice. It needs `pip install hibari-tts`; nothing is fetched when it runs."""

    kind: ClassVar[str] = "speak"
    outputs: ClassVar = {"audio": "audio"}

    text: str = Field(
        min_length=1,
        max_length=5000,
        description="What is said. Planning speaks a new text once, to learn how long it takes.",
    )
    voice: Literal["heart"] = Field("heart", description="A woman's, American.")
    speed: float = Field(1.0, ge=0.5, le=2.0, description="2 is twice as fast.")

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Count the samples: the voice's length decides how many chunks there are."""
        found = util.find_spec("hibari")
        if found is None or found.origin is None or util.find_spec("onnxruntime") is None:
            raise MissingError(f"{name}: the engine that speaks is not installed", "pip install hibari-tts")
        values = planner.add_simple(name, self)
        digest = hashlib.sha256(repr((self.text, self.voice, self.speed, _engine())).encode()).hexdigest()
        model = Path(found.origin).parent / "assets" / "hibari.onnx"
        known = planner.remember(f"speech of {digest}", model, lambda: {"num_samples": len(self._spoken())})
        if not known["num_samples"]:
            planner.problem(name, "text", "R130", "there is no word in it that an English voice can say")
            return {}
        return with_facts(values, sound_facts(known["num_samples"], _RATE_HZ, 1))

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give out the sound, mono at 24 kHz."""
        from s2v_flow.media.audio import Audio
        from s2v_flow.media.resample import Joined

        return {"audio": Joined((Audio(self._spoken()[None], _RATE_HZ),))}

    def identity(self, digests: Mapping[tuple[str | int, ...], str], precision: Precision) -> dict[str, Any]:
        """Return the fields, and which engine speaks them."""
        return {**super().identity(digests, precision), "engine": _engine()}

    def _spoken(self) -> Any:
        return import_module("hibari").Hibari(self.voice, threads=1)(self.text, self.speed, seed=0)  # float32 [n]


def _engine() -> str:
    return f"hibari-tts {metadata.version('hibari-tts')}"
