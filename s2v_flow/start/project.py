"""The first recipe: written for a portrait and a voice, whole and commented, in a size that fits the portrait.

It is made of data: one set of nodes, and what each likeness changes. What it says is the same as recipes/s2v_*.yaml and
recipes/demo.yaml, which a test compares.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from s2v_flow.errors import MissingError, S2VFlowError, UsageError
from s2v_flow.files.atomic import TakenError, put_new, temporary
from s2v_flow.graph.node import Node
from s2v_flow.graph.ports import FieldPath
from s2v_flow.library.needs import meant_instead
from s2v_flow.recipe.argument import Override
from s2v_flow.recipe.emit import to_yaml
from s2v_flow.recipe.load import Recipe, load_recipe
from s2v_flow.recipe.params import escaped, whole_reference
from s2v_flow.recipe.reader import FORBIDDEN
from s2v_flow.recipe.tree import plain

Nodes = Mapping[str, Mapping[str, Any]]

_NEGATIVE = "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量"
# Source: Wan2.2, wan/configs/wan_s2v_14B.py, sample_neg_prompt
_OFFICIAL_NEGATIVE = (
    "画面模糊，最差质量，画面模糊，细节模糊不清，情绪激动剧烈，手快速抖动，字幕，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)

_LIGHTNING_LORA = {
    "id": "lightning",
    "file": "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors",
    "strength": 1.0,
    "allow_partial": True,
}
_BF16 = {"checkpoint": "wan2.2_s2v_14B_bf16.safetensors"}
_FP16_ENCODER = {"checkpoint": "umt5_xxl_fp16.safetensors"}

_NODES: Nodes = {
    "dit": {"kind": "load_diffusion_model", "checkpoint": "wan2.2_s2v_14B_fp8_scaled.safetensors"},
    "umt5": {"kind": "load_text_encoder", "checkpoint": "umt5_xxl_fp8_e4m3fn_scaled.safetensors"},
    "wav2vec2": {"kind": "load_audio_encoder", "checkpoint": "wav2vec2_large_english_fp16.safetensors"},
    "vae": {"kind": "load_vae", "checkpoint": "wan_2.1_vae.safetensors"},
    "portrait": {"kind": "load_image", "file": "$params.image"},
    "voice": {"kind": "load_audio", "file": "$params.audio"},
    "positive": {"kind": "encode_text", "text_encoder": "$umt5", "text": "$params.prompt"},
    "negative": {"kind": "encode_text", "text_encoder": "$umt5", "text": "$params.negative_prompt"},
    "speech": {"kind": "encode_audio", "audio_encoder": "$wav2vec2", "audio": "$voice"},
    "reference": {
        "kind": "encode_image",
        "vae": "$vae",
        "image": "$portrait",
        "width": "$params.width",
        "height": "$params.height",
    },
    "first": {
        "kind": "sample",
        "model": "$dit",
        "positive": "$positive",
        "negative": "$negative",
        "speech": "$speech",
        "reference": "$reference",
        "steps": "$params.steps",
        "cfg": "$params.cfg",
        "seed": "$params.seed",
        "sampler": "uni_pc",
        "scheduler": "simple",
        "shift": 8.0,
    },
    "talk": {"kind": "extend", "video": "$first", "chunks": "auto"},
    "frames": {"kind": "decode", "vae": "$vae", "latent": "$talk"},
    "video": {"kind": "save_video", "frames": "$frames", "audio": "$voice", "file": "out/talk.mp4"},
}


@dataclass(frozen=True)
class StartRecipe:
    """What a likeness changes: parameters, fields of nodes, profiles.

    `negative_prompt` None: it has no such node. `max_area` is its size in pixels, in the portrait's shape; `size` is
    its only width and height.
    """

    description: str
    params: Mapping[str, Any]
    nodes: Nodes = field(default_factory=dict)
    profiles: Mapping[str, Any] = field(default_factory=dict)
    negative_prompt: str | None = _NEGATIVE
    max_area: int = 640 * 640
    size: tuple[int, int] | None = None


RECIPES: Mapping[str, StartRecipe] = MappingProxyType(
    {
        "lightning": StartRecipe(
            "Talking portrait with the Lightning LoRA, four steps: quick.",
            params={"steps": 4, "cfg": 1.0, "seed": 20},
            nodes={"dit": {"precision": "auto", "loras": [_LIGHTNING_LORA]}},
            profiles={
                "quality": {"params": {"steps": 20, "cfg": 6.0}, "nodes": {"dit": {"loras": []}}},
                "bf16": {"nodes": {"dit": _BF16}},
            },
        ),
        "quality": StartRecipe(
            "Talking portrait in 20 steps with guidance, fp8 weights.",
            params={"steps": 20, "cfg": 6.0, "seed": 20},
            profiles={"bf16": {"nodes": {"dit": _BF16}}},
        ),
        "bf16": StartRecipe(
            "Talking portrait in 20 steps with guidance, weights in bfloat16 (33 GB).",
            params={"steps": 20, "cfg": 6.0, "seed": 20},
            nodes={"dit": _BF16, "umt5": _FP16_ENCODER},
        ),
        "official": StartRecipe(
            "Talking portrait with the settings of the model's authors: their solver, 40 steps, motion as pixels.",
            params={"steps": 40, "cfg": 4.5, "seed": 20},
            nodes={
                "dit": _BF16,
                "umt5": _FP16_ENCODER,
                "first": {"vae": "$vae", "sampler": "flow_unipc", "shift": 3.0, "motion": "pixels"},
            },
            negative_prompt=_OFFICIAL_NEGATIVE,
            max_area=704 * 1024,
        ),
        "demo": StartRecipe(
            "A drawn character speaks, without weights to fetch: the demo's small models know drawn faces only.",
            params={"length": 37, "steps": 4, "cfg": 1.0, "seed": 20},
            nodes={
                "dit": {"checkpoint": "demo_s2v.safetensors"},
                "umt5": {"checkpoint": "tiny_umt5.safetensors"},
                "wav2vec2": {"checkpoint": "demo_wav2vec2.safetensors"},
                "vae": {"checkpoint": "demo_vae.safetensors"},
                "first": {"length": "$params.length"},
                "frames": {"frames_per_call": 4},
                "talk": {
                    "timeline": [
                        {"at": 2.4, "prompt": "She smiles."},
                        {"at": 4.8, "prompt": "She looks surprised."},
                    ]
                },
                "larger": {"kind": "frames_scale", "frames": "$frames", "factor": 2, "method": "bicubic"},
                "video": {"frames": "$larger", "preset": "veryfast"},
            },
            negative_prompt=None,
            size=(128, 128),
        ),
    }
)

HEAD = """\
A first recipe. `s2vflow check` finds its mistakes, `plan` shows what a run would do, `run` makes the video, and
`models` lists the model files that it needs. `s2vflow nodes KIND` explains the fields of a node.
Editors complete and check it once `s2vflow schema -o recipe.schema.json` has written the schema, with the first line
`# yaml-language-server: $schema=recipe.schema.json`."""

ABOVE: Mapping[FieldPath, str] = MappingProxyType(
    {
        (): HEAD,
        ("params",): "The knobs: change them here, or for one run with --set steps=20.",
        ("nodes",): "What happens, node by node; $name is another node's result.",
        ("profiles",): "Sets of changes, for one run: -p quality, or -p quality,bf16.",
    }
)
BEHIND: Mapping[FieldPath, str] = MappingProxyType(
    {
        ("params", "width"): "the portrait is cut about its centre to this shape",
        ("params", "steps"): "denoising steps",
        ("params", "cfg"): "how closely the prompt is followed; 1 is quickest",
        ("params", "seed"): "another seed, another video",
        ("nodes", "talk"): "as many chunks as the voice is long; settings come from `first`",
    }
)


def start_data(like: str, params: Mapping[str, Any], output: str) -> dict[str, Any]:
    """Return a recipe like one of `RECIPES`; `params`: image, audio, prompt, width and height.

    `output`: the video's name, relative to the recipe.
    """
    recipe = RECIPES[like]
    names = dict.fromkeys([*_NODES, *recipe.nodes])
    nodes = {name: {**_NODES.get(name, {}), **recipe.nodes.get(name, {})} for name in names}
    nodes["video"] = {**nodes.pop("video"), "file": output}  # stands last
    texts = {name: params[name] for name in ("image", "audio", "prompt")}
    if recipe.negative_prompt is None:
        del nodes["negative"], nodes["first"]["negative"]
    else:
        texts["negative_prompt"] = recipe.negative_prompt
    values = {**texts, **params, **recipe.params}
    data: dict[str, Any] = {"s2vflow": 1, "description": recipe.description, "params": values, "nodes": nodes}
    return {**data, "profiles": dict(recipe.profiles)} if recipe.profiles else data


DEFAULT_PROMPT = "The person looks into the camera and speaks calmly."
_UNIT = 64  # the authors' sizes are multiples of this
_MAX_UNITS = 64  # 4096 pixels, the longest side that a node takes
_PLACEHOLDER_SIZE = (1, 1)


@dataclass(frozen=True)
class Start:
    """What a first recipe is made for. Without a portrait or a voice, the recipe names files that are to be put there.

    `like` is a name in `RECIPES`; `output` is the video's name, as the recipe says it: relative to the recipe.
    """

    portrait: Path | None = None
    voice: Path | None = None
    prompt: str = DEFAULT_PROMPT
    like: str = "lightning"
    output: str = "out/talk.mp4"


def fitting_size(width: int, height: int, max_area: int) -> tuple[int, int]:
    """Return the largest size in multiples of 64 that has an image's shape, rounded up, within an area.

    The image is scaled until, each side rounded up to 64, it just fits the area; all are in pixels.

    Raises:
        ValueError: A side is not positive, or the area is less than 64 x 64.

    Source: Wan2.2, wan/speech2video.py, WanS2V.get_size_less_than_area, which tries 100 scales and never enlarges.
    """
    if width < 1 or height < 1 or max_area < _UNIT**2:
        raise ValueError(f"no size for {width}x{height} within {max_area} pixels")
    units = max_area // _UNIT**2
    # every size that scaling can give has one side that is a multiple of 64 before rounding
    by_width = [(count, -(-count * height // width)) for count in range(1, _MAX_UNITS + 1)]
    by_height = [(-(-count * width // height), count) for count in range(1, _MAX_UNITS + 1)]
    fitting = [size for size in (*by_width, *by_height) if size[0] * size[1] <= units and max(size) <= _MAX_UNITS]
    best = max(fitting, key=lambda size: size[0] * size[1])
    return best[0] * _UNIT, best[1] * _UNIT


def recipe_text(start: Start, folder: Path) -> str:
    """Return a first recipe as text; `folder`: where it will stand: it names the files relative to this.

    Raises:
        MissingError, MediaError, RefusedError: A file is not there, or is no image or sound that can be used.
        S2VFlowError: A text holds characters that no recipe may hold.
    """
    for path, what in ((start.portrait, "portrait"), (start.voice, "voice")):
        if path is not None and not path.exists():
            near = meant_instead(str(path), what, [str(path.parent)])
            raise MissingError(f"{path}: no such file", fix=near or f"give the path of the {what}")
    width, height = _PLACEHOLDER_SIZE
    portrait, voice = "portrait.png", "voice.mp3"
    about = {"image": "put your portrait there", "audio": "put the voice there"}
    if start.portrait is not None:
        from s2v_flow.media.image import probe_image

        width, height = probe_image(start.portrait)
        portrait = _relative(start.portrait, folder)
        about["image"] = f"{width}x{height} pixels"
    if start.voice is not None:
        from s2v_flow.media.audio import probe_audio

        about["audio"] = f"{float(probe_audio(start.voice).duration_seconds):.2f} s"
        voice = _relative(start.voice, folder)
    like = RECIPES[start.like]
    size = like.size or fitting_size(width, height, like.max_area)
    texts = {"image": portrait, "audio": voice, "prompt": start.prompt}
    for name, text in texts.items():
        found = FORBIDDEN.search(text)
        if found is not None:
            message = f"the {name} holds the character U+{ord(found[0]):04X}, which may not stand in a recipe"
            raise UsageError(message, "leave it out, or rename the file")
    literal = {name: escaped(text) for name, text in texts.items()}
    data = start_data(start.like, {**literal, "width": size[0], "height": size[1]}, start.output)
    behind = {path: text for path, text in BEHIND.items() if _has(data, path)}
    behind.update({("params", name): text for name, text in about.items()})
    above = {path: text for path, text in ABOVE.items() if _has(data, path)}
    return to_yaml(data, comments=behind, above=above)


def is_as_written(path: Path, kinds: Mapping[str, type[Node]]) -> bool:
    """Tell whether a recipe is as `make` or `init` wrote it, so that nobody's work is in it."""
    with suppress(OSError, KeyError, TypeError, AttributeError, S2VFlowError):
        recipe, folder = load_recipe(path, kinds=kinds), path.parent
        params, video = recipe.params, recipe.nodes["video"].node.model_dump()["file"]
        start = Start(folder / params["image"], folder / params["audio"], params["prompt"], output=Path(video).name)
        text = path.read_text(encoding="utf-8")
        return any(recipe_text(replace(start, like=like), folder) == text for like in RECIPES)
    return False


def changes_like(start: Start, recipe: Recipe) -> list[Override]:
    """Return what makes a recipe one for another portrait, voice, prompt and output; all else stays, its size too.

    `start`: what it is for; paths start at the current folder.

    Raises:
        S2VFlowError: The recipe has no such node, or several, so that the place is not clear.
    """
    spoken = {spec.node.refs()["positive"].node for spec in recipe.nodes.values() if "positive" in spec.node.refs()}
    places = (
        ("load_image", "file", _relative(start.portrait or Path(), Path.cwd()), None),
        ("load_audio", "file", _relative(start.voice or Path(), Path.cwd()), None),
        ("encode_text", "text", start.prompt, spoken),
        ("save_video", "file", start.output, None),
    )
    nodes, changes = plain(recipe.document)["nodes"], []
    for kind, key, value, among in places:
        found = [name for name, spec in recipe.nodes.items() if spec.kind == kind and (among is None or name in among)]
        if len(found) != 1:
            message = f"{recipe.path} cannot be followed: it has {len(found)} {kind} nodes for one {key}"
            raise UsageError(message, f"s2vflow recipe {recipe.path} -o NEW.yaml writes its recipe: change that one")
        param = whole_reference(nodes[found[0]].get(key))
        place = f"nodes.{found[0]}.{key}" if param is None else f"params.{param}"
        changes.append(Override("set-json", f"{place}={json.dumps(escaped(value))}"))
    return changes


def recipe_path(video: Path) -> Path:
    """Return where the recipe of a video is left: beside it.

    Raises:
        S2VFlowError: The video's name does not end in .mp4.
    """
    if video.suffix != ".mp4":
        raise UsageError(f"{video}: a video's name ends in .mp4", f"-o {video.stem or 'talk'}.mp4")
    return video.with_suffix(".yaml")


def write_recipe(path: Path, text: str, *, force: bool = False, replaces: bytes | None = None) -> None:
    """Write a recipe, whole or not at all; a file that says the same already is left alone, a device is written to.

    `replaces`: what a file of the same kind has near its start, which is overwritten.

    Raises:
        S2VFlowError: Another file is there and `force` is not given, or it cannot be written.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        before = path.read_bytes() if path.is_file() else None
        if before == text.encode():
            return
        is_older = replaces is not None and before is not None and replaces in b"\n" + before[:400]
        with temporary(path.parent, path.suffix) as (file, name):
            file.write(text.encode())
            file.close()
            if force or is_older:
                os.replace(name, path)
                return
            with suppress(TakenError):  # perhaps by another process, of the same
                put_new(name, path)
            if path.read_bytes() != text.encode():
                fix = "name another file with -o, or overwrite it with --force"
                raise UsageError(f"{path} is there already, and says something else", fix)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}", "name another file with -o") from error


def _relative(path: Path, folder: Path) -> str:
    """Return a path as a recipe in `folder` names it."""
    try:
        text = Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()
    except ValueError:  # another drive
        return path.absolute().as_posix()
    return f"./{text}" if text.startswith("~") else text


def _has(data: Any, path: FieldPath) -> bool:
    for part in path:
        if not isinstance(data, Mapping) or part not in data:
            return False
        data = data[part]
    return True
