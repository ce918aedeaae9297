"""The pages of a sweep: laid out by the matrix's axes, named after them, and nothing overwritten."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes_for_tests import options, tiny, write_recipe, write_voice

from s2v_flow import api
from s2v_flow.graph.run import RunResult
from s2v_flow.history.side import laid_out, summarise
from s2v_flow.media import sheet
from s2v_flow.media.writer import VideoWriter


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("side")
    write_voice(folder / "voice.wav", 0.5)
    return folder


def planned(place: Path, models: Path, *axes: str, matrix: str = "") -> api.Planned:
    recipe = write_recipe(place, tiny(), extra=matrix)
    return api.plan(recipe, options(place, models, axes=axes))


def shape(made: api.Planned, *lost: str) -> list[list[str]]:
    """Return the pages, each as its rows; a hole is a dash."""
    cells = [variant.cell for variant in made.variants]
    pages = laid_out(cells, {cell.label: Path(cell.label) for cell in cells if cell.label not in lost})
    return [["|".join(" ".join(tile.lines) if tile else "-" for tile in row) for row in page] for page in pages]


def test_rows_are_the_first_axis_and_columns_the_second(place: Path, tiny_models: Path) -> None:
    """In the axes' order, also where exclude takes the first cell; a cell that failed is a hole, too."""
    matrix = "matrix: {nodes.first.seed: [2, 1], nodes.first.cfg: [1.0, 1.5], "
    matrix += "exclude: [{nodes.first.seed: 2, nodes.first.cfg: 1.0}]}"
    made = planned(place, tiny_models, matrix=matrix)
    assert shape(made) == [["-|seed=2 cfg=1.5", "seed=1 cfg=1.0|seed=1 cfg=1.5"]]
    assert shape(made, "seed=1,cfg=1.5") == [["-|seed=2 cfg=1.5", "seed=1 cfg=1.0|-"]]


def test_further_axes_and_many_values_make_pages(place: Path, tiny_models: Path) -> None:
    """Of 24 tiles at most; what include adds comes last."""
    matrix = "matrix: {nodes.first.seed: [1, 2], nodes.first.cfg: [1.0], nodes.first.steps: [2, 3], "
    matrix += "include: [{nodes.first.seed: 0, nodes.first.cfg: 1.0, nodes.first.steps: 2}]}"
    assert shape(planned(place, tiny_models, matrix=matrix)) == [
        ["seed=1 cfg=1.0, steps=2", "seed=2 cfg=1.0, steps=2", "seed=0 cfg=1.0, steps=2"],
        ["seed=1 cfg=1.0, steps=3", "seed=2 cfg=1.0, steps=3"],
    ]
    seeds = shape(planned(place, tiny_models, "nodes.first.seed=1..30"))
    assert [len(page) for page in seeds] == [24, 6]
    wide = shape(planned(place, tiny_models, "nodes.first.cfg=1.0,1.5,2.0", "nodes.first.seed=1..10"))
    assert [[row.count("|") + 1 for row in page] for page in wide] == [[8, 8, 8], [2, 2, 2]]


def swept(place: Path, made: api.Planned, level: int) -> RunResult:
    """Return the result of a sweep whose videos are all of one grey."""
    outputs = {}
    for label in made.labels:
        path = place / f"talk.{label}.mp4"
        with VideoWriter(path, 32, 32, preset="ultrafast") as writer:
            writer.write(np.full((2, 32, 32, 3), level, np.uint8))
        outputs[f"{label}/video"] = (path,)
    return RunResult((), (), outputs, {})


def test_a_sweeps_pages_are_named_after_its_axes_and_numbered(place: Path, tiny_models: Path) -> None:
    """The same again writes nothing; other videos under the same names leave the first pages alone."""
    made, result = planned(place, tiny_models, "nodes.first.seed=1,2"), functools.partial(swept, place)
    first = summarise(made, result(made, 10))
    assert [path.name for path in first] == ["recipe.cells.seed.png", "recipe.cells.seed.mp4"]
    before = [path.stat().st_mtime_ns for path in first]
    assert summarise(made, result(made, 10)) == first
    second = summarise(made, result(made, 200))
    assert [path.name for path in second] == ["recipe.cells.seed.2.png", "recipe.cells.seed.2.mp4"]
    assert [path.stat().st_mtime_ns for path in first] == before
    assert summarise(planned(place, tiny_models, "nodes.first.seed=1"), result(made, 10)) == []


@pytest.mark.parametrize("suffix", [".png", ".mp4"])
def test_a_page_that_another_run_writes_meanwhile_stays(
    suffix: str, tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These get a number; the other run's of the same videos is this one's, too."""
    write_voice(tmp_path / "voice.wav", 0.5)
    made = planned(tmp_path, tiny_models, "nodes.first.seed=1,2")
    for path in summarise(made, swept(tmp_path, made, 10)):
        path.rename(path.with_stem("others"))
    name = {".png": "contact_sheet", ".mp4": "side_by_side"}[suffix]
    write, taken = getattr(sheet, name), tmp_path / f"recipe.cells.seed{suffix}"

    def meanwhile(*args: Any, **given: Any) -> None:
        if not taken.exists():
            taken.write_bytes(tmp_path.joinpath(f"others{suffix}").read_bytes())
        write(*args, **given)

    monkeypatch.setattr(sheet, name, meanwhile)
    for level, stem in ((10, "recipe.cells.seed"), (200, "recipe.cells.seed.2")):
        taken.unlink(missing_ok=True)
        found = summarise(made, swept(tmp_path, made, level))
        assert [path.stem for path in found] == [stem, stem]
        assert taken.read_bytes() == tmp_path.joinpath(f"others{suffix}").read_bytes()
