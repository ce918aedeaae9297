"""Translators of what a workflow begins and ends with: files, models, prompts, pictures, sound, and what is saved.

VideoHelperSuite's loaders are among them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from s2v_flow.comfy.catalog import classes
from s2v_flow.comfy.graph import Link, Value
from s2v_flow.comfy.meaning import (
    UNKNOWN,
    ZEROED,
    AtNode,
    Latent,
    Made,
    Model,
    NodeRef,
    Translator,
    Video,
)
from s2v_flow.nodes.encode import weighted_parts
from s2v_flow.wording import shortened

WHOLE_SECONDS = 86_400.0  # a day: TrimAudioDuration cannot be told "to the end"
GGUF_MODELS = ("UnetLoaderGGUF", "UnetLoaderGGUFAdvanced", "GGUFLoaderKJ", "LoaderGGUF")
_PLACE = re.compile(r"\s*\[(input|output|temp)\]$")
_OTHER_CODEC = re.compile(r"26[56]|hevc|av1|vp[89]|webm|webp|png|gif|prores|ffv1", re.IGNORECASE)
_TOKEN = re.compile(r"%[^%/]*%")


def file_name(at: AtNode, name: str, type_: str | None = None) -> Value:
    """Return a file's name as a recipe writes it: forward slashes, without ComfyUI's `[input]`."""
    given = at.value(name, type_)
    text = given.value.replace("\\", "/")
    text = text.strip('" ').removeprefix("input/") if at.class_type.startswith("VHS_") else text
    match = _PLACE.search(text)
    if match is not None:
        text = text[: match.start()]
        if match[1] != "input":
            at.mistakes.note(f"{text} was read from ComfyUI's {match[1]} folder: give that folder as --input-dir")
    if not text:
        raise at.refuse(f"{name}: no file is chosen", "choose one, or bypass the node")
    return Value(text, given.knob)


def _unet(at: AtNode) -> Any:
    dtype = at.value("weight_dtype").value if "weight_dtype" in at.widgets else "default"
    if dtype != "default":
        at.note(f"weight_dtype {dtype} is left out; precision and fp8-scaled files do that")
    return Model(file_name(at, at.widgets[0]), at.node)


def _lora(at: AtNode) -> Any:
    model = at.meaning("model", Model)
    lora = (file_name(at, "lora_name"), at.value("strength_model"), at.node.title)
    made = replace(model, loras=(*model.loras, lora))
    if at.class_type != "LoraLoader":
        return made
    at.note("the LoRA is put on the diffusion model only, not on the text encoder")
    return made, at.optional("clip")


def _power_lora(at: AtNode) -> Any:
    """Several LoRAs in a node, each a map: those that are on, in their order."""
    model = at.meaning("model", Model)
    loras = list(model.loras)
    for name, given in at.node.inputs.items():
        row = given.value if isinstance(given, Value) else None
        if not name.lower().startswith("lora_") or not isinstance(row, Mapping) or not row.get("on"):
            continue
        inputs = {"lora": Value(row.get("lora")), "strength": Value(row.get("strength", 1.0))}
        one = replace(at, node=replace(at.node, inputs=inputs))
        if row.get("lora") not in (None, "", "None"):
            loras.append((file_name(one, "lora", "STRING"), one.value("strength", "FLOAT"), None))
    return replace(model, loras=tuple(loras)), at.optional("clip")


def _easy_cache(at: AtNode) -> Any:
    found = {name: at.value(name) for name in at.widgets}
    if (found["start_percent"].value, found["end_percent"].value) != (0.15, 0.95):
        at.note("start_percent and end_percent are left out: the first 15 % of the steps and the last are computed")
    threshold = found["reuse_threshold"]
    return replace(at.meaning("model", Model), threshold=threshold if threshold.value > 0 else None)


def _loader(kind: str, usual: str, type_: str) -> Translator:
    return lambda at: at.made(kind, usual, {"checkpoint": file_name(at, at.widgets[0])}, type_)


def _load_image(at: AtNode) -> Any:
    fields = {"file": file_name(at, "image"), "background": "ignore"}
    return Made(_vhs_scaled(at, at.add("load_image", "portrait", fields), "image"), "image")


def _video_components(at: AtNode) -> Any:
    found = at.meaning("video", object)
    if isinstance(found, Video):
        return found.frames, found.audio, found.fps
    link = at.node.inputs["video"]
    if not isinstance(found, Value) or not isinstance(link, Link):
        raise at.refuse("video takes something that recipes cannot express here")
    source = at.graph.nodes[link.node]
    frames = at.draft.add("load_video", "clip", {"file": found}, source)
    audio = at.draft.add("load_audio", "clip_sound", {"file": found}, source, titled=False)
    at.note("load_video gives 16 frames a second, whatever the file has; ComfyUI takes them one by one")
    return Made(frames, "frames"), Made(audio, "audio"), Value(16.0)


def _repeat(at: AtNode) -> Any:
    count = at.value("amount")
    fields = {"image": at.port("image", "image"), "count": count}
    return at.made("frames_from_image", "still_frames", fields, "frames", count.value)


def _text(at: AtNode) -> Any:
    given = at.value("text")
    fields = {"text_encoder": at.port("clip", "text_encoder"), "text": given}
    try:
        match weighted_parts(given.value):
            case []:
                fields["text"] = replace(given, value="")
            case [(words, 1.0)]:  # without weights: the words as they are, escaped brackets as brackets
                fields["text"] = replace(given, value=words)
            case _:
                fields["prompt_syntax"] = "comfyui"
    except ValueError as error:
        at.mistakes.note(f"prompt: {at.node.described()}: {error}: its brackets are taken as text")
    return at.made("encode_text", "prompt", fields, "conditioning")


def _speech(at: AtNode) -> Any:
    fields = {
        "audio_encoder": at.port("audio_encoder", "audio_encoder"),
        "audio": at.port("audio", "audio"),
        "conditioning": "comfyui",
        "warmup_frames": 0,
    }
    return at.made("encode_audio", "speech", fields, "speech")


def _create_video(at: AtNode) -> Any:
    sound = at.optional_port("audio", "audio")
    for name, usual in (("bit_depth", ("8", "auto", "None")), ("color_space", ("sRGB",))):
        if str(at.value(name).value) not in usual:
            at.note(f"{name} is left out: videos are saved in 8 bits, as sRGB")
    return Video(at.meaning("images", object), Made(sound, "audio") if sound else None, at.value("fps"))


def _prefix(at: AtNode) -> str:
    """Return the start of an output's name; what ComfyUI puts in for %tokens% is left out."""
    text: str = at.value("filename_prefix").value.replace("\\", "/")
    plain = re.sub(r"/{2,}", "/", _TOKEN.sub("", text)).strip("/ ") or "ComfyUI"
    if plain != text:
        at.note(f"files are named {plain} instead of {shortened(text)}")
    return plain


def _numbered(at: AtNode, suffix: str) -> str:
    prefix = _prefix(at)
    return f"{prefix}_{at.numbered(prefix + suffix):05}_{suffix}"


def _save_frames(at: AtNode, frames: Any, audio: NodeRef | None, fps: Value) -> None:
    if fps.value != 16:
        at.mistakes.warn(
            f"fps: {at.node.described()} plays {fps.value:g} frames a second, the model makes 16: everything moves "
            f"{fps.value / 16:.3g} times as fast, and lips and sound part; fps: 16 in the recipe's save_video mends it"
        )
    fields = {
        "frames": at.typed("images", frames, "frames"),
        "audio": audio,
        "file": _numbered(at, ".mp4"),
        "fps": fps if fps.value != 16 or fps.knob else None,
        "crf": _crf(at),
    }
    at.add_sink("save_video", "video", fields)


def _crf(at: AtNode) -> Value | None:
    """Return the quality that a saver asks for, where it is one of H.264's numbers; say what is not taken over."""
    forms = [
        str(given.value)
        for name, given in at.node.inputs.items()
        if isinstance(given, Value) and name in ("format", "codec", "format.codec")
    ] or [at.class_type]
    others = [form for form in forms if form not in ("auto", "none", "mp4", "h264", "video/h264-mp4")]
    has_own_scale = any(_OTHER_CODEC.search(form) for form in forms)
    name = next((name for name in at.node.inputs if name.rpartition(".")[2] == "crf"), None)
    value = None if name is None else at.value(name, "INT")
    if others:
        lost = "" if value is None or not has_own_scale else f"; crf {value.value} is that codec's and is left out"
        at.note(f"saved as mp4 (H.264) instead of {', '.join(others)}{lost}")
    return None if has_own_scale else value


def _save_video(at: AtNode) -> Any:
    video = at.meaning("video", Video)
    _save_frames(at, video.frames, video.audio.ref if video.audio else None, video.fps)
    return video


def _save_animation(at: AtNode) -> Any:
    sound = at.optional_port("audio", "audio")
    rate = "frame_rate" if at.class_type == "VHS_VideoCombine" else "fps"
    if at.class_type == "VHS_VideoCombine" and at.value("pingpong").value:
        raise at.refuse("pingpong: recipes play no video backwards at its end", "switch pingpong off")
    if getattr(at.node.inputs.get("trim_to_audio"), "value", False):
        at.note("trim_to_audio is left out: trim: audio of decode does that")
    _save_frames(at, at.meaning("images", object), sound, at.value(rate))
    return ()


def _save_image(at: AtNode) -> Any:
    prefix = _prefix(at) if at.class_type == "SaveImage" else "preview"
    number = at.numbered(prefix + ".png")
    file = f"{prefix}.png" if number == 1 else f"{prefix}_{number}.png"
    fields = {"frames": at.port("images", "frames"), "file": file}
    at.add_sink("save_images", "images", fields)
    return ()


def _save_latent(at: AtNode) -> Any:
    fields = {"latent": at.meaning("samples", Latent).ref, "file": _numbered(at, ".latent")}
    at.add_sink("save_latent", "latents", fields)
    return ()


def _load_audio(at: AtNode) -> Any:
    """LoadAudio, and VideoHelperSuite's two, whose numbers are 0 for the beginning and the end."""
    file, *part = (item.name for item in classes()[at.class_type].widgets if item.type != "ANY")
    fields = {"file": file_name(at, file)}
    for name, target in zip(part, ("start", "max_duration"), strict=False):
        number = at.value(name)
        fields |= {target: number} if number.value else {}
    return at.made("load_audio", "voice", fields, "audio")


def _trim(at: AtNode) -> Any:
    voice = at.draft[at.port("audio", "audio")]
    if voice.kind != "load_audio" or voice.fields.keys() & {"lead", "tail"}:
        raise at.refuse("of joined sounds no part can be taken", "cut the files before they are joined")
    start, duration = at.value("start_index"), at.value("duration")
    if start.value < 0:
        raise at.refuse("start_index counts from the end", "give it from the beginning, in seconds")
    fields = dict(voice.fields)
    if voice.fields.keys() > {"file"}:  # trimmed before
        before = fields.get("max_duration", Value(float("inf"))).value - start.value
        start = Value(start.value + fields.get("start", Value(0.0)).value)
        duration = duration if duration.value <= before else Value(before)
    if duration.value <= 0:
        raise at.refuse(f"duration: {duration.value:g} seconds are left", "let it keep some of the sound")
    fields |= {"start": start} if start.value else {}
    fields |= {"max_duration": duration} if duration.value < WHOLE_SECONDS else {}
    return at.made("load_audio", voice.usual, fields, "audio")


def _concat(at: AtNode) -> Any:
    """Two sounds, one after the other; silence becomes a field of the sound that it stands beside."""
    names = ("audio1", "audio2") if at.value("direction").value == "after" else ("audio2", "audio1")
    first, second = (at.meaning(name, object) for name in names)
    silent, sound, field, name = (first, second, "lead", names[1])
    if isinstance(second, Value):
        silent, sound, field, name = (second, first, "tail", names[0])
    if not isinstance(silent, Value):
        refs = {"first": at.typed(names[0], first, "audio")}
        refs["second"] = at.typed(names[1], second, "audio")
        return at.made("audio_concat", "sound", refs, "audio")
    return _changed(at, at.typed(name, sound, "audio"), field, silent)


def _changed(at: AtNode, ref: NodeRef, field: str, number: Value) -> Made:
    """Return a sound with a number added to one of its fields; joined sounds have none."""
    voice = at.draft[ref]
    if voice.kind != "load_audio":
        raise at.refuse(f"{field} of joined sounds", "put this node before the one that joins them")
    before = voice.fields.get(field)
    number = number if before is None else Value(before.value + number.value)
    fields = {**voice.fields, field: number if field != "volume" else Value(float(number.value))}
    return at.made("load_audio", voice.usual, fields, "audio")


def _vhs_video(at: AtNode) -> Any:
    """VHS_LoadVideo and its kin: frames, their number or a mask, the sound."""

    def given(name: str) -> Value:
        return at.value(name) if name in at.widgets else Value(0)

    if given("select_every_nth").value > 1:
        raise at.refuse("select_every_nth: recipes leave no frames out", "set it to 1, and force_rate to 16")
    file = file_name(at, "video")
    if given("force_rate").value != 16:
        at.note("load_video gives 16 frames a second, whatever force_rate says")
    ref = at.add("load_video", "clip", {"file": file})
    first, count, begin = given("skip_first_frames"), given("frame_load_cap"), given("start_time").value
    first = Value(round(16 * begin)) if begin else first
    if first.value or count.value:
        part = {"frames": ref, "start": first, "length": count if count.value else None}
        ref = at.add("frames_slice", "part", part, titled=False)
    ref = _vhs_scaled(at, ref, "frames")
    sound: dict[str, Any] = {"file": file}
    sound |= {"start": Value(begin or first.value / 16)} if first.value or begin else {}
    sound |= {"max_duration": Value(count.value / 16)} if count.value else {}
    audio = at.add("load_audio", "clip_sound", sound, titled=False)
    return Made(ref, "frames"), UNKNOWN, Made(audio, "audio"), UNKNOWN


def _vhs_scaled(at: AtNode, ref: NodeRef, port: str) -> NodeRef:
    """Scale what a loader gives to its custom_width and custom_height; 0 keeps the shape."""
    sides = {side: at.value(f"custom_{side}") for side in ("width", "height") if f"custom_{side}" in at.widgets}
    sides = {side: number for side, number in sides.items() if number.value}
    if not sides:
        return ref
    scale = {port: ref, "method": "lanczos", **sides, "crop": "center" if len(sides) == 2 else "disabled"}
    return at.add(f"{port}_scale", "scaled", scale, titled=False)


SOURCES: Mapping[str, Translator] = MappingProxyType(
    {
        **dict.fromkeys(("UNETLoader", "DiffusionModelLoaderKJ", *GGUF_MODELS), _unet),
        **dict.fromkeys(("LoraLoader", "LoraLoaderModelOnly", "LoraLoaderBypassModelOnly"), _lora),
        "Power Lora Loader (rgthree)": _power_lora,
        "ModelSamplingSD3": lambda at: replace(at.meaning("model", Model), shift=at.value("shift")),
        "EasyCache": _easy_cache,
        **dict.fromkeys(
            ("CLIPLoader", "CLIPLoaderGGUF", "ClipLoaderGGUF"), _loader("load_text_encoder", "umt5", "text_encoder")
        ),
        "AudioEncoderLoader": _loader("load_audio_encoder", "wav2vec2", "audio_encoder"),
        **dict.fromkeys(("VAELoader", "VAELoaderKJ"), _loader("load_vae", "vae", "vae")),
        **dict.fromkeys(("LoadImage", "VHS_LoadImagePath"), _load_image),
        "LoadVideo": lambda at: file_name(at, "file"),
        "LoadLatent": lambda at: Latent(at.add("load_latent", "loaded", {"file": file_name(at, "latent")})),
        "GetVideoComponents": _video_components,
        "RepeatImageBatch": _repeat,
        "CLIPTextEncode": _text,
        "ConditioningZeroOut": lambda at: ZEROED,
        "AudioEncoderEncode": _speech,
        "CreateVideo": _create_video,
        "SaveVideo": _save_video,
        **dict.fromkeys(("SaveAnimatedWEBP", "SaveAnimatedPNG", "SaveWEBM", "VHS_VideoCombine"), _save_animation),
        **dict.fromkeys(("SaveImage", "PreviewImage"), _save_image),
        "SaveLatent": _save_latent,
        **dict.fromkeys(("LoadAudio", "VHS_LoadAudio", "VHS_LoadAudioUpload"), _load_audio),
        "TrimAudioDuration": _trim,
        "EmptyAudio": lambda at: at.value("duration"),
        "AudioConcat": _concat,
        "AudioAdjustVolume": lambda at: _changed(at, at.port("audio", "audio"), "volume", at.value("volume")),
        **dict.fromkeys((f"VHS_LoadVideo{which}" for which in ("", "Path", "FFmpeg", "FFmpegPath")), _vhs_video),
    }
)
