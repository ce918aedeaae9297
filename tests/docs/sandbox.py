"""A folder in which the commands of the pages run as they stand: every file that they name, with tiny models in it."""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image
from recipes_for_tests import RECIPES, write_clip, write_voice

MODELS = {
    "diffusion_models/wan2.2_s2v_14B_fp8_scaled.safetensors": "diffusion_models/tiny_s2v_fp8_scaled.safetensors",
    "diffusion_models/wan2.2_s2v_14B_bf16.safetensors": "diffusion_models/tiny_s2v.safetensors",
    "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors": "text_encoders/tiny_umt5_fp8_scaled.safetensors",
    "text_encoders/umt5_xxl_fp16.safetensors": "text_encoders/tiny_umt5.safetensors",
    "audio_encoders/wav2vec2_large_english_fp16.safetensors": "audio_encoders/tiny_wav2vec2.safetensors",
    "vae/wan_2.1_vae.safetensors": "vae/tiny_vae.safetensors",
    "loras/wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors": "loras/tiny_lightning_lora.safetensors",
    "loras/my_style.safetensors": "loras/tiny_lightning_lora_peft.safetensors",
}


def make_models(root: Path, tiny: Path) -> None:
    """Make a ComfyUI models folder: the names that recipes use, the demo's tiny models."""
    for name, file in MODELS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tiny / file, root / name)  # a link would change a file that another worker may be hashing


def make_inputs(folder: Path, seconds: float) -> None:
    """Make the portraits, voices and clips that pages name."""
    portrait = Image.open(RECIPES / "inputs" / "astronaut.png").convert("RGB").resize((96, 96))
    for name in ("portrait.png", "anna.png", "me.jpg"):
        portrait.save(folder / name)
    write_voice(folder / "anna.wav", seconds)
    shutil.copyfile(folder / "anna.wav", folder / "speech.mp3")  # what a file is, its content tells
    for name in ("pose.mp4", "clip.mp4", "film.mp4"):
        write_clip(folder / name, 80)
