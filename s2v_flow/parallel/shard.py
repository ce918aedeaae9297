"""A rank's part of the tokens, from the first block to the head; self-attention exchanges tokens for heads.

Source: S. A. Jacobs et al., 2023, DeepSpeed Ulysses, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from s2v_flow.models.attention import Kernel
from s2v_flow.models.conditioning import InjectedAudio, PreparedChunk
from s2v_flow.wording import size_text


@dataclass
class Traffic:
    """What one rank has sent so far, in bytes.

    gathered: what it would have sent beside it, had every injection of audio gathered all tokens first.
    """

    forwards: int = 0
    sent: int = 0
    gathered: int = 0

    def text(self) -> str:
        """Say what was sent in a forward pass, on average; "" before the first."""
        if not self.forwards:
            return ""
        sent, gathered = (size_text(count // self.forwards) for count in (self.sent, self.gathered))
        beside = f"; gathering all tokens for the audio would have sent {gathered} more" if self.gathered else ""
        return f"each sent {sent} in a forward pass{beside}"


@dataclass(frozen=True, eq=False)
class SequenceShard:
    """One of `size` equal parts of a chunk's tokens; behind the last token of all, copies of it fill up."""

    group: dist.ProcessGroup
    rank: int
    size: int
    whole: PreparedChunk
    traffic: Traffic

    @property
    def length(self) -> int:
        """How many tokens each rank has: L'."""
        return -(-len(self.whole.rotations) // self.size)

    @property
    def start(self) -> int:
        """The number of the first token here."""
        return self.rank * self.length

    def part(self) -> PreparedChunk:
        """Return the chunk as a forward pass over these tokens takes it."""
        whole, rotations = self.whole, self.own(self.whole.rotations[None])[0]
        borders = (whole.num_noisy_tokens, whole.num_video_tokens)
        noisy, video = (min(max(border - self.start, 0), self.length) for border in borders)
        return replace(whole, num_noisy_tokens=noisy, num_video_tokens=video, rotations=rotations, shard=self)

    def own(self, tokens: Tensor) -> Tensor:
        """See `Shard`."""
        indices = torch.arange(self.start, self.start + self.length, device=tokens.device)
        return tokens[:, indices.clamp_(max=tokens.shape[1] - 1)]

    def attend(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Shard`. Two exchanges: all heads of few tokens for few heads of all tokens, and back."""
        length, num_tokens = self.length, len(self.whole.rotations)
        parts = [torch.unflatten(x, 1, (self.size, -1)).transpose(0, 1) for x in (q, k, v)]  # P of [B, N/P, L', K]
        taken = self._exchanged(torch.stack(parts, dim=1))  # [P, 3, B, N/P, L', K]
        taken = taken.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)[..., :num_tokens, :]  # [3, B, N/P, L, K]
        attended = F.pad(kernel(*taken), (0, 0, 0, self.size * length - num_tokens))  # [B, N/P, P L', K]
        back = self._exchanged(torch.unflatten(attended, 2, (self.size, length)).permute(2, 0, 1, 3, 4))
        return back.transpose(0, 1).flatten(1, 2)  # [B, N, L', K]

    def inject(self, injector: Callable[..., Tensor], video: Tensor, audio: InjectedAudio, *more: object) -> Tensor:
        """See `Shard`. Every token meets its own frame's audio here: none is sent anywhere."""
        count, width = video.shape[1:]
        item_bytes = audio.keys.element_size()  # what is computed in: less than the stream's own float32, if anything
        self.traffic.gathered += (self.size - 1) * len(video) * self.length * width * item_bytes
        if count == 0:
            return video
        tokens_per_frame = self.whole.num_video_tokens // self.whole.latent_shape[2]
        first, lead = divmod(self.start, tokens_per_frame)
        frames = -(-(lead + count) // tokens_per_frame)
        filled = F.pad(video, (0, 0, lead, frames * tokens_per_frame - lead - count))  # to whole frames
        of = (part[:, first : first + frames] for part in (audio.keys, audio.values, audio.scale, audio.shift))
        return injector(filled, InjectedAudio(*of), *more)[:, lead : lead + count]

    def join(self, patches: Tensor) -> Tensor:
        """See `Shard`."""
        parts = [torch.empty_like(patches) for _ in range(self.size)]
        dist.all_gather(parts, patches.contiguous(), group=self.group)
        self.traffic.sent += (self.size - 1) * patches.nbytes
        return torch.cat(parts, dim=1)[:, : self.whole.num_video_tokens]

    def _exchanged(self, parts: Tensor) -> Tensor:
        """Send the part with number r to rank r; the parts that come instead are numbered by where they are from."""
        given = parts.contiguous()
        taken = torch.empty_like(given)
        dist.all_to_all_single(taken, given, group=self.group)
        self.traffic.sent += given.nbytes // self.size * (self.size - 1)
        return taken
