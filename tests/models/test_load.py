"""From files to live modules: the same weights whatever the layout, and errors that name what is wrong."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from models_for_tests import features
from reference import relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from s2v_flow.errors import CheckpointError, RefusedError
from s2v_flow.models import load
from s2v_flow.models.load import LoadedDit, load_audio_encoder, load_dit, load_text_encoder, load_vae
from s2v_flow.models.lora import LoraSpec
from s2v_flow.models.packed import PackedLinear
from s2v_flow.weights.layout import check_layout
from s2v_flow.weights.reader import Checkpoint

F32, BF16 = torch.float32, torch.bfloat16


def dit(
    models: Path, name: str, *, dtype: torch.dtype = F32, quantized: bool = False, loras: tuple[str, ...] = ()
) -> LoadedDit:
    specs = [LoraSpec(models / "loras" / f"{lora}.safetensors") for lora in loras]
    file = models / "diffusion_models" / f"{name}.safetensors"
    return load_dit(file, dtype=dtype, device="cpu", quantized=quantized, loras=specs)


def state(loaded: LoadedDit) -> dict[str, Tensor]:
    return dict(loaded.module.state_dict())


def expanded(models: Path) -> dict[str, Tensor]:
    """Expand the older fp8 file by hand, in float64."""
    stored = load_file(models / "diffusion_models" / "tiny_s2v_fp8_scaled.safetensors")
    scales = {
        key.removesuffix("scale_weight") + "weight": value for key, value in stored.items() if "scale_weight" in key
    }
    return {
        key: (value.double() * scales[key].double()).float() if key in scales else value
        for key, value in stored.items()
        if "scale" not in key
    }


def with_lora(models: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge the tiny LoRA by hand, in float64."""
    lora = load_file(models / "loras" / "tiny_lightning_lora.safetensors")
    merged = {key: value.double() for key, value in weights.items()}
    for key, up in lora.items():
        path, _, role = key.removeprefix("diffusion_model.").partition(".lora_up")
        if role and f"{path}.weight" in merged:
            down, alpha = lora[key.replace("lora_up", "lora_down")], lora[key.replace("lora_up.weight", "alpha")]
            merged[f"{path}.weight"] += float(alpha) / down.shape[0] * up.double() @ down.double()
        for suffix, name in ((".diff_b", ".bias"), (".diff", ".weight")):
            target = key.removeprefix("diffusion_model.").removesuffix(suffix) + name
            if key.endswith(suffix) and target in merged:
                merged[target] += up.double()
    return merged


def test_full_precision_weights_arrive_unchanged(tiny_models: Path) -> None:
    loaded = dit(tiny_models, "tiny_s2v")
    file = load_file(tiny_models / "diffusion_models" / "tiny_s2v.safetensors")
    found = state(loaded)
    assert found.keys() == file.keys()
    assert all(torch.equal(found[key], value) for key, value in file.items())
    assert not loaded.module.training
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    assert (loaded.num_tensors, loaded.num_packed_layers, loaded.loras) == (315, 0, ())


@pytest.mark.parametrize("name", ["tiny_s2v_fp8_scaled", "tiny_s2v_fp8_metadata"])
def test_either_fp8_layout_is_expanded_at_loading(tiny_models: Path, name: str) -> None:
    found, expected = state(dit(tiny_models, name)), expanded(tiny_models)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", ["tiny_s2v_fp8_scaled", "tiny_s2v_fp8_metadata"])
def test_fp8_weights_stay_in_fp8_if_asked(tiny_models: Path, name: str) -> None:
    loaded = dit(tiny_models, name, dtype=BF16, quantized=True)
    layers = {path: layer for path, layer in loaded.module.named_modules() if isinstance(layer, PackedLinear)}
    assert len(layers) == loaded.num_packed_layers == 110
    full = state(dit(tiny_models, name, dtype=BF16))
    for path, layer in layers.items():
        assert layer.packed.data.dtype == torch.float8_e4m3fn
        assert torch.equal(layer.packed.expand(BF16), full[f"{path}.weight"])
        assert layer.bias is not None
        assert torch.equal(layer.bias, full[f"{path}.bias"])


def test_full_precision_file_has_nothing_to_keep_in_fp8(tiny_models: Path) -> None:
    assert dit(tiny_models, "tiny_s2v", quantized=True).num_packed_layers == 0


def test_linear_layers_take_the_compute_dtype_and_nothing_else_is_narrowed(tiny_models: Path) -> None:
    loaded = dit(tiny_models, "tiny_s2v", dtype=BF16)
    assert loaded.module.compute_dtype == BF16
    linear = {path for path, layer in loaded.module.named_modules() if type(layer) is nn.Linear}
    for key, value in state(loaded).items():
        assert value.dtype == (BF16 if key.rpartition(".")[0] in linear else F32), key


@pytest.mark.parametrize(("stored", "wanted"), [(BF16, F32), (torch.float16, F32), (torch.float16, BF16), (BF16, BF16)])
def test_half_precision_files_load_into_any_dtype(
    tiny_models: Path, tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    file = load_file(tiny_models / "diffusion_models" / "tiny_s2v.safetensors")
    save_file(
        {f"model.diffusion_model.{key}": value.to(stored) for key, value in file.items()}, tmp_path / "half.safetensors"
    )
    module = load_dit(tmp_path / "half.safetensors", dtype=wanted, device="cpu", quantized=False).module
    assert torch.equal(module.head.head.weight, file["head.head.weight"].to(stored).to(wanted))
    norm = module.blocks[0].norm3.weight
    assert norm.dtype == torch.promote_types(stored, wanted)
    assert torch.equal(norm.float(), file["blocks.0.norm3.weight"].to(stored).float())


@pytest.mark.parametrize("lora", ["tiny_lightning_lora", "tiny_lightning_lora_peft"])
def test_lora_is_merged_and_its_homeless_keys_are_reported(tiny_models: Path, lora: str) -> None:
    loaded = dit(tiny_models, "tiny_s2v", loras=(lora,))
    expected = with_lora(tiny_models, load_file(tiny_models / "diffusion_models" / "tiny_s2v.safetensors"))
    for key, value in state(loaded).items():
        assert relative_error(value, expected[key]) < 3e-7, key
    with safe_open(tiny_models / "loras" / f"{lora}.safetensors", framework="pt") as file:
        keys = list(file.keys())
    homeless = sorted(key for key in keys if any(part in key for part in ("blocks.5.", "blocks.6.", "img_emb")))
    (report,) = loaded.loras
    assert list(report.unmatched) == homeless
    assert (report.matched, report.total) == (len(keys) - len(homeless), len(keys))


@pytest.mark.parametrize("name", ["tiny_s2v", "tiny_s2v_fp8_scaled"])
def test_bf16_lora_is_merged_in_float32_and_rounded_once(tiny_models: Path, name: str) -> None:
    exact = state(dit(tiny_models, name, loras=("tiny_lightning_lora",)))
    key = "blocks.1.ffn.2.weight"
    rounded = state(dit(tiny_models, name, dtype=BF16, loras=("tiny_lightning_lora",)))[key]
    assert torch.equal(rounded, exact[key].to(BF16))


def test_lora_on_fp8_stands_beside_weights_that_stay_as_they_are(tiny_models: Path) -> None:
    name, lora = "tiny_s2v_fp8_scaled", "tiny_lightning_lora"
    merged = dit(tiny_models, name, loras=(lora,)).module
    beside = dit(tiny_models, name, quantized=True, loras=(lora,)).module
    plain = dit(tiny_models, name, quantized=True).module
    generator = torch.Generator().manual_seed(0)
    compared = 0
    for path, layer in beside.named_modules():
        if not isinstance(layer, PackedLinear):
            continue
        assert torch.equal(layer.packed.data.view(torch.uint8), plain.get_submodule(path).packed.data.view(torch.uint8))
        x = torch.randn(3, layer.in_features, generator=generator)
        assert relative_error(layer(x), merged.get_submodule(path)(x)) < 2e-6
        compared += layer.lora_down is not None
    assert compared == 40
    assert torch.equal(beside.blocks[0].norm3.weight, merged.blocks[0].norm3.weight)


def test_a_full_update_of_an_fp8_weight_expands_that_layer_alone(tiny_models: Path, tmp_path: Path) -> None:
    q = "diffusion_model.blocks.0.self_attn.q"
    tensors = {
        f"{q}.diff": torch.ones(256, 256),
        f"{q}.lora_A.weight": torch.ones(1, 256),
        f"{q}.lora_B.weight": torch.ones(256, 1),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    file = tiny_models / "diffusion_models" / "tiny_s2v_fp8_scaled.safetensors"
    loras = [LoraSpec(tmp_path / "lora.safetensors", 0.5)]
    loaded = load_dit(file, dtype=F32, device="cpu", quantized=True, loras=loras)
    layer = loaded.module.blocks[0].self_attn.q
    assert type(layer) is nn.Linear
    assert relative_error(layer.weight, expanded(tiny_models)["blocks.0.self_attn.q.weight"] + 1.0) < 1e-6
    assert loaded.num_packed_layers == 109


def test_two_loras_add_up(tiny_models: Path) -> None:
    lora = "tiny_lightning_lora"
    zero = load_file(tiny_models / "diffusion_models" / "tiny_s2v.safetensors")["blocks.0.ffn.0.weight"]
    one = dit(tiny_models, "tiny_s2v", loras=(lora,)).module.blocks[0].ffn[0].weight
    loaded = dit(tiny_models, "tiny_s2v", loras=(lora, "tiny_lightning_lora_peft"))
    assert relative_error(loaded.module.blocks[0].ffn[0].weight - zero, 2 * (one - zero)) < 1e-5
    assert len(loaded.loras) == 2


def test_vae_weights_arrive_unchanged(tiny_models: Path) -> None:
    vae = load_vae(tiny_models / "vae" / "tiny_vae.safetensors", F32, "cpu")
    file = load_file(tiny_models / "vae" / "tiny_vae.safetensors")
    found = vae.state_dict()
    assert found.keys() == file.keys()
    assert all(torch.equal(found[key], value) for key, value in file.items())
    half = load_vae(tiny_models / "vae" / "tiny_vae.safetensors", BF16, "cpu")
    assert {value.dtype for value in half.state_dict().values()} == {BF16}


@pytest.mark.parametrize("name", ["tiny_umt5_fp8_scaled", "tiny_umt5_fp8_tagged"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_fp8_text_encoder_gives_the_same_rows_expanded_or_not(tiny_models: Path, name: str, dtype: torch.dtype) -> None:
    file = tiny_models / "text_encoders" / f"{name}.safetensors"
    kept = load_text_encoder(file, dtype=dtype, device="cpu", quantized=True)
    full = load_text_encoder(file, dtype=dtype, device="cpu", quantized=False)
    assert sum(isinstance(layer, PackedLinear) for layer in kept.module.modules()) == 14
    rows = kept.encode("He looks down.")
    assert rows.dtype == dtype
    assert torch.equal(rows, full.encode("He looks down."))


def test_text_encoder_takes_its_embedding_under_either_name_or_both(tiny_models: Path, tmp_path: Path) -> None:
    original = tiny_models / "text_encoders" / "tiny_umt5.safetensors"
    file = load_file(original)
    table = file.pop("shared.weight")
    copies = {"encoder.embed_tokens.weight": table}
    for name, tables in (("copy", copies), ("both", {"shared.weight": table.clone(), **copies})):
        save_file({**file, **tables}, tmp_path / f"{name}.safetensors")
        encoder = load_text_encoder(tmp_path / f"{name}.safetensors", dtype=F32, device="cpu", quantized=False)
        expected = load_text_encoder(original, dtype=F32, device="cpu", quantized=False)
        assert torch.equal(encoder.encode("Hello"), expected.encode("Hello"))


def test_audio_encoder_takes_old_keys_a_prefix_and_foreign_heads(tiny_models: Path, tmp_path: Path) -> None:
    original = tiny_models / "audio_encoders" / "tiny_wav2vec2.safetensors"
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    tensors = {"lm_head.weight": torch.zeros(3, 64), "lm_head.bias": torch.zeros(3)}
    for key, value in load_file(original).items():
        for new, spelling in old.items():
            key = key.replace(new, spelling)
        tensors[f"wav2vec2.{key}"] = value.half()
    save_file(tensors, tmp_path / "old.safetensors")
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    found = features(load_audio_encoder(tmp_path / "old.safetensors", dtype=F32, device="cpu"), x, "official")
    expected = features(load_audio_encoder(original, dtype=F32, device="cpu"), x, "official")
    assert 0 < relative_error(found, expected) < 2e-3


def test_an_audio_encoders_weight_norm_may_be_merged(tiny_models: Path, tmp_path: Path) -> None:
    """As converters leave it that store what the convolution computes with: the product, g v / |v|."""
    original = tiny_models / "audio_encoders" / "tiny_wav2vec2.safetensors"
    tensors, name = load_file(original), "encoder.pos_conv_embed.conv."
    length, direction = (tensors.pop(f"{name}parametrizations.weight.original{part}") for part in (0, 1))
    tensors[f"{name}weight"] = length * direction / direction.norm(dim=(0, 1), keepdim=True)
    save_file(tensors, tmp_path / "merged.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "merged.safetensors")
    check_layout(checkpoint.path, "wav2vec2", checkpoint.entries)
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    found = features(load_audio_encoder(checkpoint.path, dtype=F32, device="cpu"), x, "official")
    expected = features(load_audio_encoder(original, dtype=F32, device="cpu"), x, "official")
    assert relative_error(found, expected) <= 3e-6


def damaged(source: Path, target: Path, **changes: Tensor | None) -> Path:
    tensors = load_file(source)
    for key, value in changes.items():
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    save_file(tensors, target)
    return target


def test_missing_unexpected_and_misshapen_keys_are_counted_and_named(tiny_models: Path, tmp_path: Path) -> None:
    original = tiny_models / "audio_encoders" / "tiny_wav2vec2.safetensors"
    changes: dict[str, Tensor | None] = {f"encoder.layers.{i}.layer_norm.bias": None for i in range(6)}
    changes |= {"encoder.layer_norm.bias": torch.zeros(63), "extra.weight": torch.zeros(1)}
    file = damaged(original, tmp_path / "bad.safetensors", **changes)
    with pytest.raises(CheckpointError) as caught:
        load_audio_encoder(file, dtype=F32, device="cpu")
    named = ", ".join(f"encoder.layers.{i}.layer_norm.bias" for i in range(5))
    assert caught.value.message == (
        f"{file}: is no complete wav2vec2 file: 6 missing ({named}, ...); 1 unexpected (extra.weight); "
        "1 misshapen (encoder.layer_norm.bias is [63], expected [64])"
    )


def test_a_size_that_cannot_be_read_is_named(tiny_models: Path, tmp_path: Path) -> None:
    original = tiny_models / "diffusion_models" / "tiny_s2v.safetensors"
    file = damaged(original, tmp_path / "bad.safetensors", **{"head.modulation": None})
    with pytest.raises(CheckpointError, match=r"is no complete wan s2v file: head\.modulation is missing"):
        load_dit(file, dtype=F32, device="cpu", quantized=False)
    original = tiny_models / "text_encoders" / "tiny_umt5.safetensors"
    key = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    file = damaged(original, tmp_path / "bad.safetensors", **{key: None})
    with pytest.raises(CheckpointError, match=rf"is no complete umt5 encoder file: '{key}' is missing"):
        load_text_encoder(file, dtype=F32, device="cpu", quantized=False)


def test_hostile_sizes_are_an_error_of_ours_at_once(tiny_models: Path, tmp_path: Path) -> None:
    """A layer number is no count, and a width of 0 or 2**60 costs nothing in a file."""
    audio = tiny_models / "audio_encoders" / "tiny_wav2vec2.safetensors"
    text = tiny_models / "text_encoders" / "tiny_umt5.safetensors"
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    conv = "encoder.pos_conv_embed.conv.parametrizations.weight.original1"
    for source, key, value in (
        (audio, "encoder.layers.999999999.layer_norm.bias", torch.zeros(64)),
        (text, "encoder.block.999999999.layer.0.layer_norm.weight", torch.zeros(64)),
        (text, bias, torch.zeros(32, 0)),
        (text, "shared.weight", torch.zeros(2**60, 0)),
        (audio, conv, torch.zeros(64, 0, 128)),
        (audio, conv, torch.zeros(64, 64)),
    ):
        file = damaged(source, tmp_path / "bad.safetensors", **{key: value})
        read = partial(load_text_encoder, quantized=False) if source is text else load_audio_encoder
        with pytest.raises(CheckpointError, match="is no complete"):
            read(file, dtype=F32, device="cpu")


def test_a_file_of_another_family_is_named(tiny_models: Path, tmp_path: Path) -> None:
    t2v = {"head.modulation": torch.zeros(1, 2, 8), "blocks.0.self_attn.q.weight": torch.zeros(8, 8)}
    save_file(t2v, tmp_path / "t2v.safetensors")
    with pytest.raises(CheckpointError, match=r"this is a wan t2v checkpoint: it has no audio_injector\.\*"):
        load_dit(tmp_path / "t2v.safetensors", dtype=F32, device="cpu", quantized=False)
    vae = tiny_models / "vae" / "tiny_vae.safetensors"
    for call in (
        lambda: load_dit(vae, dtype=F32, device="cpu", quantized=False),
        lambda: load_text_encoder(vae, dtype=F32, device="cpu", quantized=False),
        lambda: load_audio_encoder(vae, dtype=F32, device="cpu"),
    ):
        with pytest.raises(CheckpointError, match="this is a wan vae checkpoint"):
            call()
    with pytest.raises(CheckpointError, match="this is a wan s2v checkpoint"):
        load_vae(tiny_models / "diffusion_models" / "tiny_s2v.safetensors", F32, "cpu")


def test_a_text_encoder_without_tokenizer_is_refused(tiny_models: Path, tmp_path: Path) -> None:
    original = tiny_models / "text_encoders" / "tiny_umt5.safetensors"
    file = damaged(original, tmp_path / "bare.safetensors", spiece_model=None)
    with pytest.raises(CheckpointError, match=r"has no tokenizer inside \('spiece_model'\)"):
        load_text_encoder(file, dtype=F32, device="cpu", quantized=False)


def test_pickles_are_refused_by_every_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.pth"
    torch.save({"x": torch.zeros(1)}, file)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    for call in (
        lambda: load_dit(file, dtype=F32, device="cpu", quantized=False),
        lambda: load_vae(file, F32, "cpu"),
        lambda: load_text_encoder(file, dtype=F32, device="cpu", quantized=False),
        lambda: load_audio_encoder(file, dtype=F32, device="cpu"),
    ):
        with pytest.raises(RefusedError, match="is a pickle"):
            call()


def test_weights_in_the_wanted_dtype_are_not_copied(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a change of dtype, the module's tensors are the ones that the file gave: mapped, not read."""
    given: dict[int, str] = {}
    tensor = load.Checkpoint.tensor

    def spy(self: load.Checkpoint, key: str) -> Tensor:
        value = tensor(self, key)
        given[value.data_ptr()] = key
        return value

    monkeypatch.setattr(load.Checkpoint, "tensor", spy)
    loaded = dit(tiny_models, "tiny_s2v")
    assert {value.data_ptr() for value in state(loaded).values()} <= given.keys()


FOUR_AT_ONCE = """
import sys
from functools import partial
from pathlib import Path
from threading import Barrier, Thread

import torch

from s2v_flow.models.load import load_audio_encoder, load_text_encoder

models, start, failed = Path(sys.argv[1]), Barrier(4), []
text = partial(load_text_encoder, models / "text_encoders" / "tiny_umt5.safetensors", quantized=False)
voice = partial(load_audio_encoder, models / "audio_encoders" / "tiny_wav2vec2.safetensors")


def load(model):
    start.wait()
    try:
        model(dtype=torch.float32, device="cpu")
    except Exception as error:
        failed.append(repr(error))


threads = [Thread(target=load, args=(model,)) for model in (text, voice, text, voice)]
assert "transformers" not in sys.modules
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.exit(", ".join(failed) or 0)
"""


@pytest.mark.slow
def test_threads_that_load_the_first_encoders_at_once_wait_for_each_other(tiny_models: Path) -> None:
    """All import transformers, which replaces its own module at the end; a process of its own, for a first import."""
    subprocess.run([sys.executable, "-c", FOUR_AT_ONCE, str(tiny_models)], check=True, timeout=300)
