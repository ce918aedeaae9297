"""A node that fails: an error with its place or a defect, and what happens to the others and to what it used."""

from __future__ import annotations

import gc
import signal
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import torch
from toy import Glue, Join, LoadTool, Save, Split, Text, Word, Workshop

from s2v_flow.errors import ExitCode, Place, S2VFlowError
from s2v_flow.graph.interrupt import StoppedError, StopRequest
from s2v_flow.graph.node import Node
from s2v_flow.graph.ports import Neutral, Ref

R = Ref.parse


def too_big() -> None:
    torch.zeros(2, 3) @ torch.zeros(2, 3)


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


EXPECTED = {
    "value": (lambda: int("odd"), "invalid literal for int", ExitCode.FAILED),
    "text": (lambda: b"\xff".decode(), "can't decode byte 0xff", ExitCode.FAILED),
    "overflow": (lambda: (10**400) / 3, "too large", ExitCode.FAILED),
    "shapes": (too_big, "mat1 and mat2 shapes cannot be multiplied", ExitCode.FAILED),
    "gone": (lambda: Path("/nothing/here").read_bytes(), "No such file or directory: '/nothing/here'", ExitCode.FAILED),
    "memory": (out_of_memory, "out of memory: CUDA out of memory", ExitCode.OUT_OF_MEMORY),
    "host memory": (lambda: bytearray(2**62), "out of memory", ExitCode.OUT_OF_MEMORY),
}
DEFECTS = {
    "assertion": (lambda: _assert(), AssertionError),
    "key": (lambda: {}["x"], KeyError),
    "zero": (lambda: 1 / 0, ZeroDivisionError),
    "type": (lambda: len(3), TypeError),  # type: ignore[arg-type]
    "attribute": (lambda: (3).nothing, AttributeError),  # type: ignore[attr-defined]
    "recursion": (lambda: _deep(), RecursionError),
    "not implemented": (lambda: Node.run(Word(text="w"), None, {}), NotImplementedError),  # type: ignore[arg-type]
}


def _assert() -> None:
    raise AssertionError("never")


def _deep() -> None:
    _deep()


class Odd(Node):
    """Fails as it is told to."""

    kind: ClassVar[str] = "odd"
    outputs: ClassVar = {"text": "conditioning"}
    is_stored: ClassVar[bool] = True

    a: Text
    how: Annotated[str, Neutral()]

    def run(self, context: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        {**EXPECTED, **DEFECTS}[self.how][0]()
        return {"text": b""}


class Holder(Node):
    """Fails with something large in its hands."""

    kind: ClassVar[str] = "holder"
    outputs: ClassVar = {"text": "conditioning"}
    is_stored: ClassVar[bool] = True
    held: ClassVar[list[weakref.ref[Any]]] = []

    a: Text

    def run(self, context: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        latent = torch.zeros(1000)
        self.held.append(weakref.ref(latent))
        raise ValueError(f"{len(latent)} numbers are no good")


class Swallower(Node):
    """Is stopped by a signal while it is in a package that makes an error of its own of any exception."""

    kind: ClassVar[str] = "swallower"
    outputs: ClassVar = {"text": "conditioning"}
    is_stored: ClassVar[bool] = True
    stop: ClassVar[StopRequest]

    a: Text

    def run(self, context: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self.stop.handle(signal.SIGTERM, None)
        except StoppedError:
            raise ValueError("could not determine the shape") from None
        return {}


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def test_a_stop_that_comes_out_as_an_error_is_a_stop(shop: Workshop) -> None:
    Swallower.stop = StopRequest(lambda text: None)
    nodes = {"word": Word(text="w"), "loads": Swallower(a=R("$word"))}
    with pytest.raises(StoppedError, match="terminated: in loads") as caught:
        shop.run(nodes, should_stop=Swallower.stop)
    assert caught.value.exit_code == ExitCode.TERMINATED


@pytest.mark.parametrize("how", EXPECTED)
def test_what_a_node_cannot_work_with_is_an_error_that_names_it(how: str, shop: Workshop) -> None:
    """And says where the recipe has it, what to do and what is kept; the next run goes on from there."""
    _, message, code = EXPECTED[how]
    nodes = {"word": Word(text="w"), "bad": Odd(a=R("$word"), how=how)}
    with pytest.raises(S2VFlowError) as caught:
        shop.run(nodes)
    error = caught.value
    assert message in error.message
    assert error.message.startswith("bad: ")
    assert (error.exit_code, error.place, error.inside) == (code, Place("toy.yaml", 2), "nodes.bad (kind: odd)")
    assert error.fix
    assert error.kept == "every result that was finished: the same command goes on from there"
    assert error.__cause__ is not None
    with pytest.raises(S2VFlowError):
        shop.run(nodes)
    assert shop.started() == ["bad"]


@pytest.mark.parametrize("how", DEFECTS)
def test_what_nobody_foresaw_stays_a_defect(how: str, shop: Workshop) -> None:
    """With its traceback."""
    with pytest.raises(DEFECTS[how][1]):
        shop.run({"word": Word(text="w"), "bad": Odd(a=R("$word"), how=how)})


def test_an_error_of_a_part_names_the_recipes_node(shop: Workshop) -> None:
    """A chunk stands in the recipe as the node that asks for it."""
    nodes = {"word": Word(text="w"), "split": Split(a=R("$word"), count=2), "glue": Glue(parts=R("$split"))}
    plan_names = {"word", "split[1]", "split[2]", "glue"}
    shop.run(nodes)
    assert set(shop.statuses) == plan_names
    nodes |= {"bad": Join(a=R("$glue"), fails="this is no use")}
    with pytest.raises(S2VFlowError, match="this is no use") as caught:
        shop.run(nodes)
    assert (caught.value.place, caught.value.inside) == (Place("toy.yaml", 4), "nodes.bad (kind: join)")


def cells() -> dict[str, Node]:
    """A cell that fails while it uses a model, and one that works with another afterwards."""
    return {
        "dit": LoadTool(),
        "other": LoadTool(made_with=R("$dit")),
        "word": Word(text="w"),
        "bad": Join(a=R("$word"), tool=R("$dit"), fails="unlucky"),
        "next": Join(a=R("$bad"), tool=R("$other")),
        "bad_file": Save(a=R("$next"), file="bad.txt"),
        "vae": LoadTool(),
        "decode": Join(a=R("$word"), tool=R("$vae"), suffix="!"),
        "file": Save(a=R("$decode"), file="good.txt"),
    }


def test_a_failed_cell_closes_its_models_before_the_next_cell_decodes(shop: Workshop) -> None:
    """And so does what was skipped with it; on a GPU the next cell needs the memory."""
    result = shop.run(cells(), keeps_going=True)
    assert (shop.folder / "good.txt").read_text() == "w!"
    skipped = "needs a node that failed"
    assert result.failures == {"bad": "unlucky", "next": skipped, "bad_file": skipped}
    assert shop.log == ["make dit", "close dit", "make vae", "decode uses vae", "close vae", "end"]


def test_a_failed_cell_holds_nothing_in_memory(shop: Workshop) -> None:
    """What it had in its hands is gone when the next cell begins: an error's traceback would hold it."""
    Holder.held.clear()
    seen: list[bool] = []

    class Look(Join):
        kind: ClassVar[str] = "look"

        def run(self, context: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
            gc.collect()
            seen.append(Holder.held[0]() is None)
            return super().run(context, inputs)

    nodes = {"word": Word(text="w"), "bad": Holder(a=R("$word")), "good": Look(a=R("$word"))}
    result = shop.run(nodes, keeps_going=True)
    assert (list(result.failures), seen) == (["bad"], [True])
