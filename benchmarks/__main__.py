"""`python -m benchmarks [--json FILE] [--against-comfyui DIR]`: figures in a table, each a line in history.jsonl.

CPU seconds of interleaved rounds, medians; one thread. Figures of tiny models on a CPU are no prediction for the 14 B
model on a GPU; what is counted is the same everywhere. `--quick` only counts. `--against-comfyui` times two jobs that
run through a ComfyUI checkout and through us, and nothing else.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
HISTORY = Path(__file__).with_name("history.jsonl")
DEMO = ROOT / "recipes" / "demo.yaml"
ROUNDS = 3
FRAMES = 9

Work = Callable[[], object]


@dataclass(frozen=True)
class Figure:
    """One measured or counted figure: what history.jsonl has a line of."""

    commit: str
    machine: str
    versions: Mapping[str, str]
    figure: str
    value: float
    low: float | None = None
    high: float | None = None


def cpu_seconds() -> float:
    """Return what this process and its ended children have used, user and system."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def timed(works: Mapping[str, Work], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Time pieces of work in turn, every other round backwards, after one round that does not count."""
    took: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name in list(works) if number % 2 else list(works)[::-1]:
            begun = cpu_seconds()
            works[name]()
            if number:
                took[name].append(cpu_seconds() - begun)
    return took


def start_works() -> dict[str, Work]:
    """Start the command line, as processes."""

    def start(*arguments: str) -> Work:
        command = [sys.executable, "-m", "s2v_flow", *arguments]
        return lambda: subprocess.run(command, check=True, capture_output=True)

    return {
        "start: --help, CPU s": start("--help"),
        "start: check, CPU s": start("check", str(DEMO)),
        "start: plan, CPU s": start("plan", str(DEMO)),
    }


def dit_works() -> dict[str, Work]:
    """The demo's DiT: a step at its size, and how preparing once and joining branches compare with not doing so."""
    import torch

    from benchmarks.models import TINY, Size, preparation, random_dit

    model = random_dit(TINY, torch.float32, "cpu")
    step = preparation(model, Size(16, 16, 10), "cpu")()
    prepare = preparation(model, Size(24, 24, 5), "cpu", num_branches=2)
    pair = prepare()

    def two_calls() -> None:
        for branch in pair.branches:
            model(pair.x, pair.timestep, pair.chunk, [branch])

    return {
        "DiT: the demo's sampling step, CPU s": step,
        "DiT: 192x192, 17 frames, two branches, CPU s": pair,
        "DiT: the same, prepared in every step, CPU s": lambda: prepare()(),
        "DiT: the same, a call per branch, CPU s": two_calls,
    }


def vae_works() -> dict[str, Work]:
    """Decode and encode 9 frames of 128x128 as a stream: the demo's VAE, and one of width 24."""
    import torch
    import torch.nn.functional as F

    from benchmarks.models import random_weights
    from s2v_flow.models import vae_layers
    from s2v_flow.models.vae import StreamState, VAEConfig, WanVAE

    latent, pixels = torch.randn(1, 16, (FRAMES + 3) // 4, 16, 16), torch.rand(1, 3, FRAMES, 128, 128) * 2 - 1

    def decoder(vae: WanVAE) -> Work:
        def decode() -> None:
            state: StreamState | None = None
            for part in latent.split(1, dim=2):
                _, state = vae.decode_next(part, state)

        return decode

    works: dict[str, Work] = {}
    for width in (24, 16):
        with torch.device("meta"):
            vae = WanVAE(VAEConfig(width))
        random_weights(vae, "cpu")
        works[f"VAE width {width}, 128x128: decode, CPU s a frame"] = decoder(vae)
        works[f"VAE width {width}, 128x128: encode, CPU s a frame"] = lambda vae=vae: vae.encode(pixels)  # type: ignore[misc]
    works["VAE width 16: decode, again (A/A), CPU s a frame"] = decoder(vae)
    ours = vae_layers.conv3d

    def with_torchs_choice() -> None:
        vae_layers.conv3d = lambda x, w, b, stride, padding: F.conv3d(x, w, b, tuple(stride), tuple(padding))
        try:
            decoder(vae)()
        finally:
            vae_layers.conv3d = ours

    works["VAE width 16: decode, torch's choice of convolution, CPU s a frame"] = with_torchs_choice
    return works


def cache_works(folder: Path) -> dict[str, Work]:
    """What a run's start does with a cache of 2,000 results: count their bytes; or read every entry too."""
    from s2v_flow.cache.budget import Budget
    from s2v_flow.cache.housekeeping import inventory
    from s2v_flow.cache.store import Store

    for number in range(2000):
        Store(folder).publish(f"{number * 2**240:064x}", {"kind": "toy"}, {"out": str(number).encode()}, {})
    return {
        "cache of 2,000 results: bytes counted, CPU s": Budget(folder, 10**9, lambda text: None, reserve=0).begin,
        "cache of 2,000 results: every entry read, CPU s": lambda: inventory(folder),
    }


def load_works(path: Path) -> dict[str, Work]:
    """Load a DiT's file of 239 MB in bf16 to float32: as runs do, and by safetensors' own loader with a cast."""
    from dataclasses import replace

    import torch
    from safetensors.torch import load_file, save_file

    from benchmarks.models import TINY, random_dit
    from s2v_flow.models.load import load_dit

    weights = random_dit(replace(TINY, dim=768, ffn_dim=3072, num_layers=7), torch.float32, "cpu").state_dict()
    save_file({key: value.bfloat16() for key, value in weights.items()}, path)

    def theirs() -> None:
        loaded = load_file(path)
        for key in loaded:
            loaded[key] = loaded[key].float()

    return {
        "load: a DiT in bf16 to float32, CPU s": lambda: load_dit(
            path, dtype=torch.float32, device="cpu", quantized=False
        ),
        "load: the same, safetensors' loader and a cast, CPU s": theirs,
    }


RATIOS = {  # theirs / ours, of figures of one run
    "A/A: VAE decode, the same work twice": ("VAE width 16: decode, again", "VAE width 16, 128x128: decode"),
    "VAE decode: torch's convolution / ours": ("VAE width 16: decode, torch", "VAE width 16, 128x128: decode"),
    "DiT: prepared in every step / once": ("DiT: the same, prepared", "DiT: 192x192"),
    "DiT: a call per branch / one call": ("DiT: the same, a call", "DiT: 192x192"),
    "load: safetensors' loader and a cast / ours": ("load: the same", "load: a DiT"),
    "cache: every entry read / bytes counted": ("cache of 2,000 results: every", "cache of 2,000 results: bytes"),
}


def measured() -> dict[str, list[float]]:
    """Return every timed figure's rounds, and the ratios', by name."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        loads = load_works(Path(folder) / "dit.safetensors")
        took = timed({**start_works(), **dit_works(), **vae_works(), **loads, **cache_works(Path(folder) / "cache")})
    for name, seconds in took.items():
        if name.endswith("a frame"):
            took[name] = [value / FRAMES for value in seconds]
    for name, sides in RATIOS.items():
        theirs, ours = (next(value for key, value in took.items() if key.startswith(side)) for side in sides)
        took[name] = [a / b for a, b in zip(theirs, ours, strict=True)]
    return took


def against(checkout: Path, python: str, jobs: list[str], rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of whole runs, theirs and ours, and the ratios of each round."""
    from benchmarks.against import prepare, whole_runs

    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for job in jobs:
            took = timed(whole_runs(checkout.absolute(), python, Path(folder), job), rounds)
            found |= {f"{job} job: {side}, CPU s": seconds for side, seconds in took.items()}
            for name, side in (("ours / ComfyUI", "ComfyUI"), ("ours / ours (A/A)", "ours, again")):
                found[f"{job} job: {name}"] = [a / b for a, b in zip(took["ours"], took[side], strict=True)]
    return found


def origin() -> dict[str, object]:
    """Return what every line has: the commit, the machine, and the versions of what computes."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    note = os.environ.get("BENCHMARKS_NOTE", "")
    machine = f"{processor}, {os.cpu_count()} cores" + (f", {note}" if note else "")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "av")}
    return {
        "commit": git.stdout.strip() or "unknown",
        "machine": machine,
        "versions": {"python": platform.python_version(), **versions},
    }


def main(arguments: list[str] | None = None) -> None:
    """Count, measure, print the table and append to the history."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too, as a list")
    parser.add_argument("--quick", action="store_true", help="only what is counted; nothing is timed")
    parser.add_argument("--history", type=Path, default=HISTORY, metavar="FILE", help=f"default: {HISTORY}")
    parser.add_argument(
        "--against-comfyui", type=Path, metavar="DIR", help="a ComfyUI checkout to time two jobs against"
    )
    parser.add_argument(
        "--comfyui-python", default=sys.executable, metavar="FILE", help="the interpreter of its packages"
    )
    parser.add_argument("--job", action="append", choices=["tiny template", "middle-sized"], help="only this one")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"default: {ROUNDS}")
    given = parser.parse_args(arguments)

    from benchmarks.counters import figures

    common = origin()
    lines = [Figure(figure=name, value=value, **common) for name, value in figures().items()]  # type: ignore[arg-type]
    if given.against_comfyui is not None:
        jobs = given.job or ["tiny template", "middle-sized"]
        taken = against(given.against_comfyui, given.comfyui_python, jobs, given.rounds)
    else:
        taken = {} if given.quick else measured()
    for name, values in taken.items():
        kept = [float(f"{value:.4g}") for value in (median(values), min(values), max(values))]
        lines.append(Figure(**common, figure=name, value=kept[0], low=kept[1], high=kept[2]))  # type: ignore[arg-type]
    for line in lines:
        spread = "" if line.low is None else f"  [{line.low:g}..{line.high:g}]"
        sys.stdout.write(f"{line.figure:72} {line.value:>9g}{spread}\n")
    rows = [{key: value for key, value in asdict(line).items() if value is not None} for line in lines]
    with given.history.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
