"""Shards are what their index says, and all of it lies beside the index."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from s2v_flow.convert import release
from s2v_flow.convert.release import Piece, in_dtype, open_shards, open_single, write_tensors
from s2v_flow.errors import (
    BadNumbersError,
    CheckpointError,
    ExitCode,
    MissingError,
    RefusedError,
    S2VFlowError,
)

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
VALUES = {"x": torch.arange(6.0).reshape(2, 3), "y": torch.ones(3, dtype=torch.bfloat16), "z": torch.tensor(7)}


def make(folder: Path, weight_map: Any = None, **more: torch.Tensor) -> Path:
    """Write x into the first shard, y and z and `more` into the second, and an index."""
    save_file({"x": VALUES["x"]}, folder / A, metadata={"format": "pt"})
    save_file({"y": VALUES["y"], "z": VALUES["z"], **more}, folder / B, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    listed = {"x": A, "y": B, "z": B} if weight_map is None else weight_map
    index.write_text(json.dumps({"metadata": {"total_size": 38}, "weight_map": listed}))
    return index


def test_shards_are_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block; the file that comes of them is the one that safetensors reads, aligned and without gaps."""
    monkeypatch.setattr("s2v_flow.convert.release.BLOCK_BYTES", 8)
    shards = open_shards(make(tmp_path))
    assert shards.files == (tmp_path / A, tmp_path / B)
    steps: list[tuple[int, int]] = []
    with open(tmp_path / "whole", "w+b") as file:
        write_tensors(file, shards.pieces, {"k": "v"}, lambda done, total: steps.append((done, total)))
    whole = load((tmp_path / "whole").read_bytes())
    assert {name: (value.tolist(), value.dtype) for name, value in whole.items()} == {
        name: (value.tolist(), value.dtype) for name, value in VALUES.items()
    }
    assert steps == [(8, 38), (16, 38), (24, 38), (32, 38), (38, 38)]
    header = open_single(tmp_path / "whole")
    assert header.metadata == {"k": "v"}
    assert [piece.name for piece in header.pieces] == ["z", "x", "y"]


def test_links_to_a_hub_s_cache_are_followed(tmp_path: Path) -> None:
    """It keeps shards under other names and links to them."""
    (tmp_path / "blobs").mkdir()
    index = make(tmp_path)
    os.rename(tmp_path / A, tmp_path / "blobs" / "0123")
    (tmp_path / A).symlink_to(tmp_path / "blobs" / "0123")
    assert len(open_shards(index).pieces) == 3


OUTSIDE = ["../a.safetensors", "/tmp/a.safetensors", "a/b.safetensors", "..\\a.safetensors", "C:a.safetensors"]


@pytest.mark.parametrize("name", [*OUTSIDE, "a.bin", "..", "", "a\n.safetensors"])
def test_an_index_names_nothing_but_shards_beside_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(RefusedError, match="no safetensors file in its own folder"):
        open_shards(make(tmp_path, {"x": A, "y": name}))


WRONG: dict[str, tuple[object, str]] = {
    "not_where_it_should_be": ({"x": B, "y": A, "z": B}, f"'x' should be in {B}, and is in {A}"),
    "nowhere": ({"x": A, "y": B, "z": B, "w": B}, f"'w' should be in {B}, and is nowhere"),
    "not_listed": ({"x": A, "y": B}, f"'z' should be nowhere, and is in {B}"),
    "no_map": ([A], "has no weight_map"),
    "no_texts": ({"x": 3}, "its weight_map is not a map of texts"),
    "empty": ({}, "has no weight_map"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_index_that_says_something_else_is_refused(tmp_path: Path, name: str) -> None:
    weight_map, message = WRONG[name]
    with pytest.raises(CheckpointError) as caught:
        open_shards(make(tmp_path, weight_map))
    assert message in caught.value.message


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"'x' is in two shards, {A} and {B}"):
        open_shards(make(tmp_path, x=torch.zeros(1)))
    index = make(tmp_path)
    index.write_text(f'{{"weight_map": {{"x": "{A}", "x": "{B}"}}}}')
    with pytest.raises(CheckpointError, match="names 'x' twice"):
        open_shards(index)


def test_a_missing_or_damaged_shard_is_named(tmp_path: Path) -> None:
    index = make(tmp_path)
    (tmp_path / B).write_bytes((tmp_path / B).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{B}.*truncated"):
        open_shards(index)
    (tmp_path / B).write_bytes(b"\x80\x02}.")
    with pytest.raises(RefusedError, match=f"{B}: is a pickle"):
        open_shards(index)
    (tmp_path / B).unlink()
    with pytest.raises(MissingError, match=f"{B}: no such file"):
        open_shards(index)
    index.unlink()
    with pytest.raises(MissingError, match="cannot be read"):
        open_shards(index)


def test_shards_that_disagree_about_themselves_are_refused(tmp_path: Path) -> None:
    index = make(tmp_path)
    save_file({"x": VALUES["x"]}, tmp_path / A, metadata={"format": "np"})
    with pytest.raises(CheckpointError, match="say different things of 'format'"):
        open_shards(index)


def piece(values: torch.Tensor, dtype: str) -> Piece:
    raw = values.contiguous().view(torch.uint8).numpy().tobytes()
    half = len(raw) // 2
    return Piece("x", dtype, tuple(values.shape), lambda: [raw[:half], raw[half:]])


def test_floats_are_rounded_as_torch_does_and_the_rest_is_kept() -> None:
    values = torch.randn(8, generator=torch.Generator().manual_seed(0))
    for wanted, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        raw = b"".join(in_dtype(piece(values, "F32"), wanted).blocks())
        assert torch.equal(torch.frombuffer(bytearray(raw), dtype=dtype), values.to(dtype))
    counts = piece(torch.arange(8), "I64")
    assert in_dtype(counts, "bf16") is counts


def test_what_a_dtype_cannot_hold_is_an_error() -> None:
    """Infinities that were there before stay; fp8 means nothing without its scales."""
    infinite = torch.tensor([1.0, float("inf")])
    assert list(in_dtype(piece(infinite, "F32"), "fp16").blocks())
    with pytest.raises(BadNumbersError, match="fp16 cannot hold"):
        list(in_dtype(piece(torch.tensor([1.0, 70000.0]), "F32"), "fp16").blocks())
    with pytest.raises(CheckpointError, match="is in fp8"):
        in_dtype(piece(torch.ones(8).to(torch.float8_e4m3fn), "F8_E4M3"), "bf16")


def test_nothing_is_written_where_there_is_no_room(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as file, pytest.raises(S2VFlowError, match=r"GB are free") as caught:
        write_tensors(file, [Piece("x", "U8", (1 << 60,), list)], {}, lambda done, total: None)
    assert caught.value.exit_code == ExitCode.DISK_FULL
    assert (tmp_path / "a").stat().st_size == 0


def test_a_source_that_becomes_shorter_is_noticed(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as file, pytest.raises(CheckpointError, match="changed while it was read"):
        write_tensors(file, [Piece("x", "U8", (3,), lambda: [b"ab"])], {}, lambda done, total: None)


def test_names_that_fill_the_header_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "MAX_HEADER_BYTES", 100)
    pieces = [Piece(f"{i}" * 50, "U8", (0,), list) for i in range(3)]
    with pytest.raises(CheckpointError, match="at most 100 are accepted"):
        write_tensors(io.BytesIO(), pieces, {}, lambda done, total: None)
