"""What every rank does, the first one too: hold a model, prepare what it is told, take its part of forward passes.

That is a part of the tokens, from the first block to the head; self-attention exchanges tokens for heads.

Source: S. A. Jacobs et al., 2023, DeepSpeed Ulysses, section 3.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from s2v_flow.models.attention import Kernel
from s2v_flow.models.conditioning import Branch, InjectedAudio, PreparedChunk
from s2v_flow.models.load import LoadedDit, load_dit
from s2v_flow.parallel.layout import layout_of, rank_device
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


_PATIENCE = timedelta(days=300)  # a rank that is lost is noticed otherwise
_CPU = torch.device("cpu")


class Held(NamedTuple):
    """Stands in a message for what all ranks hold since the message of this number."""

    number: int


class Rank:
    """One rank of `size`: on every rank the same methods are called with equal arguments, `meet` first.

    `folder`: private to the ranks of one run.
    """

    def __init__(self, rank: int, size: int, device: str, folder: Path) -> None:
        self.traffic = Traffic()
        self._rank, self._size, self._folder = rank, size, folder
        self._device = torch.device(rank_device(device, rank))
        self._is_gpu = self._device.type == "cuda"
        self._groups: dict[int, dist.ProcessGroup] = {}
        self._ending = threading.Lock()
        self._threads = torch.get_num_threads()
        torch.set_num_threads(max(self._threads // size, 1))
        if self._is_gpu:
            torch.cuda.set_device(self._device)

    def meet(self) -> None:
        """Wait for the other ranks, and make the groups of those that share a chunk's tokens."""
        rank, size, store = self._rank, self._size, FileStore(str(self._folder / "meeting"), self._size)
        with _environment():
            name, device = ("cpu:gloo,cuda:nccl", self._device) if self._is_gpu else ("gloo", None)
            init = partial(dist.init_process_group, name, store=store, rank=rank, world_size=size)
            init(timeout=_PATIENCE, device_id=device)
            for length in sorted({layout_of(size, branches).sequence for branches in (1, 2)}):
                for first in range(0, size, length):  # every rank makes every group, in one order
                    group = dist.new_group(list(range(first, first + length)), timeout=_PATIENCE)
                    if first <= rank < first + length:
                        self._groups[length] = group

    def tell(self, *message: Any) -> None:
        """Tell all ranks, from the first: a number, the results to release, a method, its arguments and options."""
        dist.broadcast_object_list([message], 0, device=_CPU)

    def serve(self) -> NoReturn:
        """Do what the first rank tells."""
        held: dict[int, Any] = {}
        while True:
            message: list[Any] = [None]
            dist.broadcast_object_list(message, 0, device=_CPU)
            number, gone, method, given, options = message[0]
            for each in gone:
                held.pop(each, None)
            given = [held[one.number] if isinstance(one, Held) else one for one in given]
            value = getattr(self, method)(*given, **options)
            held |= {} if method == "forward" else {number: value}

    def load(self, path: Path, **options: Any) -> LoadedDit:
        """Load a diffusion model onto this rank's device; see `load_dit`."""
        return load_dit(path, **{**options, "device": self._device})

    def use(self, loaded: LoadedDit, what: str, *given: Any, **options: Any) -> Any:
        """Call a method of the model that computes nothing in common, with this rank's device."""
        options |= {"device": self._device} if "device" in options else {}
        here = [one.to(self._device) if isinstance(one, Tensor) else one for one in given]
        return getattr(loaded.module, what)(*here, **options)

    def forward(
        self,
        loaded: LoadedDit,
        attention: str,
        chunk: PreparedChunk,
        *parts: Any,
        x: Tensor | None = None,
        time: Tensor | None = None,
    ) -> list[Tensor]:
        """Take this rank's part of a forward pass.

        `parts`: the branches of guidance, each as its text and its audio. `x`, `time`: the latent and the timestep, on
        rank 0; the others get them from there.

        Returns the velocities of all branches, on rank 0; on others, those that it has taken part in.
        """
        x = torch.empty(chunk.latent_shape, device=self._device) if x is None else x.float().contiguous()
        time = x.new_empty(chunk.latent_shape[0]) if time is None else time.to(x)
        for given in (x, time):
            self._broadcast(given, 0)
        branches = [Branch(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
        guidance, sequence = layout_of(self._size, len(branches))
        half, place = divmod(self._rank, sequence)
        if sequence > 1:
            chunk = SequenceShard(self._groups[sequence], place, sequence, chunk, self.traffic).part()
        loaded.module.attention = attention
        mine = branches if guidance == 1 else [branches[half]]
        velocities: list[Tensor] = loaded.module(x, time, chunk, mine)
        if guidance == 2:
            other = velocities[0] if half else torch.empty_like(velocities[0])
            self._broadcast(other, sequence)
            velocities.append(other)
        self.traffic.forwards += 1
        if self._is_gpu:  # a rank that fails is to fail in this pass
            torch.cuda.synchronize(self._device)
        return velocities

    def abandon(self) -> None:
        """End what waits for a rank that is lost, from any thread; over gloo it notices by itself."""
        with self._ending:
            if self._is_gpu and dist.is_initialized():
                dist.distributed_c10d._abort_process_group()

    def leave(self) -> None:
        """End the communication; the other ranks are gone."""
        self.abandon()
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.set_num_threads(self._threads)

    def _broadcast(self, tensor: Tensor, source: int) -> None:
        dist.broadcast(tensor, source)
        self.traffic.sent += (self._size - 1) * tensor.nbytes if self._rank == source else 0


@contextmanager
def _environment() -> Iterator[None]:
    """Let sockets that are opened inside be this machine's own alone, and NCCL's watchdogs end no process."""
    values = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo" if sys.platform == "linux" else "lo0")
    values |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
    before, hook = {name: os.environ[name] for name in values if name in os.environ}, sys.excepthook
    os.environ.update(values)
    try:
        yield
    finally:
        sys.excepthook = hook  # torch's writes [rank0] before every line of a traceback, for good
        for name in values:
            del os.environ[name]
        os.environ.update(before)
