"""Translators of the middle of a workflow: chunks become `sample` and `extend`, latents become frames."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, get_args

from s2v_flow.comfy.catalog import AUTHORS_SAMPLERS
from s2v_flow.comfy.finish import lora_id
from s2v_flow.comfy.graph import Value
from s2v_flow.comfy.meaning import (
    ZEROED,
    AtNode,
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
)
from s2v_flow.nodes.edit import piece
from s2v_flow.nodes.sample import Sample
from s2v_flow.sampling import CALLS_PER_STEP
from s2v_flow.wording import did_you_mean

_LAST = ("sampler", "scheduler", "shift", "conditioning", "step_cache", "step_cache_threshold")  # behind the seed
_WHOLE = 4096  # ImageFromBatch takes no more frames than this; the template uses it for "all"


def _prepared(at: AtNode) -> Any:
    vae = at.port("vae", "vae")
    is_first = at.class_type == "WanSoundImageToVideo"
    base = None if is_first else at.meaning("video_latent", Latent)
    if is_first and at.value("batch_size").value != 1:
        raise at.refuse("batch_size must be 1", "set it to 1; one recipe makes one video")
    size = (_side(at, "width"), _side(at, "height")) if base is None else base.size
    inputs: dict[str, Any] = {"speech": at.optional_port("audio_encoder_output", "speech")}
    image = at.optional_port("ref_image", "image")
    if image is not None and size is None:
        fix = "begin with WanSoundImageToVideo, or disconnect ref_image"
        raise at.refuse("ref_image: the size of a loaded latent is not in the workflow", fix)
    if image is not None and size is not None:
        fields = {"vae": vae, "image": image, "width": size[0], "height": size[1], "conditioning": "comfyui"}
        inputs["reference"] = at.add("encode_image", "reference", fields, titled=is_first)
    inputs["control_video"] = at.optional_port("control_video", "frames")
    inputs["motion_video"] = at.optional_port("ref_motion", "frames") if is_first else None
    inputs["vae"] = vae if inputs["control_video"] or inputs["motion_video"] else None
    length = at.value("length")
    if length.value < 1:
        raise at.refuse(f"length must be at least 1, got {length.value}")
    length = Value((length.value - 1) // 4 * 4 + 1, length.knob)  # what the VAE makes of it
    texts: dict[str, Any] = {}
    for role in ("positive", "negative"):
        texts[role] = at.meaning(role, object)
        while isinstance(texts[role], PreparedText):  # of the chunk before: this one puts its own things over it
            before = texts[role].prepared
            if "reference" in before.inputs:
                inputs.setdefault("reference", before.inputs["reference"])
            texts[role] = before.texts[texts[role].role]
    prepared = Prepared(at.node, base, texts, inputs, length, size)
    return PreparedText(prepared, "positive"), PreparedText(prepared, "negative"), prepared


def _side(at: AtNode, name: str) -> Value:
    given = at.value(name)
    side = given.value - given.value % 16
    if side == given.value or side < 16:
        return given
    at.mistakes.note(f"{name}: {at.node.described()}: {given.value} becomes {side}: the model takes multiples of 16")
    return Value(side)


def _k_sampler(at: AtNode) -> Any:
    steps, _, scheduler = (at.value(name) for name in ("steps", "cfg", "scheduler"))
    if at.class_type == "KSampler":
        _require(at, "denoise", 1.0)
        seed = at.value("seed")
    else:
        for name, wanted in (("add_noise", "enable"), ("return_with_leftover_noise", "disable"), ("start_at_step", 0)):
            _require(at, name, wanted)
        if at.value("end_at_step").value < steps.value:
            raise at.refuse("end_at_step lies before the last step", "recipes sample in one go")
        seed = at.value("noise_seed")
    guider = _guider(at)
    sigmas = Sigmas(scheduler, steps, guider.model.shift)
    return _sampled(at, guider, sigmas, at.value("sampler_name"), seed)


def _custom_sampler(at: AtNode) -> Any:
    if at.class_type == "SamplerCustom":
        _require(at, "add_noise", True)
        guider, seed = _guider(at), at.value("noise_seed")
    else:
        guider, seed = at.meaning("guider", Guider), at.meaning("noise", Noise).seed
    solver, sigmas = at.meaning("sampler", Solver), at.meaning("sigmas", Sigmas)
    if solver.name.value in ("uni_pc", "uni_pc_bh2"):
        text = "takes KSampler's noise levels here, which differ a little from BasicScheduler's; the result will too"
        at.note(f"{solver.name.value} {text}")
    latent = _sampled(at, guider, sigmas, solver.name, seed)
    return latent, latent


def _require(at: AtNode, name: str, wanted: Any) -> None:
    found = at.value(name).value
    if found != wanted:
        raise at.refuse(f"{name} must be {wanted}, got {found}", "recipes sample from noise, in one go")


def _sampled(at: AtNode, guider: Guider, sigmas: Sigmas, solver: Value, seed: Value) -> Latent:
    chunk = at.meaning("latent_image", object)
    if not isinstance(chunk, Prepared):
        fix = "connect the latent output of WanSoundImageToVideo or WanSoundImageToVideoExtend"
        raise at.refuse("latent_image is not an empty latent of a chunk", fix)
    for what, name in (("sampler", solver), ("scheduler", sigmas.scheduler)):
        known = [word for word in get_args(Sample.model_fields[what].annotation) if word not in AUTHORS_SAMPLERS]
        if name.value not in known:
            raise at.refuse(f"there is no {what} {name.value} here", did_you_mean(name.value, known))
    settings: dict[str, Any] = {"model": _model_node(at, guider.model)}
    settings["positive"] = _text_of(at, guider.positive, chunk, "positive")
    if guider.cfg.value != 1 or guider.cfg.knob or _plain(guider.negative, chunk) is not ZEROED:
        settings["negative"] = _negative(at, guider, chunk, settings["positive"])
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
        at.note(f"EasyCache is left out: {solver.value} calls the model twice a step")
    elif has_cache:
        settings |= {"step_cache": "easy", "step_cache_threshold": guider.model.threshold}
    elif chunk.base is not None and chunk.base.settings.get("step_cache") == "easy":
        settings["step_cache"] = "off"
    settings = {name: value for name, value in settings.items() if value is not None}
    return _chunk(at, chunk, settings, seed)


def _chunk(at: AtNode, chunk: Prepared, settings: dict[str, Any], seed: Value) -> Latent:
    num_frames = (chunk.length.value - 1) // 4 + 1
    if chunk.base is None:
        order = [name for name in settings if name not in _LAST]
        fields = {name: settings[name] for name in order} | {"seed": seed} | settings
        ref = at.add("sample", "first", fields, chunk.source)
        kept = {name: value for name, value in settings.items() if name not in ("width", "height", "motion_video")}
        return Latent(ref, num_frames, chunk.size, {**kept, "motion": "latent"})
    base = chunk.base
    lost = [name for name in ("speech", "reference") if name in base.settings and name not in settings]
    if lost:
        fix = "connect it here too, or leave it out of the chunks before"
        raise at.refuse(f"{lost[0]}: an extend cannot go without what the chunk before it has", fix)
    wanted = {**settings, **_control(at, chunk, settings), "motion": "latent"}
    own = {name: value for name, value in wanted.items() if base.settings.get(name) != value}
    fields = {"video": base.ref, "chunks": 1, "seed": seed, **own}
    ref = at.add("extend", "talk", fields, chunk.source)
    total = None if base.num_frames is None else base.num_frames + num_frames
    joined = Latent(ref, total, base.size, {**base.settings, **wanted})
    cut = {"latent": ref, "axis": "t", "index": -num_frames, "amount": num_frames}
    last = at.add("latent_cut", "last_chunk", cut, titled=False)
    return Latent(last, num_frames, base.size, joined.settings, piece=(base.ref, joined))


def _control(at: AtNode, chunk: Prepared, settings: Mapping[str, Any]) -> dict[str, Any]:
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
        ref = at.add("frames_slice", "no_pose", fields, titled=False)
        return {"control_video": ref, "vae": base.settings["vae"]}
    if base.num_frames is None:
        raise at.refuse("control_video: how long the loaded latent is, is not in the workflow")
    offset, length = 4 * base.num_frames, 4 * ((chunk.length.value - 1) // 4) + 1
    pose = at.draft[given]
    numbers = [getattr(pose.fields.get(name), "value", None) for name in ("start", "length")]
    if pose.kind == "frames_slice" and numbers == [offset, length]:  # cut by hand, so that it goes on
        return {"control_video": pose.fields["frames"]}
    at.mistakes.note("as in ComfyUI, the pose video begins anew in every chunk; --modernise lets it go on")
    return {"control_video": at.add("frames_delay", "pose_again", {"frames": given, "count": offset}, titled=False)}


def _model_node(at: AtNode, model: Model) -> NodeRef:
    loras: list[dict[str, Any]] = []
    for file, strength, title in model.loras:
        name = lora_id(title, file.value, {lora["id"] for lora in loras})
        loras.append({"id": name, "file": file, "strength": strength, "allow_partial": True})
    fields = {"checkpoint": model.checkpoint, "loras": loras or None}
    return at.draft.add("load_diffusion_model", "dit", fields, model.source)


def _plain(found: Any, chunk: Prepared) -> Any:
    is_own = isinstance(found, PreparedText) and found.prepared is chunk
    return chunk.texts[found.role] if is_own else found


def _text_of(at: AtNode, found: Any, chunk: Prepared, role: str) -> NodeRef:
    plain = _plain(found, chunk)
    if isinstance(plain, Made) and plain is not found:
        ref = at.typed(role, plain, "conditioning")
        if at.draft[ref].usual == "prompt":
            at.draft[ref].usual = role
        return ref
    if plain is ZEROED:
        raise at.refuse(f"{role} is a zeroed conditioning", "use an empty prompt, or cfg 1")
    message = f"{role} does not come from the same {chunk.source.type} as the latent"
    raise at.refuse(message, f"connect the output {role} of {chunk.source.described()}")


def _negative(at: AtNode, guider: Guider, chunk: Prepared, positive: NodeRef) -> NodeRef | None:
    """Return the negative prompt; with cfg 1 nothing reads it, and it may be anything."""
    if guider.cfg.value == 1:
        plain = _plain(guider.negative, chunk)
        if not isinstance(plain, Made) or plain is guider.negative or plain.ref == positive:
            return None
    return _text_of(at, guider.negative, chunk, "negative")


def _sigmas(at: AtNode) -> Any:
    _require(at, "denoise", 1.0)
    shift = at.meaning("model", Model).shift
    return Sigmas(at.value("scheduler"), at.value("steps"), shift)


def _guider(at: AtNode) -> Guider:
    model = at.meaning("model", Model)
    if at.class_type == "BasicGuider":
        return Guider(model, at.meaning("conditioning", object), None, Value(1.0))
    return Guider(model, at.meaning("positive", object), at.optional("negative"), at.value("cfg"))


def _concat(at: AtNode) -> Any:
    first, second = at.meaning("samples1", Latent), at.meaning("samples2", Latent)
    dim = at.value("dim").value
    axis = dim.removeprefix("-")
    if axis not in ("t", "x", "y"):
        raise at.refuse(f"dim: t, x or y expected, got {dim}")
    if dim.startswith("-"):
        first, second = second, first
    if axis == "t" and second.piece is not None and second.piece[0] == first.ref:
        return second.piece[1]
    fields = {"first": first.ref, "second": second.ref, "axis": axis if axis != "t" else None}
    ref = at.add("latent_concat", "joined", fields)
    if axis != "t":
        return Latent(ref, first.num_frames, None, first.settings)
    is_doubled = first.cut_of == (second.ref, "t", 0, 1)
    counts = [latent.num_frames for latent in (first, second) if latent.num_frames is not None]
    known = sum(counts) if len(counts) == 2 else None
    return Latent(ref, known, first.size, first.settings, doubled=second if is_doubled else None)


def _cut(at: AtNode) -> Any:
    whole = at.meaning("samples", Latent)
    axis = at.value("dim").value
    if axis not in ("t", "x", "y"):
        raise at.refuse(f"dim: t, x or y expected, got {axis}")
    index, amount = at.value("index"), at.value("amount")
    fields = {"latent": whole.ref, "axis": axis, "index": index, "amount": amount}
    ref = at.add("latent_cut", "piece", fields)
    cut_of = (whole.ref, axis, index.value, amount.value)
    if axis != "t":
        return Latent(ref, whole.num_frames, None, whole.settings, cut_of)
    count = None if whole.num_frames is None else piece(whole.num_frames, index.value, amount.value)[1]
    return Latent(ref, count, whole.size, whole.settings, cut_of)


def _decode(at: AtNode) -> Any:
    latent, vae = at.meaning("samples", Latent), at.port("vae", "vae")
    if at.class_type == "VAEDecodeTiled":
        at.note("decoded a few frames at a time instead of in tiles, without seams")
    shown = latent.doubled or latent
    prefix = "first" if latent.doubled else "none"
    fields = {"vae": vae, "latent": shown.ref, "prefix": prefix, "drop_frames": 0, "trim": "none"}
    ref = at.add("decode", "frames", fields)
    total = None if latent.num_frames is None else 4 * latent.num_frames - 3
    return Made(ref, "frames", total, is_decoded=True)


def _from_batch(at: AtNode) -> Any:
    index, length = at.value("batch_index"), at.value("length")
    found = at.meaning("image", object)
    if isinstance(found, Made) and found.type == "image":
        return found
    if not isinstance(found, Made) or found.type != "frames":
        raise at.refuse("image takes something that recipes cannot express here")
    left = None if found.total is None else found.total - index.value
    takes_all = length.value >= left if left is not None else length.value >= _WHOLE
    if takes_all and found.is_decoded and (left is None or left > 0):
        decode = at.draft[found.ref]
        ref = at.add("decode", "frames", {**decode.fields, "drop_frames": index})
        at.draft[ref].made_from += [name for name in decode.made_from if name not in at.draft[ref].made_from]
        return Made(ref, "frames", left)
    if not takes_all and length.value >= _WHOLE:
        at.note(f"it takes {length.value} of {left} frames; the rest is cut, as there")
    fields = {"frames": found.ref, "start": index, "length": None if takes_all else length}
    count = None if found.total is None else piece(found.total, index.value, length.value)[1]
    return at.made("frames_slice", "part", fields, "frames", count)


SAMPLING: Mapping[str, Translator] = MappingProxyType(
    {
        **dict.fromkeys(("WanSoundImageToVideo", "WanSoundImageToVideoExtend"), _prepared),
        **dict.fromkeys(("KSampler", "KSamplerAdvanced"), _k_sampler),
        **dict.fromkeys(("SamplerCustom", "SamplerCustomAdvanced"), _custom_sampler),
        "RandomNoise": lambda at: Noise(at.value("noise_seed")),
        "KSamplerSelect": lambda at: Solver(at.value("sampler_name")),
        "BasicScheduler": _sigmas,
        **dict.fromkeys(("CFGGuider", "BasicGuider"), _guider),
        "LatentConcat": _concat,
        "LatentCut": _cut,
        **dict.fromkeys(("VAEDecode", "VAEDecodeTiled"), _decode),
        "ImageFromBatch": _from_batch,
    }
)
