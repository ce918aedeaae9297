"""A file under a result's name that is another stays, and the result is numbered; the plan says so, and the run."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from toy import Save, Word, Workshop, plan_toys

from s2v_flow.errors import RecipeError
from s2v_flow.graph.events import Delivered, Noted
from s2v_flow.graph.node import Node
from s2v_flow.graph.ports import Ref
from s2v_flow.graph.status import placing

R = Ref.parse


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def nodes(text: str) -> dict[str, Node]:
    return {"word": Word(text=text), "save": Save(a=R("$word"), file="out.txt")}


def run(shop: Workshop, text: str, *, overwrites: bool = False) -> None:
    shop.run(nodes(text), overwrites=overwrites)


def planned(shop: Workshop, text: str, **more: Any) -> list[str]:
    return list(placing(plan_toys(nodes(text), shop.folder), shop.assess(nodes(text)), **more))


def said(shop: Workshop) -> list[str]:
    return [event.text for event in shop.events if isinstance(event, Noted)]


def delivered(shop: Workshop) -> list[tuple[str, bool]]:
    return [(Path(event.path).name, event.changed) for event in shop.events if isinstance(event, Delivered)]


def contents(shop: Workshop) -> dict[str, str]:
    return {path.name: path.read_text() for path in shop.folder.glob("out*")}


def test_a_users_file_stays_and_the_result_is_numbered(shop: Workshop) -> None:
    """The plan says it before, the run when it happens: which file stays, and how the new one is called."""
    path = shop.folder / "out.txt"
    path.write_text("mine")
    os.utime(path, (0, 86_400 * 365))
    (line,) = planned(shop, "w")
    assert line.startswith(f"file: {path} (4 B, written 1971-01-0")
    assert line.endswith(") stays, unless it is this result; else written as out.2.txt")
    run(shop, "w")
    assert said(shop) == ["out.txt kept: it is another result; written as out.2.txt"]
    assert contents(shop) == {"out.txt": "mine", "out.2.txt": "w"}
    assert planned(shop, "w") == []


def test_each_result_is_found_again_under_its_own_number(shop: Workshop) -> None:
    """Also where a number between was removed; a free name without a number is filled first."""
    for text in ("one", "two", "three", "one", "two", "three"):
        run(shop, text)
    assert contents(shop) == {"out.txt": "one", "out.2.txt": "two", "out.3.txt": "three"}
    assert delivered(shop) == [("out.3.txt", False)]
    assert said(shop) == []
    (shop.folder / "out.2.txt").unlink()
    run(shop, "three")
    assert delivered(shop) == [("out.3.txt", False)]
    assert planned(shop, "two")[0].endswith(") stays: it is another result; written as out.4.txt")
    run(shop, "two")
    (shop.folder / "out.txt").unlink()
    run(shop, "two")
    assert contents(shop) == {"out.txt": "two", "out.3.txt": "three", "out.4.txt": "two"}


def test_overwrite_takes_the_place_of_another_file(shop: Workshop) -> None:
    """The plan says so, and the run; the same result again is no replacement."""
    (shop.folder / "out.txt").write_text("mine")
    (line,) = planned(shop, "w", overwrites=True)
    assert line.endswith(") will be replaced (--overwrite)")
    run(shop, "w", overwrites=True)
    (line,) = said(shop)
    assert line.endswith(") was replaced (--overwrite)")
    run(shop, "w", overwrites=True)
    assert said(shop) == planned(shop, "w", overwrites=True) == []
    assert contents(shop) == {"out.txt": "w"}


def test_the_same_result_takes_no_number(shop: Workshop) -> None:
    """Nor does another note behind the same film, nor equal bytes that were not stored any more."""
    run(shop, "w")
    assert planned(shop, "w") == []
    run(shop, "w")
    assert said(shop) == []
    (shop.folder / "out.txt").write_bytes(b"w and a note of an earlier version")
    assert planned(shop, "w") == []
    run(shop, "w")
    assert said(shop) == []
    assert (shop.folder / "out.txt").read_bytes() == b"w"
    for path in shop.objects():
        path.unlink()
    run(shop, "w")
    assert contents(shop) == {"out.txt": "w"}


def test_a_folder_under_the_name_is_an_error(shop: Workshop) -> None:
    (shop.folder / "out.txt").mkdir()
    with pytest.raises(RecipeError, match=r"out.txt cannot be written: a folder has this name"):
        run(shop, "w")
    assert [path.name for path in shop.folder.glob("*out*")] == ["out.txt"]


@pytest.mark.parametrize("has_links", [True, False])
def test_runs_at_the_same_time_never_share_a_name(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    """Eight at once, on file systems with and without links: eight files, each whole."""
    if not has_links:

        def refuse(*paths: object, **more: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    texts = [str(number) * 50_000 for number in range(8)]
    shops = [Workshop(shop.folder) for _ in texts]
    barrier = threading.Barrier(len(texts))

    def work(own: Workshop, text: str) -> None:
        barrier.wait()
        run(own, text)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(shops, texts, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(contents(shop).values()) == texts
    assert len(contents(shop)) == len(texts)
