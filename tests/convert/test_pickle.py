"""What comes out of a pickle is a plain tensor, or nothing does; and what the process that opens it may do."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pickles_for_tests import Calls, FakeStorage, FakeTensor, forge, forge_legacy, pickled

from s2v_flow.convert.pickle import Limits, check_version, convert_pickle, read_pickle
from s2v_flow.convert.release import Wanted
from s2v_flow.errors import CheckpointError, ExitCode, MissingError, RefusedError, S2VFlowError
from s2v_flow.weights.header import is_pickle

ROOM = Limits.for_size(1000)
VAE = {"decoder.head.0.gamma": torch.zeros(96), "conv2.weight": torch.zeros(16, 16)}


def open_it(path: Path) -> list[str]:
    return list(read_pickle(str(path))[0])


def attempt(source: Path, limits: Limits = ROOM, on_progress: Callable[[int, int], None] = lambda *_: None) -> int:
    with open(source.with_name("out"), "wb") as file:
        return convert_pickle(source, file, Wanted(), on_progress, limits)


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
        "learnt": torch.nn.Parameter(torch.ones(2)),
    }
    if is_zip:  # the older form knows no fp8
        state["fp8"] = torch.ones(3).to(torch.float8_e4m3fn)
    path = tmp_path / "a.pth"
    torch.save(state, path, _use_new_zipfile_serialization=is_zip)
    assert is_pickle(path)
    tensors, _ = read_pickle(str(path))
    assert list(tensors) == list(state)
    for name, value in state.items():
        assert type(tensors[name]) is torch.Tensor
        assert torch.equal(tensors[name].float(), value.detach().float()), name
        assert tensors[name].dtype == value.dtype


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_a_state_dict_may_stand_one_level_down(tmp_path: Path, wrapper: str) -> None:
    """What stands beside it is left out and counted; two levels are refused."""
    state = OrderedDict(x=torch.ones(2))
    path = tmp_path / "a.pth"
    torch.save({wrapper: state, "epoch": 3, "lr": 0.1}, path)
    tensors, num_left_out = read_pickle(str(path))
    assert (list(tensors), num_left_out) == (["x"], 2)
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
    "sparse": (sparse, "'x' is sparse"),
    "meta": (lambda: torch.ones(2, device="meta"), "'x' is sparse, quantised or without data"),
    "complex": (lambda: torch.ones(2, dtype=torch.complex64), "'x' has the dtype torch.complex64"),
    "ranks": (lambda: torch.ones([1] * 17), "17 dimensions"),
    "spread": (lambda: torch.ones(1).expand(10**6), "more than its storage of 4 bytes"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_plain_tensor_is_refused(tmp_path: Path, name: str) -> None:
    make, message = ODD[name]
    torch.save({"x": make()}, tmp_path / "a.pth")
    with pytest.raises(RefusedError) as caught:
        open_it(tmp_path / "a.pth")
    assert message in caught.value.message


FORGED: dict[str, FakeTensor] = {
    "past_the_end": plain(offset=14),
    "before_the_start": plain(offset=-4),
    "huge_by_stride_0": FakeTensor(FakeStorage(16), (1 << 40,), (0,)),
    "huge": FakeTensor(FakeStorage(16), (1 << 40,), (1,)),
    "overflow": FakeTensor(FakeStorage(16), (1 << 62, 1 << 62), (0, 0)),
    "negative_size": FakeTensor(FakeStorage(16), (-4,), (1,)),
    "negative_stride": FakeTensor(FakeStorage(16), (4,), (-1,), 8),
    "storage_too_small": FakeTensor(FakeStorage(1000), (1000,), (1,)),
    "storage_missing": FakeTensor(FakeStorage(16, "9"), (4,), (1,)),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_tensor_that_is_not_what_it_claims_is_refused(tmp_path: Path, name: str) -> None:
    """By torch, or by us: none of them yields a byte that is not its own."""
    with pytest.raises((RefusedError, CheckpointError)):
        open_it(forge(tmp_path / "a.pth", {"x": FORGED[name]}))
    if name == "storage_too_small":
        with pytest.raises(CheckpointError, match="wrong byte size"):
            open_it(forge_legacy(tmp_path / "a.pth", {"x": FORGED[name]}))


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[2Jx", "x\u202ey", "x" * 513, 3, ("x",)])
def test_a_name_that_a_terminal_would_obey_is_refused(tmp_path: Path, name: object) -> None:
    """And what is no name at all; what is shown of it is harmless."""
    torch.save({name: torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(RefusedError, match="which is no plain name") as caught:
        open_it(tmp_path / "a.pth")
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 200


def test_one_storage_under_many_names_is_refused(tmp_path: Path) -> None:
    """Two are an embedding that is tied; a hundred are a small file that would become a large one."""
    shared = torch.ones(1000)
    path = tmp_path / "a.pth"
    torch.save({"x": shared, "y": shared}, path)
    assert open_it(path) == ["x", "y"]
    torch.save({str(i): shared for i in range(100)}, path)
    with pytest.raises(RefusedError, match="holds tensors of 400000 bytes in all"):
        open_it(path)


def test_a_container_that_torch_save_never_writes_is_refused(tmp_path: Path) -> None:
    """A packed zip, one with a part that says it is larger than the file, a tar."""
    path = tmp_path / "a.pth"
    with pytest.raises(RefusedError, match="is a packed zip"):
        open_it(forge(path, {"x": plain()}, packed=True))
    raw = bytearray(forge(path, {"x": plain()}).read_bytes())
    directory = raw.index(b"PK\x01\x02")
    raw[directory + 20 : directory + 28] = (1 << 30).to_bytes(4, "little") * 2
    path.write_bytes(raw)
    with pytest.raises(RefusedError, match="claims to hold"):
        open_it(path)
    (tmp_path / "pickle").write_bytes(pickled({}))
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.add(tmp_path / "pickle", "pickle")
    with pytest.raises(RefusedError, match="is a tar"):
        open_it(path)


def test_any_cut_of_a_file_is_an_error_of_ours(tmp_path: Path) -> None:
    """And so are mutants of its pickle: flipped bytes; one without an end, one that holds itself."""
    whole = forge(tmp_path / "a.pth", {"x": plain(), "y": plain(4)}).read_bytes()
    path = tmp_path / "cut.pth"
    for size in range(4, len(whole), 17):
        path.write_bytes(whole[:size])
        with pytest.raises(S2VFlowError):
            open_it(path)
    draw = torch.Generator().manual_seed(0)
    raw, refused = pickled({"x": plain(), "y": plain(4)}), 0
    for _ in range(100):
        at, byte = torch.randint(0, 256, (2,), generator=draw).tolist()
        mutant = bytearray(raw)
        mutant[at % len(raw)] = byte
        try:
            open_it(forge(path, bytes(mutant)))
        except S2VFlowError:
            refused += 1
    assert refused > 30
    own: list[Any] = []
    own.append(own)
    for value in (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", pickled(own), pickled({"x": own})):
        with pytest.raises((RefusedError, CheckpointError)):
            open_it(forge(path, value))


def test_a_torch_whose_unpickler_has_holes_opens_no_pickle() -> None:
    for version in ("2.6.0", "2.9.1+cu124", "odd"):
        with pytest.raises(RefusedError, match=r"CVE-2026-24747.* 2\.10 or newer"):
            check_version(version)
    for version in ("2.10.0", "2.13.0+cpu", "3.0.0a0"):
        check_version(version)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_process_that_opens_a_pickle_has_nothing_to_do_harm_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No environment, an empty folder, no input, the files that it was given, limits that it cannot raise."""
    monkeypatch.setenv("SECRET", "s")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = tmp_path / "a.pth"
    torch.save({**VAE, "large": torch.zeros(40 << 20, dtype=torch.uint8)}, source)
    seen: dict[str, Any] = {}

    def children() -> set[Path]:
        return {path.parent for path in Path("/proc").glob("[0-9]*/stat") if parent(path) == os.getpid()}

    before = children()

    def look(done: int, total: int) -> None:
        if seen:
            return
        (child,) = children() - before
        os.kill(int(child.name), signal.SIGSTOP)
        limits = (child / "limits").read_text().splitlines()[1:]
        seen.update(
            environment=(child / "environ").read_bytes(),
            folder=list((child / "cwd").iterdir()),
            files={os.readlink(file) for file in (child / "fd").iterdir()},
            limits={line[:26].strip(): line[26:].split()[:2] for line in limits},
        )
        os.kill(int(child.name), signal.SIGCONT)

    limits = Limits.for_size(source.stat().st_size)
    attempt(source, limits, look)
    assert (seen["environment"], seen["folder"]) == (b"", [])
    named = {name for name in seen["files"] if name.startswith("/")}
    assert named == {"/dev/null", str(source), str(tmp_path / "out")}
    assert seen["limits"]["Max core file size"] == ["0", "0"]
    assert seen["limits"]["Max cpu time"] == [str(limits.seconds)] * 2
    assert seen["limits"]["Max file size"] == [str(limits.file_bytes)] * 2
    assert int(seen["limits"]["Max address space"][1]) < limits.memory_bytes + 64 * 2**30
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "out"]


def parent(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.mark.slow
def test_limits_stop_a_file_that_needs_more(tmp_path: Path) -> None:
    """Of memory, of time, of the disk."""
    source = tmp_path / "a.pth"
    torch.save({**VAE, "x": torch.zeros(16 << 20)}, source, _use_new_zipfile_serialization=False)
    with pytest.raises(RefusedError, match="needs more memory than a file of its size may"):
        attempt(source, replace(ROOM, memory_bytes=32 << 20))
    with pytest.raises(RefusedError, match="it took more than 0 s"):
        attempt(source, replace(ROOM, seconds=0))
    with pytest.raises(RefusedError, match="File too large"):
        attempt(source, replace(ROOM, file_bytes=1 << 20))


def test_a_source_that_is_not_there_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="cannot be read"):
        attempt(tmp_path / "a.pth")


def test_a_pickle_is_not_opened_where_nothing_limits_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(VAE, tmp_path / "a.pth")
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(RefusedError, match="Windows cannot limit"):
        attempt(tmp_path / "a.pth")
