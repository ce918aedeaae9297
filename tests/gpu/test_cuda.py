"""What only a GPU can show: `pytest -m gpu -s` on a machine with one. Figures are printed, limits are asserted.

Everything else is tested on the CPU; nothing here runs in CI.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from recipes_for_tests import options, tiny, write_recipe, write_voice
from reference import fill_module, load_golden, prepare_case, relative_error
from safetensors.torch import load_file, save_file

from s2v_flow import api
from s2v_flow.errors import BadNumbersError
from s2v_flow.graph.events import StepDone
from s2v_flow.graph.interrupt import StoppedError
from s2v_flow.models.conditioning import Branch, PreparedChunk
from s2v_flow.models.dit import S2VConfig, WanS2V
from s2v_flow.nodes.tensors import each_to_frames, to_frames

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use is here"),
]

TINY = S2VConfig(dim=256, ffn_dim=512, num_layers=5, text_dim=64, audio_dim=64)
LATENT = {"kind": "save_latent", "latent": "$talk", "file": "out/talk.latent"}


def prepared(name: str, dtype: torch.dtype) -> tuple[WanS2V, torch.Tensor, torch.Tensor, PreparedChunk, Branch]:
    """Return a golden case on the GPU: model, x, timestep, chunk and branch."""
    inputs, _, case = load_golden(f"components/{name}")
    inputs = {key: value.cuda() for key, value in inputs.items()}
    model = fill_module(WanS2V(TINY, compute_dtype=dtype)).cuda()
    if dtype != torch.float32:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.to(dtype)
    chunk, branch = prepare_case(model, name, inputs, case, "cuda")
    return model, inputs["x"], inputs["timestep"], chunk, branch


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)])
@pytest.mark.parametrize("name", ["dit_first_chunk", "dit_extend_full_motion", "dit_official_extend"])
def test_a_forward_is_the_references(
    name: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the golden outputs, which were made in float32 on a CPU; without TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, x, timestep, chunk, branch = prepared(name, dtype)
    (velocity,) = model(x, timestep, chunk, [branch])
    error = relative_error(velocity.cpu(), load_golden(f"components/{name}")[1]["velocity"])
    sys.stdout.write(f"\n{name} {dtype}: {error:.2e}\n")
    assert error <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_never_waits_for_the_gpu(dtype: torch.dtype) -> None:
    """torch raises at the first synchronisation."""
    model, x, timestep, chunk, branch = prepared("dit_official_extend", dtype)
    model(x, timestep, chunk, [branch])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x, timestep, chunk, [branch, branch])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def latent_of(folder: Path, models: Path, cache: str, *sets: str, recipe: Path, device: str = "cuda") -> torch.Tensor:
    """Run a recipe and return its latent: the file of this run, beside those of earlier ones."""
    result = api.run(recipe, options(folder, models, folder / cache, sets=list(sets)), device=device)
    return load_file(result.outputs["all"][0])["latent_tensor"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two chunks of four steps, and their latent as a file."""
    write_voice(tmp_path / "voice.wav", 0.4)
    changes = tiny(first={"steps": 4, "cfg": 2.0}, talk={"chunks": 1}, all=LATENT)
    return write_recipe(tmp_path, changes)


@pytest.mark.parametrize("checkpoint", ["tiny_s2v.safetensors", "tiny_s2v_fp8_scaled.safetensors"])
def test_a_whole_run(checkpoint: str, recipe: Path, tiny_models: Path, tmp_path: Path) -> None:
    """Finite, the same again to the last bit, streamed weights included, and near the CPU's float32."""
    chosen = f"nodes.dit.checkpoint={checkpoint}"
    once = latent_of(tmp_path, tiny_models, "a", chosen, recipe=recipe)
    again = latent_of(tmp_path, tiny_models, "b", chosen, recipe=recipe)
    streamed = latent_of(tmp_path, tiny_models, "c", chosen, "nodes.dit.placement=streamed", recipe=recipe)
    on_cpu = latent_of(tmp_path, tiny_models, "cpu", chosen, recipe=recipe, device="cpu")
    error = relative_error(once, on_cpu)
    sys.stdout.write(f"\n{checkpoint}: bf16 on GPU against float32 on CPU {error:.2e}\n")
    assert torch.isfinite(once).all()
    assert torch.equal(once, again)
    assert torch.equal(once, streamed)
    assert error < 0.2, "an untrained model's trajectory amplifies rounding; a wrong one is off by 1"


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(recipe: Path, tiny_models: Path, tmp_path: Path) -> None:
    """At every step of the second chunk."""
    whole = latent_of(tmp_path, tiny_models, "whole", recipe=recipe)
    for step in range(1, 4):
        seen: list[int] = []
        chosen = options(tmp_path, tiny_models, tmp_path / f"cut{step}", should_stop=lambda seen=seen: bool(seen))

        def stop(event: object, step: int = step, seen: list[int] = seen) -> None:
            if isinstance(event, StepDone) and (event.node, event.step) == ("talk[1]", step):
                seen.append(step)

        with pytest.raises(StoppedError):
            api.run(recipe, chosen, stop, device="cuda")
        assert torch.equal(latent_of(tmp_path, tiny_models, f"cut{step}", recipe=recipe), whole)


def test_bad_numbers_are_found_at_their_step(recipe: Path, tiny_models: Path, tmp_path: Path) -> None:
    """Without waiting for the GPU in each step: told a step later, by the right name."""
    tensors = load_file(tiny_models / "diffusion_models" / "tiny_s2v.safetensors")
    tensors["head.head.bias"] = torch.full_like(tensors["head.head.bias"], torch.nan)
    folder = tmp_path / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "broken.safetensors")
    chosen = options(tmp_path, tiny_models, sets=["nodes.dit.checkpoint=broken.safetensors"])
    with pytest.raises(BadNumbersError, match="after step 1 of 4"):
        api.run(recipe, chosen, device="cuda", models_dirs=[tiny_models, folder.parent])


def test_frames_that_are_copied_while_the_next_are_decoded_are_the_same() -> None:
    """Each group's pixels are gone, and their memory used again, before it is asked for."""
    groups = [torch.rand(1, 3, 8, 256, 256) * 2.2 - 1.1 for _ in range(6)]
    copied = each_to_frames(group.cuda() * 1.0 for group in groups)
    assert all(torch.equal(frames, to_frames(group)) for frames, group in zip(copied, groups, strict=True))
