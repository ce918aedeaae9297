from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from s2v_flow.cli.describe import schema_text
from s2v_flow.errors import RecipeError
from s2v_flow.graph.node import Node
from s2v_flow.recipe.load import load_recipe
from s2v_flow.recipe.problems import Problems
from s2v_flow.recipe.reader import Source, read_yaml
from s2v_flow.recipe.schema import recipe_schema
from s2v_flow.recipe.tree import plain

ROOT = Path(__file__).parents[2]
DESIGN = Path(__file__).parent / "good" / "design.yaml"


@pytest.fixture(scope="session")
def validator(kinds: Mapping[str, type[Node]]) -> Draft7Validator:
    return Draft7Validator(recipe_schema(kinds))


def read(text: str) -> Any:
    """Read YAML as editors do: by 1.2 core."""
    return plain(read_yaml(text.encode(), Source("r.yaml", Path(), ()), Problems()))


def test_the_shipped_schema_is_what_the_code_generates() -> None:
    """schemas/recipe.schema.json is never edited by hand."""
    assert (ROOT / "schemas" / "recipe.schema.json").read_text(encoding="utf-8") == schema_text("recipe")


def test_the_schema_is_draft_7_and_nothing_newer(kinds: Mapping[str, type[Node]]) -> None:
    """yaml-language-server reads no later draft: no keyword of one, nothing beside a $ref, no $ref into nothing."""
    schema = recipe_schema(kinds)
    Draft7Validator.check_schema(schema)
    pending: list[Any] = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            assert not part.keys() & {"$defs", "prefixItems", "unevaluatedProperties", "dependentRequired", "$anchor"}
            if isinstance(part.get("$ref"), str):
                assert list(part) == ["$ref"]
                assert part["$ref"].removeprefix("#/definitions/") in schema["definitions"]
            pending += part.values()
        elif isinstance(part, list):
            pending += part


def test_the_recipe_of_the_design_page_fits_the_schema(validator: Draft7Validator) -> None:
    """With its profiles."""
    assert [error.message for error in validator.iter_errors(read(DESIGN.read_text()))] == []


def test_every_field_has_a_description(kinds: Mapping[str, type[Node]]) -> None:
    """Editors show it."""
    definitions = recipe_schema(kinds)["definitions"]
    for name in [*kinds, "Lora"]:
        for field, schema in definitions[name]["properties"].items():
            assert schema.get("description"), (name, field)


NODES = "vae: {kind: load_vae, checkpoint: a}, clip: {kind: load_latent, file: a}"


@pytest.mark.parametrize(
    "text",
    [
        "s2vflow: 2\nnodes: {vae: {kind: load_vae, checkpoint: a}}",
        "nodes: {vae: {kind: load_vae, checkpoint: a}}",
        "s2vflow: 1",
        "s2vflow: 1\nnodes: {}",
        "s2vflow: 1\nnode: {}\nnodes: {vae: {kind: load_vae, checkpoint: a}}",
        "s2vflow: 1\nnodes: {vae: {kind: load_va, checkpoint: a}}",
        "s2vflow: 1\nnodes: {vae: {checkpoint: a}}",
        "s2vflow: 1\nnodes: {vae: {kind: load_vae}}",
        "s2vflow: 1\nnodes: {vae: {kind: load_vae, checkpoint: 1}}",
        "s2vflow: 1\nnodes: {vae: {kind: load_vae, checkpoint: a, precision: fp8}}",
        "s2vflow: 1\nnodes: {vae: {kind: load_vae, checkpoint: a, lora: []}}",
        "s2vflow: 1\nnodes: {'a b': {kind: load_vae, checkpoint: a}}",
        "s2vflow: 1\nparams: {a: {b: c}}\nnodes: {vae: {kind: load_vae, checkpoint: a}}",
        f"s2vflow: 1\nnodes: {{{NODES}, more: {{kind: extend, video: clip}}}}",
        f"s2vflow: 1\nnodes: {{{NODES}, more: {{kind: extend, video: $params.clip}}}}",
        f"s2vflow: 1\nnodes: {{{NODES}, more: {{kind: extend, video: $clip, steps: 0}}}}",
        f"s2vflow: 1\nnodes: {{{NODES}, more: {{kind: extend, video: $clip, steps: '4'}}}}",
        f"s2vflow: 1\nnodes: {{{NODES}, more: {{kind: extend, video: $clip, chunks: atuo}}}}",
        f"s2vflow: 1\nnodes: {{{NODES}, more: {{kind: extend, video: $clip, seed: [1, x]}}}}",
        f"s2vflow: 1\nnodes: {{{NODES}, dit: {{kind: load_diffusion_model, checkpoint: a, loras: [{{id: a}}]}}}}",
        f"s2vflow: 1\nnodes: {{{NODES}}}\nprofiles: {{a: {{nodes: {{vae: {{chekpoint: a}}}}}}}}",
        f"s2vflow: 1\nnodes: {{{NODES}}}\nprofiles: {{a: {{nodes: {{vae: {{kind: load_vae, steps: 4}}}}}}}}",
        f"s2vflow: 1\nnodes: {{{NODES}}}\nprofiles: {{a: {{node: {{}}}}}}",
        f"s2vflow: 1\nparams: {{seed: 1}}\nnodes: {{{NODES}}}\nmatrix: {{seed: 1}}",
        f"s2vflow: 1\nparams: {{seed: 1}}\nnodes: {{{NODES}}}\nmatrix: {{seed: []}}",
        f"s2vflow: 1\nparams: {{seed: 1}}\nnodes: {{{NODES}}}\nmatrix: {{seed: [1], exclude: {{seed: 1}}}}",
        f"s2vflow: 1\nparams: {{seed: 1}}\nnodes: {{{NODES}}}\nmatrix: {{seed: [1], include: [{{}}]}}",
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(
    text: str, validator: Draft7Validator, kinds: Mapping[str, type[Node]], tmp_path: Path
) -> None:
    """Obvious mistakes show while typing; the loader agrees."""
    assert not validator.is_valid(read(text))
    path = tmp_path / "r.yaml"
    path.write_text(text)
    if "profiles" not in text or "kind: load_vae, steps" in text:
        with pytest.raises(RecipeError):
            load_recipe(path, kinds=kinds)


@pytest.mark.parametrize(
    "text",
    [
        f"s2vflow: 1\nnodes: {{{NODES}, more: {{kind: extend, video: $clip.latent, steps: $params.steps}}}}",
        f"s2vflow: 1\nnodes: {{{NODES}, more: {{kind: extend, video: $clip, seed: $params.seeds, cfg: null}}}}",
        f"s2vflow: 1\nnodes: {{{NODES}, more: {{kind: extend, video: $clip, seed: [$params.seed, 1]}}}}",
        "s2vflow: 1\nnodes: {out: {kind: save_latent, latent: $a, file: '${params.name}.latent'}}",
        "s2vflow: 1\nnodes: {out: {kind: save_video, frames: $a, file: 'talk.${params.suffix}'}}",
        "s2vflow: 1\nnodes: {out: {kind: save_video, frames: $a, file: $params.file}}",
        "s2vflow: 1\nextends: base.yaml",
        "s2vflow: 1\nextends: base.yaml\nnodes: {first: {steps: 4}}",
        f"s2vflow: 1\nparams:\nnodes: {{{NODES}}}\nprofiles: {{a: {{description: x, params: {{seeds: [1, 2]}}}}}}",
        f"s2vflow: 1\nnodes: {{{NODES}}}\nprofiles: {{a: {{nodes: {{vae: {{kind: load_image, file: a}}}}}}}}",
        f"s2vflow: 1\nnodes: {{{NODES}}}\nmatrix: {{seed: [1], nodes.vae.precision: [fp32], exclude: [{{seed: 1}}]}}",
        f"s2vflow: 1\nnodes: {{{NODES}}}\nmatrix:\n  nodes.dit.loras: [[], [{{id: a}}]]\n  include: [{{seed: 3}}]",
    ],
)
def test_the_schema_takes_references_and_parts(text: str, validator: Draft7Validator) -> None:
    """Parameters may stand for values, and a recipe that extends another may be a part of one."""
    assert [error.message for error in validator.iter_errors(read(text))] == []


def test_override_files_have_a_schema_of_their_own(kinds: Mapping[str, type[Node]]) -> None:
    """Every part is optional there."""
    schema = recipe_schema(kinds)
    override = Draft7Validator({**schema["definitions"]["override"], "definitions": schema["definitions"]})
    assert override.is_valid(read("nodes: {first: {steps: 4}}"))
    assert override.is_valid({})
    assert not override.is_valid(read("nodes: {first: {stepz: 4}}"))
