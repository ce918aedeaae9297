"""ComfyUI's extra_model_paths.yaml: read as ComfyUI reads it, within the limits of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes_for_tests import call, write_recipe

from s2v_flow.api import Options
from s2v_flow.errors import RecipeError
from s2v_flow.graph.locations import Locations, ModelFolder
from s2v_flow.graph.ports import FileField
from s2v_flow.library.needs import find_extra_models, read_extra_models

VAE = FileField("model", "VAE", ("vae",))
ENCODER = FileField("model", "text encoder", ("text_encoders", "clip"))


def write(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "extra_model_paths.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_sections_give_folders_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several paths to a line; a base that is absolute, relative to the file, at home or in the environment."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setenv("WEIGHTS", str(tmp_path / "weights"))
    file = write(
        tmp_path / "ui",
        "# comment\n"
        "a1111:\n"
        f"    base_path: {(tmp_path / 'webui').as_posix()}/\n"
        "    vae: models/VAE\n"
        "    loras: |\n"
        "         models/Lora\n"
        "\n"
        "         models/LyCORIS\n"
        "mine:\n"
        "    base_path: ../big\n"
        "    is_default: true\n"
        "    unet: unet/\n"
        "old:\n"
        "    base_path: ~/old\n"
        "    clip: clip\n"
        "    embeddings:\n"
        "disk: {vae: $WEIGHTS/vae, clip: here}\n"
        "nothing:\n",
    )
    assert read_extra_models([file]) == (
        ModelFolder("vae", tmp_path / "webui/models/VAE"),
        ModelFolder("loras", tmp_path / "webui/models/Lora"),
        ModelFolder("loras", tmp_path / "webui/models/LyCORIS"),
        ModelFolder("unet", tmp_path / "ui/../big/unet", is_default=True),
        ModelFolder("clip", tmp_path / "home/old/clip"),
        ModelFolder("vae", tmp_path / "weights/vae"),
        ModelFolder("clip", tmp_path / "ui/here"),
    )


def test_every_mistake_of_a_file_is_shown_with_its_place(tmp_path: Path) -> None:
    file = write(tmp_path, "one: text\ntwo:\n  base_path: [a]\n  vae: {a: b}\n  vae: c\nthree: {loras: 3}\n")
    with pytest.raises(RecipeError) as caught:
        read_extra_models([file])
    found = [(item.place.line, item.code) for item in caught.value.diagnostics if item.place]
    assert found == [(1, "R012"), (3, "R012"), (4, "R012"), (5, "R006"), (6, "R012")]


@pytest.mark.parametrize("text", ["- a\n", "a: &a [*a]\n", "a: !!python/object:os.system b\n", "[" * 100, "a: 'b\n"])
def test_what_is_no_map_or_no_plain_yaml_is_refused(tmp_path: Path, text: str) -> None:
    """The same bounded reader as for recipes."""
    with pytest.raises(RecipeError):
        read_extra_models([write(tmp_path, text)])


def test_an_empty_file_gives_nothing(tmp_path: Path) -> None:
    assert read_extra_models([write(tmp_path, "# all commented out\n")]) == ()


def test_default_folders_come_before_the_models_folders_and_others_after(tmp_path: Path) -> None:
    """An old name of a folder (clip) counts as the new one."""
    folders = (ModelFolder("clip", tmp_path / "after"), ModelFolder("clip", tmp_path / "before", is_default=True))
    locations = Locations(models_dirs=[tmp_path / "models"], model_folders=folders)
    for better in ("after", "models/text_encoders", "before"):
        path = put(tmp_path / better / "m.bin")
        assert locations.find(ENCODER, "m.bin", tmp_path) == path
    missing = locations.find(VAE, "m.bin", tmp_path)
    assert getattr(missing, "looked_in", None) == (str(tmp_path / "models/vae"),)


def test_the_file_beside_a_models_folder_is_found_unless_another_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given on the command line, by the environment, else ComfyUI's own."""
    models = tmp_path / "ComfyUI" / "models"
    own = write(tmp_path / "ComfyUI", "a: {vae: own}\n")
    assert find_extra_models([models]) == []
    models.mkdir()
    assert find_extra_models([models]) == [own]
    other = write(tmp_path / "other", "a: {vae: other}\n")
    third = write(tmp_path / "third", "a: {vae: third}\n")

    def folders(**given: object) -> list[Path]:
        options = Options(models_dirs=[models], cache_dir=tmp_path / "cache", **given)  # type: ignore[arg-type]
        return [folder.path for folder in options.locations.model_folders]

    assert folders() == [tmp_path / "ComfyUI/own"]
    monkeypatch.setenv("S2VFLOW_EXTRA_MODEL_PATHS", str(third))
    assert folders() == [tmp_path / "third/third"]
    assert folders(extra_model_paths=[other]) == [tmp_path / "other/other", tmp_path / "third/third"]


def test_a_wrong_file_stops_a_plan_with_exit_code_3(tmp_path: Path) -> None:
    file = write(tmp_path, "a: {vae: [b]}\n")
    recipe = write_recipe(tmp_path)
    where = ["--cache-dir", str(tmp_path / "cache")]
    code, out, err = call("plan", recipe, "--extra-model-paths", file, *where)
    assert (code, out) == (3, "")
    assert f"{file}:1:10: error[R012]: vae: expected a folder" in err


def test_a_plan_finds_models_there(tmp_path: Path) -> None:
    """What is not found elsewhere is missing, with these folders among those that were looked at."""
    file = write(tmp_path, "a: {vae: weights}\n")
    where = ["--cache-dir", str(tmp_path / "cache"), "--models-dir", str(tmp_path / "models")]
    recipe = write_recipe(tmp_path, {"vae": {"checkpoint": "none.safetensors"}})
    _, out, _ = call("plan", recipe, "--extra-model-paths", file, *where)
    assert f"missing: none.safetensors (vae), looked for in {tmp_path / 'models/vae'}, {tmp_path / 'weights'}" in out
