"""Translators of what a workflow begins and ends with: files, models, prompts, pictures, sound, and what is saved."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from s2v_flow.comfy.graph import ComfyNode, Link, Value
from s2v_flow.comfy.meaning import Context, FramesMade, Latent, Made, Model, NodeRef, Video, Zeroed

Translator = Callable[[Context, ComfyNode], tuple[Any, ...]]
WHOLE_SECONDS = 86_400.0  # a day: TrimAudioDuration cannot be told "to the end"
_PLACE = re.compile(r"\s*\[(input|output|temp)\]$")
_TOKEN = re.compile(r"%[^%/]*%")


def file_name(context: Context, node: ComfyNode, name: str) -> Value:
    """Return a file's name as a recipe writes it: forward slashes, without ComfyUI's `[input]`."""
    given = context.value(node, name)
    text = given.value.replace("\\", "/")
    match = _PLACE.search(text)
    if match is not None:
        text = text[: match.start()]
        if match[1] != "input":
            context.mistakes.note(f"{text} was read from ComfyUI's {match[1]} folder: give that folder as --input-dir")
    if not text:
        raise context.refuse(node, f"{name}: no file is chosen", "choose one, or bypass the node")
    return Value(text, given.knob, given.title)


def _unet(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    dtype = context.value(node, "weight_dtype").value
    if dtype != "default":
        context.mistakes.note(
            f"{node.described()}: weight_dtype {dtype} is left out; precision and fp8-scaled files do that"
        )
    return (Model(file_name(context, node, "unet_name"), node),)


def _lora(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    model = context.meaning(node, "model", Model)
    lora = (file_name(context, node, "lora_name"), context.value(node, "strength_model"), node.title)
    made = Model(model.checkpoint, model.source, (*model.loras, lora), model.shift)
    if node.type == "LoraLoaderModelOnly":
        return (made,)
    context.mistakes.note(f"{node.described()}: the LoRA is put on the diffusion model only, not on the text encoder")
    return made, context.optional(node, "clip")


def _shift(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    model = context.meaning(node, "model", Model)
    return (Model(model.checkpoint, model.source, model.loras, context.value(node, "shift")),)


def _loader(kind: str, usual: str, widget: str, type_: str) -> Translator:
    def translate(context: Context, node: ComfyNode) -> tuple[Any, ...]:
        ref = context.draft.add(kind, usual, {"checkpoint": file_name(context, node, widget)}, node)
        return (Made(ref, type_),)

    return translate


def _load_image(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    fields = {"file": file_name(context, node, "image"), "background": "ignore"}
    return (Made(context.draft.add("load_image", "portrait", fields, node), "image"),)


def _load_audio(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    return (Made(context.draft.add("load_audio", "voice", {"file": file_name(context, node, "audio")}, node), "audio"),)


def _load_video(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    return (file_name(context, node, "file"),)


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


def _trim(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    voice = context.draft[context.port(node, "audio", "audio")]
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


def _scale(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    def given(name: str) -> Value:
        return context.value(node, name)

    fields: dict[str, Any] = {"method": given("upscale_method")}
    if node.type == "ImageScale":
        fields |= {name: given(name) for name in ("width", "height") if given(name).value}
        fields |= {"crop": given("crop")}
        if not fields.keys() & {"width", "height"}:  # both 0: as it is
            return (context.meaning(node, "image", object),)
    elif node.type == "ImageScaleBy":
        fields |= {"factor": given("scale_by")}
    elif node.type == "ImageScaleToTotalPixels":
        steps = given("resolution_steps")
        fields |= {"megapixels": given("megapixels"), "multiple_of": steps if steps.value != 1 else None}
    else:
        fields |= {"longest_side": given("largest_size")}
    found = context.meaning(node, "image", object)
    if isinstance(found, FramesMade):
        return (FramesMade(context.draft.add("frames_scale", "scaled", {"frames": found.ref} | fields, node)),)
    image = context.typed(node, "image", found, "image")
    return (Made(context.draft.add("image_scale", "scaled", {"image": image} | fields, node), "image"),)


def _repeat(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    count = context.value(node, "amount")
    fields = {"image": context.port(node, "image", "image"), "count": count}
    return (FramesMade(context.draft.add("frames_from_image", "still_frames", fields, node), count.value),)


def _text(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    fields = {"text_encoder": context.port(node, "clip", "text_encoder"), "text": context.value(node, "text")}
    return (Made(context.draft.add("encode_text", "prompt", fields, node), "conditioning"),)


def _zeroed(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    return (Zeroed(),)


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
    return (Video(context.meaning(node, "images", object), sound, context.value(node, "fps")),)


def _prefix(context: Context, node: ComfyNode) -> str:
    """Return the start of an output's name; what ComfyUI puts in for %tokens% is left out."""
    text: str = context.value(node, "filename_prefix").value.replace("\\", "/")
    plain = re.sub(r"/{2,}", "/", _TOKEN.sub("", text)).strip("/ ") or "ComfyUI"
    if plain != text:
        context.mistakes.note(f"{node.described()}: files are named {plain}, without what stands between % signs")
    return plain


def _numbered(context: Context, node: ComfyNode, suffix: str) -> str:
    prefix = _prefix(context, node)
    return f"{prefix}_{context.numbered(prefix + suffix):05}_{suffix}"


def _save_frames(context: Context, node: ComfyNode, frames: Any, audio: NodeRef | None, fps: Value) -> None:
    fields = {
        "frames": context.typed(node, "images", frames, "frames"),
        "audio": audio,
        "file": _numbered(context, node, ".mp4"),
        "fps": fps if fps.value != 16 or fps.knob else None,
    }
    context.draft.add_sink("save_video", "video", fields, node)


def _save_video(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    video = context.meaning(node, "video", Video)
    _save_frames(context, node, video.frames, video.audio.ref if video.audio else None, video.fps)
    return ()


def _save_animation(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    context.mistakes.note(f"{node.described()}: saved as mp4")
    audio = context.optional(node, "audio")
    sound = None if audio is None else context.typed(node, "audio", audio, "audio")
    rate = "frame_rate" if node.type == "VHS_VideoCombine" else "fps"
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


def _load_latent(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    ref = context.draft.add("load_latent", "loaded", {"file": file_name(context, node, "latent")}, node)
    return (Latent(ref),)


def _primitive(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    given = context.value(node, "value")
    return (Value(given.value, given.knob or node.id, given.title or node.title),)


def _concatenate(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    parts = [context.value(node, name).value for name in ("string_a", "string_b", "delimiter")]
    return (Value(f"{parts[0]}{parts[2]}{parts[1]}"),)


def _switch(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    name = "on_true" if context.value(node, "switch").value else "on_false"
    given = node.inputs.get(name)
    return (given,) if isinstance(given, Value) else (context.meaning(node, name, object),)


SOURCES: Mapping[str, Translator] = MappingProxyType(
    {
        "UNETLoader": _unet,
        "LoraLoaderModelOnly": _lora,
        "LoraLoader": _lora,
        "ModelSamplingSD3": _shift,
        "CLIPLoader": _loader("load_text_encoder", "umt5", "clip_name", "text_encoder"),
        "AudioEncoderLoader": _loader("load_audio_encoder", "wav2vec2", "audio_encoder_name", "audio_encoder"),
        "VAELoader": _loader("load_vae", "vae", "vae_name", "vae"),
        "LoadImage": _load_image,
        "LoadAudio": _load_audio,
        "LoadVideo": _load_video,
        "LoadLatent": _load_latent,
        "GetVideoComponents": _video_components,
        "TrimAudioDuration": _trim,
        "ImageScale": _scale,
        "ImageScaleBy": _scale,
        "ImageScaleToTotalPixels": _scale,
        "ImageScaleToMaxDimension": _scale,
        "RepeatImageBatch": _repeat,
        "CLIPTextEncode": _text,
        "ConditioningZeroOut": _zeroed,
        "AudioEncoderEncode": _speech,
        "CreateVideo": _create_video,
        "SaveVideo": _save_video,
        "SaveAnimatedWEBP": _save_animation,
        "SaveWEBM": _save_animation,
        "VHS_VideoCombine": _save_animation,
        "SaveImage": _save_image,
        "PreviewImage": _save_image,
        "SaveLatent": _save_latent,
        "PrimitiveInt": _primitive,
        "PrimitiveFloat": _primitive,
        "PrimitiveString": _primitive,
        "PrimitiveStringMultiline": _primitive,
        "PrimitiveBoolean": _primitive,
        "StringConcatenate": _concatenate,
        "ComfySwitchNode": _switch,
    }
)
