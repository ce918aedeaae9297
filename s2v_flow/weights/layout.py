"""What a complete model file holds: each family's keys and shapes, from the few sizes that differ. Needs no torch.

Planning checks files by it; loading builds modules whose parameters are the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from s2v_flow.errors import CheckpointError
from s2v_flow.weights.header import TensorEntry, convert_command
from s2v_flow.weights.quantization import BOOKKEEPING, MARKER, Packing
from s2v_flow.weights.reader import Shapes

TOKENIZER_KEY = "spiece_model"
EMBEDDING_KEY = "shared.weight"
EMBEDDING_COPY_KEY = "encoder.embed_tokens.weight"  # the same table; some files carry it too, or instead
MASK_KEY = "masked_spec_embed"  # for training only: files with and without it are whole
_UMT5_QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"
_WEIGHT_NORM = "encoder.pos_conv_embed.conv."
MERGED_NORM_KEY = _WEIGHT_NORM + "weight"  # where direction and length are multiplied already
ADAPTER_KEY = "encoder.layers.0.adapter_layer.linear_1.weight"  # of an encoder with an adapter in each layer
OLD_KEYS = {
    _WEIGHT_NORM + "weight_g": _WEIGHT_NORM + "parametrizations.weight.original0",
    _WEIGHT_NORM + "weight_v": _WEIGHT_NORM + "parametrizations.weight.original1",
}
# What some files carry beside the encoder, and nothing here needs: heads, and what follows the last layer.
UNUSED_PREFIXES = (
    *("lm_head.", "quantizer.", "project_q.", "project_hid.", "projector.", "classifier.", "tdnn.", "objective."),
    *("adapter.", "layer_weights", "logit_scale", "feature_extractor.weight", "feature_extractor.bias"),
)
# The VAE's steps: a block from 1 to 2 times the narrowest width is 12; a change of size at 2 times that width is 2.
_VAE_DOWN, _VAE_UP = "11 11 1 12 22 2 24 44 4 44 44", "44 44 44 4 24 44 44 4 22 22 22 2 11 11 11"
_FIX_FILE = "download the file again, or use another"
_SHOWN = 5

_Sized = Iterator[tuple[str, tuple[int, ...]]]


def check_layout(
    path: Path,
    family: str,
    entries: Mapping[str, TensorEntry],
    packings: Mapping[str, Packing] = {},
    *,
    has_tokenizer: bool = False,
) -> None:
    """Check that a file of a known family is whole: no tensor is missing, misshapen or too many.

    `entries`: without the file's prefix; `packings`: its quantised weights; `has_tokenizer`: whether a text encoder's
    tokenizer stands elsewhere than in a tensor.

    Raises:
        CheckpointError: It is not; the tensors are named.
    """
    used = own_keys(entries.keys())
    found = {key: packings[name].shape if name in packings else entries[name].shape for key, name in used.items()}
    try:
        expected = dict(_LAYOUTS[family](found))
    except (KeyError, ValueError, IndexError) as error:
        detail = f"{error} is missing" if isinstance(error, KeyError) else "a tensor has too few or too many dimensions"
        raise CheckpointError(f"{path}: is no complete {family} file: {detail}", fix=_FIX_FILE) from error
    if family == "umt5 encoder" and TOKENIZER_KEY not in entries and not has_tokenizer:
        raise no_tokenizer(path)
    padded = {
        key: expected[key]
        for key in used.keys() & expected.keys()
        if used[key] in packings and packings[used[key]].holds(expected[key])
    }
    compare(path, family, {**found, **padded}, expected)


def no_tokenizer(path: Path) -> CheckpointError:
    """Return the error that a text encoder's file holds no tokenizer."""
    fix = "name one in the node (tokenizer: spiece.model), or use ComfyUI's repackaged text encoder"
    if path.suffix != ".gguf":
        fix += f", or put it into the file: {convert_command(path, None, '--tokenizer', 'spiece.model')}"
    return CheckpointError(f"{path}: has no tokenizer inside ({TOKENIZER_KEY!r})", fix)


def own_keys(keys: Collection[str]) -> dict[str, str]:
    """Map the keys of a module to those of its file: scales, heads and the tokenizer are left out."""
    renames, dropped = dict(OLD_KEYS), {TOKENIZER_KEY, MARKER}
    unused = (*UNUSED_PREFIXES, "decoder.") if _UMT5_QUERY in keys else UNUSED_PREFIXES
    if EMBEDDING_KEY in keys:
        dropped.add(EMBEDDING_COPY_KEY)
    else:
        renames[EMBEDDING_COPY_KEY] = EMBEDDING_KEY
    return {
        renames.get(key, key): key
        for key in keys
        if key not in dropped and not key.endswith(BOOKKEEPING) and not key.startswith(unused)
    }


def compare(path: Path, family: str, found: Shapes, expected: Shapes) -> None:
    """Compare a file's keys and shapes with those that its module needs.

    Raises:
        CheckpointError: They differ; the first of them are named.
    """
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    misshapen = [
        f"{key} is {list(found[key])}, expected {list(shape)}"
        for key, shape in sorted(expected.items())
        if key in found and found[key] != shape
    ]
    parts = [
        f"{len(keys)} {name} ({', '.join(keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''})"
        for name, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if keys
    ]
    if parts:
        raise CheckpointError(f"{path}: is no complete {family} file: {'; '.join(parts)}", fix=_FIX_FILE)


def num_layers(shapes: Shapes, prefix: str) -> int:
    """Count the layers `prefix`.0, `prefix`.1, ...: one more than the highest number."""
    pattern = re.compile(rf"{re.escape(prefix)}\.([0-9]{{1,4}})\.")
    return max((int(match[1]) + 1 for match in map(pattern.match, shapes) if match), default=0)


def _layer(name: str, *shape: int) -> _Sized:
    """Yield a layer's weight of that shape, and its bias."""
    yield from ((f"{name}.weight", shape), (f"{name}.bias", shape[:1]))


def _dit(shapes: Shapes) -> _Sized:
    """Source: Wan2.2, wan/modules/s2v/model_s2v.py, WanModel_S2V."""
    dim, ffn = shapes["head.modulation"][2], shapes["blocks.0.ffn.0.weight"][0]
    audio = "casual_audio_encoder.encoder"  # sic
    sound = shapes[f"{audio}.conv1_local.conv.weight"][1]
    yield from _layer("text_embedding.0", dim, shapes["text_embedding.0.weight"][1])
    yield from _layer("text_embedding.2", dim, dim)
    yield from _layer("time_embedding.0", dim, 256)
    yield from _layer("time_embedding.2", dim, dim)
    yield from _layer("time_projection.1", 6 * dim, dim)
    for index in range(num_layers(shapes, "blocks")):
        yield f"blocks.{index}.modulation", (1, 6, dim)
        yield from _layer(f"blocks.{index}.norm3", dim)
        yield from _attention(f"blocks.{index}.self_attn", dim)
        yield from _attention(f"blocks.{index}.cross_attn", dim)
        yield from _layer(f"blocks.{index}.ffn.0", ffn, dim)
        yield from _layer(f"blocks.{index}.ffn.2", dim, ffn)
    yield "head.modulation", (1, 2, dim)
    yield from _layer("head.head", 64, dim)
    yield "trainable_cond_mask.weight", (3, dim)
    yield "casual_audio_encoder.weights", (1, 25, 1, 1)
    yield f"{audio}.padding_tokens", (1, 1, 1, dim)
    yield from _layer(f"{audio}.conv1_local.conv", dim, sound, 3)
    yield from _layer(f"{audio}.conv1_global.conv", dim // 4, sound, 3)
    yield from _layer(f"{audio}.conv2.conv", dim // 2, dim // 4, 3)
    yield from _layer(f"{audio}.conv3.conv", dim, dim // 2, 3)
    yield from _layer(f"{audio}.final_linear", dim, dim)
    for index in range(12):
        yield from _attention(f"audio_injector.injector.{index}", dim)
        yield from _layer(f"audio_injector.injector_adain_layers.{index}.linear", 2 * dim, dim)
    for name, kernel in (("patch_embedding", 1), ("cond_encoder", 1), ("frame_packer.proj", 1)):
        yield from _layer(name, dim, 16, kernel, 2, 2)
    yield from _layer("frame_packer.proj_2x", dim, 16, 2, 4, 4)
    yield from _layer("frame_packer.proj_4x", dim, 16, 4, 8, 8)


def _attention(name: str, dim: int) -> _Sized:
    for part in "qkvo":
        yield from _layer(f"{name}.{part}", dim, dim)
    yield from ((f"{name}.norm_{part}.weight", (dim,)) for part in "qk")


def _vae(shapes: Shapes) -> _Sized:
    """Source: Wan2.2, wan/modules/vae2_1.py, WanVAE_."""
    width = shapes["decoder.head.0.gamma"][0]
    yield from _layer("conv1", 32, 32, 1, 1, 1)
    yield from _layer("conv2", 16, 16, 1, 1, 1)
    yield from _layer("encoder.conv1", width, 3, 3, 3, 3)
    for index, step in enumerate(_VAE_DOWN.split()):
        yield from _vae_step(f"encoder.downsamples.{index}", step, width, timed=index > 2, goes_up=False)
    yield from _vae_middle("encoder.middle", 4 * width)
    yield "encoder.head.0.gamma", (4 * width, 1, 1, 1)
    yield from _layer("encoder.head.2", 32, 4 * width, 3, 3, 3)
    yield from _layer("decoder.conv1", 4 * width, 16, 3, 3, 3)
    yield from _vae_middle("decoder.middle", 4 * width)
    for index, step in enumerate(_VAE_UP.split()):
        yield from _vae_step(f"decoder.upsamples.{index}", step, width, timed=index < 11, goes_up=True)
    yield "decoder.head.0.gamma", (width, 1, 1, 1)
    yield from _layer("decoder.head.2", 3, width, 3, 3, 3)


def _vae_step(name: str, step: str, width: int, *, timed: bool, goes_up: bool) -> _Sized:
    channels, *out = (int(factor) * width for factor in step)
    if out:
        yield from _vae_block(name, channels, out[0])
        return
    yield from _layer(f"{name}.resample.1", channels // 2 if goes_up else channels, channels, 3, 3)
    if timed:
        yield from _layer(f"{name}.time_conv", 2 * channels if goes_up else channels, channels, 3, 1, 1)


def _vae_block(name: str, width: int, out: int) -> _Sized:
    yield f"{name}.residual.0.gamma", (width, 1, 1, 1)
    yield from _layer(f"{name}.residual.2", out, width, 3, 3, 3)
    yield f"{name}.residual.3.gamma", (out, 1, 1, 1)
    yield from _layer(f"{name}.residual.6", out, out, 3, 3, 3)
    if width != out:
        yield from _layer(f"{name}.shortcut", out, width, 1, 1, 1)


def _vae_middle(name: str, width: int) -> _Sized:
    yield from _vae_block(f"{name}.0", width, width)
    yield f"{name}.1.norm.gamma", (width, 1, 1)
    yield from _layer(f"{name}.1.to_qkv", 3 * width, width, 1, 1)
    yield from _layer(f"{name}.1.proj", width, width, 1, 1)
    yield from _vae_block(f"{name}.2", width, width)


def _umt5(shapes: Shapes) -> _Sized:
    """Source: transformers, models/umt5/modeling_umt5.py, UMT5EncoderModel."""
    inner, width = shapes[_UMT5_QUERY]
    bias = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    wide = shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0]
    yield EMBEDDING_KEY, (shapes[EMBEDDING_KEY][0], width)
    yield "encoder.final_layer_norm.weight", (width,)
    for index in range(num_layers(shapes, "encoder.block")):
        attention, dense = (f"encoder.block.{index}.layer.{part}" for part in (0, 1))
        yield from ((f"{attention}.SelfAttention.{part}.weight", (inner, width)) for part in "qkv")
        yield f"{attention}.SelfAttention.o.weight", (width, inner)
        yield f"{attention}.SelfAttention.relative_attention_bias.weight", bias
        yield from ((f"{dense}.DenseReluDense.{part}.weight", (wide, width)) for part in ("wi_0", "wi_1"))
        yield f"{dense}.DenseReluDense.wo.weight", (width, wide)
        yield from ((f"{layer}.layer_norm.weight", (width,)) for layer in (attention, dense))


def _wav2vec2(shapes: Shapes) -> _Sized:
    """Source: transformers, models/wav2vec2/modeling_wav2vec2.py, Wav2Vec2Model."""
    is_merged = MERGED_NORM_KEY in shapes
    width, group, kernel = shapes[MERGED_NORM_KEY if is_merged else _WEIGHT_NORM + "parametrizations.weight.original1"]
    wide = shapes["encoder.layers.0.feed_forward.intermediate_dense.weight"][0]
    channels = 1
    for index in range(7):
        name = f"feature_extractor.conv_layers.{index}"
        out, _, size = shapes[f"{name}.conv.weight"]
        yield from _layer(f"{name}.conv", out, channels, size)
        yield from _layer(f"{name}.layer_norm", out)
        channels = out
    yield from _layer("feature_projection.layer_norm", channels)
    yield from _layer("feature_projection.projection", width, channels)
    yield _WEIGHT_NORM + "bias", (width,)
    if is_merged:
        yield MERGED_NORM_KEY, (width, group, kernel)
    else:
        yield _WEIGHT_NORM + "parametrizations.weight.original0", (1, 1, kernel)
        yield _WEIGHT_NORM + "parametrizations.weight.original1", (width, group, kernel)
    yield from _layer("encoder.layer_norm", width)
    for index in range(num_layers(shapes, "encoder.layers")):
        name = f"encoder.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _layer(f"{name}.attention.{part}", width, width)
        yield from _layer(f"{name}.layer_norm", width)
        yield from _layer(f"{name}.final_layer_norm", width)
        yield from _layer(f"{name}.feed_forward.intermediate_dense", wide, width)
        yield from _layer(f"{name}.feed_forward.output_dense", width, wide)
        if ADAPTER_KEY in shapes:
            inner = shapes[ADAPTER_KEY][0]
            yield from _layer(f"{name}.adapter_layer.norm", width)
            yield from _layer(f"{name}.adapter_layer.linear_1", inner, width)
            yield from _layer(f"{name}.adapter_layer.linear_2", width, inner)
    if MASK_KEY in shapes:
        yield MASK_KEY, (width,)


_LAYOUTS: Mapping[str, Callable[[Shapes], _Sized]] = {
    "wan s2v": _dit,
    "wan vae": _vae,
    "umt5 encoder": _umt5,
    "wav2vec2": _wav2vec2,
}
