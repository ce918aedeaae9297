"""One video on several GPUs: processes that share the diffusion model's forward passes; nothing else is shared.

The process that the user started is rank 0: it runs the plan as ever, and alone touches cache, outputs and terminal.
The other ranks are its children. They load the same diffusion model, are told what to prepare, and take their part of
each forward pass. The models know of this only `conditioning.Shard`, the graph nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from s2v_flow.graph.events import Listener, Noted


@contextmanager
def shared_models(
    models: Callable[[], Any], num_ranks: int, device: str, emit: Listener
) -> Iterator[Callable[[], Any]]:
    """Let ranks share the diffusion models of the registry that `models` makes; its first use starts them.

    `device`: "cpu", or "cuda" for a GPU each. `emit` is told at the end what was sent.
    """
    if num_ranks == 1:
        yield models
        return
    teams = []

    @cache
    def registry() -> Any:
        from s2v_flow.parallel.team import Team

        made, team = models(), Team(num_ranks, device)
        teams.append(team)  # to be closed, whatever comes
        team.start()
        made.load_dit = team.load_dit
        return made

    try:
        yield registry
    finally:
        for team in teams:
            if text := team.traffic.text():
                emit(Noted("", f"{num_ranks} ranks: {text}"))
            team.close()
