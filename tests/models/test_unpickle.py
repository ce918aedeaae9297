"""What comes out of a pickle is a plain tensor, or nothing does. In this process: `test_pickled` has the limits."""

from __future__ import annotations

import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pickles_for_tests import Calls, FakeStorage, FakeTensor, forge, forge_legacy, pickled

from s2v_flow.errors import CheckpointError, ExitCode, RefusedError, S2VFlowError
from s2v_flow.models import unpickle
from s2v_flow.models.unpickle import Unpickled, check_container, check_name, check_version, read_pickle
from s2v_flow.weights.header import is_pickle


def open_it(path: Path) -> Unpickled:
    size = path.stat().st_size
    check_container(str(path), size)
    return read_pickle(str(path), size)


def plain(offset: int = 0) -> FakeTensor:
    return FakeTensor(FakeStorage(16), (2, 2), (2, 1), offset)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_tensors_come_out_as_they_went_in(tmp_path: Path, is_zip: bool) -> None:
    """Of every dtype that safetensors has, views and parameters too."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {
        "whole": base,
        "view": base[1:3, 2:5],
        "turned": base.T,
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        "counts": torch.tensor([1, -2], dtype=torch.int64),
        "learnt": torch.nn.Parameter(torch.ones(2)),
    }
    if is_zip:  # the older form knows no fp8
        state["fp8"] = torch.ones(3).to(torch.float8_e4m3fn)
    path = tmp_path / "a.pth"
    torch.save(state, path, _use_new_zipfile_serialization=is_zip)
    assert is_pickle(path)
    found = open_it(path)
    assert list(found.tensors) == list(state)
    for name, value in state.items():
        assert type(found.tensors[name]) is torch.Tensor
        assert torch.equal(found.tensors[name].float(), value.detach().float()), name
        assert found.tensors[name].dtype == value.dtype


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_a_state_dict_may_stand_one_level_down(tmp_path: Path, wrapper: str) -> None:
    """What stands beside it is left out and counted; two levels are refused."""
    state = OrderedDict(x=torch.ones(2))
    path = tmp_path / "a.pth"
    torch.save({wrapper: state, "epoch": 3, "lr": 0.1}, path)
    found = open_it(path)
    assert (list(found.tensors), found.num_left_out) == (["x"], 2)
    torch.save({wrapper: {wrapper: state}}, path)
    with pytest.raises(RefusedError, match=r"is a (OrderedDict|dict)"):
        open_it(path)


@pytest.mark.parametrize("form", ["plain", "zip", "nested", "state"])
def test_nothing_that_a_pickle_asks_for_is_called(tmp_path: Path, form: str) -> None:
    path, bomb = tmp_path / "a.pth", Calls(tmp_path / "trace")
    if form == "plain":
        path.write_bytes(pickle.dumps(bomb, protocol=2))
    elif form == "nested":  # a pickle inside of a pickle's bytes, which a careless loader opens
        forge(path, {"x": plain(), "inner": pickle.dumps(bomb)})
    else:
        forge(path, bomb if form == "zip" else {"x": plain(), "y": bomb})
    with pytest.raises(RefusedError) as caught:
        open_it(path)
    assert caught.value.exit_code == ExitCode.REFUSED
    assert "weights_only" not in caught.value.message  # torch's own advice is to open it unsafely
    assert not (tmp_path / "trace").exists()
    if form == "state":
        assert "it asks for posix.mkdir" in caught.value.message


def sparse() -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[0, 1]]), torch.ones(2), (4,), check_invariants=True)


ODD: dict[str, tuple[Callable[[], Any], str]] = {
    "number": (lambda: 3, "'x' is a int"),
    "text": (lambda: "y" * 1000, "'x' is a str"),
    "list": (lambda: [torch.ones(1)], "'x' is a list"),
    "sparse": (sparse, "'x' is sparse"),
    "meta": (lambda: torch.ones(2, device="meta"), "'x' is sparse, quantised or without data"),
    "complex": (lambda: torch.ones(2, dtype=torch.complex64), "'x' has the dtype torch.complex64"),
    "ranks": (lambda: torch.ones([1] * 17), "17 dimensions"),
    "spread": (lambda: torch.ones(1).expand(10**6), "more than its storage of 4 bytes"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_plain_tensor_is_refused(tmp_path: Path, name: str) -> None:
    make, message = ODD[name]
    path = tmp_path / "a.pth"
    torch.save({"x": make()}, path)
    with pytest.raises(RefusedError) as caught:
        open_it(path)
    assert message in caught.value.message


FORGED: dict[str, tuple[FakeTensor, str]] = {
    "past_the_end": (plain(offset=14), "not resizable"),
    "before_the_start": (plain(offset=-4), "invalid storage offset"),
    "huge_by_stride_0": (FakeTensor(FakeStorage(16), (1 << 40,), (0,)), "more than its storage of 64 bytes"),
    "huge": (FakeTensor(FakeStorage(16), (1 << 40,), (1,)), "not resizable"),
    "overflow": (FakeTensor(FakeStorage(16), (1 << 62, 1 << 62), (0, 0)), "overflow"),
    "negative_size": (FakeTensor(FakeStorage(16), (-4,), (1,)), "overflow"),
    "negative_stride": (FakeTensor(FakeStorage(16), (4,), (-1,), 8), "overflow"),
    "storage_too_small": (FakeTensor(FakeStorage(1000), (1000,), (1,)), "not resizable"),
    "storage_missing": (FakeTensor(FakeStorage(16, "9"), (4,), (1,)), "file not found"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_tensor_that_is_not_what_it_claims_is_refused(tmp_path: Path, name: str) -> None:
    """By torch, or by us: none of them yields a byte that is not its own."""
    tensor, message = FORGED[name]
    with pytest.raises((RefusedError, CheckpointError)) as caught:
        open_it(forge(tmp_path / "a.pth", {"x": tensor}))
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (FakeTensor(FakeStorage(16), (1000,), (1,)), "wrong byte size"),
        (FakeTensor(FakeStorage(16), (4,), (1,), 14), "wrong byte size"),
        (FakeTensor(FakeStorage(10**6), (4,), (1,)), "wrong byte size"),
        (FakeTensor(FakeStorage(10**13), (4,), (1,)), "more memory than a file of its size may"),
    ],
    ids=["grows", "past_the_end", "claims_more", "claims_40_TB"],
)
def test_the_older_form_cannot_claim_more_than_it_has(tmp_path: Path, tensor: FakeTensor, message: str) -> None:
    with pytest.raises(S2VFlowError) as caught:
        open_it(forge_legacy(tmp_path / "a.pth", {"x": tensor}))
    assert message in caught.value.message


def test_a_storage_that_claims_more_than_the_file_gives_only_what_is_there(tmp_path: Path) -> None:
    found = open_it(forge(tmp_path / "a.pth", {"x": FakeTensor(FakeStorage(10**12), (4,), (1,))}))
    assert found.tensors["x"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", ["", "a\nb", "a\0b", "\x1b[2Jx", "x\u202ey", "x" * 513, 3, None, b"x", ("x",)])
def test_a_name_that_a_terminal_would_obey_is_refused(name: object) -> None:
    """And what is no name at all; what is shown of it is harmless."""
    with pytest.raises(RefusedError) as caught:
        check_name(name)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 200


def test_too_many_tensors_are_refused_before_they_are_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(dict.fromkeys(map(str, range(unpickle.MAX_TENSORS + 1)), 0), path)
    with pytest.raises(RefusedError, match="100001 tensors; at most 100000"):
        open_it(path)


def test_one_storage_under_many_names_is_refused(tmp_path: Path) -> None:
    """Two are an embedding that is tied; a hundred are a small file that would become a large one."""
    shared = torch.ones(1000)
    path = tmp_path / "a.pth"
    torch.save({"x": shared, "y": shared}, path)
    assert list(open_it(path).tensors) == ["x", "y"]
    torch.save({str(i): shared for i in range(100)}, path)
    with pytest.raises(RefusedError, match="holds tensors of 400000 bytes in all"):
        open_it(path)


def write_packed(path: Path) -> None:
    forge(path, {"x": plain()}, packed=True)


def write_twice(path: Path) -> None:
    forge(path, {"x": plain()})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", pickled({"x": plain()}))


def write_large_pickle(path: Path) -> None:
    forge(path, b"x" * (unpickle.MAX_PICKLE_BYTES + 1))


def write_many(path: Path) -> None:
    forge(path, {"x": plain()}, storages={str(i): b"" for i in range(200)})


def write_lying(path: Path) -> None:
    """A part that says it is larger than the file."""
    raw = bytearray(forge(path, {"x": plain()}).read_bytes())
    directory = raw.index(b"PK\x01\x02")
    raw[directory + 20 : directory + 28] = (1 << 30).to_bytes(4, "little") * 2
    path.write_bytes(raw)


def write_tar(path: Path) -> None:
    (path.parent / "pickle").write_bytes(pickled({}))
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.add(path.parent / "pickle", "pickle")


CONTAINERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "packed": (write_packed, "is a packed zip"),
    "twice": (write_twice, "names a part twice"),
    "large_pickle": (write_large_pickle, "holds a pickle of 33554433 bytes"),
    "many": (write_many, "parts; at most 100 are accepted"),
    "lying": (write_lying, "claims to hold"),
    "tar": (write_tar, "is a tar"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_that_torch_save_never_writes_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write, message = CONTAINERS[name]
    path = tmp_path / "a.pth"
    write(path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    if name == "many":
        monkeypatch.setattr(unpickle, "MAX_TENSORS", 100)
    with pytest.raises(RefusedError, match=message):
        open_it(path)


def test_any_cut_of_a_file_is_an_error_of_ours(tmp_path: Path) -> None:
    """And so are 300 mutants of its pickle: flipped bytes."""
    whole = forge(tmp_path / "a.pth", {"x": plain(), "y": plain(4)}).read_bytes()
    path = tmp_path / "cut.pth"
    for size in range(4, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(S2VFlowError):
            open_it(path)
    draw = torch.Generator().manual_seed(0)
    raw, refused = pickled({"x": plain(), "y": plain(4)}), 0
    for _ in range(300):
        at, byte = torch.randint(0, 256, (2,), generator=draw).tolist()
        mutant = bytearray(raw)
        mutant[at % len(raw)] = byte
        try:
            open_it(forge(path, bytes(mutant)))
        except S2VFlowError:
            refused += 1
    assert refused > 100


def test_a_pickle_without_an_end_ends(tmp_path: Path) -> None:
    """Nested a hundred thousand times, or a list that holds itself."""
    deep = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    own: list[Any] = []
    own.append(own)
    for value in (deep, pickled(own), pickled({"x": own})):
        with pytest.raises((RefusedError, CheckpointError)):
            open_it(forge(tmp_path / "a.pth", value))


@pytest.mark.parametrize("version", ["1.13.1", "2.5.1+cu124", "2.9.1", "odd"])
def test_an_older_torch_opens_no_pickle(version: str) -> None:
    with pytest.raises(RefusedError, match="CVE-2026-24747"):
        check_version(version)


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "3.0.0a0"])
def test_a_newer_torch_does(version: str) -> None:
    check_version(version)
