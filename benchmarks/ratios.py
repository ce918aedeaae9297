"""Speed as ratios, both sides in one session: `python benchmarks/ratios.py`. About two minutes on two cores.

CPU seconds (process_time) of interleaved rounds, medians; the models are the demo's. A ratio on a tiny model and a CPU
is no prediction for the 14 B model on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROUNDS = 5
DEMO = Path(__file__).parents[1] / "recipes" / "demo.yaml"


def compare(name: str, ours: Callable[[], object], theirs: Callable[[], object]) -> str:
    """Return a line with the median of theirs / ours over interleaved rounds."""
    ratios = []
    for round_ in range(ROUNDS):
        order = [ours, theirs] if round_ % 2 else [theirs, ours]
        took = {}
        for work in order:
            begun = time.process_time()
            work()
            took[work] = time.process_time() - begun
        ratios.append(took[theirs] / took[ours])
    return f"{name}: {median(ratios):.2f} [{min(ratios):.2f}..{max(ratios):.2f}]"


def vae_line(models: Path) -> str:
    """Compare decoding with torch's own choice of convolution and with ours."""
    import torch
    import torch.nn.functional as F

    from s2v_flow.models import vae_layers
    from s2v_flow.models.load import load_vae

    vae = load_vae(models / "vae" / "tiny_vae.safetensors", torch.float32, "cpu")
    latent = torch.randn(1, 16, 9, 16, 16)
    ours = vae_layers.conv3d

    def decode() -> None:
        state = None
        for part in torch.split(latent, 2, dim=2):
            _, state = vae.decode_next(part, state)

    def plain(x, weight, bias, stride, padding):  # type: ignore[no-untyped-def]
        return F.conv3d(x, weight, bias, tuple(stride), tuple(padding))

    def with_plain() -> None:
        vae_layers.conv3d = plain
        try:
            decode()
        finally:
            vae_layers.conv3d = ours

    return compare("VAE decode 128x128 in groups of 2: torch's convolution / ours", decode, with_plain)


def dit_lines(models: Path) -> list[str]:
    """Compare preparing once with preparing in every step, and one call for both branches with two."""
    import torch

    from s2v_flow.models.conditioning import Branch
    from s2v_flow.models.load import load_dit

    model = load_dit(
        models / "diffusion_models" / "tiny_s2v.safetensors", dtype=torch.float32, device="cpu", quantized=False
    ).module
    x, context = torch.randn(1, 16, 5, 24, 24), torch.randn(1, 512, 64)
    audio, time_ = torch.randn(1, 25, 64, 20), torch.full((1,), 700.0)
    motion, reference = torch.randn(1, 16, 19, 24, 24), torch.randn(1, 16, 1, 24, 24)

    def prepare():  # type: ignore[no-untyped-def]
        chunk = model.prepare_chunk(
            num_latent_frames=5, height=24, width=24, reference_latent=reference, motion_latent=motion,
            control_latent=torch.zeros(1, 16, 1, 2, 2), conditioning="official",
        )  # fmt: skip
        branches = [
            Branch(
                model.prepare_text(context), model.prepare_audio(sound, num_latent_frames=5, conditioning="official")
            )
            for sound in (audio, audio * 0)
        ]
        return chunk, branches

    chunk, branches = prepare()

    def step() -> None:
        model(x, time_, chunk, branches)

    def step_with_preparation() -> None:
        model(x, time_, *prepare())

    def two_calls() -> None:
        for branch in branches:
            model(x, time_, chunk, [branch])

    return [
        compare("DiT step 192x192: prepared in every step / prepared once", step, step_with_preparation),
        compare("DiT step 192x192, guidance: a call per branch / one call", step, two_calls),
    ]


def cache_line() -> str:
    """Compare what a run's start does with a cache of 2,000 results: count their bytes, or read every entry too."""
    from s2v_flow.cache.budget import Budget
    from s2v_flow.cache.housekeeping import inventory
    from s2v_flow.cache.store import Store

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number in range(2000):
            Store(root).publish(f"{number * 2**240:064x}", {"kind": "toy"}, {"out": str(number).encode()}, {})

        def count() -> None:
            Budget(root, 10**9, lambda text: None, reserve=0).begin()

        def read() -> None:
            count()
            inventory(root)

        return compare("start with 2,000 results: reading every entry / counting bytes", count, read)


def run_line() -> str:
    """Compare the first run of the demo with the second one, as processes, by the clock."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "s2v_flow", "run", str(DEMO), "--output-dir", folder, "--cache-dir", folder]
        took = []
        for _ in range(2):
            begun = time.monotonic()
            subprocess.run(command, check=True, capture_output=True)
            took.append(time.monotonic() - begun)
        return f"demo: first run {took[0]:.1f} s, second {took[1]:.2f} s, ratio {took[0] / took[1]:.0f}"


def main() -> None:
    """Print one line for each ratio."""
    from s2v_flow.demo.models import make_demo_models

    lines = [run_line(), cache_line()]
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        make_demo_models(models)
        lines += [vae_line(models), *dit_lines(models)]
    sys.stdout.write(f"{os.cpu_count()} cores\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
