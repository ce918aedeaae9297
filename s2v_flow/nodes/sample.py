"""The kinds `sample` and `extend`: a video's first chunk, and as many further chunks as it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from s2v_flow.graph.node import Node, Planner
from s2v_flow.graph.ports import Value
from s2v_flow.nodes.chunk_plan import (
    FRAME_RATE_HZ,
    FRAMES_PER_LATENT,
    Chain,
    add_chunk,
    latent_frames,
    voice_frames,
    warmup_frames,
)
from s2v_flow.nodes.encode import EncodeText
from s2v_flow.nodes.fields import (
    Cfg,
    Conditioning,
    ConditioningInput,
    FramesInput,
    LatentInput,
    Length,
    ModelInput,
    Motion,
    ReferenceInput,
    Seconds,
    Seed,
    Settings,
    Shift,
    Side,
    SpeechInput,
    StepCache,
    StepCacheThreshold,
    Steps,
    VaeInput,
    VideoSettings,
    own_settings,
)
from s2v_flow.nodes.remarks import remark_on_prompt, remark_on_settings
from s2v_flow.sampling import CALLS_PER_STEP, SAMPLERS, SamplerName, SchedulerName, minimum_steps

LEAST_MOVING_SIDE = 64  # the oldest of the motion's frames are packed by 8x8 latent pixels
USUAL_SHIFTS = (0.05, 0.1, 0.25, 0.5, 1.0, 3.0, 5.0, 8.0, 12.0, 100.0)


class TimelineEntry(BaseModel):
    """What changes at a time; what is not given goes on as before."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    at: Seconds = Field(
        description="When, on the voice's clock: seconds, or text like 12.5s. It takes effect where two chunks meet, "
        "at the nearest such place."
    )
    prompt: str | None = Field(
        None,
        description="The prompt from here on, in the prompt_syntax of the video's positive prompt.",
        max_length=20_000,
    )
    negative_prompt: str | None = Field(None, description="The negative prompt from here on.", max_length=20_000)
    seed: Seed | None = Field(None, description="The seed of the first chunk from here on; one more for each further.")
    steps: Steps | None = Field(None, description="Denoising steps from here on.")
    cfg: Cfg | None = Field(None, description="Guidance scale from here on.")
    shift: Shift | None = Field(None, description="Shift of the noise schedule from here on.")


def check_timeline(entries: list[TimelineEntry]) -> list[TimelineEntry]:
    """Refuse a timeline that is out of order.

    Raises:
        ValueError: Naming the first entry that does not come after the one before.
    """
    for before, after in pairwise(entries):
        if after.at <= before.at:
            raise ValueError(f"times must rise: {after.at:g} s stands after {before.at:g} s")
    return entries


class Sample(Node):
    """Sample a video's first chunk: 20 latent frames, 80 frames of sound at length 77."""

    kind: ClassVar[str] = "sample"
    outputs: ClassVar = {"latent": "latent"}

    model: ModelInput = Field(description="The diffusion model.")
    positive: ConditioningInput = Field(description="The encoded prompt.")
    negative: ConditioningInput | None = Field(None, description="The encoded negative prompt; needed unless cfg is 1.")
    speech: SpeechInput | None = Field(None, description="The encoded voice; without one nothing is said.")
    reference: ReferenceInput | None = Field(None, description="The encoded portrait.")
    control_video: FramesInput | None = Field(
        None, description="A pose video; frame i steers the frame of sound i/16 s."
    )
    motion_video: FramesInput | None = Field(
        None, description="A clip whose motion the video continues: its last 73 frames."
    )
    vae: VaeInput | None = Field(None, description="Needed for control_video, motion_video and motion: pixels.")
    width: Side | None = Field(None, description="The video's width; taken from the reference where there is one.")
    height: Side | None = Field(None, description="The video's height; taken from the reference where there is one.")
    length: Length = Field(
        77, description="Pixel frames of a chunk alone, 4n+1; a chunk is (length-1)/4+1 latent frames."
    )
    steps: Steps = Field(20, description="Denoising steps.")
    cfg: Cfg = Field(6.0, description="Guidance scale. 1 runs one branch and needs no negative prompt.")
    seed: Seed = Field(0, description="The first chunk's seed; the noise is the same on every device.")
    sampler: SamplerName = Field("uni_pc", description="The solver.")
    scheduler: SchedulerName = Field("simple", description="The noise schedule; the authors' solvers have their own.")
    shift: Shift = Field(8.0, description="How far the schedule leans towards noise.")
    conditioning: Conditioning = Field(
        "official", description="How sound and motion meet the frames: as the model was trained, or ComfyUI's numbers."
    )
    step_cache: StepCache = Field(
        "off",
        description="easy (approximate): a step whose model output is expected to differ little from the last computed "
        "one reuses it, as ComfyUI's EasyCache does; velocity (approximate): the same, but what is reused does not "
        "move with the sample. From about 20 steps on; the manifest says how many were reused.",
    )
    step_cache_threshold: StepCacheThreshold = Field(
        0.2, description="How far the output may drift, relative to itself, before a step is computed again."
    )
    motion: Motion = Field(
        "latent",
        description="What a chunk hands to the next: its latents, or decoded pixels (floats, never through a codec), "
        "as the authors do.",
    )
    init_first_frame: bool = Field(
        False, description="Begin with the portrait itself as the last frames before the video."
    )

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Plan the first chunk."""
        given = Settings().updated(planner, self)
        settings = _with_size(given)
        for key, own, side in zip(("width", "height"), given.size, settings.size, strict=True):
            if own is not None and own != side:
                message = f"{key}: the reference has {side}, got {own}"
                planner.problem(name, key, "R128", message, f"leave {key} out, or change it in the reference's node")
                return {}
        if not check_settings(planner, name, self, settings):
            return {}
        moves = "motion_video" in settings.inputs or self.init_first_frame or self.motion == "pixels"
        key = "width" if self.reference is None else "reference"
        if moves and not has_room_for_motion(planner, name, key, settings):
            return {}
        remark_on_settings(planner, name, settings, type(self).model_fields)
        return add_chunk(planner, name, name, Chain(seed=self.seed), settings, self.seed).value()


class Extend(Node):
    """Continue a video by further chunks, each from the last 19 latent frames of what is there."""

    kind: ClassVar[str] = "extend"
    outputs: ClassVar = {"latent": "latent"}

    video: LatentInput = Field(description="The video so far: a sample, an extend or a load_latent node.")
    chunks: Literal["auto"] | Annotated[int, Field(ge=0, le=10_000)] = Field(
        "auto", description="How many chunks to add; auto adds the least number that covers the voice."
    )
    model: ModelInput | None = Field(None, description="Inherited from the video unless given.")
    positive: ConditioningInput | None = Field(None, description="Inherited from the video unless given.")
    negative: ConditioningInput | None = Field(None, description="Inherited from the video unless given.")
    speech: SpeechInput | None = Field(None, description="Inherited from the video unless given.")
    reference: ReferenceInput | None = Field(None, description="Inherited from the video unless given.")
    control_video: FramesInput | None = Field(None, description="Inherited from the video unless given.")
    vae: VaeInput | None = Field(None, description="Inherited from the video unless given.")
    length: Length | None = Field(None, description="Inherited from the video unless given.")
    steps: Steps | None = Field(None, description="Inherited from the video unless given.")
    cfg: Cfg | None = Field(None, description="Inherited from the video unless given.")
    seed: Seed | list[Seed] | None = Field(
        None,
        description="A number: the first added chunk's seed, one more for each further one. A list: one seed per "
        "chunk. Unless given, the first chunk's seed plus the chunk's position in the video.",
    )
    sampler: SamplerName | None = Field(None, description="Inherited from the video unless given.")
    scheduler: SchedulerName | None = Field(None, description="Inherited from the video unless given.")
    shift: Shift | None = Field(None, description="Inherited from the video unless given.")
    conditioning: Conditioning | None = Field(None, description="Inherited from the video unless given.")
    step_cache: StepCache | None = Field(None, description="Inherited from the video unless given.")
    step_cache_threshold: StepCacheThreshold | None = Field(None, description="Inherited from the video unless given.")
    motion: Motion | None = Field(None, description="Inherited from the video unless given.")
    timeline: Annotated[list[TimelineEntry], AfterValidator(check_timeline)] = Field(
        [], description="What changes as the voice goes on: prompts, seeds and settings from given times on."
    )

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Plan the further chunks; `auto` needs the voice's length, which its file tells."""
        video = planner.value(self.video)
        if video is None:
            return {}
        chain: Chain = video.facts["chain"]
        settings = _with_size(chain.settings.updated(planner, self))
        if not check_settings(planner, name, self, settings):
            return {}
        given = [key for key in type(self).model_fields if getattr(self, key) is not None]
        remark_on_settings(planner, name, settings, given)
        old, new = chain.settings.size, settings.size
        if old != new and not chain.is_open:
            message = f"reference: {new[0]}x{new[1]} cannot follow a video of {old[0]}x{old[1]}"
            planner.problem(name, "reference", "R104", message, "encode the portrait at the video's size")
            return {}
        if any((side or 0) % 16 for side in new):
            message = f"video: {new[0]}x{new[1]} pixels, where a video that goes on needs multiples of 16"
            fix = "cut an even amount of cells in its latent_cut node, or cut after extend"
            planner.problem(name, "video", "R134", message, fix)
            return {}
        if chain.parts and chain.pixels is None and settings.fields.motion == "pixels":
            planner.problem(name, "motion", "R100", "motion: pixels cannot follow chunks that hand over latents")
            return {}
        if chain.pixels is not None and settings.fields.length != chain.settings.fields.length:
            planner.problem(name, "length", "R101", "length cannot change between chunks with motion: pixels")
            return {}
        count = self._num_chunks(planner, name, chain, settings)
        if count and not has_room_for_motion(planner, name, "video", settings):
            return {}
        if isinstance(self.seed, list) and self.chunks != "auto" and len(self.seed) != count:
            planner.problem(name, "seed", "R102", f"seed: expected {count} seeds, one per chunk, got {len(self.seed)}")
            return {}
        is_open = self.chunks == "auto" and voice_frames(settings) is None
        chain = replace(chain, is_open=chain.is_open or is_open)
        return self._add_chunks(planner, name, chain, settings, count).value()

    def _add_chunks(self, planner: Planner, name: str, chain: Chain, settings: Settings, count: int) -> Chain:
        timeline = Timeline(planner, name, self.timeline, settings)
        num_frames = FRAMES_PER_LATENT * latent_frames(settings.fields.length)
        inherited = chain.seed + len(chain.parts)
        for position in range(count):
            cue = timeline.cue(FRAMES_PER_LATENT * chain.num_latent_frames - warmup_frames(settings), num_frames)
            if not check_settings(planner, name, self, cue.settings):
                return chain
            seed = self._seed(inherited, position) if cue.seed is None else cue.seed
            chain = add_chunk(planner, f"{name}[{position + 1}]", name, chain, cue.settings, seed, since=cue.since)
        timeline.close()
        return replace(chain, settings=settings)

    def _seed(self, inherited: int, position: int) -> int:
        """Return the seed of an added chunk; where `auto` needs more than a list has, it counts on from the last."""
        given = self.seed if isinstance(self.seed, list) else [inherited if self.seed is None else self.seed]
        last = min(position, len(given) - 1)
        return (given[last] + position - last if given else inherited + position) % 2**64

    def _num_chunks(self, planner: Planner, name: str, chain: Chain, settings: Settings) -> int:
        if isinstance(self.chunks, int):
            return self.chunks
        frames = voice_frames(settings)
        if frames is None:
            if "speech" not in settings.inputs:
                planner.problem(
                    name, "chunks", "R103", "chunks: auto needs a voice", "give speech, or a number of chunks"
                )
            return 0
        lacking = frames + warmup_frames(settings) - FRAMES_PER_LATENT * chain.num_latent_frames
        return max(-(-lacking // (FRAMES_PER_LATENT * latent_frames(settings.fields.length))), 0)


def _with_size(settings: Settings) -> Settings:
    reference = settings.inputs.get("reference")
    return settings if reference is None else settings.with_size(reference.facts["width"], reference.facts["height"])


Problem = tuple[str, str, str, str | None]


def check_settings(planner: Planner, name: str, node: Node, settings: Settings) -> bool:
    """Record what a chunk lacks or what does not go together; tell whether all is well."""
    fields = settings.fields
    # an input whose own node could not be planned is not lacking: what is wrong is said there
    inputs = set(settings.inputs) | set(node.refs())
    problems: list[Problem] = []
    key: str
    for key in ("model", "positive"):
        if key not in inputs:
            problems.append((key, "R120", f"{key} is missing and cannot be inherited", f"add {key}: $..."))
    missing = settings.missing()
    sizes = [key for key in ("width", "height") if key in missing]
    problems += [(key, "R121", f"{key} is unknown", "give a reference, or width and height") for key in sizes]
    starts_still, in_pixels = fields.init_first_frame, getattr(fields, "motion", "latent") == "pixels"
    if getattr(fields, "cfg", 1) != 1 and "negative" not in inputs:
        fix = "add negative: $... (an encode_text node), or set cfg: 1"
        problems.append(("cfg", "R122", f"cfg {fields.cfg:g} needs a negative prompt", fix))
    needs_vae: list[str] = [key for key in ("control_video", "motion_video") if key in inputs]
    needs_vae += ["motion"] * in_pixels + ["init_first_frame"] * starts_still
    if needs_vae and "vae" not in inputs:
        problems.append((needs_vae[0], "R123", f"{needs_vae[0]} needs the VAE", "add vae: $... (a load_vae node)"))
    if (in_pixels or starts_still) and "reference" not in inputs:
        key = "motion" if in_pixels else "init_first_frame"
        problems.append((key, "R124", f"{key} needs a reference", "add reference: $... (an encode_image node)"))
    if starts_still and "motion_video" in inputs:
        problems.append(("init_first_frame", "R125", "init_first_frame and motion_video exclude each other", None))
    problems += [
        (key, "R127", f"{key} is missing and cannot be inherited", f"add {key}: ...")
        for key in missing
        if key not in sizes
    ]
    sampler = getattr(fields, "sampler", SAMPLERS[0])
    if fields.step_cache != "off" and (sampler not in SAMPLERS or CALLS_PER_STEP.get(sampler, 1) > 1):
        calls = "more than once" if sampler in SAMPLERS else "an unknown number of times"
        message = f"step_cache: {fields.step_cache} needs one model call a step; {sampler} calls the model {calls}"
        problems.append(("step_cache", "R125", message, "set sampler: uni_pc, or step_cache: off"))
    if not missing:
        problems += _schedule_problems(node, fields)
    for problem in problems:
        planner.problem(name, *problem)
    return not problems and inputs <= {*settings.inputs, "video"}


def has_room_for_motion(planner: Planner, name: str, key: str, settings: Settings) -> bool:
    """Record, at `key`, where a side is too short for motion to be taken from a video; tell whether all is well."""
    width, height = settings.size
    if min(width or LEAST_MOVING_SIDE, height or LEAST_MOVING_SIDE) >= LEAST_MOVING_SIDE:
        return True
    message = f"{key}: {width}x{height} pixels, where motion needs {LEAST_MOVING_SIDE} a side at least"
    planner.problem(name, key, "R134", message, "make the video larger")
    return False


def _schedule_problems(node: Node, fields: VideoSettings) -> Iterator[Problem]:
    """Yield a mistake where the sampler cannot step over the noise levels that shift and steps give."""
    from s2v_flow.sampling.levels import can_step

    sampler, scheduler, steps, shift = fields.sampler, fields.scheduler, fields.steps, fields.shift
    least = minimum_steps(sampler, scheduler)
    if steps < least:
        yield "steps", "R126", f"steps: {sampler} with {scheduler} needs at least {least}, got {steps}", None
    elif not can_step(sampler, scheduler, steps, shift):
        better = [value for value in USUAL_SHIFTS if can_step(sampler, scheduler, steps, value)]
        nearest = min(better, key=lambda value: abs(log(value / shift)), default=None)
        fix = "take fewer steps" if nearest is None else f"set shift: {nearest:g} (8 is usual), or take fewer steps"
        key = "shift" if getattr(node, "shift", None) is not None else "steps"
        message = f"{key}: shift {shift:g} and steps {steps} give no falling schedule with {sampler} and {scheduler}"
        yield key, "R135", message, fix


@dataclass(frozen=True)
class Cue:
    """What a chunk is sampled with: its settings, its seed if the timeline gives one, and since when."""

    settings: Settings
    seed: int | None = None
    since: float | None = None


class Timeline:
    """Walks along an `extend` node's chunks; prompts are planned where they are first used."""

    def __init__(self, planner: Planner, name: str, entries: Sequence[TimelineEntry], settings: Settings) -> None:
        self._builder = planner
        self._name = name
        self._waiting = list(enumerate(entries, start=1))
        self._cue = Cue(settings)

    def cue(self, first_frame: int, num_frames: int) -> Cue:
        """Return what the next chunk is sampled with.

        `first_frame`: the chunk's first frame on the voice's clock; negative in the warm-up.
        """
        self._cue = replace(self._cue, seed=None if self._cue.seed is None else self._cue.seed + 1)
        middle = (first_frame + num_frames / 2) / FRAME_RATE_HZ
        while self._waiting and self._waiting[0][1].at <= middle:
            number, entry = self._waiting.pop(0)
            if self._waiting and self._waiting[0][1].at <= middle:
                text = (
                    f"{self._name}: the timeline's entry at {entry.at:g} s has no chunk of its own; the next one counts"
                )
                self._builder.note(self._name, text)
            self._cue = self._after(number, entry)
        return self._cue

    def close(self) -> None:
        """Say which entries come after the last chunk."""
        for _, entry in self._waiting:
            text = f"{self._name}: the timeline's entry at {entry.at:g} s comes after the last chunk and has no effect"
            self._builder.note(self._name, text)

    def _after(self, number: int, entry: TimelineEntry) -> Cue:
        settings = self._cue.settings
        inputs = dict(settings.inputs)
        for key, text in (("positive", entry.prompt), ("negative", entry.negative_prompt)):
            if text is not None:
                inputs[key] = self._encode(f"{self._name}.{key}[{number}]", text, settings.inputs)
        own = own_settings(entry)
        settings = Settings(inputs, settings.fields.model_copy(update=own))
        given = own.keys() if entry.negative_prompt is None else {*own, "negative"}
        remark_on_settings(self._builder, self._name, settings, given)
        seed = self._cue.seed if entry.seed is None else entry.seed
        return Cue(settings, seed, entry.at)

    def _encode(self, name: str, text: str, inputs: Mapping[str, Value]) -> Value:
        """Plan a prompt: by the encoder, and in the syntax, of the video's own."""
        facts = inputs["positive"].facts
        node = EncodeText.model_construct(text_encoder=None, text=text, prompt_syntax=facts["prompt_syntax"])
        try:
            parts = [words for words, _ in node.parts()]
        except ValueError as error:
            self._builder.problem(self._name, "timeline", "R106", f"{name}: {error}")
            parts = []
        encoder: Value = facts["text_encoder"]
        remark_on_prompt(self._builder, self._name, encoder, parts, node=name)
        (value,) = self._builder.add(name, node, {"text_encoder": encoder}, recipe_node=self._name).values()
        return replace(value, facts=facts)
