from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from s2v_flow.errors import RecipeError
from s2v_flow.recipe.load import Recipe

Load = Callable[..., Recipe]


def text_of(load: Load, params: str, text: str) -> Any:
    """Return what a latent's file name becomes."""
    recipe = load(f"s2vflow: 1\nparams: {params}\nnodes:\n  clip: {{kind: load_latent, file: {text}}}\n")
    return recipe.nodes["clip"].node.model_dump()["file"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("'$5 coffee'", "$5 coffee"),
        ("$", "$"),
        ("$$", "$$"),
        ("'$clip'", "$clip"),
        ("'$params'", "$params"),
        ("'{params.x}'", "{params.x}"),
        ("'${params.name}'", "a.wav"),
        ("'in/${params.name}'", "in/a.wav"),
        ("'${params.name}${params.name}'", "a.wava.wav"),
        ("'${params.count}-${params.size}-${params.flag}'", "4-0.0001-true"),
        ("'$${params.name}'", "${params.name}"),
        ("'$$${params.name}'", "$${params.name}"),
        ("'$$params.name'", "$params.name"),
        ("'$$5'", "$$5"),
        ("$params.name", "a.wav"),
        ("$params.again", "a.wav"),
        ("$params.inside", "x/a.wav"),
    ],
)
def test_references_in_text(load: Load, text: str, expected: str) -> None:
    """Only `$params.` and `${` mean anything, a doubled dollar takes that away, numbers come in canonical form."""
    params = "{name: a.wav, count: 0x4, size: 1e-4, flag: true, again: $params.name, inside: 'x/${params.again}'}"
    assert text_of(load, params, text) == expected


def test_what_a_parameter_holds_is_not_read_again(load: Load) -> None:
    """A text put into another is not searched for references."""
    assert text_of(load, "{a: '$${params.b}', b: x}", "'<${params.a}>'") == "<${params.b}>"


def test_a_whole_reference_keeps_the_type(load: Load) -> None:
    """Numbers stay numbers, lists stay lists, null stays null."""
    recipe = load(
        "s2vflow: 1\nparams: {steps: 4, seeds: [1, $params.steps], cfg: null}\nnodes:\n"
        "  clip: {kind: load_latent, file: a}\n"
        "  more: {kind: extend, video: $clip, steps: $params.steps, seed: $params.seeds, cfg: $params.cfg}\n"
    )
    more: Any = recipe.nodes["more"].node
    assert (more.steps, more.seed, more.cfg) == (4, [1, 4], None)
    assert recipe.params == {"steps": 4, "seeds": [1, 4], "cfg": None}
    assert recipe.nodes["more"].origin(("seed", 1)).place.line == 2
    assert recipe.nodes["more"].origin("video").place.line == 5


def test_the_place_of_a_mistake_is_where_the_value_was_written(load: Load) -> None:
    """A parameter's wrong value is marked at the parameter, once, however often it is used."""
    with pytest.raises(RecipeError) as caught:
        load(
            "s2vflow: 1\nparams:\n  side: 100\nnodes:\n"
            "  vae: {kind: load_vae, checkpoint: a}\n  face: {kind: load_image, file: a}\n"
            "  ref: {kind: encode_image, vae: $vae, image: $face, width: $params.side, height: 64}\n"
            "  two: {kind: encode_image, vae: $vae, image: $face, width: $params.side, height: 64}\n"
        )
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.place is not None
    assert (diagnostic.place.line, diagnostic.place.column) == (3, 9)
    assert diagnostic.inside == "nodes.ref.width (kind: encode_image), from params.side"


def test_sixteen_levels_of_references_are_allowed_in_any_order(load: Load) -> None:
    """The limit is the same whether the chain is written upwards or downwards."""
    chain = ["p0: x", *(f"p{level}: $params.p{level - 1}" for level in range(1, 17))]
    for lines in (chain, chain[::-1]):
        assert text_of(load, "{" + ", ".join(lines) + "}", "$params.p16") == "x"
        too_long = [*lines, "p17: $params.p16"]
        for order in (too_long, too_long[::-1]):
            with pytest.raises(RecipeError) as caught:
                text_of(load, "{" + ", ".join(order) + "}", "a")
            assert {diagnostic.code for diagnostic in caught.value.diagnostics} == {"R033"}


def test_a_faulty_parameter_is_reported_once_and_where_it_is(load: Load) -> None:
    """Uses of a parameter whose own value is wrong say nothing more."""
    with pytest.raises(RecipeError) as caught:
        text_of(load, "{a: $params.b, c: '${params.a}'}", "$params.c")
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "R030"
    assert diagnostic.place is not None
    assert (diagnostic.place.line, diagnostic.place.column) == (2, 13)
