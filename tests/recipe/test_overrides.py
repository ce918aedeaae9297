from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2v_flow.errors import Diagnostic, RecipeError
from s2v_flow.nodes.table import NODE_KINDS
from s2v_flow.recipe.argument import MAX_TEXT_FILE_BYTES, Changes, Override
from s2v_flow.recipe.load import Recipe, load_recipe

Load = Callable[..., Recipe]

TEXT = """
s2vflow: 1
params: {steps: 4, cfg: 1, shift: 8.0, prompt: hello, chunks: auto, seeds: [1, 2], name: out, unused: 1, off: ~}
nodes:
  dit:
    kind: load_diffusion_model
    checkpoint: a.safetensors
    loras: [{id: style, file: s.safetensors}, {id: lightning, file: l.safetensors, strength: 0.5}]
  umt5: {kind: load_text_encoder, checkpoint: t5.safetensors}
  positive: {kind: encode_text, text_encoder: $umt5, text: $params.prompt}
  first: {kind: sample, model: $dit, positive: $positive, steps: $params.steps, cfg: $params.cfg, shift: $params.shift}
  talk: {kind: extend, video: $first, chunks: $params.chunks, seed: $params.seeds, negative: $positive}
  out: {kind: save_latent, latent: $talk, file: "${params.name}-${params.steps}.latent"}
"""


def value(recipe: Recipe, path: str) -> Any:
    node, *fields = path.split(".")
    found: Any = recipe.nodes[node].node
    for name in fields:
        found = found[int(name)] if name.isdecimal() else getattr(found, name)
    return found


@pytest.mark.parametrize(
    ("argument", "path", "expected"),
    [
        ("steps=20", "first.steps", 20),
        ("params.steps=0x10", "first.steps", 16),
        ("nodes.first.steps=7", "first.steps", 7),
        ("cfg=4.5", "first.cfg", 4.5),  # an int so far, but every use takes any number
        ("cfg=1e1", "first.cfg", 10.0),
        ("shift=3", "first.shift", 3.0),
        ("prompt=12", "positive.text", "12"),  # text stays text
        ("prompt=null", "positive.text", "null"),
        ("prompt=true", "positive.text", "true"),
        ("prompt=a=b, [c]", "positive.text", "a=b, [c]"),
        ("prompt=", "positive.text", ""),
        ("prompt=[x]", "positive.text", "[x]"),
        ("chunks=3", "talk.chunks", 3),  # text so far, but its use takes no free text
        ("chunks=auto", "talk.chunks", "auto"),
        ("seeds=[5, 6]", "talk.seed", [5, 6]),
        ("seeds=7", "talk.seed", 7),
        ("seeds[1]=9", "talk.seed", [1, 9]),
        ("nodes.talk.seed=[1, 2, 3]", "talk.seed", [1, 2, 3]),
        ("nodes.dit.loras[lightning].strength=1", "dit.loras.1.strength", 1.0),
        ("nodes.dit.loras[style].allow_partial=true", "dit.loras.0.allow_partial", True),
        ("nodes.dit.loras[0].file=x.safetensors", "dit.loras.0.file", "x.safetensors"),
        ("nodes.dit.loras=[]", "dit.loras", []),
        ("nodes.dit.loras=[{id: a, file: b}]", "dit.loras.0.file", "b"),
        ("nodes.talk.negative=null", "talk.negative", None),
        ("nodes.first.sampler=euler", "first.sampler", "euler"),
        ("nodes.first.init_first_frame=true", "first.init_first_frame", True),
        ("nodes.positive.text=no", "positive.text", "no"),
        ("nodes.positive.text=${params.name}!", "positive.text", "out!"),
        ("nodes.first.cfg=$params.steps", "first.cfg", 4),
        ("name=new", "out.file", "new-4.latent"),
        ("steps=5", "out.file", "out-5.latent"),
    ],
)
def test_a_value_is_read_as_its_place_takes_it(load: Load, argument: str, path: str, expected: object) -> None:
    """The schema decides the type, for parameters what they hold and where they are used."""
    found = value(load(TEXT, sets=[argument]), path)
    assert found == expected
    assert isinstance(found, bool) == isinstance(expected, bool)


def test_an_input_can_be_set_to_another_node(load: Load) -> None:
    """References are written as in a recipe."""
    assert str(value(load(TEXT, sets=["nodes.talk.negative=$positive.conditioning"]), "talk.negative")) == (
        "$positive.conditioning"
    )


@pytest.mark.parametrize(
    "argument",
    ["steps=4.5", "steps=abc", "steps=1e1", "steps=true", "steps=null", "steps=", "steps= 4", "cfg=x", "unused=a",
     "unused=1.5", "chunks=many", "seeds=[a]", "seeds[0]=x", "nodes.first.motion=none",
     "nodes.dit.loras[style].allow_partial=1"],
)  # fmt: skip
def test_a_value_that_its_place_does_not_take_is_refused(load: Load, argument: str) -> None:
    """Nothing is converted that was not meant: the error points into the argument."""
    with pytest.raises(RecipeError) as caught:
        load(TEXT, sets=["name=x", argument])
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code in ("R052", "R012")
    assert diagnostic.place is not None
    assert (diagnostic.place.file, diagnostic.place.line) == ("--set", 2)
    assert diagnostic.place.column > argument.index("=")
    assert diagnostic.excerpt == argument


def test_setting_a_field_leaves_the_parameter_alone(load: Load) -> None:
    """`nodes.first.steps` changes one node only."""
    recipe = load(TEXT, sets=["nodes.first.steps=9"])
    assert value(recipe, "first.steps") == 9
    assert recipe.params["steps"] == 4


def test_a_parameter_without_type_or_use_takes_text(load: Load) -> None:
    """Null says nothing about what may come."""
    assert load(TEXT, sets=["off=12"]).params["off"] == "12"
    assert load(TEXT, sets=["off=null"]).params["off"] is None


def test_half_a_surrogate_pair_from_the_command_line_is_refused(load: Load) -> None:
    """An argument that is not UTF-8 reaches Python as surrogates, which cannot be written anywhere."""
    with pytest.raises(RecipeError) as caught:
        load(TEXT, sets=["prompt=\udcff"])
    assert [diagnostic.code for diagnostic in caught.value.diagnostics] == ["R003"]


@pytest.mark.parametrize(
    ("argument", "path", "expected"),
    [
        ("steps=20", "first.steps", 20),
        ("cfg=4.5", "first.cfg", 4.5),
        ('prompt="12"', "positive.text", "12"),
        ('prompt="a\\n\\"b\\" \\u00e4 \\ud83d\\ude00"', "positive.text", 'a\n"b" ä 😀'),
        ('prompt="${params.name}!"', "positive.text", "out!"),
        ("nodes.first.cfg=1E1", "first.cfg", 10.0),
        ('nodes.dit.loras=[{"id":"a","file":"b","strength":2}]', "dit.loras.0.strength", 2.0),
        ("nodes.dit.loras[style].allow_partial=true", "dit.loras.0.allow_partial", True),
        ("nodes.talk.negative=null", "talk.negative", None),
        ('nodes.first.cfg="$params.steps"', "first.cfg", 4),
        ("seeds=[5, 6]", "talk.seed", [5, 6]),
    ],
)
def test_json_sets_values_of_any_shape(load: Load, argument: str, path: str, expected: object) -> None:
    """JSON says the type; the place must take it."""
    found = value(load(TEXT, overrides=[Override("set-json", argument)]), path)
    assert found == expected
    assert isinstance(found, bool) == isinstance(expected, bool)


def test_an_input_can_be_set_by_json(load: Load) -> None:
    """References are texts, as in a recipe."""
    recipe = load(TEXT, overrides=[Override("set-json", 'nodes.talk.negative="$positive"')])
    assert str(value(recipe, "talk.negative")) == "$positive"


def test_a_prompt_comes_from_a_file_without_its_last_line_break(load: Load, tmp_path: Path) -> None:
    """Line breaks are those of Unix, parameters are put in, and the file counts as read."""
    (tmp_path / "prompt.txt").write_bytes("Grüße,\r\n${params.name}: a, [b] #c\r\n\r\n".encode())
    recipe = load(TEXT, tmp_path, overrides=[Override("set-file", "prompt=prompt.txt")])
    assert recipe.params["prompt"] == "Grüße,\nout: a, [b] #c\n"
    assert recipe.files[-1] == Path("prompt.txt")


def test_a_text_file_has_a_size_that_is_bounded(load: Load, tmp_path: Path) -> None:
    """A mistyped name of a video is not read into memory."""
    path = tmp_path / "prompt.txt"
    path.write_text("a" * MAX_TEXT_FILE_BYTES)
    assert len(load(TEXT, overrides=[Override("set-file", f"off={path}")]).params["off"]) == MAX_TEXT_FILE_BYTES
    path.write_text("a" * (MAX_TEXT_FILE_BYTES + 1))
    with pytest.raises(RecipeError) as caught:
        load(TEXT, overrides=[Override("set-file", f"off={path}")])
    assert [diagnostic.code for diagnostic in caught.value.diagnostics] == ["R004"]


def test_unset_goes_back_to_the_default(load: Load) -> None:
    """Fields to that of the schema, also within items; items of lists go away."""
    unset = [Override("unset", path) for path in ("nodes.first.shift", "nodes.dit.loras[lightning].strength")]
    recipe = load(TEXT.replace("shift: 8.0, ", "shift: 3.0, "), overrides=unset)
    assert value(recipe, "first.shift") == 8.0
    assert value(recipe, "dit.loras.1.strength") == 1.0
    recipe = load(TEXT, overrides=[Override("unset", "nodes.dit.loras[style]"), Override("unset", "seeds[0]")])
    assert [lora.id for lora in value(recipe, "dit.loras")] == ["lightning"]
    assert recipe.params["seeds"] == [2]
    assert load(TEXT, overrides=[Override("unset", "nodes.first.sampler")]).nodes == load(TEXT).nodes  # not given


def test_unset_takes_a_parameter_back_to_what_the_recipe_says(load: Load, tmp_path: Path) -> None:
    """Whatever a profile, an override file or an earlier --set made of it; what only they have goes away."""
    over = tmp_path / "over.yaml"
    over.write_text("params: {steps: 30, more: 1}\n")
    text = TEXT + "profiles: {p: {params: {cfg: 5}}}\n"
    changes = [Override("set", "steps=9"), *(Override("unset", name) for name in ("steps", "cfg", "params.more"))]
    recipe = load(text, profiles=["p"], override_files=[over], overrides=changes)
    assert recipe.params == load(TEXT).params


def test_changes_of_all_kinds_apply_in_their_order(load: Load) -> None:
    """The last one wins; `sets` come before."""
    changes = [Override("set-json", "steps=5"), Override("unset", "steps"), Override("set", "steps=6")]
    assert load(TEXT, sets=["steps=3"]).params["steps"] == 3
    assert load(TEXT, sets=["steps=3"], overrides=changes[:1]).params["steps"] == 5
    assert load(TEXT, sets=["steps=3"], overrides=changes[:2]).params["steps"] == 4
    assert load(TEXT, sets=["steps=3"], overrides=changes).params["steps"] == 6


@settings(max_examples=60, derandomize=True, database=None, deadline=None)
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
        max_leaves=6,
    ),
    st.sampled_from(["steps", "prompt", "seeds", "nodes.dit.loras", "nodes.dit.loras[style]", "nodes.talk.negative"]),
    st.integers(0, 60),
)
def test_any_json_is_applied_or_refused_with_a_diagnostic(
    tmp_path_factory: pytest.TempPathFactory, data: object, path: str, end: int
) -> None:
    """Whole or cut off, it makes a recipe, or a RecipeError with places."""
    file = tmp_path_factory.getbasetemp() / "json.yaml"
    file.write_text(TEXT)
    found: Sequence[Diagnostic] = ()
    for text in (json.dumps(data), json.dumps(data, ensure_ascii=False)[:end]):
        try:
            load_recipe(
                file,
                kinds={kind.kind: kind for kind in NODE_KINDS},
                changes=Changes(overrides=[Override("set-json", f"{path}={text}")]),
            )
        except RecipeError as error:
            found = error.diagnostics
        assert all(diagnostic.place is not None for diagnostic in found)


@settings(max_examples=60, derandomize=True, database=None, deadline=None)
@given(
    st.one_of(
        st.text(max_size=30),
        st.builds(
            "{}={}".format,
            st.sampled_from(["steps", "prompt", "seeds", "nodes.dit.loras", "seeds[0]", "chunks"]),
            st.text(max_size=20),
        ),
        st.from_regex(r"(nodes|params)(\.[a-z]{1,5}|\[[a-z0-9]\]){0,3}=.{0,9}", fullmatch=True),
    )
)  # fmt: skip
def test_any_argument_is_applied_or_refused_with_a_diagnostic(
    tmp_path_factory: pytest.TempPathFactory, argument: str
) -> None:
    """No text after --set, --set-file or --unset makes anything but a recipe or a RecipeError with places."""
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(TEXT)
    found: Sequence[Diagnostic] = ()
    kinds: Sequence[Any] = ("set", "set-file", "unset")
    for kind in kinds:
        try:
            load_recipe(
                path,
                kinds={kind.kind: kind for kind in NODE_KINDS},
                changes=Changes(overrides=[Override(kind, argument)]),
            )
        except RecipeError as error:
            found = error.diagnostics
        assert all(diagnostic.place is not None for diagnostic in found)


@settings(max_examples=60, derandomize=True, database=None, deadline=None)
@given(st.text(alphabet=st.characters(min_codepoint=32, exclude_categories=["Cs", "Cc"]), max_size=40))
def test_text_set_is_the_text_that_arrives(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Whatever a prompt holds, it arrives unchanged, unless it refers to parameters."""
    if "${" in text or "$params." in text or "\ufeff" in text or "\ufffe" in text or "\uffff" in text:
        return
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_text(TEXT)
    changes = Changes(overrides=[Override("set", f"prompt={text}")])
    recipe = load_recipe(path, kinds={kind.kind: kind for kind in NODE_KINDS}, changes=changes)
    assert recipe.params["prompt"] == text
