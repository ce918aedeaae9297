"""Warnings before a run, by the setting's name: where its result is another than a user may expect."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2v_flow.graph.node import Planner
from s2v_flow.graph.ports import Value

if TYPE_CHECKING:
    from s2v_flow.models.lora import LoraReport
    from s2v_flow.nodes.fields import Settings

FEW_STEPS = 8  # what models that are distilled for few steps are run with, at most
USUAL_STEPS = 20
LOW_COVERAGE = 0.5  # of a LoRA's tensors
_DISTILLED = re.compile(
    r"lightx2v|lightning|live-?avatar|distil|causvid|accvid|fusionx|fastwan|self[-_ .]?forcing|turbo|hyper"
    r"|(?<![a-z])(lcm|dmd\d?|rcm)(?![a-z])|(?<!\d)[1-8][-_ .]?steps?(?![a-z])",
    re.IGNORECASE,
)
_NAME_KEYS = ("title", "name", "tag", "description")  # of a file's metadata: ss_output_name, modelspec.title


@dataclass(frozen=True)
class ModelFacts:
    """What sampling settings are compared with: whether the model is untrained, and its files made for few steps."""

    is_demo: bool = False
    distilled: tuple[str, ...] = ()


def is_distilled(name: str, path: Path | None) -> bool:
    """Tell by a model file's name, or the names in its metadata, whether it is made for few steps without guidance."""
    from s2v_flow.weights.reader import Checkpoint

    metadata = Checkpoint.open(path).metadata if path is not None and path.is_file() else {}
    names = [text for key, text in metadata.items() if key.lower().endswith(_NAME_KEYS)]
    return any(_DISTILLED.search(text) for text in (name.replace("\\", "/").rpartition("/")[2], *names))


def remark_on_settings(planner: Planner, name: str, settings: Settings, given: Collection[str]) -> None:
    """Say what settings of a chunk do not do, where node `name` gives one of them itself, by the names in `given`."""
    inputs, steps, cfg = settings.inputs, settings.fields.steps, settings.fields.cfg
    if cfg == 1 and "negative" in inputs and {"negative", "cfg"} & set(given):
        planner.note(name, f"negative: the negative prompt is not used in {name}: with cfg 1 there is no guidance")
    cache, threshold = settings.fields.step_cache, settings.fields.step_cache_threshold
    if cache != "off" and steps < USUAL_STEPS and {"step_cache", "steps"} & set(given):
        text = f"step_cache: {name} has steps {steps}: it pays from about {USUAL_STEPS} on, and is approximate"
        planner.note(name, text, is_warning=True)
    usual = type(settings.fields).model_fields["step_cache_threshold"].default
    if cache == "off" and threshold != usual and "step_cache_threshold" in given:
        planner.note(name, f"step_cache_threshold: it has no effect in {name}, where step_cache is off")
    model = inputs["model"].facts.get("model") if "model" in inputs else None
    if model is None or not {"model", "steps", "cfg"} & set(given):
        return
    if model.distilled and (steps > FEW_STEPS or cfg > 1):
        text = f"lora: {model.distilled[0]} is made for few steps without guidance, but {name} has steps {steps} and "
        planner.note(name, f"{text}cfg {cfg:g}: set steps to 4 and cfg to 1, or leave it out")
    elif not model.distilled and steps <= FEW_STEPS and not model.is_demo:
        text = (
            f"lora: {name} has steps {steps} without a LoRA for few steps (Lightning, lightx2v): the picture will be "
        )
        planner.note(name, f"{text}blurred or noisy; add one, or set steps to {USUAL_STEPS}")


def remark_on_lora(planner: Planner, name: str, lora: str, strength: float, report: LoraReport | None) -> None:
    """Say which LoRAs do nothing, or little. `report` tells how much of the file found a home, where that is known."""
    if strength == 0:
        planner.note(name, f"lora: {lora} has strength 0 and no effect")
    elif report is not None and report.coverage < LOW_COVERAGE:
        text = f"lora: {report.matched} of {report.total} tensors of {report.path.name} have a home in the model"
        planner.note(name, f"{text}: it has little effect", is_warning=True)
    if report is not None and report.told_scale != 1:
        text = (
            f"lora: {report.path.name} says alpha / rank = {report.told_scale:g} in metadata that ComfyUI does not read"
        )
        text += f": as there, it is applied with 1; diffusers' result has strength {report.told_scale * strength:g}"
        planner.note(name, text, is_warning=True)
    if report is not None and report.is_causal:
        text = (
            f"lora: {lora} is LiveAvatar's (by its name, or by its layers and rank): it is made for causal sampling in "
        )
        text += "blocks with a KV cache, which is not supported; what it gives here is out of contract"
        planner.note(name, text, is_warning=True)


def remark_on_prompt(planner: Planner, name: str, encoder: Value, text: str | Sequence[str], *, node: str) -> None:
    """Say where a prompt is cut: the model takes 512 tokens.

    `text`: the prompt, or its parts, where each is tokenised by itself.

    Raises:
        CheckpointError: The text encoder's file is damaged.
    """
    from s2v_flow.weights.tokenizer import MAX_TOKENS, is_surely_short, measure

    path, given = (planner.file(encoder.source.node, key) for key in ("checkpoint", "tokenizer"))
    whole = text if isinstance(text, str) else "\0".join(text)
    if path is None or not path.is_file() or is_surely_short(whole):
        return

    def count() -> dict[str, Any]:
        return dict(zip(("tokens", "last_words"), measure(path, text, given), strict=True))

    found = planner.remember(f"tokens of {sha256(whole.encode()).hexdigest()}", path, count)
    if found["tokens"] > MAX_TOKENS:
        cut = f"prompt: the text of {node} has {found['tokens']} tokens and is cut at {MAX_TOKENS}"
        planner.note(name, f'{cut}; the last words that count: "{found["last_words"]}"')
