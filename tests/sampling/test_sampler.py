"""Every sampler against the reference's trajectories, and what `Sampler` promises its caller."""

from __future__ import annotations

import pytest
import torch
from reference import load_golden, relative_error
from torch import Tensor

from s2v_flow.sampling import SAMPLERS, SamplerName
from s2v_flow.sampling.sampler import Sampler, make_sampler
from s2v_flow.sampling.state import SolverState

COMFY = {shift: load_golden(f"components/sampler_shift{shift}") for shift in (3, 8)}
OFFICIAL = load_golden("components/sampler_official")


def denoise(x: Tensor, sigma: float) -> Tensor:
    """The model that the golden trajectories were measured with."""
    return 0.7 * torch.tanh(x) + 0.2 * torch.sin(3 * x) * sigma


def run(sampler: Sampler, noise: Tensor) -> Tensor:
    *_, last = sampler.iterate(denoise, sampler.start(noise))
    return sampler.result(last)


def cases(outputs: dict[str, Tensor]) -> list[str]:
    return [name for name in outputs if not name.endswith((".sigmas", ".timesteps"))]


@pytest.mark.parametrize("shift", COMFY)
@pytest.mark.parametrize("case", cases(COMFY[8][1]))
def test_comfyuis_samplers_end_where_the_reference_ends(shift: int, case: str) -> None:
    inputs, expected, _ = COMFY[shift]
    name, steps = case.split(".steps")
    sampler = make_sampler(name, "simple", int(steps), float(shift), seed=0)  # type: ignore[arg-type]
    assert relative_error(run(sampler, inputs["noise"]), expected[case]) <= 3e-6


@pytest.mark.parametrize("case", cases(OFFICIAL[1]))
def test_the_authors_samplers_have_the_references_levels_and_times_and_end_where_it_ends(case: str) -> None:
    inputs, expected, _ = OFFICIAL
    name, shift, steps = case.split(".")
    sampler = make_sampler(name, "simple", int(steps[5:]), float(shift[5:]), seed=0)  # type: ignore[arg-type]
    assert torch.equal(torch.tensor(sampler.sigmas, dtype=torch.float32), expected[f"{case}.sigmas"])
    assert [sampler.timestep(sigma) for sigma in sampler.sigmas[:-1]] == expected[f"{case}.timesteps"].tolist()
    assert relative_error(run(sampler, inputs["noise"]), expected[case]) <= 3e-6


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_cut_after_any_step_resumes_to_the_same_bits(name: SamplerName) -> None:
    """Each cut goes through named tensors and a new sampler, as a checkpoint on disk would."""
    noise = torch.randn(1, 16, 1, 2, 2, generator=torch.Generator().manual_seed(5))
    sampler = make_sampler(name, "simple", 6, 8.0, seed=3)
    states = [sampler.start(noise), *sampler.iterate(denoise, sampler.start(noise))]
    for state in states:
        read = SolverState.from_tensors(state.to_tensors())
        resumed = [read, *make_sampler(name, "simple", 6, 8.0, seed=3).iterate(denoise, read)]
        assert len(resumed) == 7 - read.step
        assert torch.equal(sampler.result(resumed[-1]), sampler.result(states[-1]))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_calls_the_model_once_or_heun_twice_but_for_its_last(name: SamplerName) -> None:
    calls = 0

    def counting(x: Tensor, sigma: float) -> Tensor:
        nonlocal calls
        calls += 1
        return denoise(x, sigma)

    sampler = make_sampler(name, "simple", 4, 8.0, seed=0)
    counted = []
    for _ in sampler.iterate(counting, sampler.start(torch.ones(1, 16, 1, 1, 1))):
        counted.append(calls)
        calls = 0
    assert counted == ([2, 2, 2, 1] if name == "heun" else [1, 1, 1, 1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_model_is_called_with_python_floats_and_the_state_is_not_changed_in_place(name: SamplerName) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def watching(x: Tensor, sigma: float) -> Tensor:
        assert type(sigma) is float
        seen.append((x, x.clone()))
        return denoise(x, sigma)

    sampler = make_sampler(name, "simple", 4, 8.0, seed=0)
    noise = torch.randn(1, 16, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    kept = noise.clone()
    list(sampler.iterate(watching, sampler.start(noise)))
    assert all(torch.equal(x, copy) for x, copy in [*seen, (noise, kept)])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_single_step_ends_on_the_models_guess(name: SamplerName) -> None:
    """uni_pc ends at level 2^-10 and leaves that much of the noise: it comes near only."""
    sampler = make_sampler(name, "simple", 1, 8.0, seed=0)
    noise = torch.randn(1, 16, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    guess = denoise(sampler.start(noise).x, sampler.sigmas[0])
    assert relative_error(run(sampler, noise), guess) <= (5e-3 if name.startswith("uni_pc") else 1e-6)


def test_step_noise_depends_on_the_seed_and_other_samplers_do_not() -> None:
    noise = torch.ones(1, 16, 1, 2, 2)
    for name in SAMPLERS:
        one, other = (run(make_sampler(name, "simple", 3, 8.0, seed=seed), noise) for seed in (1, 2))
        assert torch.equal(one, other) == (name not in ("euler_ancestral", "lcm"))


def test_the_time_is_multiplied_in_float32() -> None:
    sampler = make_sampler("uni_pc", "simple", 20, 8.0, seed=0)
    sigmas = torch.tensor(sampler.sigmas[:-1], dtype=torch.float32)
    assert [sampler.timestep(sigma) for sigma in sampler.sigmas[:-1]] == (sigmas * 1000).tolist()


def test_a_run_that_is_not_over_has_no_result() -> None:
    sampler = make_sampler("euler", "simple", 2, 8.0, seed=0)
    state = next(sampler.iterate(denoise, sampler.start(torch.ones(1, 16, 1, 1, 1))))
    with pytest.raises(ValueError, match="1 of 2 steps"):
        sampler.result(state)


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown sampler 'plms'"):
        make_sampler("plms", "simple", 2, 8.0, seed=0)  # type: ignore[arg-type]
