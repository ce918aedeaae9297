"""Translators of the middle of a workflow: chunks become `sample` and `extend`, latents become frames."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, get_args

from s2v_flow.comfy.catalog import AUTHORS_SAMPLERS
from s2v_flow.comfy.finish import lora_id
from s2v_flow.comfy.graph import ComfyNode, Value
from s2v_flow.comfy.meaning import (
    Context,
    FramesMade,
    Guider,
    Latent,
    Made,
    Model,
    NodeRef,
    Noise,
    Prepared,
    PreparedText,
    Sigmas,
    Solver,
    Translator,
    Zeroed,
)
from s2v_flow.nodes.sample import Sample
from s2v_flow.sampling.catalog import CALLS_PER_STEP
from s2v_flow.wording import did_you_mean

_LAST = ("sampler", "scheduler", "shift", "conditioning", "step_cache", "step_cache_threshold")  # behind the seed
_WHOLE = 4096  # ImageFromBatch takes no more frames than this; the template uses it for "all"


def _prepared(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    vae = context.port(node, "vae", "vae")
    is_first = node.type == "WanSoundImageToVideo"
    base = None if is_first else context.meaning(node, "video_latent", Latent)
    if is_first and context.value(node, "batch_size").value != 1:
        raise context.refuse(node, "batch_size must be 1", "set it to 1; one recipe makes one video")
    size = (_side(context, node, "width"), _side(context, node, "height")) if base is None else base.size
    inputs: dict[str, Any] = {"speech": _optional(context, node, "audio_encoder_output", "speech")}
    image = _optional(context, node, "ref_image", "image")
    if image is not None and size is None:
        fix = "begin with WanSoundImageToVideo, or disconnect ref_image"
        raise context.refuse(node, "ref_image: the size of a loaded latent is not in the workflow", fix)
    if image is not None and size is not None:
        fields = {"vae": vae, "image": image, "width": size[0], "height": size[1], "conditioning": "comfyui"}
        inputs["reference"] = context.draft.add("encode_image", "reference", fields, node, titled=is_first)
    inputs["control_video"] = _optional(context, node, "control_video", "frames")
    inputs["motion_video"] = _optional(context, node, "ref_motion", "frames") if is_first else None
    inputs["vae"] = vae if inputs["control_video"] or inputs["motion_video"] else None
    length = context.value(node, "length")
    if length.value < 1:
        raise context.refuse(node, f"length must be at least 1, got {length.value}")
    length = Value((length.value - 1) // 4 * 4 + 1, length.knob, length.title)  # what the VAE makes of it
    texts: dict[str, Any] = {}
    for role in ("positive", "negative"):
        texts[role] = context.meaning(node, role, object)
        while isinstance(texts[role], PreparedText):  # of the chunk before: this one puts its own things over it
            before = texts[role].prepared
            if "reference" in before.inputs:
                inputs.setdefault("reference", before.inputs["reference"])
            texts[role] = before.texts[texts[role].role]
    prepared = Prepared(node, base, texts, inputs, length, size)
    return PreparedText(prepared, "positive"), PreparedText(prepared, "negative"), prepared


def _side(context: Context, node: ComfyNode, name: str) -> Value:
    given = context.value(node, name)
    side = given.value - given.value % 16
    if side == given.value or side < 16:
        return given
    context.mistakes.note(f"{name}: {node.described()}: {given.value} becomes {side}: the model takes multiples of 16")
    return Value(side)


def _optional(context: Context, node: ComfyNode, name: str, type_: str) -> NodeRef | None:
    found = context.optional(node, name)
    return None if found is None else context.typed(node, name, found, type_)


def _k_sampler(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    names = {name: context.value(node, name) for name in ("steps", "cfg", "scheduler")}
    if node.type == "KSampler":
        _require(context, node, "denoise", 1.0)
        seed = context.value(node, "seed")
    else:
        for name, wanted in (("add_noise", "enable"), ("return_with_leftover_noise", "disable"), ("start_at_step", 0)):
            _require(context, node, name, wanted)
        if context.value(node, "end_at_step").value < names["steps"].value:
            raise context.refuse(node, "end_at_step lies before the last step", "recipes sample in one go")
        seed = context.value(node, "noise_seed")
    model = context.meaning(node, "model", Model)
    texts = context.meaning(node, "positive", object), context.optional(node, "negative")
    guider = Guider(model, texts[0], texts[1], names["cfg"])
    sigmas = Sigmas(names["scheduler"], names["steps"], model.shift)
    return (_sampled(context, node, guider, sigmas, context.value(node, "sampler_name"), seed),)


def _custom_sampler(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    if node.type == "SamplerCustom":
        _require(context, node, "add_noise", True)
        model = context.meaning(node, "model", Model)
        texts = context.meaning(node, "positive", object), context.optional(node, "negative")
        guider = Guider(model, texts[0], texts[1], context.value(node, "cfg"))
        seed = context.value(node, "noise_seed")
    else:
        guider = context.meaning(node, "guider", Guider)
        seed = context.meaning(node, "noise", Noise).seed
    solver, sigmas = context.meaning(node, "sampler", Solver), context.meaning(node, "sigmas", Sigmas)
    if solver.name.value in ("uni_pc", "uni_pc_bh2"):
        context.mistakes.note(
            f"{node.described()}: {solver.name.value} takes KSampler's noise levels here, which differ a little from "
            "BasicScheduler's; the result will too"
        )
    latent = _sampled(context, node, guider, sigmas, solver.name, seed)
    return latent, latent


def _require(context: Context, node: ComfyNode, name: str, wanted: Any) -> None:
    found = context.value(node, name).value
    if found != wanted:
        raise context.refuse(node, f"{name} must be {wanted}, got {found}", "recipes sample from noise, in one go")


def _sampled(context: Context, node: ComfyNode, guider: Guider, sigmas: Sigmas, solver: Value, seed: Value) -> Latent:
    chunk = context.meaning(node, "latent_image", object)
    if not isinstance(chunk, Prepared):
        fix = "connect the latent output of WanSoundImageToVideo or WanSoundImageToVideoExtend"
        raise context.refuse(node, "latent_image is not an empty latent of a chunk", fix)
    for what, name in (("sampler", solver), ("scheduler", sigmas.scheduler)):
        known = [word for word in get_args(Sample.model_fields[what].annotation) if word not in AUTHORS_SAMPLERS]
        if name.value not in known:
            raise context.refuse(node, f"there is no {what} {name.value} here", did_you_mean(name.value, known))
    settings: dict[str, Any] = {"model": _model_node(context, guider.model)}
    settings["positive"] = _text_of(context, node, guider.positive, chunk, "positive")
    if guider.cfg.value != 1 or guider.cfg.knob or not isinstance(_plain(guider.negative, chunk), Zeroed):
        settings["negative"] = _negative(context, node, guider, chunk, settings["positive"])
    settings |= chunk.inputs
    if chunk.base is None and "reference" not in settings and chunk.size is not None:
        settings |= {"width": chunk.size[0], "height": chunk.size[1]}
    settings |= {
        "length": chunk.length,
        "steps": sigmas.steps,
        "cfg": guider.cfg,
        "sampler": solver,
        "scheduler": sigmas.scheduler,
        "shift": sigmas.shift,
        "conditioning": "comfyui",
    }
    has_cache = guider.model.threshold is not None
    if has_cache and CALLS_PER_STEP.get(solver.value, 1) > 1:
        context.mistakes.note(f"{node.described()}: EasyCache is left out: {solver.value} calls the model twice a step")
    elif has_cache:
        settings |= {"step_cache": "easy", "step_cache_threshold": guider.model.threshold}
    elif chunk.base is not None and chunk.base.settings.get("step_cache") == "easy":
        settings["step_cache"] = "off"
    settings = {name: value for name, value in settings.items() if value is not None}
    return _chunk(context, node, chunk, settings, seed)


def _chunk(context: Context, node: ComfyNode, chunk: Prepared, settings: dict[str, Any], seed: Value) -> Latent:
    num_frames = (chunk.length.value - 1) // 4 + 1
    if chunk.base is None:
        order = [name for name in settings if name not in _LAST]
        fields = {name: settings[name] for name in order} | {"seed": seed} | settings
        ref = context.draft.add("sample", "first", fields, node, chunk.source)
        kept = {name: value for name, value in settings.items() if name not in ("width", "height", "motion_video")}
        return Latent(ref, num_frames, chunk.size, {**kept, "motion": "latent"})
    base = chunk.base
    lost = [name for name in ("speech", "reference") if name in base.settings and name not in settings]
    if lost:
        fix = "connect it here too, or leave it out of the chunks before"
        raise context.refuse(node, f"{lost[0]}: an extend cannot go without what the chunk before it has", fix)
    wanted = {**settings, **_control(context, node, chunk, settings), "motion": "latent"}
    own = {name: value for name, value in wanted.items() if base.settings.get(name) != value}
    fields = {"video": base.ref, "chunks": 1, "seed": seed, **own}
    ref = context.draft.add("extend", "talk", fields, node, chunk.source)
    total = None if base.num_frames is None else base.num_frames + num_frames
    joined = Latent(ref, total, base.size, {**base.settings, **wanted})
    cut = {"latent": ref, "axis": "t", "index": -num_frames, "amount": num_frames}
    piece = context.draft.add("latent_cut", "last_chunk", cut, node, titled=False)
    return Latent(piece, num_frames, base.size, joined.settings, piece=(base.ref, joined))


def _control(context: Context, node: ComfyNode, chunk: Prepared, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return an extend's pose video such that it gets the frames that ComfyUI takes: always the first ones.

    In a recipe frame i of a pose video belongs to frame i of the sound.
    """
    base = chunk.base
    assert base is not None, "only an extend asks"
    given = settings.get("control_video")
    if given is None:
        if "control_video" not in base.settings:
            return {}
        fields = {"frames": base.settings["control_video"], "length": 1}  # past its end there is none
        return {
            "control_video": context.draft.add("frames_slice", "no_pose", fields, node, titled=False),
            "vae": base.settings["vae"],
        }
    if base.num_frames is None:
        raise context.refuse(node, "control_video: how long the loaded latent is, is not in the workflow")
    offset, length = 4 * base.num_frames, 4 * ((chunk.length.value - 1) // 4) + 1
    piece = context.draft[given]
    numbers = [getattr(piece.fields.get(name), "value", None) for name in ("start", "length")]
    if piece.kind == "frames_slice" and numbers == [offset, length]:  # cut by hand, so that it goes on
        return {"control_video": piece.fields["frames"]}
    context.mistakes.note("as in ComfyUI, the pose video begins anew in every chunk; --modernise lets it go on")
    fields = {"frames": given, "count": offset}
    return {"control_video": context.draft.add("frames_delay", "pose_again", fields, node, titled=False)}


def _model_node(context: Context, model: Model) -> NodeRef:
    loras: list[dict[str, Any]] = []
    for file, strength, title in model.loras:
        name = lora_id(title, file.value, {lora["id"] for lora in loras})
        loras.append({"id": name, "file": file, "strength": strength, "allow_partial": True})
    fields = {"checkpoint": model.checkpoint, "loras": loras or None}
    return context.draft.add("load_diffusion_model", "dit", fields, model.source)


def _plain(found: Any, chunk: Prepared) -> Any:
    is_own = isinstance(found, PreparedText) and found.prepared is chunk
    return chunk.texts[found.role] if is_own else found


def _text_of(context: Context, node: ComfyNode, found: Any, chunk: Prepared, role: str) -> NodeRef:
    plain = _plain(found, chunk)
    if isinstance(plain, Made) and plain is not found:
        ref = context.typed(node, role, plain, "conditioning")
        if context.draft[ref].usual == "prompt":
            context.draft[ref].usual = role
        return ref
    if isinstance(plain, Zeroed):
        raise context.refuse(node, f"{role} is a zeroed conditioning", "use an empty prompt, or cfg 1")
    message = f"{role} does not come from the same {chunk.source.type} as the latent"
    raise context.refuse(node, message, f"connect the output {role} of {chunk.source.described()}")


def _negative(context: Context, node: ComfyNode, guider: Guider, chunk: Prepared, positive: NodeRef) -> NodeRef | None:
    """Return the negative prompt; with cfg 1 nothing reads it, and it may be anything."""
    if guider.cfg.value == 1:
        plain = _plain(guider.negative, chunk)
        if not isinstance(plain, Made) or plain is guider.negative or plain.ref == positive:
            return None
    return _text_of(context, node, guider.negative, chunk, "negative")


def _sigmas(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    _require(context, node, "denoise", 1.0)
    shift = context.meaning(node, "model", Model).shift
    return (Sigmas(context.value(node, "scheduler"), context.value(node, "steps"), shift),)


def _guider(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    model = context.meaning(node, "model", Model)
    if node.type == "BasicGuider":
        return (Guider(model, context.meaning(node, "conditioning", object), None, Value(1.0)),)
    texts = context.meaning(node, "positive", object), context.optional(node, "negative")
    return (Guider(model, texts[0], texts[1], context.value(node, "cfg")),)


def _concat(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    first, second = context.meaning(node, "samples1", Latent), context.meaning(node, "samples2", Latent)
    dim = context.value(node, "dim").value
    axis = dim.removeprefix("-")
    if axis not in ("t", "x", "y"):
        raise context.refuse(node, f"dim: t, x or y expected, got {dim}")
    if dim.startswith("-"):
        first, second = second, first
    if axis == "t" and second.piece is not None and second.piece[0] == first.ref:
        return (second.piece[1],)
    fields = {"first": first.ref, "second": second.ref, "axis": axis if axis != "t" else None}
    ref = context.draft.add("latent_concat", "joined", fields, node)
    if axis != "t":
        return (Latent(ref, first.num_frames, None, first.settings),)
    is_doubled = first.cut_of == (second.ref, "t", 0, 1)
    counts = [latent.num_frames for latent in (first, second) if latent.num_frames is not None]
    known = sum(counts) if len(counts) == 2 else None
    return (Latent(ref, known, first.size, first.settings, doubled=second if is_doubled else None),)


def _cut(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    whole = context.meaning(node, "samples", Latent)
    axis = context.value(node, "dim").value
    if axis not in ("t", "x", "y"):
        raise context.refuse(node, f"dim: t, x or y expected, got {axis}")
    index, amount = context.value(node, "index"), context.value(node, "amount")
    fields = {"latent": whole.ref, "axis": axis, "index": index, "amount": amount}
    ref = context.draft.add("latent_cut", "piece", fields, node)
    cut_of = (whole.ref, axis, index.value, amount.value)
    if axis != "t":
        return (Latent(ref, whole.num_frames, None, whole.settings, cut_of),)
    left = None if whole.num_frames is None else whole.num_frames - index.value if index.value >= 0 else -index.value
    count = None if left is None else max(min(amount.value, left), 1)
    return (Latent(ref, count, whole.size, whole.settings, cut_of),)


def _decode(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    latent, vae = context.meaning(node, "samples", Latent), context.port(node, "vae", "vae")
    if node.type == "VAEDecodeTiled":
        context.mistakes.note(f"{node.described()}: decoded a few frames at a time instead of in tiles, without seams")
    shown = latent.doubled or latent
    fields = {
        "vae": vae,
        "latent": shown.ref,
        "prefix": "first" if latent.doubled else "none",
        "drop_frames": 0,
        "trim": "none",
    }
    ref = context.draft.add("decode", "frames", fields, node)
    total = None if latent.num_frames is None else 4 * latent.num_frames - 3
    return (FramesMade(ref, total, is_decoded=True),)


def _from_batch(context: Context, node: ComfyNode) -> tuple[Any, ...]:
    index, length = context.value(node, "batch_index"), context.value(node, "length")
    found = context.meaning(node, "image", object)
    if isinstance(found, Made) and found.type == "image":
        return (found,)
    if not isinstance(found, FramesMade):
        raise context.refuse(node, "image takes something that recipes cannot express here")
    left = None if found.total is None else found.total - index.value
    takes_all = length.value >= left if left is not None else length.value >= _WHOLE
    if takes_all and found.is_decoded and (left is None or left > 0):
        decode = context.draft[found.ref]
        ref = context.draft.add("decode", "frames", {**decode.fields, "drop_frames": index}, node)
        context.draft[ref].made_from += [name for name in decode.made_from if name not in context.draft[ref].made_from]
        return (FramesMade(ref, left),)
    if not takes_all and length.value >= _WHOLE:
        context.mistakes.note(
            f"{node.described()}: it takes {length.value} of {left} frames; the rest is cut, as there"
        )
    fields = {"frames": found.ref, "start": index, "length": None if takes_all else length}
    count = None if left is None else max(min(left, length.value), 1)
    return (FramesMade(context.draft.add("frames_slice", "part", fields, node), count),)


SAMPLING: Mapping[str, Translator] = MappingProxyType(
    {
        "WanSoundImageToVideo": _prepared,
        "WanSoundImageToVideoExtend": _prepared,
        "KSampler": _k_sampler,
        "KSamplerAdvanced": _k_sampler,
        "SamplerCustom": _custom_sampler,
        "SamplerCustomAdvanced": _custom_sampler,
        "RandomNoise": lambda context, node: (Noise(context.value(node, "noise_seed")),),
        "KSamplerSelect": lambda context, node: (Solver(context.value(node, "sampler_name")),),
        "BasicScheduler": _sigmas,
        "CFGGuider": _guider,
        "BasicGuider": _guider,
        "LatentConcat": _concat,
        "LatentCut": _cut,
        "VAEDecode": _decode,
        "VAEDecodeTiled": _decode,
        "ImageFromBatch": _from_batch,
    }
)
