"""The solver's state as named tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from s2v_flow.sampling.state import SolverState


def test_a_state_survives_a_file(tmp_path: Path) -> None:
    """Even where its tensors share memory, which safetensors refuses."""
    x = torch.arange(4.0)
    rng = torch.Generator().get_state()
    state = SolverState(step=2, x=x, history={"denoised_1": x, "slope_1": x[::2]}, rng=rng)
    save_file(state.to_tensors(), tmp_path / "state.safetensors")
    read = SolverState.from_tensors(load_file(tmp_path / "state.safetensors"))
    assert read.step == 2
    assert torch.equal(read.x, x)
    assert read.history.keys() == state.history.keys()
    assert all(torch.equal(read.history[name], tensor) for name, tensor in state.history.items())
    assert read.rng is not None
    assert torch.equal(read.rng, rng)


def test_a_series_is_read_back_newest_first() -> None:
    old, new = torch.zeros(1), torch.ones(1)
    state = SolverState(step=0, x=new).advance(new, denoised=[new, old])
    assert [tensor.item() for tensor in state.past("denoised")] == [1.0, 0.0]
    assert state.past("slope") == []


def test_advancing_counts_and_forgets_what_is_not_named() -> None:
    state = SolverState(step=3, x=torch.zeros(1), history={"slope_1": torch.zeros(1)}).advance(torch.ones(1))
    assert state.step == 4
    assert not state.history


@pytest.mark.parametrize("names", [["x"], ["step"], ["step", "x", "latent"], []])
def test_tensors_that_are_no_state_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match="no solver state"):
        SolverState.from_tensors({name: torch.zeros(()) for name in names})
