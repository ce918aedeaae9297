"""Where well-known model files can be had, by file name. Nothing here is downloaded unless the user asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_WAN22 = "https://huggingface.co/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
_WAN21 = "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"

HOMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        name: (f"{repository}/{folder}/{name}",)
        for repository, folder, name in (
            (_WAN22, "diffusion_models", "wan2.2_s2v_14B_fp8_scaled.safetensors"),
            (_WAN22, "diffusion_models", "wan2.2_s2v_14B_bf16.safetensors"),
            (_WAN22, "audio_encoders", "wav2vec2_large_english_fp16.safetensors"),
            (_WAN22, "loras", "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors"),
            (_WAN21, "text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors"),
            (_WAN21, "text_encoders", "umt5_xxl_fp16.safetensors"),
            (_WAN22, "vae", "wan_2.1_vae.safetensors"),
        )
    }
)
