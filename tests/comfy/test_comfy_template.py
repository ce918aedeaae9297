"""The official template, from the package that ComfyUI installs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from comfy_workflows import TEMPLATE, template_path

from s2v_flow import api
from s2v_flow.comfy.importer import import_workflow
from s2v_flow.library.needs import HOMES

STORED = Path(__file__).parent / "recipes" / "video_wan2_2_14B_s2v.yaml"
MODELS = {
    "wan2.2_s2v_14B_fp8_scaled.safetensors",
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    "wav2vec2_large_english_fp16.safetensors",
    "wan_2.1_vae.safetensors",
}
LORA = "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors"


def test_the_templates_recipe_is_the_stored_one() -> None:
    """Byte for byte, and twice the same."""
    texts = {import_workflow(template_path(), api.KINDS).text for _ in range(2)}
    assert texts == {STORED.read_text()}


def plan(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    empty = folder / "models"
    empty.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "s2v_flow", "plan", str(STORED), "--json", "--models-dir", str(empty), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    return result.returncode, json.loads(result.stdout)


@pytest.mark.parametrize(("profile", "steps", "seeds", "models"), [
    ((), 4, [20, 1, 250], MODELS | {LORA}),
    pytest.param(("-p", "steps_20"), 20, [20, 1, 250, 1], MODELS, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_plan_without_models_names_each_with_its_home(
    profile: tuple[str, ...], steps: int, seeds: list[int], models: set[str], tmp_path: Path
) -> None:
    """Exit code 4; with the template's bypassed part switched on, 20 steps, all its chunks, and no LoRA."""
    code, made = plan(tmp_path, *profile)
    assert code == 4
    missing = {item["file"]: item["homes"] for item in made["missing"]}
    assert {name for name in missing if name.endswith(".safetensors")} == models
    assert all(missing[name] == list(HOMES[name]) for name in models)
    chunks = [node["facts"] for node in made["nodes"] if "chunk" in node["facts"]]
    assert [chunk["seed"] for chunk in chunks] == seeds
    assert {chunk["steps"] for chunk in chunks} == {steps}
    assert made["frames"] == 80 * len(seeds) + 1 - 3


@pytest.mark.slow
def test_the_command_line_imports_checks_and_exports(tmp_path: Path) -> None:
    """`import -o`, `check`, `export -o`, `import` again; an existing file is not overwritten unasked."""

    def s2vflow(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "s2v_flow", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    made = s2vflow("import", str(template_path()), "-o", "recipe.yaml")
    assert (made.returncode, made.stdout) == (0, "")
    assert "-p steps_20" in made.stderr
    assert (tmp_path / "recipe.yaml").read_text() == STORED.read_text()
    assert s2vflow("check", "recipe.yaml").returncode == 0
    assert s2vflow("export", "recipe.yaml", "-o", TEMPLATE).returncode == 0
    assert s2vflow("import", TEMPLATE, "-o", "recipe.yaml").returncode == 2
    assert s2vflow("import", TEMPLATE, "-o", "recipe.yaml", "--force").returncode == 0
    assert s2vflow("import", "recipe.yaml").returncode == 3
