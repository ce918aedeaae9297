"""Where a batch's workers run, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from s2v_flow.batch.dispatch import Engine
from s2v_flow.batch.record import Batch
from s2v_flow.batch.worker import Setup


def open_engine(
    name: str,
    setups: Sequence[Setup],
    batch: Batch,
    address: str | None = None,
    slurm: Mapping[str, Any] | None = None,
) -> Engine:
    """Return an engine.

    Args:
        name: "local", "ray" or "slurm".
        setups: What each worker is given.
        batch: The batch that will run.
        address: ray: the cluster's.
        slurm: slurm: submitit's parameters.

    Raises:
        S2VFlowError: What it needs is not installed, or not here.
    """
    if name == "ray":
        from s2v_flow.batch.ray_engine import RayEngine

        return RayEngine(setups, address)
    if name == "slurm":
        from s2v_flow.batch.slurm_engine import SlurmEngine

        return SlurmEngine(setups, batch.logs, slurm)
    from s2v_flow.batch.local import LocalEngine

    return LocalEngine(setups)
