"""How ranks share a forward pass, and whether they can; known without torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from s2v_flow.errors import ExitCode, S2VFlowError, UsageError
from s2v_flow.graph.node import Plan
from s2v_flow.graph.ports import Source
from s2v_flow.machine import num_gpus
from s2v_flow.models.footprint import read_weights
from s2v_flow.nodes.chunk import Chunk

_MOST_RANKS = 64
_HEAD_WIDTH = 128  # `models.attention.HEAD_WIDTH`, without torch


class Layout(NamedTuple):
    """So many groups of ranks share the branches of guidance, so many ranks in each group the tokens."""

    guidance: int
    sequence: int


def layout_of(num_ranks: int, num_branches: int) -> Layout:
    """Return how ranks share a forward pass: a branch of guidance for each half of them, where there are two halves."""
    guidance = 2 if num_branches == 2 and num_ranks % 2 == 0 else 1
    return Layout(guidance, num_ranks // guidance)


def rank_device(device: str, rank: int) -> str:
    """Return torch's name of a rank's device: the GPU with its number, unless `device` is the CPU or one GPU."""
    return f"cuda:{rank}" if device == "cuda" else device


def check_ranks(plan: Plan, to_compute: Collection[str], num_ranks: int, device: str, asked: str) -> None:
    """Refuse a number of ranks that the machine or a chunk's model cannot have.

    `device`: the run's, as torch names it; `asked`: as the user did.

    Raises:
        S2VFlowError: There are fewer GPUs, or one is named (exit code 2); the tokens cannot be shared among so many,
            as each needs as many whole attention heads as the others, or its blocks are to be compiled (exit code 3).
    """
    if num_ranks == 1:
        return
    if device.startswith("cuda:"):
        text = f"--gpus {num_ranks} takes the GPUs from cuda:0 on, not {device}"
        raise UsageError(text, "--device cuda; CUDA_VISIBLE_DEVICES says which")
    if asked != "cpu" and num_gpus() < num_ranks:
        text = f"--gpus {num_ranks}: torch and the driver see {num_gpus()} GPUs"
        raise UsageError(text, f"fewer, or --device cpu for {num_ranks} processes on the CPU")
    found: dict[tuple[int, int], tuple[str, str]] = {}  # heads and branches, with the first chunk that has them
    for node in plan.nodes:
        model = node.inputs.get("model")
        if isinstance(node.node, Chunk) and node.name in to_compute and isinstance(model, Source):
            loader = plan.node(model.node)
            if getattr(loader.node, "compile", "off") != "off":
                text = f"--gpus {num_ranks}: {loader.name} is to compile its blocks, which ranks cannot share"
                raise S2VFlowError(text, f"--set nodes.{loader.name}.compile=off", exit_code=ExitCode.RECIPE)
            path = loader.files.get(("checkpoint",))
            if path is not None and path.is_file():
                width = read_weights(path, "load_diffusion_model", "fp32", on_cpu=True).shapes["head.modulation"][-1]
                found.setdefault((width // _HEAD_WIDTH, 2 if "negative" in node.inputs else 1), (node.name, path.name))
    fits = {
        number: {of: of[0] % layout_of(number, of[1]).sequence == 0 for of in found}
        for number in {*range(2, _MOST_RANKS + 1), num_ranks}
    }
    for of, (name, file) in found.items():
        if not fits[num_ranks][of]:
            sequence = layout_of(num_ranks, of[1]).sequence
            text = f"{sequence} ranks cannot share {name}'s tokens: {file} has {of[0]} attention heads"
            others = " or ".join(str(number) for number in sorted(fits) if all(fits[number].values()))
            fix = f"--gpus {others}" if others else "one GPU"
            raise S2VFlowError(f"--gpus {num_ranks}: {text}", fix, exit_code=ExitCode.RECIPE)
