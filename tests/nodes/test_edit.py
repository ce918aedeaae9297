"""The small kinds for unusual graphs: what they give is what ComfyUI's nodes give."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from s2v_flow.errors import S2VFlowError
from s2v_flow.nodes.edit import FramesConcat, FramesDelay, FramesFromImage, FramesSlice, ImageFromFrames, piece
from s2v_flow.nodes.frames import Frames, window
from s2v_flow.nodes.load_media import Lazy
from s2v_flow.nodes.scale import FramesScale, ImageScale, resize

NO_CONTEXT: Any = None


def numbered(count: int, width: int = 4, height: int = 2, group: int = 3) -> Frames:
    """Return frames whose pixels are their number."""
    array = np.zeros((count, height, width, 3), np.uint8) + np.arange(count, dtype=np.uint8)[:, None, None, None]

    def groups() -> Any:
        return iter(np.split(array, range(group, count, group)))

    return Frames(width, height, count, groups, lambda start, n: array[start : start + n])


def numbers(frames: Frames) -> list[int]:
    """Return which frames there are, after checking that streaming and reading agree."""
    streamed = [int(frame[0, 0, 0]) for group in frames for frame in group]
    read = [int(frame[0, 0, 0]) for frame in frames.read(0, frames.num_frames)]
    assert streamed == read
    assert len(streamed) == frames.num_frames
    parts = [int(frame[0, 0, 0]) for start in range(0, len(read), 2) for frame in frames.read(start, 2)]
    assert parts == read
    return streamed


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [(0, None, range(7)), (2, 3, range(2, 5)), (5, 10, range(5, 7)), (9, None, range(6, 7)), (3, None, range(3, 7))],
)
def test_a_slice_takes_some_frames_and_at_least_the_last(start: int, length: int | None, expected: range) -> None:
    """As ImageFromBatch, however far its index goes."""
    made = FramesSlice.model_validate({"frames": "$x", "start": start, "length": length})
    assert numbers(made.run(NO_CONTEXT, {"frames": numbered(7)})["frames"]) == list(expected)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_delay_lets_the_first_frame_stand(count: int) -> None:
    """In front of all others."""
    made = FramesDelay.model_validate({"frames": "$x", "count": count})
    assert numbers(made.run(NO_CONTEXT, {"frames": numbered(4)})["frames"]) == [0] * count + [0, 1, 2, 3]


@pytest.mark.parametrize("counts", [(3, 4), (5, 0), (0, 2), (1, 1)])
def test_two_videos_are_put_one_after_the_other(counts: tuple[int, int]) -> None:
    """Streamed or read, wherever the seam lies; videos of two sizes are refused, with the way out."""
    parts: dict[str, Any] = dict(zip(("first", "second"), map(numbered, counts), strict=True))
    node = FramesConcat.model_validate({"first": "$a", "second": "$b"})
    assert numbers(node.run(NO_CONTEXT, parts)["frames"]) == [*range(counts[0]), *range(counts[1])]
    context: Any = SimpleNamespace(name="all")
    with pytest.raises(S2VFlowError, match="all: the videos must have one size, these have 4 x 2 and 6 x 2") as caught:
        node.run(context, parts | {"second": numbered(2, width=6)})
    assert "frames_scale" in (caught.value.fix or "")


def test_images_and_frames_turn_into_each_other() -> None:
    """One frame as floats in [0, 1]; one image as often as wanted."""
    image = ImageFromFrames.model_validate({"frames": "$x", "index": 9}).run(NO_CONTEXT, {"frames": numbered(4)})
    assert image["image"].read().max() == np.float32(3) / np.float32(255)
    made = FramesFromImage.model_validate({"image": "$x", "count": 3}).run(NO_CONTEXT, image)
    assert numbers(made["frames"]) == [3, 3, 3]


@pytest.mark.parametrize(
    ("total", "index", "amount", "expected"),
    [
        (10, 0, 1, (0, 1)),
        (10, 8, 5, (8, 2)),
        (10, 99, 2, (9, 1)),
        (10, -3, 2, (7, 2)),
        (10, -3, 9, (7, 3)),
        (4, -9, 2, (0, 2)),
    ],
)
def test_a_piece_stays_inside(total: int, index: int, amount: int, expected: tuple[int, int]) -> None:
    """An index below 0 counts from the end, as in LatentCut."""
    assert piece(total, index, amount) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"width": 30, "height": 10}, (30, 10)),
        ({"height": 30}, (60, 30)),
        ({"width": 25}, (25, 12)),
        ({"factor": 0.5}, (50, 25)),
        ({"longest_side": 64}, (64, 32)),
        ({"megapixels": 0.01, "multiple_of": 8}, (144, 72)),
        ({"megapixels": 0.01}, (145, 72)),
    ],
)
def test_the_new_size_is_comfyuis(fields: dict[str, Any], expected: tuple[int, int]) -> None:
    """Of a picture of 100 x 50."""
    node = ImageScale.model_validate({"image": "$x", **fields})
    assert node.target(100, 50) == expected
    picture = np.zeros((50, 100, 3), np.float32)
    made = node.run(NO_CONTEXT, {"image": Lazy(lambda: picture)})["image"].read()
    assert made.shape == (expected[1], expected[0], 3)


def test_a_size_is_given_in_exactly_one_way() -> None:
    """Neither none nor two."""
    for fields in ({}, {"factor": 2.0, "width": 8}):
        with pytest.raises(ValueError, match="give width and height, or factor"):
            ImageScale.model_validate({"image": "$x", **fields})


@pytest.mark.parametrize("method", ["nearest-exact", "bilinear", "area", "bicubic", "lanczos"])
def test_scaling_is_what_comfyui_computes(method: Any) -> None:
    """torch's interpolation without smoothing; Pillow's Lanczos on 8 bits; cut about the centre first."""
    picture = np.random.default_rng(0).random((12, 30, 3), dtype=np.float32)
    made = resize(picture, 8, 6, method, crops=True)
    cut = picture[:, 7:23]
    if method == "lanczos":
        small = Image.fromarray((cut * 255).astype(np.uint8)).resize((8, 6), Image.Resampling.LANCZOS)
        expected = np.asarray(small, np.float32) / 255
    else:
        pixels = torch.from_numpy(cut.copy()).movedim(-1, 0)[None]
        expected = torch.nn.functional.interpolate(pixels, size=(6, 8), mode=method)[0].movedim(0, -1).numpy()
    assert np.array_equal(made, expected)


def test_frames_are_scaled_one_by_one() -> None:
    """Their number stays."""
    node = FramesScale.model_validate({"frames": "$x", "factor": 2.0, "method": "nearest-exact"})
    made = node.run(NO_CONTEXT, {"frames": numbered(5)})["frames"]
    assert (made.width, made.height) == (8, 4)
    assert numbers(made) == [0, 1, 2, 3, 4]
    assert next(iter(window(made.groups(), 0, 1))).shape == (1, 4, 8, 3)


def test_videos_of_other_sizes_cannot_be_joined(tmp_path: Path) -> None:
    """Planning says so, at the second one."""
    from s2v_flow import api
    from s2v_flow.errors import RecipeError

    text = (Path(__file__).parents[2] / "recipes" / "demo.yaml").read_text().split("nodes:\n")
    first = "{kind: sample, model: $dit, positive: $positive, cfg: 1.0, width: 64, height: %d}"
    nodes = (
        f"nodes:\n  one: {first % 64}\n  two: {first % 96}\n"
        "  both: {kind: latent_concat, first: $one, second: $two}\n"
        "  save: {kind: save_latent, latent: $both, file: x}\n"
    )
    (tmp_path / "recipe.yaml").write_text(text[0] + nodes + text[1])
    with pytest.raises(RecipeError) as caught:
        api.plan(tmp_path / "recipe.yaml", api.Options(device="cpu"))
    assert [item.code for item in caught.value.diagnostics] == ["R105"]
    assert "height 64 and 96" in caught.value.diagnostics[0].message
