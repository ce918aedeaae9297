"""`python -m benchmarks.gpu --json FILE [--toy]`: all that a machine with a GPU must show, in one call.

Weights are random, made on the device, in bf16 at full size. Every part has a process of its own: what fails or hangs
costs its own row, with the error's text, and when the time for all is over, what is left is ended. `--toy` runs every
part on the CPU at toy size: it shows that the script works, and nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.__main__ import origin
from benchmarks.models import FULL, TINY, Forward, Size, preparation, random_dit, random_weights
from s2v_flow.models.attention import try_backend
from s2v_flow.models.footprint import Weights, chunk_bytes, decoding_bytes
from s2v_flow.models.packed import PackedLinear, PackedWeight, multiply_in_fp8
from s2v_flow.models.registry import weight_bytes
from s2v_flow.models.vae import StreamState, VAEConfig, WanVAE
from s2v_flow.sampling.sampler import denoised_from_velocity, initial_noise, make_sampler
from s2v_flow.weights.quantization import Packing

FP8_MAX = 448.0
LONGEST_SECONDS = 460  # for all parts: a call is to end within eight minutes
Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """What the parts run at."""

    device: str
    config: Any
    sizes: tuple[Size, ...]
    vae_width: int
    latent_frames: int

    @property
    def is_cuda(self) -> bool:
        """Whether there is a GPU whose memory and waiting can be observed."""
        return self.device == "cuda"


WHOLE = Scale("cuda", FULL, (Size(80, 80, 20), Size(104, 60, 20)), 96, 61)
TOY = Scale("cpu", replace(TINY, num_layers=2), (Size(8, 8, 2), Size(12, 8, 2)), 8, 5)


def settle(scale: Scale) -> None:
    """Wait for the device."""
    if scale.is_cuda:
        torch.cuda.synchronize()


def seconds(scale: Scale, work: Callable[[], object]) -> float:
    """Return how long a piece of work takes by the clock, the second time."""
    work()
    settle(scale)
    begun = time.perf_counter()
    work()
    settle(scale)
    return round(time.perf_counter() - begun, 4)


@contextmanager
def peak(scale: Scale, row: Row) -> Iterator[None]:
    """Put the most bytes that torch held on the GPU into a row; None on a CPU, where torch does not count them."""
    if scale.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    yield
    row["peak_bytes"] = torch.cuda.max_memory_allocated() if scale.is_cuda else None


def shapes_of(module: nn.Module, on_cpu: bool, item_bytes: int) -> Weights:
    """Describe a module as a plan sees its file."""
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    return Weights(shapes, weight_bytes(module), item_bytes, is_packed=False, on_cpu=on_cpu)


def correctness(scale: Scale) -> Iterator[Row]:
    """The small DiT in bf16, fp16 and fp8 against float32, as a relative error; the same weights."""
    torch.backends.cudnn.allow_tf32 = False
    whole = random_dit(TINY, torch.float32, scale.device)
    (expected,) = preparation(whole, Size(16, 16, 3), scale.device)()()
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp8", torch.bfloat16)):
        model = random_dit(TINY, dtype, scale.device)
        model.load_state_dict(whole.state_dict())
        if name == "fp8":
            pack_blocks(model)
        (found,) = preparation(model, Size(16, 16, 3), scale.device)()()
        error = float((found.double() - expected.double()).norm() / expected.double().norm())
        limit = 0.1 if name == "fp8" else 0.02
        yield {"case": name, "relative_error": error, "limit": limit, "status": "ok" if error <= limit else "failed"}


def pack_blocks(model: nn.Module) -> None:
    """Store the linear layers of the blocks in fp8 with one scale each."""
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and path.startswith("blocks."):
            scale = layer.weight.float().abs().max() / FP8_MAX
            shape = (layer.out_features, layer.in_features)
            data = (layer.weight.float() / scale).to(torch.float8_e4m3fn)
            packed = PackedWeight(Packing("float8_e4m3fn", shape), shape, data, scale.cpu())
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, PackedLinear(packed, layer.bias))


def sampling(forward: Forward, steps: int, device: str) -> Callable[[], Tensor]:
    """Return what takes `steps` steps of uni_pc from noise, one forward each."""
    sampler = make_sampler("uni_pc", "simple", steps, 5.0, 0, device=device)
    start = sampler.start(initial_noise(forward.x.shape, 0))

    def denoise(x: Tensor, sigma: float) -> Tensor:
        timestep = torch.full((1,), sampler.timestep(sigma), device=x.device)
        (velocity,) = replace(forward, x=x, timestep=timestep)()
        return denoised_from_velocity(x, velocity, sigma)

    return lambda: list(sampler.iterate(denoise, start))[-1].x


def synchronisation(scale: Scale) -> Iterator[Row]:
    """Four steps in which torch raises at the first wait for the GPU; a CPU has nothing to wait for."""
    forward = preparation(random_dit(TINY, torch.bfloat16, scale.device), Size(16, 16, 3), scale.device)()
    sample = sampling(forward, 4, scale.device)
    sample()
    settle(scale)
    if scale.is_cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        sample()
    finally:
        if scale.is_cuda:
            torch.cuda.set_sync_debug_mode("default")
    yield {"case": "four steps", "is_observed": scale.is_cuda}


def forwards(scale: Scale) -> Iterator[Row]:
    """Seconds per forward, first with resident weights, then streamed; the 12-forward job of three chunks between."""
    dtype = torch.bfloat16
    model = random_dit(scale.config, dtype, scale.device)
    for placement in ("resident", "streamed"):
        if placement == "streamed":
            model.stream_weights(scale.device)
        for size in scale.sizes:
            case = f"{8 * size.width}x{8 * size.height} {placement}"
            row: Row = {"case": case}
            with peak(scale, row):
                forward = preparation(model, size, scale.device)()
                row["seconds"] = seconds(scale, forward)
            inputs = ["speech", "reference", "history"]
            weights = shapes_of(model, not scale.is_cuda, dtype.itemsize)
            row["planned_step_bytes"] = chunk_bytes(weights, 8 * size.width, 8 * size.height, size.frames, inputs)
            row["weight_bytes"] = weights.num_bytes
            yield row
            if placement == "resident" and size is scale.sizes[0]:
                sample = sampling(forward, 4, scale.device)
                begun = time.perf_counter()
                for _ in range(3):
                    sample()
                settle(scale)
                yield {"case": f"{case}: 3 chunks of 4 steps", "seconds": round(time.perf_counter() - begun, 3)}
            del forward


def backends(scale: Scale) -> Iterator[Row]:
    """A forward by each backend of attention that this device has; the others with why not."""
    model = random_dit(scale.config, torch.bfloat16, scale.device)
    forward = preparation(model, scale.sizes[0], scale.device)()
    for backend in ("sdpa", "cudnn", "flash", "efficient", "sage"):
        failure = None if backend == "sdpa" else try_backend(backend, scale.device, torch.bfloat16)
        if failure is not None:
            yield {"case": backend, "status": "skipped", "error": failure}
            continue
        model.attention = backend
        yield variant(scale, backend, forward)


def variant(scale: Scale, case: str, forward: Forward, expected: Tensor | None = None) -> Row:
    """Time a forward: the first call too, which may compile, and the error against another way of computing it."""
    row: Row = {"case": case}
    try:
        begun = time.perf_counter()
        (found,) = forward()
        settle(scale)
        row["first_seconds"] = round(time.perf_counter() - begun, 4)
        with peak(scale, row):
            row["seconds"] = seconds(scale, forward)
    except Exception as error:
        return {**row, "status": "failed", "error": f"{type(error).__name__}: {error}"}
    if expected is not None:
        row["relative_error"] = float((found.double() - expected.double()).norm() / expected.double().norm())
    return row


def compiled(scale: Scale) -> Iterator[Row]:
    """A forward of compiled blocks, against the same one in eager mode."""
    model = random_dit(scale.config, torch.bfloat16, scale.device)
    forward = preparation(model, scale.sizes[0], scale.device)()
    (expected,) = forward()
    model.compile_blocks()
    yield variant(scale, "blocks", forward, expected)


def fp8_fast(scale: Scale) -> Iterator[Row]:
    """A forward with fp8 products, against bf16."""
    model = random_dit(scale.config, torch.bfloat16, scale.device)
    forward = preparation(model, scale.sizes[0], scale.device)()
    (expected,) = forward()
    multiply_in_fp8(model.blocks)
    yield variant(scale, "e4m3fn, a scale a row", forward, expected)


def decoding(scale: Scale) -> Iterator[Row]:
    """Decode a stream of latent frames, one at a time."""
    for dtype in (torch.float32, torch.bfloat16) if scale.is_cuda else (torch.float32,):  # minutes without AMX
        with torch.device("meta"):
            vae = WanVAE(VAEConfig(scale.vae_width)).to(dtype)
        random_weights(vae, scale.device)
        size = scale.sizes[0]
        latent = torch.randn(1, 16, scale.latent_frames, size.height, size.width, device=scale.device)

        def decode(vae: WanVAE = vae, latent: Tensor = latent) -> None:
            state: StreamState | None = None
            for part in latent.split(1, dim=2):
                _, state = vae.decode_next(part, state)

        row: Row = {"case": f"{scale.latent_frames} latent frames, {str(dtype).removeprefix('torch.')}"}
        with peak(scale, row):
            row["seconds"] = seconds(scale, decode)
        weights = shapes_of(vae, not scale.is_cuda, dtype.itemsize)
        row["planned_bytes"] = decoding_bytes(weights, 8 * size.width, 8 * size.height, 1) + weights.num_bytes
        yield row


PARTS = (correctness, synchronisation, forwards, backends, fp8_fast, decoding, compiled)


def rows_of(part: Callable[[Scale], Iterator[Row]], scale: Scale) -> Iterator[Row]:
    """Run a part: its rows, and one with the error where it failed."""
    name = part.__name__
    try:
        for row in part(scale):
            yield {"part": name, "status": "ok", **row}
    except Exception as error:
        yield {"part": name, "status": "failed", "error": f"{type(error).__name__}: {error}"}


def send_rows(part: Callable[[Scale], Iterator[Row]], scale: Scale, rows: Connection) -> None:
    """Send a part's rows, and what the device is called, from a process of its own."""
    device = torch.cuda.get_device_name() if scale.is_cuda and torch.cuda.is_available() else "cpu"
    for row in rows_of(part, scale):
        rows.send((device, row))


def rows_apart(part: Callable[[Scale], Iterator[Row]], scale: Scale, left: float) -> Iterator[tuple[str, Row]]:
    """Run a part in a process of its own, for `left` seconds at most: its rows, each with the device's name.

    What a kernel breaks for its process, or hangs in, costs the part alone.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_rows, args=(part, scale, sender), daemon=True)
    process.start()
    sender.close()
    end = time.monotonic() + left
    error = None
    try:
        while receiver.poll(max(end - time.monotonic(), 0)):
            yield receiver.recv()
        error = f"it was ended: {LONGEST_SECONDS} s for all parts are over"
        process.kill()
    except EOFError:
        process.join()
        if process.exitcode:
            error = f"its process ended with {process.exitcode}"
    if error is not None:
        yield "", {"part": part.__name__, "status": "failed", "error": error}


def main(arguments: list[str] | None = None) -> int:
    """Run every part; 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", required=True, help="where the rows are written")
    parser.add_argument("--toy", action="store_true", help="every part at toy size, on the CPU")
    given = parser.parse_args(arguments)
    scale, end = TOY if given.toy else WHOLE, time.monotonic() + LONGEST_SECONDS
    found: dict[str, Any] = {**origin(), "device": "", "is_toy": given.toy, "rows": []}
    for part in PARTS:
        for device, row in rows_apart(part, scale, end - time.monotonic()):
            found["device"] = device or found["device"]
            found["rows"].append(row)
            text = json.dumps(found, indent=1) + "\n"
            given.json.write_text(text, encoding="utf-8")  # what is there survives a crash
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
    return int(any(row["status"] == "failed" for row in found["rows"]))


if __name__ == "__main__":
    sys.exit(main())
