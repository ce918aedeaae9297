"""`s2vflow init` and `make`: a first recipe that is right, fits the portrait, and says what the shipped ones say."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from recipes_for_tests import PORTRAIT, RECIPES, call, write_voice
from runs_for_tests import Place

from s2v_flow import api
from s2v_flow.errors import S2VFlowError
from s2v_flow.start.project import RECIPES as LIKENESSES
from s2v_flow.start.project import Start, fitting_size, recipe_text, write_recipe

OFFICIAL_AREA = 704 * 1024
SHIPPED = {
    "lightning": "s2v_lightning.yaml",
    "quality": "s2v_quality.yaml",
    "bf16": "s2v_bf16.yaml",
    "official": "s2v_official.yaml",
    "demo": "demo.yaml",
}


def portrait(path: Path, width: int, height: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize(
    ("width", "height", "area", "expected"),
    [
        # what get_size_less_than_area of Wan2.2 gives for images that it does not have to enlarge
        (1920, 1080, OFFICIAL_AREA, (1088, 640)),
        (1080, 1920, OFFICIAL_AREA, (640, 1088)),
        (3000, 4000, OFFICIAL_AREA, (704, 960)),
        (1024, 1024, OFFICIAL_AREA, (832, 832)),
        (2000, 3000, OFFICIAL_AREA, (704, 1024)),
        # enlarged, as the shipped recipes are
        (512, 512, OFFICIAL_AREA, (832, 832)),
        (512, 512, 640 * 640, (640, 640)),
        (1920, 1080, 640 * 640, (832, 448)),
        (600, 800, 640 * 640, (576, 704)),
        (1, 1, 64 * 64, (64, 64)),
        (100_000, 1, 640 * 640, (4096, 64)),
    ],
)
def test_the_size_keeps_the_shape_within_the_area(
    width: int, height: int, area: int, expected: tuple[int, int]
) -> None:
    assert fitting_size(width, height, area) == expected


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(64 * 64, 2**21))
def test_every_size_is_one_that_nodes_take(width: int, height: int, area: int) -> None:
    """In multiples of 64, within the area and 4096 pixels; turned images give turned sizes."""
    size = fitting_size(width, height, area)
    assert all(side % 64 == 0 and 64 <= side <= 4096 for side in size)
    assert size[0] * size[1] <= area
    assert (size[0] - size[1]) * (width - height) >= 0
    turned = fitting_size(height, width, area)
    assert turned[0] * turned[1] == size[0] * size[1]


@pytest.mark.parametrize("like", SHIPPED)
def test_a_first_recipe_says_what_the_shipped_one_says(tmp_path: Path, like: str) -> None:
    """The same nodes with the same fields, and the same profiles; files, texts and the output are its own."""
    shipped = RECIPES / SHIPPED[like]
    wanted = api.check(shipped).params
    start = Start(RECIPES / wanted["image"], RECIPES / wanted["audio"], wanted["prompt"], like)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(start, tmp_path), encoding="utf-8")
    for profile in ("", *LIKENESSES[like].profiles):
        options = api.Options(profiles=[profile] if profile else [])
        ours, theirs = api.check(path, options), api.check(shipped, options)
        ignored = {"image", "audio"}
        assert {**ours.params, **dict.fromkeys(ignored)} == {**theirs.params, **dict.fromkeys(ignored)}
        for name, spec in theirs.nodes.items():
            own = {field: value for field, value in spec.node.model_dump().items() if field != "file"}
            assert {field: getattr(ours.nodes[name].node, field) for field in own} == {
                field: getattr(spec.node, field) for field in own
            }, name
        assert list(ours.nodes) == list(theirs.nodes)


def test_init_names_files_relative_to_the_new_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the command is given; what it knows of the files stands beside them."""
    portrait(tmp_path / "in/me.png", 1080, 1920)
    write_voice(tmp_path / "in/me.wav", 1.25)
    monkeypatch.chdir(tmp_path / "in")
    code, out, err = call("init", "me.png", "me.wav", "-o", "../recipes/new.yaml", "--like", "official")
    assert (code, out, err) == (0, "../recipes/new.yaml\n", "")
    text = (tmp_path / "recipes/new.yaml").read_text()
    assert "# 1080x1920 pixels" in text
    assert "# 1.25 s" in text
    params = api.check(tmp_path / "recipes/new.yaml").params
    assert (params["image"], params["width"], params["height"]) == ("../in/me.png", 640, 1088)
    planned = api.plan(tmp_path / "recipes/new.yaml", api.Options(cache_dir=tmp_path / "cache", models_dirs=[tmp_path]))
    assert planned.plan.node("video").facts["frames"] == 20
    assert {item.kind for item in planned.plan.missing}.isdisjoint({"image", "audio"})


@pytest.mark.parametrize("like", LIKENESSES)
def test_init_without_files_says_where_they_go(tmp_path: Path, like: str) -> None:
    path = tmp_path / "recipe.yaml"
    assert call("init", "-o", path, "--like", like, "--prompt", "She sings.")[0] == 0
    assert "put your portrait there" in path.read_text()
    assert call("check", path)[0] == 0
    assert api.check(path).params["prompt"] == "She sings."


def test_init_overwrites_nothing_without_force(tmp_path: Path) -> None:
    """The same command may be given twice."""
    path = tmp_path / "recipe.yaml"
    assert call("init", "-o", path)[0] == 0
    assert call("init", "-o", path)[0] == 0
    before = path.read_text()
    code, out, err = call("init", "-o", path, "--like", "demo")
    assert (code, out) == (2, "")
    assert "--force" in err
    assert path.read_text() == before
    assert call("init", "-o", path, "--like", "demo", "--force")[0] == 0
    assert "demo_s2v" in path.read_text()
    assert os.listdir(tmp_path) == ["recipe.yaml"]


def test_of_writers_at_once_the_first_counts(tmp_path: Path) -> None:
    """Nobody's text is lost, whenever the others look; the same text twice is no mistake."""
    for round_ in range(20):
        path, starts, refused = tmp_path / f"{round_}.yaml", threading.Barrier(4), list[str]()

        def write(text: str, path: Path = path, starts: threading.Barrier = starts, to: list[str] = refused) -> None:
            starts.wait()
            try:
                write_recipe(path, text)
            except S2VFlowError:
                to.append(text)

        threads = [threading.Thread(target=write, args=(text,)) for text in "abbc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted([*refused, path.read_text(), *path.read_text().replace("a", "").replace("c", "")]) == [*"abbc"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [("none.png", None, "no such file"), ("text.png", b"text", "not an image"), (".", None, "not a regular file")],
)
def test_a_portrait_that_cannot_be_used_is_exit_code_4(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    """Nothing is written then."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = call("init", tmp_path / name, "-o", tmp_path / "recipe.yaml")
    assert (code, out) == (4, "")
    assert words in err
    assert not (tmp_path / "recipe.yaml").exists()


def test_a_folder_that_cannot_be_written_is_exit_code_2(tmp_path: Path, quick_run: Place) -> None:
    lock = ["lock", quick_run.recipe, *quick_run.where]
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "file" / "recipe.yaml", tmp_path / "folder"):
        for command in (["init"], ["init", "--force"], ["schema"], lock):
            code, _, err = call(*command, "-o", target)
            assert (code, "cannot be written" in err, "fix: name another file with -o" in err) == (2, True, True), err


def test_a_device_is_written_to_and_stays_one(tmp_path: Path) -> None:
    """As `-o /dev/stdout` is meant: neither asked to be overwritten, nor replaced by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert call("init", "-o", pipe)[0] == 0
        assert b"s2vflow: 1" in os.read(reader, 1 << 16)
    finally:
        os.close(reader)
    assert pipe.is_fifo()


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn", "Co", "Zl", "Zp"]), min_size=1)
HARD = [
    "${params.seed}",
    "$params.seed",
    "$$params.x",
    "$dit",
    "$$${",
    "a: b # c",
    "'\"",
    "- x",
    "null",
    "1e3",
    "{",
    " ",
]


@given(st.one_of(TEXTS, st.sampled_from(HARD)))
def test_every_prompt_arrives_as_it_was_given(tmp_path_factory: pytest.TempPathFactory, prompt: str) -> None:
    """Whatever YAML or the recipe language would make of it."""
    path = tmp_path_factory.mktemp("prompt") / "recipe.yaml"
    write_recipe(path, recipe_text(Start(prompt=prompt), path.parent))
    checked = api.check(path)
    assert checked.params["prompt"] == prompt
    assert getattr(checked.nodes["positive"].node, "text", None) == prompt


@pytest.mark.parametrize("name", ["~me.png", "$params.x.png", "${a}.png", "a b #c.png", "-x.png", "é: 1.png"])
def test_files_of_odd_names_are_found_by_the_recipe(tmp_path: Path, name: str) -> None:
    given_file = portrait(tmp_path / name, 64, 64)
    path = tmp_path / "recipe.yaml"
    write_recipe(path, recipe_text(Start(given_file, like="demo"), tmp_path))
    planned = api.plan(path, api.Options(cache_dir=tmp_path / "cache"))
    assert [item.file for item in planned.plan.missing] == ["voice.mp3"]


def test_a_prompt_with_control_characters_is_refused(tmp_path: Path) -> None:
    code, _, err = call("init", "-o", tmp_path / "recipe.yaml", "--prompt", "a\x1b[31m")
    assert code == 2
    assert "U+001B" in err


@pytest.mark.slow
def test_make_leaves_its_recipe_and_runs_it(tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The video beside its recipe, whatever the user's defaults; a second time, also by `run`, nothing is computed."""
    (tmp_path / "defaults.yaml").write_text("output_dir: elsewhere\n")
    monkeypatch.setenv("S2VFLOW_DEFAULTS", str(tmp_path / "defaults.yaml"))
    voice = write_voice(tmp_path / "voice.wav", 0.5)
    where = ["--cache-dir", str(tmp_path / "cache"), "--models-dir", str(tiny_models), "--device", "cpu"]
    face = portrait(tmp_path / "face.png", 64, 576)
    arguments = ["make", face, voice, "She speaks.", "-o", tmp_path / "talk.mp4", "--like", "demo", "--json", *where]
    code, out, err = call(*arguments)
    assert code == 0, err
    assert f"the recipe is {tmp_path / 'talk.yaml'}" in err
    first = json.loads(out)
    assert first["outputs"] == {"video": [str(tmp_path / "talk.mp4")]}
    assert "video" in first["computed"]
    assert json.loads(call(*arguments)[1])["computed"] == []
    monkeypatch.setenv("S2VFLOW_DEFAULTS", "")
    code, out, _ = call("run", tmp_path / "talk.yaml", "--json", *where)
    assert (code, json.loads(out)["computed"]) == (0, [])
    params = api.check(tmp_path / "talk.yaml").params
    assert (params["prompt"], params["width"], params["height"]) == (
        "She speaks.",
        128,
        128,
    )  # the only size that the demo knows


def test_make_keeps_a_recipe_that_was_changed(tmp_path: Path) -> None:
    voice = write_voice(tmp_path / "voice.wav", 0.5)
    (tmp_path / "talk.yaml").write_text("mine")
    code, _, err = call("make", PORTRAIT, voice, "She speaks.", "-o", tmp_path / "talk.mp4")
    assert code == 2
    assert "talk.yaml is there already" in err
    assert (tmp_path / "talk.yaml").read_text() == "mine"


def test_make_without_models_says_what_is_missing_and_how_to_go_on(tmp_path: Path) -> None:
    """With the profile that was chosen; the recipe is there already."""
    voice = write_voice(tmp_path / "voice.wav", 0.5)
    where = ["--cache-dir", str(tmp_path / "cache"), "--models-dir", str(tmp_path / "models"), "--device", "cpu"]
    code, out, err = call("make", PORTRAIT, voice, "Hi.", "-o", tmp_path / "talk.mp4", "-p", "quality,bf16", *where)
    assert code == 4
    assert f"to run it again: s2vflow run {tmp_path / 'talk.yaml'} -p quality -p bf16" in err
    assert "missing: wan2.2_s2v_14B_bf16.safetensors" in out
    assert "lightx2v" not in out
    assert f"s2vflow models {tmp_path / 'talk.yaml'} --download" in err


def test_a_make_that_failed_does_not_stand_in_the_way_of_the_next(tmp_path: Path) -> None:
    """The recipe that it left is replaced as long as nobody has changed it."""
    voice = write_voice(tmp_path / "voice.wav", 0.5)
    recipe = tmp_path / "talk.yaml"
    where = ["--cache-dir", tmp_path / "cache", "--models-dir", tmp_path / "models", "--device", "cpu"]
    arguments = ["make", PORTRAIT, voice, "It costs ${x}.", "-o", tmp_path / "talk.mp4", *where]
    assert call(*arguments)[0] == 4
    first = recipe.read_text()
    assert call(*arguments, "--like", "bf16")[0] == 4
    assert "wan2.2_s2v_14B_bf16" in recipe.read_text() != first
    recipe.write_text(recipe.read_text() + "# mine\n")
    code, _, err = call(*arguments)
    assert (code, "talk.yaml is there already" in err) == (2, True)
    assert recipe.read_text().endswith("# mine\n")


def test_make_makes_mp4_files(tmp_path: Path) -> None:
    code, _, err = call("make", PORTRAIT, PORTRAIT, "Hi.", "-o", tmp_path / "talk.avi")
    assert code == 2
    assert ".mp4" in err
