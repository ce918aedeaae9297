"""Live models: one of each, loaded once, within the budget."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from s2v_flow.models.registry import ModelKey, ModelRegistry, weight_bytes


def key(name: str, **changes: object) -> ModelKey:
    return ModelKey(**{"kind": "dit", "digests": (name,), "dtype": "float32", "device": "cpu", **changes})  # type: ignore[arg-type]


def loader(num_floats: int = 25) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(num_floats, 1, bias=False)


@contextmanager
def used(registry: ModelRegistry, of: ModelKey, load: Callable[[], nn.Module]) -> Iterator[nn.Module]:
    yield registry.acquire(of, load)
    registry.release(of)


def test_a_model_is_loaded_once_and_shared() -> None:
    registry = ModelRegistry()
    first = registry.acquire(key("a"), loader())
    registry.release(key("a"))
    assert registry.acquire(key("a"), loader()) is first
    assert registry.loads == {key("a"): 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "vae"},
        {"digests": ("b",)},
        {"dtype": "bfloat16"},
        {"device": "cuda:0"},
        {"quantized": True},
        {"loras": (("l", 1.0),)},
    ],
)
def test_whatever_makes_a_model_another_is_in_its_key(changes: dict[str, object]) -> None:
    assert key("a") == key("a")
    assert key("a", **changes) != key("a")


def test_what_is_loaded_is_live_until_it_is_freed() -> None:
    registry = ModelRegistry()
    assert not registry.is_live(key("a"))
    with used(registry, key("a"), loader()):
        assert registry.is_live(key("a"))
    assert registry.is_live(key("a"))
    registry.free_unused()
    assert not registry.is_live(key("a"))


def test_order_and_strength_of_loras_are_in_the_key() -> None:
    assert key("a", loras=(("x", 1.0), ("y", 1.0))) != key("a", loras=(("y", 1.0), ("x", 1.0)))
    assert key("a", loras=(("x", 1.0),)) != key("a", loras=(("x", 0.5),))


def test_beyond_the_budget_the_least_recently_used_is_freed() -> None:
    registry = ModelRegistry(memory_budget_bytes=200)
    for name in ("a", "b"):
        with used(registry, key(name), loader()):
            pass
    with used(registry, key("a"), loader()):  # a is now the younger
        pass
    assert registry.num_bytes == 200
    with used(registry, key("c"), loader()):
        assert registry.num_bytes == 200
    for name in ("a", "c"):
        with used(registry, key(name), loader()):
            pass
    assert registry.loads == {key("a"): 1, key("b"): 1, key("c"): 1}
    with used(registry, key("b"), loader()):
        assert registry.loads[key("b")] == 2


def test_models_in_use_are_never_freed() -> None:
    registry = ModelRegistry(memory_budget_bytes=100)
    model = registry.acquire(key("a"), loader())
    registry.acquire(key("b"), loader())
    assert registry.num_bytes == 200
    assert registry.free_unused() == 0
    registry.release(key("b"))
    assert registry.num_bytes == 100
    assert registry.acquire(key("a"), loader()) is model


def test_room_is_made_before_loading() -> None:
    registry = ModelRegistry(memory_budget_bytes=150)
    with used(registry, key("a"), loader()):
        pass
    seen: list[int] = []

    def load() -> nn.Module:
        seen.append(registry.num_bytes)
        return loader()()

    registry.acquire(key("b"), load, expected_bytes=100)
    assert seen == [0]


def test_freed_models_are_gone() -> None:
    registry = ModelRegistry()
    with used(registry, key("a"), loader()) as model:
        gone = weakref.ref(model)
    del model
    assert registry.free_unused() == 100
    gc.collect()
    assert gone() is None
    assert registry.num_bytes == 0


@pytest.mark.parametrize("is_cyclic", [False, True])
def test_all_objects_are_looked_through_only_where_a_model_holds_a_cycle(is_cyclic: bool) -> None:
    """Then its weights are gone too; in a large process a look takes up to a second."""
    registry = ModelRegistry()
    with used(registry, key("a"), loader()) as model:
        gone = weakref.ref(model)
        if is_cyclic:
            model.itself = [model]
    del model
    looked: list[int] = []

    def note(phase: str, facts: dict[str, int]) -> None:
        looked.extend([facts["generation"]] if phase == "start" else [])

    gc.callbacks.append(note)
    try:
        registry.free_unused()
    finally:
        gc.callbacks.remove(note)
    assert (2 in looked) == is_cyclic
    assert gone() is None


def test_leaving_the_registry_frees_what_is_in_use_too() -> None:
    with ModelRegistry() as registry:
        gone = weakref.ref(registry.acquire(key("a"), loader()))
    gc.collect()
    assert gone() is None


def test_a_failed_load_leaves_nothing_behind() -> None:
    registry = ModelRegistry()

    def fail() -> nn.Module:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        registry.acquire(key("a"), fail)
    assert registry.num_bytes == 0
    assert registry.loads == {}
    with pytest.raises(ValueError, match="dit is not in use"):
        registry.release(key("a"))


def test_threads_that_ask_at_once_share_one_load() -> None:
    registry = ModelRegistry()
    start = threading.Barrier(4)
    models: list[nn.Module] = []

    def ask() -> None:
        start.wait()
        models.append(registry.acquire(key("a"), loader()))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(models) == 4
    assert len({id(model) for model in models}) == 1
    assert registry.loads[key("a")] == 1


def test_shared_weights_count_once() -> None:
    module = nn.Module()
    module.a = nn.Embedding(5, 5)
    module.b = module.a
    module.register_buffer("c", torch.zeros(3, dtype=torch.float8_e4m3fn))
    assert weight_bytes(module) == 103
