"""Several runs in one process that share the models that are loaded."""

from __future__ import annotations

from typing import Any

from s2v_flow.api import Planned, RecipeLike, lazy_registry, plan, run_planned
from s2v_flow.api.result import Result
from s2v_flow.errors import S2VFlowError
from s2v_flow.graph.events import Listener, ignore
from s2v_flow.machine import free_memory_bytes
from s2v_flow.nodes.handle import free_device_bytes
from s2v_flow.options import Options, read_option, with_fields


class Session:
    """Runs that keep their models loaded for the next one; leaving the `with` block frees them.

    A model is used again where file contents, LoRAs, precision and device are the same; a file that has changed is
    loaded anew. Where memory runs out, models that no node needs go first. Runs go one after another.

    Args:
        options: See `Options`; what all runs have in common.
        memory: How many bytes (or "8GiB") of models that no node needs may stay loaded. Unless given, three quarters
            of what is free at the first model on the device of that run; no limit where that is not known.
    """

    def __init__(self, options: Options | None = None, *, memory: Any = None, **fields: Any) -> None:
        self.options = with_fields(options, fields)
        self._memory: int | None = read_option("memory", memory)
        self._device = "cpu"
        self._models = lazy_registry(self._budget)

    def plan(self, recipe: RecipeLike, **fields: Any) -> Planned:
        """Plan with the session's options, and single fields laid over them; see `s2v_flow.plan`."""
        return plan(recipe, self.options, **fields)

    def run(self, recipe: RecipeLike | Planned, on_event: Listener = ignore, **fields: Any) -> Result:
        """Run with the session's options, and single fields laid over them; see `s2v_flow.run`.

        Args:
            recipe: The file, a dict, or what `plan` has just returned for the same fields: it is not planned again.
            on_event: See `s2v_flow.run`.
            fields: Of `Options`.

        Raises:
            S2VFlowError: As `s2v_flow.run`, after which the session can go on; or the session is closed.
        """
        if self._models is None:
            raise S2VFlowError("this session is closed", fix="begin another: with s2v_flow.Session() as session:")
        options = with_fields(self.options, fields)
        planned = recipe if isinstance(recipe, Planned) else plan(recipe, options)
        self._device = planned.device
        return run_planned(planned, options, on_event, models=self._models)

    @property
    def num_loads(self) -> int:
        """How many times a model has been loaded."""
        return self._models().loads.total() if self._is_used() else 0

    def close(self) -> None:
        """Free all models; nothing can be run afterwards."""
        if self._is_used():
            self._models().free_unused()
        self._models = None

    def _is_used(self) -> bool:
        return self._models is not None and self._models.cache_info().currsize > 0

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _budget(self) -> int | None:
        if self._memory is not None:
            return self._memory
        free = free_device_bytes(self._device)
        free = free_memory_bytes("cpu") if free is None else free
        return None if free is None else free * 3 // 4
