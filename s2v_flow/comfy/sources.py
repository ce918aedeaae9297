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
from s2v_flow.comfy.graph import ComfyNode, Link, Value
from s2v_flow.comfy.meaning import UNKNOWN, Context, FramesMade, Latent, Made, Model, NodeRef, Translator, Video, Zeroed
from s2v_flow.nodes.encode import weighted_parts
from s2v_flow.wording import shortened

WHOLE_SECONDS = 86_400.0  # a day: TrimAudioDuration cannot be told "to the end"
GGUF_MODELS = ("UnetLoaderGGUF", "UnetLoaderGGUFAdvanced", "GGUFLoaderKJ", "LoaderGGUF")
_PLACE = re.compile(r"\s*\[(input|output|temp)\]$")
_OTHER_CODEC = re.compile(r"26[56]|hevc|av1|vp[89]|webm|webp|png|gif|prores|ffv1", re.IGNORECASE)
_TOKEN = re.compile(r"%[^%/]*%")


def file_name(context: Context, node: ComfyNode, name: str, type_: str | None = None) -> Value:
    """Return a file's name as a recipe writes it: forward slashes, without ComfyUI's `[input]`."""
    given = context.value(node, name, type_)
    text = given.value.replace("\\", "/")
    text = text.strip('" ').removeprefix("input/") if node.type.startswith("VHS_") else text
    match = _PLACE.search(text)
    if match is not None:
        text = text[: match.start()]
        if match[1] != "input":
            context.mistakes.note(f"{text} was read from ComfyUI's {match[1]} folder: give that folder as --input-dir")
    if not text:
        raise context.refuse(node, f"{name}: no file is chosen", "choose one, or bypass the node")
    return Value(text, given.knob, given.title)


def _unet(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    widgets = [item.name for item in classes()[node.type].widgets]
    dtype = context.value(node, "weight_dtype").value if "weight_dtype" in widgets else "default"
    if dtype != "default":
        context.mistakes.note(
            f"{node.described()}: weight_dtype {dtype} is left out; precision and fp8-scaled files do that"
        )
    return (Model(file_name(context, node, widgets[0]), node),)


def _lora(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    model = context.meaning(node, "model", Model)
    lora = (file_name(context, node, "lora_name"), context.value(node, "strength_model"), node.title)
    made = replace(model, loras=(*model.loras, lora))
    if node.type != "LoraLoader":
        return (made,)
    context.mistakes.note(f"{node.described()}: the LoRA is put on the diffusion model only, not on the text encoder")
    return made, context.optional(node, "clip")


def _power_lora(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    """Several LoRAs in a node, each a map: those that are on, in their order."""
    model = context.meaning(node, "model", Model)
    loras = list(model.loras)
    for name, given in node.inputs.items():
        row = given.value if isinstance(given, Value) else None
        if not name.lower().startswith("lora_") or not isinstance(row, Mapping) or not row.get("on"):
            continue
        one = replace(node, inputs={"lora": Value(row.get("lora")), "strength": Value(row.get("strength", 1.0))})
        if row.get("lora") not in (None, "", "None"):
            loras.append((file_name(context, one, "lora", "STRING"), context.value(one, "strength", "FLOAT"), None))
    return replace(model, loras=tuple(loras)), context.optional(node, "clip")


def _shift(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    return (replace(context.meaning(node, "model", Model), shift=context.value(node, "shift")),)


def _easy_cache(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    found = {item.name: context.value(node, item.name) for item in classes()[node.type].widgets}
    if (found["start_percent"].value, found["end_percent"].value) != (0.15, 0.95):
        text = "start_percent and end_percent are left out: the first 15 % of the steps and the last are computed"
        context.mistakes.note(f"{node.described()}: {text}")
    threshold = found["reuse_threshold"]
    return (replace(context.meaning(node, "model", Model), threshold=threshold if threshold.value > 0 else None),)


def _loader(kind: str, usual: str, type_: str) -> Translator:
    def translate(context: Context, node: ComfyNode) -> tuple[Any, ...]:
        widget = classes()[node.type].widgets[0].name
        ref = context.draft.add(kind, usual, {"checkpoint": file_name(context, node, widget)}, node)
        return (Made(ref, type_),)

    return translate


def _load_image(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    fields = {"file": file_name(context, node, "image"), "background": "ignore"}
    return (Made(context.draft.add("load_image", "portrait", fields, node), "image"),)


def _video_components(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    found = context.meaning(node, "video", object)
    if isinstance(found, Video):
        return found.frames, found.audio, found.fps
    link = node.inputs["video"]
    if not isinstance(found, Value) or not isinstance(link, Link):
        raise context.refuse(node, "video takes something that recipes cannot express here")
    source = context.graph.nodes[link.node]
    frames = context.draft.add("load_video", "clip", {"file": found}, source)
    audio = context.draft.add("load_audio", "clip_sound", {"file": found}, source, titled=False)
    context.mistakes.note(
        f"{node.described()}: load_video gives 16 frames a second, whatever the file has; ComfyUI takes them one by one"
    )
    return FramesMade(frames), Made(audio, "audio"), Value(16.0)


def _repeat(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    count = context.value(node, "amount")
    fields = {"image": context.port(node, "image", "image"), "count": count}
    return (FramesMade(context.draft.add("frames_from_image", "still_frames", fields, node), count.value),)


def _text(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    given = context.value(node, "text")
    fields = {"text_encoder": context.port(node, "clip", "text_encoder"), "text": given}
    try:
        match weighted_parts(given.value):
            case []:
                fields["text"] = replace(given, value="")
            case [(words, 1.0)]:  # without weights: the words as they are, escaped brackets as brackets
                fields["text"] = replace(given, value=words)
            case _:
                fields["prompt_syntax"] = "comfyui"
    except ValueError as error:
        context.mistakes.note(f"prompt: {node.described()}: {error}: its brackets are taken as text")
    return (Made(context.draft.add("encode_text", "prompt", fields, node), "conditioning"),)


def _speech(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    fields = {
        "audio_encoder": context.port(node, "audio_encoder", "audio_encoder"),
        "audio": context.port(node, "audio", "audio"),
        "conditioning": "comfyui",
        "warmup_frames": 0,
    }
    return (Made(context.draft.add("encode_audio", "speech", fields, node), "speech"),)


def _create_video(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    audio = context.optional(node, "audio")
    sound = None if audio is None else Made(context.typed(node, "audio", audio, "audio"), "audio")
    for name, usual in (("bit_depth", ("8", "auto", "None")), ("color_space", ("sRGB",))):
        if str(context.value(node, name).value) not in usual:
            context.mistakes.note(f"{node.described()}: {name} is left out: videos are saved in 8 bits, as sRGB")
    return (Video(context.meaning(node, "images", object), sound, context.value(node, "fps")),)


def _prefix(context: Context, node: ComfyNode) -> str:
    """Return the start of an output's name; what ComfyUI puts in for %tokens% is left out."""
    text: str = context.value(node, "filename_prefix").value.replace("\\", "/")
    plain = re.sub(r"/{2,}", "/", _TOKEN.sub("", text)).strip("/ ") or "ComfyUI"
    if plain != text:
        context.mistakes.note(f"{node.described()}: files are named {plain} instead of {shortened(text)}")
    return plain


def _numbered(context: Context, node: ComfyNode, suffix: str) -> str:
    prefix = _prefix(context, node)
    return f"{prefix}_{context.numbered(prefix + suffix):05}_{suffix}"


def _save_frames(context: Context, node: ComfyNode, frames: Any, audio: NodeRef | None, fps: Value) -> None:
    if fps.value != 16:
        context.mistakes.warn(
            f"fps: {node.described()} plays {fps.value:g} frames a second, the model makes 16: everything moves "
            f"{fps.value / 16:.3g} times as fast, and lips and sound part; fps: 16 in the recipe's save_video mends it"
        )
    fields = {
        "frames": context.typed(node, "images", frames, "frames"),
        "audio": audio,
        "file": _numbered(context, node, ".mp4"),
        "fps": fps if fps.value != 16 or fps.knob else None,
        "crf": _crf(context, node),
    }
    context.draft.add_sink("save_video", "video", fields, node)


def _crf(context: Context, node: ComfyNode) -> Value | None:
    """Return the quality that a saver asks for, where it is one of H.264's numbers; say what is not taken over."""
    forms = [
        str(given.value)
        for name, given in node.inputs.items()
        if isinstance(given, Value) and name in ("format", "codec", "format.codec")
    ] or [node.type]
    others = [form for form in forms if form not in ("auto", "none", "mp4", "h264", "video/h264-mp4")]
    has_own_scale = any(_OTHER_CODEC.search(form) for form in forms)
    name = next((name for name in node.inputs if name.rpartition(".")[2] == "crf"), None)
    value = None if name is None else context.value(node, name, "INT")
    if others:
        lost = "" if value is None or not has_own_scale else f"; crf {value.value} is that codec's and is left out"
        context.mistakes.note(f"{node.described()}: saved as mp4 (H.264) instead of {', '.join(others)}{lost}")
    return None if has_own_scale else value


def _save_video(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    video = context.meaning(node, "video", Video)
    _save_frames(context, node, video.frames, video.audio.ref if video.audio else None, video.fps)
    return (video,)


def _save_animation(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    audio = context.optional(node, "audio")
    sound = None if audio is None else context.typed(node, "audio", audio, "audio")
    rate = "frame_rate" if node.type == "VHS_VideoCombine" else "fps"
    if node.type == "VHS_VideoCombine" and context.value(node, "pingpong").value:
        raise context.refuse(node, "pingpong: recipes play no video backwards at its end", "switch pingpong off")
    if getattr(node.inputs.get("trim_to_audio"), "value", False):
        context.mistakes.note(f"{node.described()}: trim_to_audio is left out: trim: audio of decode does that")
    _save_frames(context, node, context.meaning(node, "images", object), sound, context.value(node, rate))
    return ()


def _save_image(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    prefix = _prefix(context, node) if node.type == "SaveImage" else "preview"
    number = context.numbered(prefix + ".png")
    file = f"{prefix}.png" if number == 1 else f"{prefix}_{number}.png"
    fields = {"frames": context.port(node, "images", "frames"), "file": file}
    context.draft.add_sink("save_images", "images", fields, node)
    return ()


def _save_latent(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    latent = context.meaning(node, "samples", Latent)
    fields = {"latent": latent.ref, "file": _numbered(context, node, ".latent")}
    context.draft.add_sink("save_latent", "latents", fields, node)
    return ()


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
    if duration.value <= 0:
        raise context.refuse(node, f"duration: {duration.value:g} seconds are left", "let it keep some of the sound")
    fields |= {"start": start} if start.value else {}
    fields |= {"max_duration": duration} if duration.value < WHOLE_SECONDS else {}
    return (Made(context.draft.add("load_audio", voice.usual, fields, node), "audio"),)


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
    return FramesMade(ref), UNKNOWN, Made(audio, "audio"), UNKNOWN


def _vhs_image(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    fields = {"file": file_name(context, node, "image"), "background": "ignore"}
    ref = _vhs_scaled(context, node, context.draft.add("load_image", "portrait", fields, node), "image")
    return Made(ref, "image"), UNKNOWN


def _vhs_scaled(context: Context, node: ComfyNode, ref: NodeRef, port: str) -> NodeRef:
    """Scale what a loader gives to its custom_width and custom_height; 0 keeps the shape."""
    sides = {side: context.value(node, f"custom_{side}") for side in ("width", "height")}
    sides = {side: number for side, number in sides.items() if number.value}
    if not sides:
        return ref
    scale = {port: ref, "method": "lanczos", **sides, "crop": "center" if len(sides) == 2 else "disabled"}
    return context.draft.add(f"{port}_scale", "scaled", scale, node, titled=False)


SOURCES: Mapping[str, Translator] = MappingProxyType(
    {
        **dict.fromkeys(("UNETLoader", "DiffusionModelLoaderKJ", *GGUF_MODELS), _unet),
        "LoraLoaderModelOnly": _lora,
        "LoraLoaderBypassModelOnly": _lora,
        "Power Lora Loader (rgthree)": _power_lora,
        "LoraLoader": _lora,
        "ModelSamplingSD3": _shift,
        "EasyCache": _easy_cache,
        **dict.fromkeys(
            ("CLIPLoader", "CLIPLoaderGGUF", "ClipLoaderGGUF"), _loader("load_text_encoder", "umt5", "text_encoder")
        ),
        "AudioEncoderLoader": _loader("load_audio_encoder", "wav2vec2", "audio_encoder"),
        **dict.fromkeys(("VAELoader", "VAELoaderKJ"), _loader("load_vae", "vae", "vae")),
        "LoadImage": _load_image,
        "LoadVideo": lambda context, node: (file_name(context, node, "file"),),
        "LoadLatent": lambda context, node: (
            Latent(context.draft.add("load_latent", "loaded", {"file": file_name(context, node, "latent")}, node)),
        ),
        "GetVideoComponents": _video_components,
        "RepeatImageBatch": _repeat,
        "CLIPTextEncode": _text,
        "ConditioningZeroOut": lambda context, node: (Zeroed(),),
        "AudioEncoderEncode": _speech,
        "CreateVideo": _create_video,
        "SaveVideo": _save_video,
        **dict.fromkeys(("SaveAnimatedWEBP", "SaveAnimatedPNG", "SaveWEBM", "VHS_VideoCombine"), _save_animation),
        "SaveImage": _save_image,
        "PreviewImage": _save_image,
        "SaveLatent": _save_latent,
        **dict.fromkeys(("LoadAudio", "VHS_LoadAudio", "VHS_LoadAudioUpload"), _load_audio),
        "TrimAudioDuration": _trim,
        "EmptyAudio": lambda context, node: (context.value(node, "duration"),),
        "AudioConcat": _concat,
        "AudioAdjustVolume": _volume,
        **dict.fromkeys((f"VHS_LoadVideo{which}" for which in ("", "Path", "FFmpeg", "FFmpegPath")), _vhs_video),
        "VHS_LoadImagePath": _vhs_image,
    }
)
