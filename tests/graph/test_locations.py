"""Where files are found, and where nothing may be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2v_flow.errors import ExitCode, RefusedError
from s2v_flow.graph.locations import Locations, Missing
from s2v_flow.graph.ports import FileField

MODEL = FileField("model", "diffusion model", ("diffusion_models", "unet"))
IMAGE = FileField("input", "image")


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_models_are_found_in_the_first_folder_that_has_them(tmp_path: Path) -> None:
    """The usual folder name before the old one, within each models folder; never beside the recipe."""
    roots = [tmp_path / "one", tmp_path / "two"]
    locations = Locations(models_dirs=roots)
    put(tmp_path / "recipes/m.bin")
    for better in ("two/unet", "two/diffusion_models", "one/unet", "one/diffusion_models"):
        path = put(tmp_path / better / "m.bin")
        assert locations.find(MODEL, "m.bin", tmp_path / "recipes") == path


def test_models_may_lie_in_subfolders(tmp_path: Path) -> None:
    """As in ComfyUI, which shows them as paths."""
    path = put(tmp_path / "unet/wan/m.bin")
    assert Locations(models_dirs=[tmp_path]).find(MODEL, "wan/m.bin", tmp_path) == path


def test_a_missing_model_says_where_it_was_sought_and_where_it_can_be_had(tmp_path: Path) -> None:
    """Its home is known by its file name, in whatever subfolder."""
    locations = Locations(models_dirs=[tmp_path / "a", tmp_path / "b"], homes={"m.bin": ["https://example.org/m.bin"]})
    looked_in = tuple(str(tmp_path / root / folder) for root in "ab" for folder in MODEL.folders)
    home = ("https://example.org/m.bin",)
    assert locations.find(MODEL, "m.bin", tmp_path) == Missing("m.bin", "diffusion_models", home, looked_in)
    found = locations.find(MODEL, "wan/m.bin", tmp_path)
    assert isinstance(found, Missing)
    assert found.homes == home


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    """Of the right name."""
    (tmp_path / "unet/m.bin").mkdir(parents=True)
    assert isinstance(Locations(models_dirs=[tmp_path]).find(MODEL, "m.bin", tmp_path), Missing)


def test_models_that_the_program_makes_are_there_before_they_are_made(tmp_path: Path) -> None:
    """The user's own file of that name comes first; a node for models of another kind does not get it."""
    made = tmp_path / "cache/unet/tiny.bin"
    locations = Locations(models_dirs=[tmp_path / "models"], made_models={"tiny.bin": made})
    assert locations.find(MODEL, "tiny.bin", tmp_path) == made
    assert isinstance(locations.find(FileField("model", "VAE", ("vae",)), "tiny.bin", tmp_path), Missing)
    own = put(tmp_path / "models/unet/tiny.bin")
    assert locations.find(MODEL, "tiny.bin", tmp_path) == own


def test_inputs_are_relative_to_the_file_that_names_them_then_to_the_input_folders(tmp_path: Path) -> None:
    """In the order in which those are given; an absolute path is what it is."""
    locations = Locations(input_dirs=[tmp_path / "in1", tmp_path / "in2"])
    base = tmp_path / "recipes"
    for better in ("in2", "in1", "recipes"):
        path = put(tmp_path / better / "a.png")
        assert locations.find(IMAGE, "a.png", base) == path
    assert locations.find(IMAGE, str(tmp_path / "in2/a.png"), base) == tmp_path / "in2/a.png"
    looked_in = (str(base), str(tmp_path / "in1"), str(tmp_path / "in2"))
    assert locations.find(IMAGE, "b.png", base) == Missing("b.png", "image", (), looked_in)


def test_home_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For inputs and for what is typed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    path = put(tmp_path / "a.png")
    assert Locations().find(IMAGE, "~/a.png", tmp_path / "recipes") == path
    written = Locations().output("~/a.mp4", tmp_path / "recipes", typed_by_user=True)
    assert written == (tmp_path / "a.mp4").resolve()


@pytest.mark.parametrize("text", ["~no-such-user/a.png", "a" * 300, "a.png/b", "a\0b"])
def test_what_cannot_be_a_file_is_missing(tmp_path: Path, text: str) -> None:
    """An unknown user, a name too long, a file taken for a folder: said like any other missing file."""
    put(tmp_path / "a.png")
    assert isinstance(Locations().find(IMAGE, text, tmp_path), Missing)
    assert isinstance(Locations(models_dirs=[tmp_path]).find(MODEL, text, tmp_path), Missing)


def test_outputs_are_relative_to_the_output_folder_else_to_the_recipe(tmp_path: Path) -> None:
    """Folders need not be there yet."""
    base, out = tmp_path / "recipes", tmp_path / "out"
    assert Locations().output("a/b.mp4", base, typed_by_user=False) == base.resolve() / "a/b.mp4"
    locations = Locations(output_dir=out)
    assert locations.output("a/b.mp4", base, typed_by_user=False) == out.resolve() / "a/b.mp4"
    inside = locations.output(str(out / "c.mp4"), base, typed_by_user=False)
    assert inside == locations.output("x/../c.mp4", base, typed_by_user=False) == out.resolve() / "c.mp4"


@pytest.mark.parametrize(
    "text", ["../a.mp4", "x/../../a.mp4", "{}/a.mp4", "~/a.mp4", "link/a.mp4", "alias.mp4", "loop/a"]
)
def test_a_recipe_does_not_write_outside_its_folder(tmp_path: Path, text: str) -> None:
    """Not upwards, not absolutely, not at home, not through links; the user may."""
    base, elsewhere = tmp_path / "recipes", tmp_path / "recipes-elsewhere"
    base.mkdir()
    elsewhere.mkdir()
    (base / "link").symlink_to(elsewhere)
    (base / "alias.mp4").symlink_to(elsewhere / "a.mp4")
    (elsewhere / "loop").symlink_to(elsewhere / "loop")
    (base / "loop").symlink_to(elsewhere / "loop")
    text = text.format(elsewhere)
    for locations in (Locations(), Locations(output_dir=base)):
        with pytest.raises(RefusedError, match="outside its folder") as caught:
            locations.output(text, base, typed_by_user=False)
        assert caught.value.exit_code == ExitCode.REFUSED
        assert "--output-dir" in (caught.value.fix or "")
        assert not locations.output(text, base, typed_by_user=True).is_relative_to(base.resolve())


def test_the_recipes_folder_is_not_allowed_beside_an_output_folder(tmp_path: Path) -> None:
    """Whoever says --output-dir wants results there and nowhere else."""
    locations = Locations(output_dir=tmp_path / "out")
    with pytest.raises(RefusedError):
        locations.output(str(tmp_path / "recipes/a.mp4"), tmp_path / "recipes", typed_by_user=False)


def test_a_folder_that_is_a_link_itself_is_no_escape(tmp_path: Path) -> None:
    """The user chose it."""
    (tmp_path / "real").mkdir()
    (tmp_path / "recipes").symlink_to(tmp_path / "real")
    written = Locations().output("a.mp4", tmp_path / "recipes", typed_by_user=False)
    assert written == (tmp_path / "real/a.mp4").resolve()
