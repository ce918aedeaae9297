"""Run an API-format workflow with a ComfyUI checkout's own nodes, on the CPU in float32, without its server.

`python comfyui_run.py CHECKOUT BASE WORKFLOW.json`, BASE with models/ and input/. Needs what ComfyUI imports; vision
and sound packages that it does not use here are replaced where they are missing. Sizes that ComfyUI has fixed are
read off the models' files, so that small ones load.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import os
import sys
import types
from typing import Any

UNUSED = ("torchvision", "torchaudio", "spandrel", "kornia", "comfy_kitchen", "comfy_aimdo")
NODES = ("wan", "audio", "audio_encoder", "latent", "model_advanced", "images", "video", "primitive")


class Empty(types.ModuleType):
    """A module in which every name is a class that does nothing."""

    __path__ = ()

    def __getattr__(self, name: str) -> type:
        """Make the class."""
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *args, **options: None})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Find the unused packages that are not installed."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Answer last of all finders."""
        is_ours = name.partition(".")[0] in UNUSED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Make an empty module; sound of the encoder's own rate needs no resampling."""
        module = Empty(spec.name)
        if spec.name == "torchaudio":
            module.functional = types.SimpleNamespace(resample=_same_rate)  # type: ignore[attr-defined]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Do nothing."""


def _same_rate(sound: Any, rate: int, wanted: int) -> Any:
    assert rate == wanted, "give sound of 16 kHz, or install torchaudio"
    return sound


def size_by_files(nodes: Any, folder_paths: Any) -> None:
    """Let loaders take their sizes from the files."""
    from safetensors import safe_open

    comfy = importlib.import_module("comfy")
    names = ("sd", "model_detection", "sd1_clip", "text_encoders.wan", "audio_encoders.audio_encoders", "ldm.wan.vae")
    loading, detection, clip, text, audio, vae = (importlib.import_module(f"{comfy.__name__}.{name}") for name in names)

    def shapes(kind: str, name: str) -> dict[str, list[int]]:
        with safe_open(folder_paths.get_full_path_or_raise(kind, name), "pt") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118

    detect = detection.detect_unet_config

    def sized(weights: Any, prefix: str, *args: Any, **options: Any) -> Any:
        config = detect(weights, prefix, *args, **options)
        if config and config.get("model_type") == "s2v":
            config["text_dim"] = weights[f"{prefix}text_embedding.0.weight"].shape[1]
            config["audio_dim"] = weights[f"{prefix}casual_audio_encoder.encoder.conv1_local.conv.weight"].shape[1]
        return config

    detection.detect_unet_config = sized
    whole_vae, load_vae = vae.WanVAE, nodes.VAELoader.load_vae

    def load_sized_vae(self: Any, vae_name: str, *args: Any) -> Any:
        width = shapes("vae", vae_name)["decoder.head.0.gamma"][0]
        vae.WanVAE = lambda **options: whole_vae(**{**options, "dim": width})
        return load_vae(self, vae_name, *args)

    nodes.VAELoader.load_vae = load_sized_vae
    model = audio.AudioEncoderModel

    def load_audio(weights: Any, prefix: str = "") -> Any:
        width = weights["encoder.layer_norm.bias"].shape[0]
        layers = {key.split(".")[2] for key in weights if key.startswith("encoder.layers.")}
        flags = dict.fromkeys(("conv_norm", "conv_bias", "do_normalize", "do_stable_layer_norm"), True)
        sizes = {"embed_dim": width, "num_heads": max(4, width // 64), "num_layers": len(layers)}
        made = model({"model_type": "wav2vec2", **sizes, **flags})
        made.load_sd(weights)
        return made

    audio.load_audio_encoder_from_sd = load_audio
    load_clip, read_json, token_model = nodes.CLIPLoader.load_clip, json.load, clip.SDClipModel

    def load_sized_clip(self: Any, clip_name: str, **options: Any) -> Any:
        found = shapes("text_encoders", clip_name)
        attention = "encoder.block.0.layer.0.SelfAttention."
        heads = found[f"{attention}relative_attention_bias.weight"][1]
        config = {
            "vocab_size": found["shared.weight"][0],
            "d_model": found["shared.weight"][1],
            "num_heads": heads,
            "d_kv": found[f"{attention}q.weight"][0] // heads,
            "d_ff": found["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
            "num_layers": len({key.split(".")[2] for key in found if key.startswith("encoder.block.")}),
        }
        path = os.path.join(os.path.dirname(text.__file__), "umt5_config_xxl.json")

        class Sized(token_model):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any, textmodel_json_config: Any = None, **given: Any) -> None:
                if isinstance(textmodel_json_config, str) and textmodel_json_config.endswith("umt5_config_xxl.json"):
                    with open(path, encoding="utf-8") as file:
                        textmodel_json_config = {**read_json(file), **config}
                super().__init__(*args, textmodel_json_config=textmodel_json_config, **given)

        text.UMT5XXlModel.__bases__ = (Sized,)
        loading.detect_te_model = lambda weights: loading.TEModel.T5_XXL
        return load_clip(self, clip_name, **options)

    nodes.CLIPLoader.load_clip = load_sized_clip


def classes(nodes: Any) -> dict[str, Any]:
    """Return node classes by name."""
    found = dict(nodes.NODE_CLASS_MAPPINGS)
    for name in NODES:
        module = importlib.import_module(f"comfy_extras.nodes_{name}")
        found.update(getattr(module, "NODE_CLASS_MAPPINGS", {}))
        for item in vars(module).values():
            if inspect.isclass(item) and hasattr(item, "define_schema") and item.__module__ == module.__name__:
                found[item.define_schema().node_id] = item
    return found


def main(checkout: str, base: str, workflow: str) -> None:
    """Run every output node."""
    sys.meta_path.append(Finder())
    sys.path[:0] = [checkout]
    flags = ("--cpu", "--use-pytorch-cross-attention", "--force-fp32", "--fp32-vae", "--fp32-text-enc")
    sys.argv = ["comfyui", *flags, "--disable-metadata", "--base-directory", base]
    importlib.import_module("comfy.options").enable_args_parsing()
    server = types.ModuleType("server")
    server.PromptServer = types.SimpleNamespace(instance=None)  # type: ignore[attr-defined]
    sys.modules["server"] = server
    nodes, folder_paths = importlib.import_module("nodes"), importlib.import_module("folder_paths")
    torch = importlib.import_module("torch")
    size_by_files(nodes, folder_paths)
    kinds = classes(nodes)
    with open(workflow, encoding="utf-8") as file:
        graph = json.load(file)
    done: dict[str, Any] = {}

    def result(number: str) -> Any:
        if number not in done:
            node = graph[number]
            given = {
                key: result(value[0])[value[1]] if isinstance(value, list) and str(value[0]) in graph else value
                for key, value in node["inputs"].items()
            }
            kind = kinds[node["class_type"]]
            if hasattr(kind, "define_schema"):
                output = kind.execute(**given)
                done[number] = getattr(output, "args", output)
            else:
                done[number] = getattr(kind(), kind.FUNCTION)(**given)
        return done[number]

    with torch.inference_mode():
        for number in graph:
            result(number)


if __name__ == "__main__":
    main(*sys.argv[1:4])
