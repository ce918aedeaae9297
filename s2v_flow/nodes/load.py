"""Kinds that name a model's file, with its LoRAs, or a latent's. Nothing is read before something needs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from s2v_flow.errors import BadNumbersError, CheckpointError
from s2v_flow.files.facts import per_file
from s2v_flow.graph.context import RunContext
from s2v_flow.graph.node import Node, Planner
from s2v_flow.graph.node import Precision as Resolve
from s2v_flow.graph.ports import FieldPath, FileField, Neutral, Value
from s2v_flow.machine import compute_capability
from s2v_flow.models.lora import LoraReport
from s2v_flow.nodes.chunk_plan import Chain, Part
from s2v_flow.nodes.fields import Attention, DitPrecision, Precision, Settings, model_file
from s2v_flow.nodes.handle import lacks_room, open_handle
from s2v_flow.nodes.remarks import ModelFacts, is_distilled, remark_on_lora

LATENT_KEY = "latent_tensor"
_YOUNGER = {"attention": "auto", "compile": "off"}  # later fields, with the defaults that change no bytes
_OLD_ROUNDING = BeforeValidator(lambda value: "comfyui_2025" if value == "comfyui" else value)  # its older name
_MADE_FOR_THE_DEMO = "the demo's model: it knows the demo's drawn faces only, and makes no good picture of a photograph"
_MADE_FOR_TESTS = "a model for tests: it is untrained, so the picture is abstract"


class Lora(BaseModel):
    """A LoRA file to put on a diffusion model."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: Annotated[str, Neutral()] = Field(
        description="A name of your choice, by which overrides address this LoRA: loras[lightning].strength.",
        pattern=r"^[A-Za-z0-9_-]+$",
    )
    file: Annotated[str, model_file("LoRA", "loras")] = Field(description="File name under the models folder's loras/.")
    strength: float = Field(1.0, ge=-10, le=10, description="Factor on the LoRA's update; 0 switches it off.")
    allow_partial: Annotated[bool, Neutral()] = Field(
        False,
        description="Accept that some of the file's keys have no home in the model (Lightning LoRAs were trained for "
        "T2V). What matched is reported either way. A LoRA of which nothing has a home is an error in any case.",
    )


class LoadDiffusionModel(Node):
    """Load a Wan2.2-S2V diffusion model, with any number of LoRAs."""

    kind: ClassVar[str] = "load_diffusion_model"
    outputs: ClassVar = {"model": "diffusion_model"}

    checkpoint: Annotated[str, model_file("diffusion model", "diffusion_models", "unet")] = Field(
        description="File name under the models folder's diffusion_models/ (or unet/): safetensors or GGUF."
    )
    precision: DitPrecision = Field(
        "auto",
        description="What is computed in. auto: float32 on CPU, bfloat16 on a GPU. Quantised weights (fp8, int8, "
        "nvfp4, mxfp8) stay packed on a GPU and are expanded at loading on a CPU; those of a GGUF file always stay. "
        "fp8_fast (approximate): bf16, but the blocks' linear layers multiply in fp8, with a scale a row; from compute "
        "capability 8.9 on.",
    )
    loras: list[Lora] = Field([], description="LoRAs, applied in this order.")
    fp8_rounding: Annotated[Literal["scaled", "comfyui_2025"], _OLD_ROUNDING] = Field(
        "scaled",
        description="For fp8-scaled files. scaled: what the file keeps in 16 or 32 bit stays so. comfyui_2025: biases "
        "and such linear weights are rounded to fp8 as well, as ComfyUI (October 2025) did on loading; for its exact "
        "numbers.",
    )
    placement: Annotated[Literal["auto", "resident", "streamed"], Neutral()] = Field(
        "auto",
        description="Where the weights rest. resident: on the device. streamed: those of the transformer's blocks in "
        "host memory, each on the device only while it and the one before it compute; the same bits, for a fraction of "
        "the device's memory. auto: streamed where weights and activations would not fit into what is free on a GPU.",
    )
    attention: Attention = Field(
        "auto",
        description="What computes attention. auto: on a GPU cuDNN where its compute capability is 9.0 or 10.0, flash "
        "at 8.x, else sdpa: torch's own choice; one that fails on a small tensor is passed over with a warning. Any "
        "other value is an error where it cannot be had. sage (approximate) needs the package sageattention.",
    )

    compile: Literal["off", "blocks"] = Field(
        "off",
        description="blocks: torch.compile of the transformer's blocks, whose weights stay on the device. The first "
        "step of a process waits for the compiler; rounding differs in the last bits.",
    )

    @field_validator("loras")
    @classmethod
    def check_ids(cls, loras: list[Lora]) -> list[Lora]:
        """Refuse two LoRAs of one id: overrides would reach the first only."""
        ids = [lora.id for lora in loras]
        twice = next((name for index, name in enumerate(ids) if name in ids[:index]), None)
        if twice is not None:
            raise ValueError(f"the id {twice} is given to two LoRAs")
        return loras

    def identity(self, digests: Mapping[FieldPath, str], precision: Resolve) -> dict[str, Any]:
        """Name the rounding as caches know it; leave out what is younger than they are, at its default."""
        fields = super().identity(digests, precision)
        fields = {name: value for name, value in fields.items() if value != _YOUNGER.get(name)}
        return {**fields, "fp8_rounding": fields["fp8_rounding"].removesuffix("_2025")}

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Check the files' headers, and match the LoRAs' with the model's."""
        values = planner.add_simple(name, self)
        check_header(planner, name, "wan s2v")
        path = planner.file(name, "checkpoint")
        is_demo = path is not None and path == planner.locations.made_models.get(self.checkpoint)
        if is_demo:
            is_trained = self.checkpoint.startswith("demo_")
            planner.note(name, f"{self.checkpoint} is {_MADE_FOR_THE_DEMO if is_trained else _MADE_FOR_TESTS}")
        files = [planner.file(name, "loras", index, "file") for index in range(len(self.loras))]
        for index in range(len(self.loras)):
            check_header(planner, name, "lora", "loras", index, "file")
        reports = matched(self.loras, path, files)
        for lora, report in zip(self.loras, reports, strict=True):
            remark_on_lora(planner, name, lora.id, lora.strength, report)
        planner.describe(name, loras=[coverage(*pair) for pair in zip(self.loras, reports, strict=True)])
        used = [(lora.file, file) for lora, file in zip(self.loras, files, strict=True) if lora.strength != 0]
        distilled = tuple(text for text, file in [*used, (self.checkpoint, path)] if is_distilled(text, file))
        facts = {"model": ModelFacts(is_demo, distilled)}
        return {port: replace(value, facts=facts) for port, value in values.items()}

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give out a handle."""
        paths = [context.files["loras", index, "file"] for index in range(len(self.loras))]
        digests = (context.digests["loras", index, "file"] for index in range(len(self.loras)))
        strengths = [lora.strength for lora in self.loras]
        facts: dict[str, Any] = {}

        def load(path: Path, **options: Any) -> Any:
            from s2v_flow.models.attention import backends_for, usable_backend
            from s2v_flow.models.load import load_dit
            from s2v_flow.models.lora import LoraSpec
            from s2v_flow.models.packed import require_products

            device, dtype = context.device, options["dtype"]
            candidates = backends_for(compute_capability(device), dtype)
            facts["attention"], told = usable_backend(self.attention, candidates, device, dtype)
            if told:
                context.note(told, is_warning=True)
            specs = [LoraSpec(file, strength) for file, strength in zip(paths, strengths, strict=True)]
            if self.precision == "fp8_fast":
                require_products(device)
            options.update(rounds_linears=self.fp8_rounding == "comfyui_2025", fp8_fast=self.precision == "fp8_fast")
            loaded = (context.models().load_dit or load_dit)(path, loras=specs, **options)
            for lora, report in zip(self.loras, loaded.loras, strict=True):
                text, is_idle = coverage_text(lora, report), report.is_idle()
                why = "its strength is 0" if lora.strength == 0 else f"the update in {report.path.name} is 0 everywhere"
                idle = f"LoRA {lora.id} changes nothing: {why}"
                context.note(idle if is_idle else text, is_warning=is_idle and lora.strength != 0)
                if report.unmatched:
                    context.note(f"LoRA {lora.id}: {unmatched_text(report)}", is_detail=True)
                counts = {name: getattr(report, name) for name in ("matched", "total", "blocks")}
                facts.setdefault("loras", []).append({"id": lora.id, **counts})
            loaded.module.attention = facts["attention"]
            if self.compile == "blocks":
                loaded.module.compile_blocks()
            return loaded.module

        def should_stream(num_tokens: int, num_branches: int, is_live: bool) -> bool:
            if context.way.get("placement") == "streamed":
                return True
            if self.placement != "auto" or is_live or self.compile == "blocks":
                return self.placement == "streamed"
            streams = lacks_room(context, self.precision, size, num_tokens, num_branches)
            if streams:
                context.note(
                    "weights and activations do not both fit: the weights are offloaded to host memory and streamed"
                )
            return streams

        loras = tuple(zip(digests, strengths, strict=True))
        size = sum(path.stat().st_size for path in paths)
        kind = f"dit, {self.fp8_rounding} fp8, {self.precision}, attention {self.attention}, compile {self.compile}"
        handle = open_handle(
            context, kind, self.precision, load, loras=loras, lora_bytes=size, facts=facts, should_stream=should_stream
        )
        return {"model": handle}


class _Loader(Node):
    """What loaders of encoders have in common: the header is checked at planning, the handle loads on its first use."""

    family: ClassVar[str]

    checkpoint: str
    precision: Precision

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Check the file's header."""
        values = planner.add_simple(name, self)
        check_header(planner, name, self.family, has_tokenizer=getattr(self, "tokenizer", None) is not None)
        return values

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give out a handle."""
        (port,) = self.outputs
        kind = f"{self.kind.removeprefix('load_')} {context.digests.get(('tokenizer',), '')}".strip()
        return {port: open_handle(context, kind, self.precision, partial(self.load, context))}

    def load(self, context: RunContext, path: Path, **options: Any) -> Any:
        """Load the model; see `open_handle`."""
        raise NotImplementedError


class LoadTextEncoder(_Loader):
    """Load the UMT5 text encoder, a safetensors or GGUF file, with the tokenizer that is inside it."""

    kind: ClassVar[str] = "load_text_encoder"
    family: ClassVar[str] = "umt5 encoder"
    outputs: ClassVar = {"text_encoder": "text_encoder"}

    checkpoint: Annotated[str, model_file("text encoder", "text_encoders", "clip")] = Field(
        description="File name under the models folder's text_encoders/ (or clip/): safetensors or GGUF."
    )
    precision: Precision = Field("auto", description="auto: float32 on CPU, bfloat16 on a GPU.")
    tokenizer: Annotated[str, model_file("tokenizer", "text_encoders", "clip")] | None = Field(
        None, description="A SentencePiece model (spiece.model), for a file without one inside."
    )

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Check the file's header, and a tokenizer that stands in a file of its own."""
        values = super().plan(planner, name)
        given = planner.file(name, "tokenizer") if self.tokenizer is not None else None
        if given is not None and given.is_file():
            _check_tokenizer(given)
        return values

    def load(self, context: RunContext, path: Path, **options: Any) -> Any:
        """Load the encoder."""
        from s2v_flow.models.load import load_text_encoder

        return load_text_encoder(path, tokenizer=context.files.get(("tokenizer",)), **options)


class LoadAudioEncoder(_Loader):
    """Load the Wav2Vec2 audio encoder."""

    kind: ClassVar[str] = "load_audio_encoder"
    family: ClassVar[str] = "wav2vec2"
    outputs: ClassVar = {"audio_encoder": "audio_encoder"}

    checkpoint: Annotated[str, model_file("audio encoder", "audio_encoders")] = Field(
        description="File name under the models folder's audio_encoders/."
    )
    precision: Precision = Field("auto", description="auto: float32.")

    def load(self, context: RunContext, path: Path, **options: Any) -> Any:
        """Load the encoder."""
        from s2v_flow.models.load import load_audio_encoder

        return load_audio_encoder(path, dtype=options["dtype"], device=options["device"])


class LoadVae(_Loader):
    """Load the Wan video VAE."""

    kind: ClassVar[str] = "load_vae"
    family: ClassVar[str] = "wan vae"
    outputs: ClassVar = {"vae": "vae"}

    checkpoint: Annotated[str, model_file("VAE", "vae")] = Field(
        description="File name under the models folder's vae/."
    )
    precision: Precision = Field("auto", description="auto: float32 on CPU, bfloat16 on a GPU.")

    def load(self, context: RunContext, path: Path, **options: Any) -> Any:
        """Load the VAE."""
        from s2v_flow.models.load import load_vae

        return load_vae(path, dtype=options["dtype"], device=options["device"])


class LoadLatent(Node):
    """Read a latent that `save_latent` (or ComfyUI's SaveLatent) wrote, as the first chunk of a video."""

    kind: ClassVar[str] = "load_latent"
    is_stored: ClassVar[bool] = True
    outputs: ClassVar = {"latent": "latent"}

    file: Annotated[str, FileField("input", "latent")] = Field(description="The file, safetensors inside.")

    def plan(self, planner: Planner, name: str) -> dict[str, Value]:
        """Take the size off the file's header: the latent is a video of one part."""
        values = planner.add_simple(name, self)
        path = planner.file(name, "file")
        shape = [1, 16, 1, 0, 0] if path is None else latent_shape(path)
        settings = Settings().with_size(8 * shape[4], 8 * shape[3])
        return Chain((Part(values["latent"].source, shape[2]),), settings, is_open=path is None).value()

    def run(self, context: RunContext, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Store the file's latent as the first chunk: {"latent": {samples: [1, 16, F, H, W]}}."""
        from s2v_flow.nodes.tensors import pack
        from s2v_flow.weights.reader import Checkpoint

        latent = Checkpoint.open(context.files["file",]).tensor(LATENT_KEY).float()
        if not latent.isfinite().all():
            raise BadNumbersError(f"{context.name}: NaN or infinity in {self.file}", fix="make the latent again")
        return {"latent": pack({"samples": latent})}


def latent_shape(path: Path) -> tuple[int, ...]:
    """Return the shape [1, 16, F, H, W] of a saved latent, from the file's header.

    Raises:
        CheckpointError: It holds no such latent.
    """
    from s2v_flow.weights.reader import Checkpoint

    shape = Checkpoint.open(path).shapes.get(LATENT_KEY, ())
    if len(shape) != 5 or shape[:2] != (1, 16) or 0 in shape:
        raise CheckpointError(
            f"{path} holds no latent of a video: expected {LATENT_KEY} [1, 16, F, H, W], got {list(shape)}",
            fix="use a file that save_latent or ComfyUI's SaveLatent wrote for a Wan video",
        )
    return shape


def check_header(planner: Planner, name: str, family: str, *field_path: str | int, has_tokenizer: bool = False) -> None:
    """Look at a model file's header, where the file is there: is it whole, and is it what the recipe takes it for?

    Raises:
        CheckpointError, RefusedError: It is damaged, a pickle, of another family, or lacks a tensor.
    """
    path = planner.file(name, *(field_path or ("checkpoint",)))
    if path is not None and path.is_file():
        _check_header(path, name, family, has_tokenizer)


@per_file
def _check_tokenizer(path: Path) -> None:
    from s2v_flow.weights.tokenizer import read_tokenizer, tokenizer_file

    read_tokenizer(tokenizer_file(path), str(path))


@per_file
def _check_header(path: Path, name: str, family: str, has_tokenizer: bool) -> None:
    from s2v_flow.weights.family import advice, describe_mismatch
    from s2v_flow.weights.layout import check_layout
    from s2v_flow.weights.quantization import read_quantization
    from s2v_flow.weights.reader import Checkpoint
    from s2v_flow.weights.tokenizer import holds_tokenizer

    checkpoint = Checkpoint.open(path)
    mismatch = describe_mismatch(family, checkpoint.shapes)
    if mismatch is not None:
        if mismatch.startswith("this is an unknown"):
            read_quantization(checkpoint)  # names the format, where it hides the keys of the family
        raise CheckpointError(f"{path}: {mismatch}", fix=advice(path, family, checkpoint.shapes, name))
    if family != "lora":
        packings = read_quantization(checkpoint).packings
        has_tokenizer = has_tokenizer or holds_tokenizer(checkpoint)
        check_layout(path, family, checkpoint.entries, packings, has_tokenizer=has_tokenizer)


def matched(loras: Sequence[Lora], checkpoint: Path | None, files: Sequence[Path | None]) -> list[LoraReport | None]:
    """Match LoRAs with a model by the files' headers; None where one of the two files is missing.

    Raises:
        CheckpointError: See `coverage_text`.
    """
    pairs = list(zip(loras, files, strict=True))
    if checkpoint is None or not checkpoint.is_file() or not pairs:
        return [None] * len(pairs)
    from s2v_flow.models.lora import LoraSpec, open_loras
    from s2v_flow.weights.quantization import read_quantization
    from s2v_flow.weights.reader import Checkpoint

    model = Checkpoint.open(checkpoint)
    quantization = read_quantization(model)
    shapes = {key: quantization.shape(model, key) for key in model.entries if key not in quantization.bookkeeping}
    reports: list[LoraReport | None] = []
    for lora, file in pairs:
        report = None
        if file is not None and file.is_file():
            (report,) = open_loras([LoraSpec(file, lora.strength)], shapes).reports
            coverage_text(lora, report)
        reports.append(report)
    return reports


def coverage(lora: Lora, report: LoraReport | None) -> dict[str, Any]:
    """Return how much of a LoRA has a home in the model, in tensors; without a report nothing is known of that."""
    known = (None, None, None) if report is None else (report.matched, report.total, list(report.unmatched))
    return {"id": lora.id, "file": lora.file, **dict(zip(("matched", "total", "unmatched"), known, strict=True))}


def coverage_text(lora: Lora, report: LoraReport) -> str:
    """Say how much of a LoRA found a home; which keys did not, `unmatched_text` says.

    Raises:
        CheckpointError: Nothing did; or not all of it, and the recipe does not allow that.
    """
    text = f"LoRA {lora.id}: {report.matched} of {report.total} tensors applied ({report.coverage:.0%})"
    if report.unmatched:
        if not report.matched:
            why = "".join(f"; {mismatch}" for mismatch in report.misshapen[:1])
            fix = f"it is for another model: name another file, or remove the LoRA {lora.id}"
            raise CheckpointError(f"{text}; {unmatched_text(report)}{why}", fix=fix)
        if not lora.allow_partial:
            fix = f"set allow_partial: true for the LoRA {lora.id} if that is meant"
            raise CheckpointError(f"{text}; {unmatched_text(report)}", fix=fix)
    return text


def unmatched_text(report: LoraReport) -> str:
    """Say which of a LoRA's keys found no home: "54 have no home in this model: ..."."""
    shown = ", ".join(report.unmatched[:5]) + (", ..." if len(report.unmatched) > 5 else "")
    return f"{len(report.unmatched)} have no home in this model: {shown}"
