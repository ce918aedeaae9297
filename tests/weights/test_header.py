"""A model file is checked before anything in it is believed, and a pickle is never opened."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from recipes_for_tests import quoted
from safetensors.torch import save, save_file

from s2v_flow.errors import CheckpointError, ExitCode, MissingError, RefusedError, S2VFlowError
from s2v_flow.weights.header import MAX_HEADER_BYTES, read_header


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_header_gives_names_dtypes_shapes_and_metadata(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(2, 3), "y": torch.zeros((), dtype=torch.bfloat16)}, file, metadata={"k": "v"})
    header = read_header(file)
    assert {name: (e.dtype, e.shape) for name, e in header.entries.items()} == {"x": ("F32", (2, 3)), "y": ("BF16", ())}
    assert header.metadata == {"k": "v"}


DAMAGED = {
    "empty": (b"", "it has 0 bytes"),
    "length_2_62": ((1 << 62).to_bytes(8, "little") + b"{}", f"claims {1 << 62} bytes; at most {MAX_HEADER_BYTES}"),
    "claims_99_mb": ((99 << 20).to_bytes(8, "little") + b"{}", f"claims {99 << 20} bytes; at most {MAX_HEADER_BYTES}"),
    "header_cut": ((400).to_bytes(8, "little") + b'{"x"', "needs 408 bytes, but the file has 12"),
    "not_json": ((4).to_bytes(8, "little") + b"{x:1", "its header is not JSON"),
    "not_utf8": ((4).to_bytes(8, "little") + b'{"\xff"', "its header is not JSON"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_start_is_named(tmp_path: Path, name: str) -> None:
    content, message = DAMAGED[name]
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert message in caught.value.message
    assert caught.value.message.startswith(f"{file}: ")
    assert caught.value.exit_code == ExitCode.MISSING


WRONG_HEADERS: dict[str, tuple[object, bytes, str]] = {
    "truncated": ({"x": entry(0, 8)}, b"1234", "need 8 bytes of data, but the file has 4 (truncated?)"),
    "too_long": ({"x": entry(0, 8)}, b"123456789", "need 8 bytes of data, but the file has 9"),
    "gap": ({"x": entry(4, 8)}, b"12345678", "'x' starts at byte 4 of the data, expected 0"),
    "overlap": ({"x": entry(0, 8), "y": entry(4, 12)}, b"0" * 12, "'y' starts at byte 4 of the data, expected 8"),
    "size": ({"x": entry(0, 8, [3])}, b"12345678", "'x' (F32 [3]) needs 12 bytes, but its offsets give 8"),
    "backwards": ({"x": entry(8, 0, [0])}, b"", "needs 0 bytes, but its offsets give -8"),
    "negative_shape": ({"x": entry(0, 4, [-1])}, b"1234", "has the shape [-1]"),
    "float_shape": ({"x": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"1234", "has the shape [1.0]"),
    "bool_shape": ({"x": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234", "has the shape [True]"),
    "huge_shape": ({"x": entry(0, 4, [2**64])}, b"1234", "has the shape"),
    "rank": ({"x": entry(0, 4, [1] * 17)}, b"1234", "has the shape"),
    "three_offsets": (
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}},
        b"1234",
        "data_offsets [0, 4, 4]",
    ),
    "dtype": ({"x": entry(0, 4, [1], "F4")}, b"1234", "has the dtype 'F4', which is not supported"),
    "dtype_list": ({"x": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}, b"", "has the dtype [], which is not"),
    "lacks_fields": ({"x": {"dtype": "F32"}}, b"", "'x' lacks dtype, shape and data_offsets"),
    "no_map": ({"x": 3}, b"", "'x' lacks dtype, shape and data_offsets"),
    "metadata": ({"__metadata__": {"k": 1}}, b"", "its __metadata__ is not a map of texts"),
    "twice": (b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"x":{}}', b"", "names 'x' twice"),
    "field_twice": (b'{"x":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", "names 'dtype' twice"),
    "deep": (b'{"x":' + b"[" * 200_000, b"", "nested too deeply"),
    "many": (b'{"x":[' + b"0," * 1_000_001, b"", "more than 1000000 values"),
    "digits": (b'{"x":{"dtype":"U8","shape":[' + b"9" * 6000 + b'],"data_offsets":[0,0]}}', b"", "damaged"),
    "bad_name": (b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,NaN]}}', b"", "data_offsets [0, nan]"),
}


@pytest.mark.parametrize("name", WRONG_HEADERS)
def test_wrong_header_is_refused_with_expected_and_got(tmp_path: Path, name: str) -> None:
    header, data, message = WRONG_HEADERS[name]
    with pytest.raises(CheckpointError) as caught:
        read_header(write(tmp_path / "a.safetensors", header, data))
    assert message in caught.value.message


def test_a_header_above_the_limit_is_refused_unread(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", b"{}", length=MAX_HEADER_BYTES + 1)
    os.truncate(file, MAX_HEADER_BYTES + 100)
    with pytest.raises(CheckpointError, match=f"at most {MAX_HEADER_BYTES}"):
        read_header(file)


FOREIGN = {
    "gguf": (b"GGUF\x03\x00\x00\x00" + b"\x01" * 40, "a GGUF file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a Git LFS pointer"),
    "html": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_file_is_called_by_its_name(tmp_path: Path, name: str) -> None:
    content, message = FOREIGN[name]
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(file)


def test_missing_file_folder_and_pipe_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no such file"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(MissingError):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path / "pipe.safetensors")


class _Canary:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".PT", ".safetensors"])
@pytest.mark.parametrize("form", ["pickle", "pickle_2", "zip", "tar"])
def test_pickle_is_refused_and_never_run(tmp_path: Path, suffix: str, form: str) -> None:
    canary, file = tmp_path / "canary", tmp_path / f"model{suffix}"
    raw = pickle.dumps(_Canary(str(canary)), protocol=2 if form == "pickle_2" else 4)
    if form == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", raw)
    elif form == "tar":
        file.write_bytes(b"pickle".ljust(257, b"\0") + b"ustar\x0000" + raw)
    else:
        file.write_bytes(raw)
    with pytest.raises(RefusedError, match="it was not opened") as caught:
        read_header(file)
    assert (caught.value.fix or "").startswith(f"convert it first: s2vflow models convert {quoted(file)} -o ")
    assert caught.value.exit_code == ExitCode.REFUSED
    assert not canary.exists()


def test_a_header_length_that_looks_like_a_pickle_is_no_pickle(tmp_path: Path) -> None:
    raw = b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'.ljust(0x0280)  # begins with bytes 80 02
    assert set(read_header(write(tmp_path / "a.safetensors", raw)).entries) == {"x"}


def test_any_cut_of_a_file_is_an_error_of_ours(tmp_path: Path) -> None:
    whole = save({"x": torch.zeros(5), "y": torch.zeros(2, 2)})
    file = tmp_path / "a.safetensors"
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_header(file)


def test_mutated_files_are_read_or_refused_never_a_crash(tmp_path: Path) -> None:
    """2,000 mutants: flipped bytes, inserted marks, repeated and removed pieces."""
    whole = save({"x": torch.zeros(5), "y": torch.zeros(2, 2)}, metadata={"k": "v"})
    draw = random.Random(0)
    file = tmp_path / "a.safetensors"
    refused = 0
    for _ in range(2000):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(content))
            size = draw.randint(0, 12)
            new = draw.choice(
                [bytes([draw.randrange(256)]), b'"', b"{", b"[", b",", b"-1", b"1e9", content[at : at + size]]
            )
            content[at : at + draw.randint(0, 2)] = new
        file.write_bytes(content)
        try:
            read_header(file)
        except S2VFlowError:
            refused += 1
    assert refused > 1000


def test_opening_a_checkpoint_needs_no_torch(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {"head.modulation": entry(0, 4)}, b"1234")
    code = (
        "import sys; from s2v_flow.weights.reader import Checkpoint; "
        f"print(Checkpoint.open({str(file)!r}).shapes, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'head.modulation': (1,)} False False"
