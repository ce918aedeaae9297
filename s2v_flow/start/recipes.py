"""The recipes that `init` and `make` write, as data: one set of nodes, and what each likeness changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from s2v_flow.graph.ports import FieldPath

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
    """Return a recipe like one of `RECIPES`.

    Args:
        params: image, audio, prompt, width and height.
        output: The video's name, relative to the recipe.
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
