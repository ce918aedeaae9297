"""Several processes share one video: what they compute, what they send, how they end. CPU processes over gloo."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_for_tests import call, options, tiny, write_recipe, write_voice
from runs_for_tests import copy_encoded
from safetensors.torch import load_file, save_file
from torch import Tensor

from s2v_flow import api
from s2v_flow.api.session import Session
from s2v_flow.demo.plan import fill_all
from s2v_flow.errors import ExitCode, S2VFlowError
from s2v_flow.graph.events import Event, Noted, StepDone
from s2v_flow.graph.interrupt import StoppedError, StopRequest
from s2v_flow.models.conditioning import Branch
from s2v_flow.models.dit import S2VConfig, WanS2V
from s2v_flow.models.load import load_dit
from s2v_flow.models.lora import LoraSpec
from s2v_flow.parallel.team import Team

LATENT = {"kind": "save_latent", "latent": "$talk", "file": "out/talk.latent"}
CLOSE = 1e-5  # of the largest value
FIRST = {"steps": 4, "cfg": 3.0}


def recipe(folder: Path, first: dict[str, Any] | None = None, **more: Any) -> Path:
    """Write a recipe of a first chunk with guidance and one that follows it without, which has motion."""
    write_voice(folder / "voice.wav", 0.4)
    rest: dict[str, Any] = {"talk": {"chunks": 1, "cfg": 1.0}, "frames": None, "video": None, "all": LATENT, **more}
    return write_recipe(folder, tiny(first=first or FIRST, **rest))


def latent(folder: Path) -> Tensor:
    """Take the latent that a run wrote."""
    path = folder / "out/talk.latent"
    found = load_file(path)["latent_tensor"]
    path.unlink()
    return found


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= CLOSE * expected.abs().max()


@pytest.mark.slow
def test_two_ranks_make_what_one_makes(tmp_path: Path, tiny_models: Path) -> None:
    """Branches of guidance in one chunk, tokens in the other, steps that are reused; one process finds all stored."""
    cache = {"step_cache": "easy", "step_cache_threshold": 3.0}
    path, told = recipe(tmp_path, {"steps": 5, "cfg": 3.0, **cache}), list[Event]()
    api.run(path, options(tmp_path, tiny_models, tmp_path / "alone"))
    alone = latent(tmp_path)
    result = api.run(path, options(tmp_path, tiny_models, gpus=2), told.append)
    assert_close(latent(tmp_path), alone)
    assert result.entries["first"].facts["hardware"].endswith(", 2 ranks")
    assert result.entries["first"].facts["step_cache"] == {"reused": 2, "steps": 5}
    assert [event.text for event in told if isinstance(event, Noted) and "ranks: each sent" in event.text]
    assert multiprocessing.active_children() == []
    assert not torch.distributed.is_initialized()
    assert "distributed" not in sys.excepthook.__module__
    assert api.run(path, options(tmp_path, tiny_models)).computed == ()


def test_what_cannot_be_shared_is_refused_before_anything_is_computed(tmp_path: Path, tiny_models: Path) -> None:
    """With the numbers that would do; the tiny model has two heads."""
    path = recipe(tmp_path)
    where = ["--models-dir", tiny_models, "--cache-dir", tmp_path / "cache"]
    for command in ("plan", "run"):
        code, _, err = call(command, path, *where, "--device", "cpu", "--gpus", 3)
        assert code == ExitCode.RECIPE
        assert "--gpus 3: 3 ranks cannot share first's tokens: tiny_s2v.safetensors has 2 attention heads" in err
        assert "fix: --gpus 2\n" in err
    code, _, err = call("run", path, *where, "--device", "auto", "--gpus", 2)
    assert code == ExitCode.USAGE
    assert "--device cpu for 2 processes on the CPU" in err
    code, _, err = call("plan", path, *where, "--device", "cpu", "--gpus", 2, "--set", "nodes.dit.compile=blocks")
    assert (code, "dit is to compile its blocks, which ranks cannot share" in err) == (ExitCode.RECIPE, True), err
    with Session(options(tmp_path, tiny_models, gpus=2)) as session, pytest.raises(S2VFlowError, match="one GPU"):
        session.run(path)
    assert not (tmp_path / "cache" / "entries").exists()


def test_a_model_that_is_not_there_is_missing_with_any_number_of_ranks(tmp_path: Path, tiny_models: Path) -> None:
    """Whether its tokens can be shared is not known then; nothing is started."""
    path = recipe(tmp_path)
    for ranks in (2, 3):
        where = ["--models-dir", tiny_models, "--cache-dir", tmp_path / "cache", "--device", "cpu", "--gpus", ranks]
        for command in ("plan", "run"):
            code, out, err = call(command, path, *where, "--set", "nodes.dit.checkpoint=gone.safetensors")
            assert code == ExitCode.MISSING
            assert "gone.safetensors" in out + err
            assert "Traceback" not in err
    assert multiprocessing.active_children() == []
    assert not (tmp_path / "cache" / "entries").exists()


@pytest.mark.slow
def test_processes_that_cannot_meet_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where NCCL finds no way from one GPU to the other: in the first process, while the other waits."""

    def fail(*given: Any, **options: Any) -> None:
        raise torch.distributed.DistBackendError("NCCL error\nncclSystemError: no shared memory")

    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    with (
        closing(Team(2, "cpu")) as team,
        pytest.raises(S2VFlowError, match=r"cannot meet: NCCL error\nncclSystemError"),
    ):
        team.start()
    assert multiprocessing.active_children() == []


# what follows starts more processes, or longer ones

DIM, HEADS, BLOCKS = 512, 4, 5
INJECTIONS = 2  # after blocks 0 and 4


@pytest.fixture(scope="module")
def four_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with four heads."""
    with torch.device("meta"):
        shapes = {
            key: tuple(value.shape)
            for key, value in WanS2V(S2VConfig(DIM, 512, BLOCKS, text_dim=64, audio_dim=64)).state_dict().items()
        }
    path = tmp_path_factory.mktemp("model") / "four_heads.safetensors"
    save_file({key: value.contiguous() for key, value in fill_all(shapes, 0).items()}, path)
    return path


def velocities(model: Any, frames: int, height: int, width: int, **case: Any) -> list[Tensor]:
    """Prepare a chunk of random inputs and run the model once."""
    draw = torch.Generator().manual_seed(0)
    batch, conditioning = case.get("batch", 1), case.get("conditioning", "official")

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    chunk = model.prepare_chunk(
        num_latent_frames=frames,
        height=height,
        width=width,
        reference_latent=noise(1, 16, 1, height, width) if case.get("reference", True) else None,
        motion_latent=noise(1, 16, 3, height, width) if case.get("motion") else None,
        control_latent=torch.zeros(1, 16, 1, 2, 2),
        conditioning=conditioning,
        batch_size=batch,
    )
    sound = noise(1, 25, 64, 4 * frames) if case.get("audio", True) else None
    branches = []
    for factor in (1.0, 0.0)[: case.get("branches", 1)]:
        given = None if sound is None else sound * factor
        audio = model.prepare_audio(given, num_latent_frames=frames, conditioning=conditioning)
        branches.append(Branch(model.prepare_text(noise(1, 9, 64)), audio))
    found: list[Tensor] = model(noise(batch, 16, frames, height, width), torch.full((batch,), 700.0), chunk, branches)
    return found


CASES: list[tuple[tuple[int, int, int], dict[str, Any]]] = [
    ((2, 8, 8), {}),
    ((3, 10, 14), {"branches": 2}),  # 105 + 35 tokens
    ((3, 10, 14), {"branches": 2, "motion": True}),
    ((2, 10, 10), {"motion": True, "conditioning": "comfyui"}),
    ((1, 2, 2), {"reference": False, "branches": 2}),  # one token
    ((1, 4, 6), {"reference": False}),  # six tokens: one rank has none
    ((2, 8, 8), {"audio": False, "batch": 2}),
]


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.soak), pytest.param(4, marks=pytest.mark.slow)])
def test_velocities_are_those_of_one_process(size: int, four_heads: Path) -> None:
    """With motion and without, one branch and two, tokens that the ranks do not divide; and the bytes sent."""
    given = {"dtype": torch.float32, "device": "cpu", "quantized": False}
    alone = load_dit(four_heads, **given).module
    with closing(Team(size, "cpu")) as team:
        team.start()
        shared = team.load_dit(four_heads, **given).module
        for shape, case in CASES:
            for found, expected in zip(
                velocities(shared, *shape, **case), velocities(alone, *shape, **case), strict=True
            ):
                assert_close(found, expected)
        sends_the_bytes_of_the_formula(size, team.traffic, shared)


def sends_the_bytes_of_the_formula(size: int, traffic: Any, shared: Any) -> None:
    """Per rank: q, k, v and the result once a block, patches once; a gather would send all tokens once an injection."""
    sent, gathered = traffic.sent, traffic.gathered
    velocities(shared, 2, 8, 8)
    length = (2 * 16 + 16) // size
    others, latent_bytes = size - 1, 16 * 2 * 8 * 8 * 4 + 4  # the latent and the time, which rank 0 sends to each
    blocks = BLOCKS * 4 * length * DIM * 4 * others // size
    assert traffic.sent - sent == blocks + others * (length * 64 * 4 + latent_bytes)
    assert traffic.gathered - gathered == INJECTIONS * others * length * DIM * 4
    if size == 2:  # a branch each: velocity 2 comes from the other rank
        sent = traffic.sent
        velocities(shared, 2, 8, 8, branches=2)
        assert traffic.sent - sent == latent_bytes


@pytest.mark.slow
def test_models_in_any_form_are_shared(tiny_models: Path) -> None:
    """LoRA merged or beside packed weights, fp8, bfloat16, streamed weights; streamed from the start or later."""
    root, f32 = tiny_models / "diffusion_models", torch.float32
    loras = [LoraSpec(tiny_models / "loras" / "tiny_lightning_lora.safetensors", 0.7)]
    forms: list[tuple[str, dict[str, Any]]] = [
        ("tiny_s2v", {"dtype": f32, "quantized": False, "loras": loras}),
        ("tiny_s2v", {"dtype": f32, "quantized": False, "streamed": True}),
        ("tiny_s2v_fp8_scaled", {"dtype": f32, "quantized": True, "loras": loras, "streamed": True}),
        ("tiny_s2v_fp8_metadata", {"dtype": torch.bfloat16, "quantized": True, "loras": loras}),
    ]
    with closing(Team(2, "cpu")) as team:
        team.start()
        for name, form in forms:
            alone = load_dit(root / f"{name}.safetensors", device="cpu", **form).module
            shared = team.load_dit(root / f"{name}.safetensors", device="cpu", **form).module
            for _ in range(2):
                for branches in (1, 2):
                    case = {"branches": branches, "motion": True}
                    pairs = zip(velocities(shared, 2, 8, 8, **case), velocities(alone, 2, 8, 8, **case), strict=True)
                    for found, expected in pairs:
                        bound = CLOSE if form["dtype"] == f32 else 0.02  # bfloat16 rounds at 0.4 %
                        assert (found - expected).abs().max() <= bound * expected.abs().max()
                shared.stream_weights("cpu")
                assert shared.is_streamed


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    """Return the folder of a run by one uninterrupted process."""
    folder = tmp_path_factory.mktemp("whole")
    api.run(recipe(folder), options(folder, tiny_models))
    return folder


@pytest.fixture(scope="module")
def whole(alone: Path) -> Tensor:
    """Return the latent that it makes."""
    return latent(alone)


class At:
    """Does something once, when a step of a node is done."""

    def __init__(self, node: str, step: int, act: Any) -> None:
        self.moment, self.act, self.steps = (node, step), act, list[tuple[str, int]]()

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self.steps.append((event.node, event.step))
            if self.steps[-1] == self.moment:
                self.act()


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_another_number_goes_on(tmp_path: Path, tiny_models: Path) -> None:
    """With an error that says which, a resume point, and no process left; then each step is taken once."""
    path, first = recipe(tmp_path, talk={"chunks": 1}), options(tmp_path, tiny_models, gpus=4)
    kill = At("first", 2, lambda: multiprocessing.active_children()[-1].kill())
    with pytest.raises(S2VFlowError) as caught:
        api.run(path, first, kill)
    assert "was killed by SIGKILL" in caught.value.message
    assert caught.value.exit_code == ExitCode.FAILED
    assert "2 of 4 steps of this chunk" in (caught.value.kept or "")
    assert multiprocessing.active_children() == []
    rest = At("", 0, None)
    api.run(path, options(tmp_path, tiny_models, gpus=2), rest)
    assert rest.steps[:2] == [("first", 3), ("first", 4)]


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        *(pytest.param(number, marks=pytest.mark.soak) for number in (signal.SIGTERM, signal.SIGUSR1)),
    ],
)
def test_signals_stop_as_in_one_process(
    number: signal.Signals, tmp_path: Path, tiny_models: Path, whole: Tensor, handlers: None
) -> None:
    """At the end of a step, also where every rank gets the signal; another number of ranks goes on."""
    path, stop = recipe(tmp_path), StopRequest(lambda text: None)
    stop.install()

    def send() -> None:
        for process in multiprocessing.active_children():
            os.kill(process.pid or 0, number)
        os.kill(os.getpid(), number)

    with pytest.raises(StoppedError, match="after step 2 of 4, resume point written") as caught:
        api.run(path, options(tmp_path, tiny_models, gpus=2, should_stop=stop), At("first", 2, send))
    assert caught.value.exit_code == {2: 130, 15: 143}.get(number, 75)
    assert multiprocessing.active_children() == []
    api.run(path, options(tmp_path, tiny_models))
    assert_close(latent(tmp_path), whole)


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["the command", "another rank"])
def test_whoever_is_killed_nobody_is_left(victim: str, tmp_path: Path, tiny_models: Path, alone: Path) -> None:
    """In the middle of a step, too; the other ranks end with it, and say nothing on the terminal."""
    copy_encoded(alone / "cache", tmp_path / "cache")
    path = recipe(tmp_path, {"steps": 50, "cfg": 1.0, "length": 41})
    command = [sys.executable, "-m", "s2v_flow", "run", str(path), "--gpus", "2", "--device", "cpu", "--events", "e"]
    where = ["--models-dir", str(tiny_models), "--cache-dir", "cache"]
    with subprocess.Popen([*command, *where], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as run:
        try:
            wait_for(lambda: (tmp_path / "e").exists() and '"step":' in (tmp_path / "e").read_text())
            peers = [int(pid) for pid in children(run.pid) if b"resource_tracker" not in command_line(int(pid))]
            assert len(peers) == 1
            os.kill(run.pid if victim == "the command" else peers[0], signal.SIGKILL)
            _, err = run.communicate()
            wait_for(lambda: not Path(f"/proc/{peers[0]}").exists())
        finally:
            run.kill()
    if victim == "the command":
        assert run.returncode == -signal.SIGKILL
        return
    assert run.returncode == ExitCode.FAILED
    assert "rank 1 (cpu) was killed by SIGKILL" in err
    assert "of 50 steps of this chunk: the same command goes on" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder of logs; that of a run that lives stays until its end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make = "from s2v_flow.parallel.team import Team; import os; Team(2, 'cpu'); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", make], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    with closing(Team(2, "cpu")):
        (living,) = tmp_path.iterdir()
        assert living != left
        with closing(Team(2, "cpu")):
            assert living in tmp_path.iterdir()
    assert list(tmp_path.iterdir()) == []


def wait_for(is_so: Any, seconds: float = 200.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
