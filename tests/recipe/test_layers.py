from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from s2v_flow.errors import RecipeError
from s2v_flow.graph.node import Node
from s2v_flow.options import Options
from s2v_flow.recipe.argument import Changes, Override
from s2v_flow.recipe.load import Recipe, load_recipe

Load = Callable[..., Recipe]

BASE = """
s2vflow: 1
description: The base.
params: {file: base.wav, name: a}
nodes:
  voice: {kind: load_audio, file: $params.file}
  dit: {kind: load_diffusion_model, checkpoint: dit.safetensors, loras: [{id: fast, file: fast.safetensors}]}
  clip: {kind: load_latent, file: clip.latent}
  out: {kind: save_latent, latent: $clip, file: out.latent}
profiles:
  draft: {params: {file: draft.wav}, nodes: {clip: {file: draft.latent}}}
  plain: {nodes: {dit: {loras: []}}}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def field(recipe: Recipe, node: str, name: str) -> Any:
    return getattr(recipe.nodes[node].node, name)


def test_later_layers_win(write: Callable[[str, str], Path], kinds: Mapping[str, type[Node]]) -> None:
    """Base, recipe, profiles in order, override files in order, --set: each is over the ones before."""
    write("base.yaml", BASE)
    path = write("recipe.yaml", "s2vflow: 1\nextends: base.yaml\nparams: {file: recipe.wav}\n")
    one = write("one.yaml", "params: {file: one.wav}\n")
    two = write("two.yaml", "s2vflow: 1\nparams: {file: two.wav}\nprofiles: {last: {params: {file: last.wav}}}\n")

    def voice(**options: Any) -> Any:
        return field(load_recipe(path, kinds=kinds, changes=Options(**options).changes), "voice", "file")

    assert voice() == "recipe.wav"
    assert voice(profiles=["draft"]) == "draft.wav"
    assert voice(profiles=["draft"], override_files=[one]) == "one.wav"
    assert voice(profiles=["draft"], override_files=[one, two]) == "two.wav"
    assert voice(profiles=["draft", "last"], override_files=[two, one]) == "one.wav"
    assert voice(profiles=["draft"], override_files=[one, two], sets=["file=set.wav", "file=set2.wav"]) == "set2.wav"


def test_maps_merge_and_lists_replace(load: Load) -> None:
    """A profile that names one field leaves the others, and a list is taken as it is."""
    recipe = load(BASE, profiles=["plain"])
    assert field(recipe, "dit", "loras") == []
    assert field(recipe, "dit", "checkpoint") == "dit.safetensors"


def test_profiles_of_the_same_name_are_merged_across_layers(
    write: Callable[[str, str], Path], kinds: Mapping[str, type[Node]]
) -> None:
    """A recipe may add to a profile of its base, and override files to both."""
    write("base.yaml", BASE)
    path = write("recipe.yaml", "s2vflow: 1\nextends: base.yaml\nprofiles: {draft: {nodes: {out: {file: d.latent}}}}\n")
    over = write("over.yaml", "profiles: {draft: {params: {file: over.wav}}}\n")
    recipe = load_recipe(path, kinds=kinds, changes=Changes(["draft"], [over]))
    assert field(recipe, "clip", "file") == "draft.latent"
    assert field(recipe, "out", "file") == "d.latent"
    assert field(recipe, "voice", "file") == "over.wav"


def test_a_node_whose_kind_changes_is_replaced_whole(load: Load) -> None:
    """Fields of the old kind do not linger; naming the same kind merges as usual."""
    changed = (
        BASE + "  other: {nodes: {voice: {kind: load_latent, file: v.latent}, dit: {kind: load_diffusion_model}}}\n"
    )
    recipe = load(changed, profiles=["other"])
    assert recipe.nodes["voice"].kind == "load_latent"
    assert field(recipe, "dit", "checkpoint") == "dit.safetensors"
    assert len(field(recipe, "dit", "loras")) == 1


def test_null_sets_none(load: Load) -> None:
    """An optional field that a base gives is taken away by null."""
    text = BASE + "  silent: {nodes: {more: {kind: extend, video: $clip, cfg: null}}}\n"
    assert field(load(text, profiles=["silent"]), "more", "cfg") is None


def test_relative_paths_start_where_the_value_was_written(
    write: Callable[[str, str], Path], kinds: Mapping[str, type[Node]], tmp_path: Path
) -> None:
    """Of a parameter it is the file that gave its value that counts, for --set the given directory."""
    write("shared/base.yaml", BASE)
    path = write("recipe.yaml", "s2vflow: 1\nextends: shared/base.yaml\nnodes: {clip: {file: mine.latent}}\n")
    recipe = load_recipe(path, kinds=kinds)
    assert recipe.nodes["voice"].base_dir("file") == tmp_path / "shared"
    assert recipe.nodes["clip"].base_dir("file") == tmp_path
    assert recipe.nodes["dit"].base_dir(("loras", 0, "file")) == tmp_path / "shared"
    assert recipe.nodes["dit"].base_dir("precision") == tmp_path / "shared"
    recipe = load_recipe(
        path, kinds=kinds, changes=Changes(overrides=[Override("set", "file=x.wav")], base_dir=tmp_path / "here")
    )
    assert recipe.nodes["voice"].base_dir("file") == tmp_path / "here"
    assert [file.name for file in recipe.files] == ["base.yaml", "recipe.yaml"]
    assert recipe.description == "The base."


def test_a_base_need_not_be_a_whole_recipe(write: Callable[[str, str], Path], kinds: Mapping[str, type[Node]]) -> None:
    """Only the recipe itself must name the version of the language."""
    write("base.yaml", "params: {file: a.wav}\n")
    path = write("r.yaml", "s2vflow: 1\nextends: base.yaml\nnodes: {voice: {kind: load_audio, file: $params.file}}\n")
    assert field(load_recipe(path, kinds=kinds), "voice", "file") == "a.wav"


def test_merging_files_that_share_no_key_does_not_depend_on_their_order(
    write: Callable[[str, str], Path], kinds: Mapping[str, type[Node]]
) -> None:
    """Disjoint override files commute."""
    path = write("recipe.yaml", BASE)
    files = [
        write("a.yaml", "params: {file: a.wav}\n"),
        write("b.yaml", "nodes: {clip: {file: b.latent}}\n"),
        write("c.yaml", "nodes: {dit: {precision: bf16}}\n"),
    ]
    one = load_recipe(path, kinds=kinds, changes=Changes(files=files))
    other = load_recipe(path, kinds=kinds, changes=Changes(files=files[::-1]))
    assert {name: spec.node for name, spec in one.nodes.items()} == {n: spec.node for n, spec in other.nodes.items()}


def test_a_chain_of_eight_files_is_allowed(write: Callable[[str, str], Path], kinds: Mapping[str, type[Node]]) -> None:
    """The limit itself is within the limit."""
    for index in range(1, 8):
        extends = f"extends: f{index + 1}.yaml\n" if index < 7 else "nodes: {voice: {kind: load_audio, file: a.wav}}\n"
        write(f"f{index}.yaml", extends)
    path = write("f0.yaml", "s2vflow: 1\nextends: f1.yaml\n")
    assert len(load_recipe(path, kinds=kinds).files) == 8


def test_a_recipe_that_is_not_there_is_a_recipe_error(tmp_path: Path, kinds: Mapping[str, type[Node]]) -> None:
    """The nearest file name is suggested."""
    (tmp_path / "talk.yaml").write_text("s2vflow: 1\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "tlak.yaml", kinds=kinds)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "R002"
    assert diagnostic.fix == f"did you mean {tmp_path / 'talk.yaml'}?"
