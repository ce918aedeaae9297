"""What a mouth does within a latent frame, written into the latent by hand.

A latent frame holds four frames, and our small VAE learns their mean long before it learns what differs. What differs at
the mouth is known here, so it is added to the latent along three directions that faces hardly use; the decoder learns to
read them, the DiT to write them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from training import state

SIZE = 3.0
ROWS, COLUMNS = slice(9, 13), slice(6, 10)  # of a latent: where mouths are


def directions(folder: Path, clips: list[dict[str, Tensor]]) -> Tensor:
    """Return three directions [3, 16] of least variance at the mouth; measured once, kept in `folder`."""
    path = folder / "detail.safetensors"
    if not path.exists():
        cells = torch.cat([clip["latent"][..., ROWS, COLUMNS].float().flatten(1) for clip in clips], 1)  # [16, n]
        vectors = torch.linalg.eigh(torch.cov(cells)).eigenvectors  # of the least first, in columns
        state.save_weights({"directions": vectors[:, :3].T.contiguous()}, path, torch.float32)
    return state.load_weights(path)["directions"]


def add_detail(latent: Tensor, opening: Tensor, along: Tensor) -> Tensor:
    """Add what differs among four frames: halves of the four, and the two of each half.

    Args:
        latent: [16, F, 16, 16].
        opening: How far the mouth opens, [4 F].
        along: From `directions`.
    """
    o = opening.view(-1, 4)
    codes = torch.stack([(o[:, 2] + o[:, 3] - o[:, 0] - o[:, 1]) / 2, o[:, 1] - o[:, 0], o[:, 3] - o[:, 2]])  # [3, F]
    added = latent.clone()
    added[..., ROWS, COLUMNS] += SIZE * torch.einsum("kf,kc->cf", codes, along)[..., None, None]
    return added
