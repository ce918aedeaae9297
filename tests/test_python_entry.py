"""The package as a library: `import s2v_flow` and its few names."""

from __future__ import annotations

import gc
import re
import shutil
import subprocess
import sys
import traceback
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from recipes_for_tests import call, tiny
from runs_for_tests import Place, copied, place
from safetensors.torch import load_file, save_file

import s2v_flow
from s2v_flow.api.result import EMBEDDED_BYTES, MAX_ROWS, table
from s2v_flow.errors import MissingError, RecipeError, S2VFlowError
from s2v_flow.graph.events import Event, StepDone
from s2v_flow.media.video import VideoReader
from s2v_flow.recipe import layers, reader

DEMO = Path(__file__).parents[1] / "recipes" / "demo.yaml"


def test_importing_the_package_imports_nothing_else() -> None:
    """Neither torch nor pydantic are loaded before a name is used."""
    code = "import sys, s2v_flow; print({'torch', 'pydantic', 's2v_flow.api'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_plan_takes_the_options_as_keywords(tmp_path: Path) -> None:
    """The same overrides as on the command line; the result is an object."""
    planned = s2v_flow.plan(str(DEMO), sets=["steps=2"], cache_dir=str(tmp_path), device="cpu")
    assert (planned.num_chunks, planned.num_frames) == (3, 95)
    assert planned.plan.node("first").facts["steps"] == 2


def test_load_and_check_return_the_recipe(tmp_path: Path) -> None:
    """Both give the validated nodes."""
    assert s2v_flow.load(DEMO).nodes.keys() == s2v_flow.check(DEMO).nodes.keys()


def test_a_recipes_name_may_hold_a_line_break(tmp_path: Path) -> None:
    """A path is a file whatever its name; only a text with a line break is taken for a recipe's text."""
    shutil.copy(DEMO, tmp_path / "a\nb.yaml")
    assert s2v_flow.check(tmp_path / "a\nb.yaml").nodes.keys() == s2v_flow.check(DEMO).nodes.keys()


def test_an_unknown_option_or_name_is_refused() -> None:
    """A misspelt keyword is a TypeError, a misspelt name an AttributeError, a wrong recipe a RecipeError."""
    with pytest.raises(TypeError, match="step"):
        s2v_flow.plan(DEMO, step=3)
    with pytest.raises(AttributeError, match="plam"):
        s2v_flow.plam  # noqa: B018
    with pytest.raises(RecipeError):
        s2v_flow.check(DEMO, sets=["stepz=3"])


@pytest.mark.parametrize(
    "given",
    [
        {"params": "steps=2"},
        {"sets": [3]},
        {"device": 0},
        {"gpus": "2"},
        {"gpus": 0},
        {"vram": -1},
        {"vram": "12"},
        {"cache_limit": 20.5},
        {"cache_dir": ""},
        {"models_dirs": [None]},
        {"overwrite": "no"},
        {"should_stop": True},
        {"selection": "first"},
        {"overrides": ["steps=2"]},
    ],
    ids=str,
)
def test_an_option_of_the_wrong_type_is_named(given: dict[str, Any]) -> None:
    """Before anything is computed: "no" would be true, a limit of 12 bytes would evict all that is stored."""
    with pytest.raises(S2VFlowError, match=f"^{next(iter(given))}: "):
        s2v_flow.plan(DEMO, **given)


def test_none_is_the_default_and_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S2VFLOW_CACHE_DIR", "~/cache")
    options = s2v_flow.Options(sets=None, models_dirs="~/models", cache_limit="20G")  # type: ignore[arg-type]
    assert (options.sets, options.cache_limit) == ((), 20 * 10**9)
    assert (options.models_dirs, options.cache_root) == ((Path.home() / "models",), Path.home() / "cache")


@pytest.mark.parametrize("recipe", [None, 3, ["recipes/demo.yaml"], b"demo.yaml", "s2vflow: 1\nnodes: {}"], ids=repr)
def test_what_is_neither_a_path_nor_a_dict_is_no_recipe(recipe: Any) -> None:
    with pytest.raises(S2VFlowError, match=r"^expected a recipe's file or a dict, got ") as caught:
        s2v_flow.check(recipe)
    assert "yaml.safe_load" in (caught.value.fix or "")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="earlier tracebacks have no notes")
def test_a_traceback_shows_the_fix() -> None:
    with pytest.raises(S2VFlowError) as caught:
        s2v_flow.plan(DEMO, device="gpu")
    assert traceback.format_exception(caught.value)[-1] == "fix: use auto, cpu, cuda or cuda:N\n"


def test_every_path_among_the_options_may_be_text_and_stand_alone(tmp_path: Path) -> None:
    """ComfyUI's extra_model_paths.yaml, override files and folders: in a list or by themselves."""
    extra, over = tmp_path / "extra.yaml", tmp_path / "over.yaml"
    extra.write_text("comfyui: {base_path: models, vae: vae}\n", encoding="utf-8")
    over.write_text("params: {steps: 2}\n", encoding="utf-8")
    for several in (lambda path: [str(path)], str):
        planned = s2v_flow.plan(
            DEMO,
            extra_model_paths=several(extra),
            override_files=several(over),
            models_dirs=several(tmp_path),
            input_dirs=several(tmp_path),
            output_dir=str(tmp_path),
            cache_dir=str(tmp_path / "cache"),
            sets="seed=3",
            device="cpu",
        )
        assert (planned.recipe.params["steps"], planned.recipe.params["seed"]) == (2, 3)


def test_a_recipe_with_a_matrix_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers, and the recipe itself; the cells are made of them."""
    opened: list[str] = []
    given = reader.read_file

    def read(path: Path, *more: Any, **options: Any) -> Any:
        opened.append(str(path))
        return given(path, *more, **options)

    monkeypatch.setattr(layers, "read_file", read)
    planned = s2v_flow.plan(DEMO, axes="seed=1..3", cache_dir=tmp_path, device="cpu")
    assert (opened, planned.labels) == ([str(DEMO)], ("seed=1", "seed=2", "seed=3"))


def test_dir_shows_what_there_is_without_importing_it() -> None:
    code = "import sys, s2v_flow; print(*dir(s2v_flow), 'torch' in sys.modules, 's2v_flow.api' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["Options", "Session", "__version__", "check", "load", "plan", "run", "False", "False"]


def test_an_error_says_the_mistakes_as_the_command_line_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        s2v_flow.check(DEMO, sets=["stepz=3", "cfg=x"])
    code, _, err = call("check", DEMO, "--set", "stepz=3", "--set", "cfg=x")
    assert (code, err) == (3, f"{caught.value}\n")
    assert "did you mean steps?" in err


def test_params_are_values_of_python(tmp_path: Path) -> None:
    """They equal --set, take numpy's numbers and paths, and count by their type."""
    given = {"steps": np.int64(3), "cfg": 2, "image": Path("a.png"), "seed": 2**64 - 1}
    params = s2v_flow.check(DEMO, params=given).params
    assert {name: params[name] for name in given} == {"steps": 3, "cfg": 2, "image": "a.png", "seed": 2**64 - 1}
    same = [s2v_flow.plan(DEMO, cache_dir=tmp_path, device="cpu", **more).statuses for more in (
        {"params": {"steps": 3, "prompt": "3"}}, {"sets": ["steps=3", "prompt=3"]})]  # fmt: skip
    assert same[0] == same[1]
    for name, value, code, text in (
        ("stepz", 3, "R051", "there is no parameter stepz"),
        ("steps", "3", "R052", "params.steps: expected a whole number, got '3'"),
        ("steps", 3.0, "R052", "params.steps: expected a whole number, got 3.0"),
        ("steps", None, "R052", "params.steps: expected a whole number, got null"),
        ("cfg", float("nan"), "R008", "NaN"),
        ("prompt", "a\x00", "R003", "U+0000"),
        ("prompt", {1}, "R012", "got set"),
        ("a=b c", 1, "R051", "there is no parameter a=b c"),
    ):
        with pytest.raises(RecipeError) as caught:
            s2v_flow.check(DEMO, params={name: value})
        (found,) = caught.value.diagnostics
        assert (found.code, str(found.place)) == (code, f"<params>:{name}")
        assert text in found.message


def test_a_dict_is_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same plan as its file; its paths are relative to the current folder."""
    given = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    monkeypatch.chdir(DEMO.parent)
    planned = s2v_flow.plan(given, params={"steps": 3}, cache_dir=tmp_path, device="cpu")
    expected = s2v_flow.plan(DEMO, params={"steps": 3}, cache_dir=tmp_path, device="cpu")
    assert planned.statuses == expected.statuses
    assert planned.plan.node("video").files == expected.plan.node("video").files
    assert len(s2v_flow.plan({"s2vflow": 1, "extends": DEMO.name}, cache_dir=tmp_path).plan.nodes) > 10


def test_mistakes_in_a_dict_have_a_place() -> None:
    given = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    nodes = given["nodes"]
    nodes["first"] |= {"steps": "many", "smapler": "euler", "cfg": float("inf")}
    nodes["dit"] |= {"loras": [{"id": "a", "file": 5}], 3: 4}
    with pytest.raises(RecipeError) as caught:
        s2v_flow.check(given)
    assert {str(item.place): item.code for item in caught.value.diagnostics} == {
        "<dict>:nodes.first.steps": "R012",
        "<dict>:nodes.first.smapler": "R011",
        "<dict>:nodes.first.cfg": "R008",
        "<dict>:nodes.dit.loras[0].file": "R012",
        "<dict>:nodes.dit.3": "R007",
    }
    assert str(caught.value).startswith("<dict>:nodes.dit.3: error[R007]: a key must be text\n")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: {"description": "x" * reader.MAX_BYTES}, "1000000 bytes"),
        (lambda: {"params": dict.fromkeys(map(str, range(reader.MAX_EVENTS)), 1)}, "20000 values"),
        (lambda: _circle(), "nest 32 deep"),
    ],
)
def test_a_dict_has_the_limits_of_a_text(make: Callable[[], dict[str, Any]], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        s2v_flow.check({"s2vflow": 1, **make()})


def _circle() -> dict[str, Any]:
    circle: dict[str, Any] = {}
    circle["nodes"] = circle
    return circle


def test_objects_are_short_in_print_and_whole_in_a_notebook(tmp_path: Path) -> None:
    """Whatever a recipe holds is escaped."""
    planned = s2v_flow.plan(DEMO, axes="seed=1,2", cache_dir=tmp_path, device="cpu")
    assert re.fullmatch(r"<Planned .*demo.yaml on cpu: 6 chunks, 95 frames, 2 cells, \d+ LOAD, \d+ RUN>", repr(planned))
    assert len(repr(planned.recipe)) < 400
    html = planned._repr_html_()
    assert html.count("<tr>") == len(planned.plan.nodes) + 1
    made = table("<b>", ("a",), [("RUN", "<script>")] * (MAX_ROWS + 1), ["&"])
    assert ("<script>" in made, made.count("&lt;script&gt;"), "and 1 more" in made) == (False, MAX_ROWS, True)


def test_a_result_gives_frames_latents_and_players(
    quick_run: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is on the disk; nothing is computed again."""
    here = copied(quick_run, tmp_path)
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"models_dirs": here.where[1], "cache_dir": here.cache, "device": "cpu"}
    result = s2v_flow.run(here.recipe, **given)
    assert (result.computed, len(repr(result)) < 300) == ((), True)
    frames = list(result.frames())
    assert [(len(frames), frame.shape, frame.dtype) for frame in frames[:1]] == [(20, (64, 64, 3), np.uint8)]
    with VideoReader(here.video) as video:
        assert np.array_equal(frames[19], video.read(19, 1)[0])
    shapes = {name: tuple(latent.shape) for name, latent in result.latents().items()}
    assert shapes == dict.fromkeys(("first", "talk[1]", "talk[2]"), (1, 16, 2, 8, 8))
    assert 'src="data:video/mp4;base64,' in result._repr_html_()
    with pytest.raises(MissingError, match="which video is meant"):
        result.frames("vide")
    name = tmp_path / 'a"<b>.mp4'
    name.write_bytes(b"0" * (EMBEDDED_BYTES + 1))
    sweep = replace(result, outputs={"seed=1/video": (here.video,), "seed=2/video": (name,), "x/y": (Path("no.mp4"),)})
    html = sweep._repr_html_()
    assert (html.count("<figure"), html.count("<video"), "base64" in html) == (3, 2, False)
    assert 'src="a%22%3Cb%3E.mp4"' in html
    assert "not there any more" in html
    shutil.rmtree(here.cache / "objects")
    with pytest.raises(S2VFlowError, match="a stored result is damaged"):
        result.latents()


ONE_CHUNK = tiny(
    talk=None, frames=None, video=None, saved={"kind": "save_latent", "latent": "$first", "file": "out/first.latent"}
)


@pytest.mark.slow
def test_a_session_loads_a_model_once(tiny_models: Path, tmp_path: Path) -> None:
    """For another seed none; for another precision or file that one; with the bits of single runs."""
    models = tmp_path / "models"
    shutil.copytree(tiny_models, models)
    here = place(tmp_path, models, ONE_CHUNK)
    given: dict[str, Any] = {"models_dirs": models, "device": "cpu"}
    seed = "nodes.first.seed={}".format

    def fail(event: Event) -> None:
        assert not isinstance(event, StepDone) or event.node != "first" or 1 / 0

    with s2v_flow.Session(cache_dir=here.cache, **given) as session:
        first = session.run(here.recipe, sets=seed(1))
        loaded = session.num_loads
        assert loaded == 4
        second = session.run(here.recipe, sets=seed(2))
        assert (session.num_loads, "first" in second.computed) == (loaded, True)
        with pytest.raises(ZeroDivisionError):
            session.run(here.recipe, fail, sets=seed(3))
        session.run(here.recipe, sets=seed(3))
        assert session.num_loads == loaded
        session.run(here.recipe, sets=[seed(3), "nodes.dit.precision=bf16"])
        assert session.num_loads == loaded + 1
        file = models / "diffusion_models" / "tiny_s2v.safetensors"
        changed = {name: tensor * 1.01 for name, tensor in load_file(file).items()}
        save_file(changed, file)
        third = session.run(here.recipe, sets=seed(2))
        assert (session.num_loads, "first" in third.computed) == (loaded + 2, True)
    with pytest.raises(S2VFlowError, match="closed"):
        session.run(here.recipe)
    alone = s2v_flow.run(here.recipe, cache_dir=tmp_path / "other", sets=seed(2), **given)
    assert alone.entries["first"].outputs == third.entries["first"].outputs
    assert alone.entries["first"].outputs != second.entries["first"].outputs != first.entries["first"].outputs


@pytest.mark.slow
def test_a_session_frees_its_models_and_keeps_to_its_memory(tiny_models: Path, tmp_path: Path) -> None:
    here = place(tmp_path, tiny_models, ONE_CHUNK)
    others = {id(item) for item in gc.get_objects() if type(item).__name__ == "WanS2V"}  # which other tests have left
    found: list[weakref.ref[Any]] = []

    def look(event: object) -> None:
        if isinstance(event, StepDone):
            models = (item for item in gc.get_objects() if type(item).__name__ == "WanS2V")
            found.extend(weakref.ref(item) for item in models if id(item) not in others)

    given: dict[str, Any] = {"cache_dir": here.cache, "models_dirs": tiny_models, "device": "cpu"}
    with s2v_flow.Session(**given) as session:
        session.run(here.recipe, look)
        assert any(model() is not None for model in found)
    assert all(model() is None for model in found)
    found.clear()
    with s2v_flow.Session(**given, memory=1) as session:
        planned = session.plan(here.recipe, sets="nodes.first.seed=5")
        session.run(planned, look)  # not planned again
        assert found
        assert all(model() is None for model in found)
