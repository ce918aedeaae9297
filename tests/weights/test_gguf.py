"""GGUF files: the header, every bound of it; block types bit for bit; the tokenizer inside."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import GOLDEN, load_golden
from sentencepiece import SentencePieceProcessor

from s2v_flow.errors import CheckpointError
from s2v_flow.models.gguf_blocks import dequantize_blocks
from s2v_flow.models.packed import read_packed
from s2v_flow.weights.gguf import BLOCK_SIZES, is_gguf, read_gguf
from s2v_flow.weights.quantization import GGUF_FORMATS, read_quantization
from s2v_flow.weights.reader import Checkpoint
from s2v_flow.weights.tokenizer import sentencepiece_model

FILES = ("dit_q8_0", "dit_q4_0", "dit_q5_0", "dit_q5_1", "k_types", "umt5_q8_0")
SPIECE = Path(__file__).parents[2] / "s2v_flow" / "demo" / "tiny_spiece.model"
UMT5 = GOLDEN / "components" / "gguf_umt5_q8_0.gguf"


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def file_of(tensors: bytes, count: int = 1, pairs: bytes = b"", num_pairs: int = 0, data: bytes = b"") -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", 3, count, num_pairs) + pairs + tensors
    return header + b"\0" * (-len(header) % 32) + data


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + dims + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize("name", FILES)
def test_every_tensor_of_the_reference_files_is_read_bit_for_bit(name: str) -> None:
    """Names, shapes, types, and the sha256 of all values in float32, as the gguf package gives them."""
    _, _, case = load_golden(f"components/gguf_{name}")
    checkpoint = Checkpoint.open(GOLDEN / "components" / f"gguf_{name}.gguf")
    assert checkpoint.shapes == {key: tuple(item["shape"]) for key, item in case["tensors"].items()}
    assert checkpoint.dtypes == {key: item["type"] for key, item in case["tensors"].items()}
    for key, item in case["tensors"].items():
        value = checkpoint.tensor(key)
        if checkpoint.dtypes[key] in GGUF_FORMATS:
            value = dequantize_blocks(value, checkpoint.dtypes[key])
        assert tuple(value.shape) == checkpoint.shapes[key]
        content = value.float().contiguous().numpy().tobytes()
        assert hashlib.sha256(content).hexdigest() == item["sha256_f32"], key


def test_opening_a_gguf_file_needs_no_torch() -> None:
    code = f"import sys; from s2v_flow.weights.reader import Checkpoint; Checkpoint.open({str(UMT5)!r})"
    check = "assert not {'torch', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", f"{code}; {check}"], check=True, timeout=60)


def test_the_tokenizer_inside_gives_the_same_tokens_as_its_model() -> None:
    """Spaces, brackets, ligatures, Chinese and what no piece covers, normalised by the table inside."""
    rebuilt, model = SentencePieceProcessor(), SentencePieceProcessor(model_file=str(SPIECE))
    rebuilt.LoadFromSerializedProto(sentencepiece_model(UMT5, read_gguf(UMT5).gguf))
    for prompt in (
        "The man is playing the guitar.",
        "  two   spaces ",
        "(x:1.3) ﬁ ½ Ünï",
        "色调艳丽，过曝",
        "",
        "\ttab\n",
    ):
        assert rebuilt.encode(prompt) == model.encode(prompt), prompt
    assert (rebuilt.eos_id(), rebuilt.unk_id(), rebuilt.pad_id()) == (model.eos_id(), model.unk_id(), model.pad_id())


@pytest.mark.parametrize("kind", sorted(GGUF_FORMATS))
def test_rows_are_expanded_alone_as_together(kind: str) -> None:
    """A row's values do not depend on the others: an embedding expands only what is looked up."""
    elements, size = BLOCK_SIZES[kind]
    rows = torch.randint(0, 256, (5, 2 * size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    whole = dequantize_blocks(rows, kind)
    assert whole.shape == (5, 2 * elements)
    assert dequantize_blocks(rows[2:3], kind).nan_to_num().equal(whole[2:3].nan_to_num())


@pytest.mark.parametrize("kind", sorted(GGUF_FORMATS))
def test_any_block_is_expanded_to_the_gguf_packages_bits(kind: str) -> None:
    """Random blocks, scales that are infinite or no number too."""
    size = BLOCK_SIZES[kind][1]
    rows = torch.randint(0, 256, (64, 2 * size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[kind])
    found = dequantize_blocks(rows, kind).numpy()
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    assert np.array_equal(found[~np.isnan(found)].view(np.int32), expected[~np.isnan(found)].view(np.int32))


@pytest.mark.parametrize("kind", ["IQ4_XS", "F32"])
def test_a_tensor_has_the_shape_that_its_converter_noted(tmp_path: Path, kind: str) -> None:
    """ComfyUI-GGUF's converters rearrange rows that do not fill blocks, and note the shape that they had."""
    elements, size = BLOCK_SIZES[kind]
    stored = torch.randint(0, 120, (3 * 256 // elements, size), dtype=torch.uint8)
    path, shape = tmp_path / "a.gguf", (8, 96)
    pairs = text("comfy.gguf.orig_shape.x.weight") + struct.pack("<IIQ2i", 9, 5, 2, *shape)
    flat = tensor("x.weight", (3, 256), {"IQ4_XS": 23, "F32": 0}[kind])
    path.write_bytes(file_of(flat, 1, pairs, 1, data=stored.numpy().tobytes()))
    checkpoint = Checkpoint.open(path)
    assert checkpoint.shapes == {"x.weight": shape}
    if kind == "F32":
        assert torch.equal(checkpoint.tensor("x.weight"), stored.view(torch.float32).view(shape))
        return
    expected = torch.from_numpy(gguf.quants.dequantize(stored.numpy(), gguf.GGMLQuantizationType.IQ4_XS)).view(shape)
    packed = read_packed(checkpoint, read_quantization(checkpoint), "x.weight", shape, "cpu")
    ids = torch.tensor([[7, 0]])
    assert torch.equal(packed.expand(torch.float32), expected)
    assert torch.equal(packed.rows(ids, torch.float32), expected[ids])


def noted(type_: int, code: str, *sizes: float) -> bytes:
    pairs = text("comfy.gguf.orig_shape.a") + struct.pack(f"<IIQ{len(sizes)}{code}", 9, type_, len(sizes), *sizes)
    return file_of(tensor("a", (8,), 0), 1, pairs, 1, data=b"\0" * 32)


REFUSED = {
    "version": (b"GGUF" + struct.pack("<IQQ", 7, 0, 0), "its version is 7"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF file"),
    "too many tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "claims"),
    "another type": (file_of(tensor("a", (1, 256), 16)), "quantised as IQ2_XXS"),
    "an unknown type": (file_of(tensor("a", (1, 256), 99)), "unknown type 99"),
    "half a block": (file_of(tensor("a", (2, 40), 8), data=b"\0" * 200), "in blocks of 32 (Q8_0)"),
    "truncated": (file_of(tensor("a", (2, 32), 8), data=b"\0" * 67), "truncated?"),
    "overlapping": (
        file_of(tensor("a", (8,), 0) + tensor("b", (8,), 0, 16), 2, data=b"\0" * 64),
        "overlaps the tensor before it",
    ),
    "twice": (file_of(tensor("a", (8,), 0) + tensor("a", (8,), 0, 32), 2, data=b"\0" * 64), "names a tensor twice"),
    "too large": (file_of(tensor("a", (2**40, 2**40), 0)), "has the shape"),
    "a long array": (
        file_of(b"", 0, text("k") + struct.pack("<IIQ", 9, 4, 2**50), 1),
        "an array of 1125899906842624 items",
    ),
    "another shape": (noted(5, "i", 3, 3), "'a' is [8], and was [3, 3] by comfy.gguf.orig_shape"),
    "a negative shape": (noted(5, "i", -2, -4), "by comfy.gguf.orig_shape"),
    "a shape of fractions": (noted(6, "f", float("nan"), 2.0), "by comfy.gguf.orig_shape"),
    "no shape": (noted(5, "i"), "by comfy.gguf.orig_shape"),
    "a ternary type": (file_of(tensor("a", (1, 256), 34)), "quantised as TQ1_0"),
    "alignment": (file_of(b"", 0, text("general.alignment") + struct.pack("<II", 4, 0), 1), "its alignment is 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_a_reason(tmp_path: Path, name: str) -> None:
    content, message = REFUSED[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    assert is_gguf(path)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    assert message in caught.value.message


@settings(max_examples=150, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), max_size=4), cut=st.integers(0, 3000))
def test_a_damaged_header_is_an_error_and_never_more(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]], cut: int
) -> None:
    """Bytes changed, the end cut off: read as something else or refused; no other exception, no endless loop."""
    content = bytearray((GOLDEN / "components" / "gguf_k_types.gguf").read_bytes())
    for place, value in flips:
        content[place % len(content)] = value
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    path.write_bytes(bytes(content[: len(content) - cut]))
    try:
        checkpoint = Checkpoint.open(path)
        for key in checkpoint.entries:
            checkpoint.tensor(key)
    except CheckpointError:
        pass
