"""Translators of sound, and of VideoHelperSuite's loaders."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from s2v_flow.comfy.catalog import classes
from s2v_flow.comfy.graph import ComfyNode, Value
from s2v_flow.comfy.meaning import Context, FramesMade, Made, NodeRef, Translator
from s2v_flow.comfy.sources import file_name

WHOLE_SECONDS = 86_400.0  # a day: TrimAudioDuration cannot be told "to the end"


def _load_audio(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    """LoadAudio, and VideoHelperSuite's two, whose numbers are 0 for the beginning and the end."""
    file, *part = (item.name for item in classes()[node.type].widgets if item.type != "ANY")
    fields = {"file": file_name(context, node, file)}
    for name, target in zip(part, ("start", "max_duration"), strict=False):
        number = context.value(node, name)
        fields |= {target: number} if number.value else {}
    return (Made(context.draft.add("load_audio", "voice", fields, node), "audio"),)


def _trim(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    voice = context.draft[context.port(node, "audio", "audio")]
    if voice.kind != "load_audio" or voice.fields.keys() & {"lead", "tail"}:
        raise context.refuse(node, "of joined sounds no part can be taken", "cut the files before they are joined")
    start, duration = context.value(node, "start_index"), context.value(node, "duration")
    if start.value < 0:
        raise context.refuse(node, "start_index counts from the end", "give it from the beginning, in seconds")
    fields = dict(voice.fields)
    if voice.fields.keys() > {"file"}:  # trimmed before
        before = fields.get("max_duration", Value(float("inf"))).value - start.value
        start = Value(start.value + fields.get("start", Value(0.0)).value)
        duration = duration if duration.value <= before else Value(before)
    fields |= {"start": start} if start.value else {}
    fields |= {"max_duration": duration} if duration.value < WHOLE_SECONDS else {}
    return (Made(context.draft.add("load_audio", voice.usual, fields, node), "audio"),)


def _silence(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    return (context.value(node, "duration"),)


def _concat(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    """Two sounds, one after the other; silence becomes a field of the sound that it stands beside."""
    names = ("audio1", "audio2") if context.value(node, "direction").value == "after" else ("audio2", "audio1")
    first, second = (context.meaning(node, name, object) for name in names)
    silent, sound, field, name = (first, second, "lead", names[1])
    if isinstance(second, Value):
        silent, sound, field, name = (second, first, "tail", names[0])
    if not isinstance(silent, Value):
        refs = {"first": context.typed(node, names[0], first, "audio")}
        refs["second"] = context.typed(node, names[1], second, "audio")
        return (Made(context.draft.add("audio_concat", "sound", refs, node), "audio"),)
    return (_changed(context, node, context.typed(node, name, sound, "audio"), field, silent),)


def _volume(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    return (_changed(context, node, context.port(node, "audio", "audio"), "volume", context.value(node, "volume")),)


def _changed(context: Context, node: ComfyNode, ref: NodeRef, field: str, number: Value) -> Made:
    """Return a sound with a number added to one of its fields; joined sounds have none."""
    voice = context.draft[ref]
    if voice.kind != "load_audio":
        raise context.refuse(node, f"{field} of joined sounds", "put this node before the one that joins them")
    before = voice.fields.get(field)
    number = number if before is None else Value(before.value + number.value)
    fields = {**voice.fields, field: number if field != "volume" else Value(float(number.value))}
    return Made(context.draft.add("load_audio", voice.usual, fields, node), "audio")


def _vhs_video(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    """VHS_LoadVideo and its kin: frames, their number or a mask, the sound."""
    widgets = {item.name for item in classes()[node.type].widgets}

    def given(name: str) -> Value:
        return context.value(node, name) if name in widgets else Value(0)

    if given("select_every_nth").value > 1:
        raise context.refuse(node, "select_every_nth: recipes leave no frames out", "set it to 1, and force_rate to 16")
    file = file_name(context, node, "video")
    if given("force_rate").value != 16:
        context.mistakes.note(f"{node.described()}: load_video gives 16 frames a second, whatever force_rate says")
    ref = context.draft.add("load_video", "clip", {"file": file}, node)
    first, count, begin = given("skip_first_frames"), given("frame_load_cap"), given("start_time").value
    first = Value(round(16 * begin)) if begin else first
    if first.value or count.value:
        part = {"frames": ref, "start": first, "length": count if count.value else None}
        ref = context.draft.add("frames_slice", "part", part, node, titled=False)
    ref = _vhs_scaled(context, node, ref, "frames")
    sound: dict[str, Any] = {"file": file}
    sound |= {"start": Value(begin or first.value / 16)} if first.value or begin else {}
    sound |= {"max_duration": Value(count.value / 16)} if count.value else {}
    audio = context.draft.add("load_audio", "clip_sound", sound, node, titled=False)
    return FramesMade(ref), None, Made(audio, "audio"), None


def _vhs_image(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    fields = {"file": file_name(context, node, "image"), "background": "ignore"}
    ref = _vhs_scaled(context, node, context.draft.add("load_image", "portrait", fields, node), "image")
    return Made(ref, "image"), None


def _vhs_scaled(context: Context, node: ComfyNode, ref: NodeRef, port: str) -> NodeRef:
    """Scale what a loader gives to its custom_width and custom_height; 0 keeps the shape."""
    sides = {side: context.value(node, f"custom_{side}") for side in ("width", "height")}
    sides = {side: number for side, number in sides.items() if number.value}
    if not sides:
        return ref
    scale = {port: ref, "method": "lanczos", **sides, "crop": "center" if len(sides) == 2 else "disabled"}
    return context.draft.add(f"{port}_scale", "scaled", scale, node, titled=False)


SOUNDS: Mapping[str, Translator] = MappingProxyType(
    {
        **dict.fromkeys(("LoadAudio", "VHS_LoadAudio", "VHS_LoadAudioUpload"), _load_audio),
        "TrimAudioDuration": _trim,
        "EmptyAudio": _silence,
        "AudioConcat": _concat,
        "AudioAdjustVolume": _volume,
        **dict.fromkeys((f"VHS_LoadVideo{which}" for which in ("", "Path", "FFmpeg", "FFmpegPath")), _vhs_video),
        "VHS_LoadImagePath": _vhs_image,
    }
)
