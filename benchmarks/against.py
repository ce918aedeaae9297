"""The same jobs through a ComfyUI checkout and through us, as whole processes: what `--against-comfyui` times.

Both read the same models and inputs, in float32, and write an mp4; ours begins with an empty cache. Random weights.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

from benchmarks.models import TINY, random_dit, random_weights

HERE = Path(__file__).parent
JOBS: dict[str, dict[str, object]] = {
    "tiny template": {},
    "middle-sized": {"size": "middle", "width": 256, "height": 256, "length": 33, "steps": 2, "cfg": 3.0},
}


def prepare(base: Path) -> None:
    """Make models and inputs below a folder, in ComfyUI's layout; sound at 16 kHz, which neither side resamples."""
    import soundfile
    import soxr
    import torch
    from safetensors.torch import load_file, save_file

    from s2v_flow.demo.models import make_demo_models
    from s2v_flow.models.vae import VAEConfig, WanVAE

    make_demo_models(base / "models")
    with torch.device("meta"):
        vae = WanVAE(VAEConfig(24))
    config = replace(TINY, dim=768, ffn_dim=3072, num_layers=9)
    models = {"vae/middle_vae": random_weights(vae, "cpu")}
    models["diffusion_models/middle_s2v"] = random_dit(config, torch.float32, "cpu")
    for name, model in models.items():
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, base / "models" / f"{name}.safetensors")
    spare = base / "models" / "audio_encoders" / "tiny_wav2vec2.safetensors"
    save_file({k: v for k, v in load_file(spare).items() if k != "masked_spec_embed"}, spare)
    (base / "input").mkdir()
    inputs = HERE.parent / "recipes" / "inputs"
    shutil.copy(inputs / "astronaut.png", base / "input")
    sound, rate = soundfile.read(inputs / "speech.wav")
    soundfile.write(base / "input" / "voice.wav", soxr.resample(sound, rate, 16000), 16000)


def whole_runs(checkout: Path, python: str, base: Path, job: str) -> dict[str, Callable[[], None]]:
    """Return what to time for a job: theirs, ours, and ours again (A/A)."""
    numbers = count()
    places = ["--models-dir", str(base / "models"), "--input-dir", str(base / "input")]
    given = [part for key, value in JOBS[job].items() for part in ("--set", f"{key}={value}")]
    program = [sys.executable, "-m", "s2v_flow"]
    recipe, workflow = str(HERE / "job.yaml"), str(base / f"{job.split()[0]}.json")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}

    def call(command: list[str]) -> None:
        done = subprocess.run(command, env=environment, cwd=base, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")

    def ours() -> None:
        folder = base / f"ours{next(numbers)}"
        call([*program, "run", recipe, *given, *places, "--cache-dir", f"{folder}/cache", "--output-dir", str(folder)])
        shutil.rmtree(folder)

    call([*program, "export", recipe, *given, *places, "--format", "api", "-o", workflow])
    theirs = [python, str(HERE / "comfyui_run.py"), str(checkout), str(base), workflow]
    return {"ComfyUI": lambda: call(theirs), "ours": ours, "ours, again": ours}
