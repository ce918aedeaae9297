"""The models under measurement, with random weights, and one chunk's inputs for them, on any device (meta too)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2v_flow.models.conditioning import Branch, PreparedChunk
from s2v_flow.models.dit import S2VConfig, WanS2V

FULL = S2VConfig(dim=5120, ffn_dim=13824, num_layers=40, text_dim=4096, audio_dim=1024)
TINY = S2VConfig(dim=256, ffn_dim=512, num_layers=5, text_dim=64, audio_dim=64)


@dataclass(frozen=True)
class Size:
    """A chunk's size in latent pixels and frames."""

    width: int
    height: int
    frames: int


def random_weights(module: nn.Module, device: str) -> nn.Module:
    """Give a module that was built on the meta device weights on `device`, scaled by their fan-in."""
    if device == "meta":
        return module.eval().requires_grad_(False)
    module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if value.dim() > 1 and "modulation" not in name and "gamma" not in name:
                value.normal_(0, value[0].numel() ** -0.5, generator=generator)
            else:
                value.fill_(0.0 if name.endswith("bias") else 1.0)
    return module.eval().requires_grad_(False)


def random_dit(config: S2VConfig, dtype: torch.dtype, device: str) -> WanS2V:
    """Make a DiT whose linear layers are of `dtype`, as a loader does; never more than once in memory."""
    with torch.device("meta"):
        model = WanS2V(config, compute_dtype=dtype)
        for module in model.modules():
            if type(module) is nn.Linear:
                module.to(dtype)
    random_weights(model, device)
    return model


@dataclass(frozen=True)
class Forward:
    """One call of a DiT: everything prepared but the call itself."""

    model: WanS2V
    x: Tensor
    timestep: Tensor
    chunk: PreparedChunk
    branches: list[Branch]

    def __call__(self) -> list[Tensor]:
        """Compute one velocity per branch."""
        velocities: list[Tensor] = self.model(self.x, self.timestep, self.chunk, self.branches)
        return velocities


def preparation(
    model: WanS2V, size: Size, device: str, num_branches: int = 1, motion: bool = True
) -> Callable[[], Forward]:
    """Return what prepares a chunk's forward; the same random inputs every time, drawn on the CPU."""
    generator = None if device == "meta" else torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="meta" if device == "meta" else "cpu").to(device)

    config, area = model.config, (size.height, size.width)
    x, reference = draw(1, 16, size.frames, *area), draw(1, 16, 1, *area)
    past = draw(1, 16, 19, *area) if motion else None
    texts = [draw(1, 512, config.text_dim) for _ in range(num_branches)]
    sound, timestep = draw(1, 25, config.audio_dim, 4 * size.frames), torch.full((1,), 700.0, device=device)
    control = torch.zeros(1, 16, 1, 2, 2, device=device)

    def prepare() -> Forward:
        chunk = model.prepare_chunk(
            num_latent_frames=size.frames, height=size.height, width=size.width, reference_latent=reference,
            motion_latent=past, control_latent=control, conditioning="official", device=device,
        )  # fmt: skip
        branches = []
        for number, text in enumerate(texts):
            heard = sound if number == 0 else torch.zeros_like(sound)
            audio = model.prepare_audio(heard, num_latent_frames=size.frames, conditioning="official")
            branches.append(Branch(model.prepare_text(text), audio))
        return Forward(model, x, timestep, chunk, branches)

    return prepare
