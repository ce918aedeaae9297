"""A cache that cannot be written costs nobody the run: results are held, delivered, and let go."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from faults_for_tests import OPERATIONS, as_a_user, forked, refuse
from toy import Join, Save, Word, Workshop, damage

from s2v_flow.errors import ExitCode, S2VFlowError
from s2v_flow.graph.events import Event, NodeFinished, Noted
from s2v_flow.graph.interrupt import StoppedError
from s2v_flow.graph.node import Node
from s2v_flow.graph.ports import Ref
from s2v_flow.graph.run import Run

R = Ref.parse
NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EIO)
NUMBERS += (errno.ESTALE,)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return Workshop(tmp_path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def diamond(suffix: str = "") -> dict[str, Node]:
    return {
        "leaf": Word(text="a"),
        "left": Join(a=R("$leaf"), suffix="l"),
        "right": Join(a=R("$leaf"), suffix="r"),
        "both": Join(a=R("$left"), b=R("$right"), suffix=suffix),
        "save": Save(a=R("$both"), file="out/saved.txt"),
    }


def warned(shop: Workshop) -> list[str]:
    return [event.text for event in shop.events if isinstance(event, Noted) and event.is_warning]


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".s2vflow-*") if "/locks/" not in str(path)]


@pytest.mark.parametrize(
    ("operation", "number"),
    [*((operation, errno.ENOSPC) for operation in OPERATIONS), *(("open", number) for number in NUMBERS[1:])],
)
def test_whatever_the_cache_refuses_from_whenever_on_the_file_is_delivered(
    operation: str, number: int, shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one warning at most; what the result says is not kept is exactly what the next run computes."""
    cache = shop.folder / "cache"
    for first in (0, 1, 2, 3, 5, 8, 13):
        with monkeypatch.context() as patched:
            if operation != "fsync":
                patched.setattr(os, "fsync", lambda descriptor: None)
            refusal = refuse(patched, operation, cache, number, first)
            result = shop.run(diamond())
        assert (shop.folder / "out/saved.txt").read_bytes() == b"alar"
        assert leftovers(shop.folder) == []
        texts = warned(shop)
        assert len(texts) == bool(result.not_kept)
        if texts:
            assert str(cache) in texts[0]
            reason = {errno.ENOSPC: "no space left", errno.EDQUOT: "the quota is used up"}
            assert reason.get(number, os.strerror(number)) in texts[0]
            assert ("ulimit -n" in texts[0]) == (number == errno.EMFILE)
        again = shop.run(diamond())
        if operation == "fsync":  # what could not be flushed may have come through all the same
            assert set(again.computed) <= set(result.not_kept)
        else:
            assert set(again.computed) == set(result.not_kept)
        assert (again.not_kept, warned(shop)) == ((), [])
        shutil.rmtree(cache)
        if refusal.refused == 0:
            break


@pytest.mark.parametrize("where", ["/dev/null/cache", "/proc/nothing/cache", "a file"])
@pytest.mark.usefixtures("quick")
def test_a_cache_folder_that_cannot_be_made_is_no_obstacle(where: str, tmp_path: Path) -> None:
    """A read-only home, a file in its place."""
    (tmp_path / "cache").symlink_to(tmp_path / "file" if where == "a file" else where)
    (tmp_path / "file").write_text("x")
    shop = Workshop(tmp_path)
    result = shop.run(diamond())
    assert result.not_kept == result.computed == ("leaf", "left", "right", "both", "save")
    assert result.to_json()["not_kept"] == list(result.not_kept)
    assert (tmp_path / "out/saved.txt").read_bytes() == b"alar"
    assert len(warned(shop)) == 1


@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_forbidden_cache_folder_is_no_obstacle(mode: int, tmp_path: Path) -> None:
    """With real modes; what is stored and can be read there is used."""
    Workshop(tmp_path).run(diamond())  # imports what the child may not be able to read
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def run() -> None:
            shop = Workshop(folder)
            shop.run({"leaf": Word(text="a"), "save": Save(a=R("$leaf"), file="leaf.txt")})
            for path in sorted((folder / "cache").rglob("*"), reverse=True):
                path.chmod(stat.S_IMODE(path.stat().st_mode) & 0o555)
            (folder / "cache").chmod(mode)
            try:
                result = shop.run(diamond())
            finally:
                (folder / "cache").chmod(0o700)
                for path in (folder / "cache").rglob("*"):
                    path.chmod(0o700)
            assert (folder / "out/saved.txt").read_bytes() == b"alar"
            assert (result.cached == ("leaf",)) == (mode == 0o500)
            assert len(warned(shop)) == 1, warned(shop)

        as_a_user(run, folder)


@pytest.mark.usefixtures("quick")
def test_what_nobody_needs_any_more_is_let_go(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chain of 30 results never more than two are in memory; none at the end."""
    sizes = []
    nodes: dict[str, Node] = {"n0": Word(text="w")}
    nodes |= {f"n{i}": Join(a=R(f"$n{i - 1}"), suffix="x") for i in range(1, 30)}
    nodes["save"] = Save(a=R("$n29"), file="out.txt")
    runs: list[Run] = []
    made = Run.__post_init__
    monkeypatch.setattr(Run, "__post_init__", lambda run: (made(run), runs.append(run))[0])

    class Watching(list[Event]):
        def append(self, event: Event) -> None:
            super().append(event)
            if isinstance(event, NodeFinished):
                sizes.append(len(runs[-1]._results._payloads))

    shop.events = Watching()
    refuse(monkeypatch, "mkdir", shop.folder / "cache", errno.EROFS)
    assert len(shop.run(nodes).not_kept) == 31
    assert max(sizes) == 2
    assert not runs[-1]._results._payloads
    assert (shop.folder / "out.txt").read_bytes() == b"w" + 29 * b"x"


@pytest.mark.usefixtures("quick")
def test_space_that_comes_back_is_used_again(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each publish asks; it is said once."""
    refuse(monkeypatch, "replace", shop.folder / "cache", errno.ENOSPC, 2, 4)
    result = shop.run(diamond())
    assert len(warned(shop)) == 1
    assert 0 < len(result.not_kept) < 4
    shop.run(diamond())
    assert tuple(shop.started()) == result.not_kept


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, ExitCode.DISK_FULL), (errno.EROFS, ExitCode.FAILED)])
@pytest.mark.usefixtures("quick")
def test_a_result_that_is_for_the_cache_alone_ends_the_run(
    number: int, code: ExitCode, shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing uses it and no file is made of it; the error says what is lost with it."""
    refuse(monkeypatch, "link", shop.folder / "cache", number)
    refuse(monkeypatch, "replace", shop.folder / "cache", number)
    with pytest.raises(S2VFlowError, match=r"(while writing|cannot write) under") as caught:
        shop.run({"word": Word(text="w"), "last": Join(a=R("$word"))})
    assert caught.value.exit_code == code
    assert "not these" in (caught.value.kept or "")
    assert (caught.value.kept or "").endswith(": word")


@pytest.mark.usefixtures("quick")
def test_a_file_that_cannot_be_written_where_it_is_to_go_ends_the_run(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result is stored, so that the next run has only to deliver it; where it is not, the error says so."""
    (shop.folder / "out").mkdir()
    with monkeypatch.context() as patched:
        refuse(patched, "replace", shop.folder / "out", errno.ENOSPC)
        with pytest.raises(S2VFlowError, match=r"no space left while writing under .*saved\.txt") as caught:
            shop.run(diamond())
        assert caught.value.exit_code == ExitCode.DISK_FULL
        assert caught.value.kept == "everything that was stored before stays usable"
        shutil.rmtree(shop.folder / "cache")
        refuse(patched, "mkdir", shop.folder / "cache", errno.ENOSPC)
        with pytest.raises(S2VFlowError) as caught:
            shop.run(diamond())
        assert "leaf, left, right, both, save" in (caught.value.kept or "")
    assert leftovers(shop.folder) == []


class Film(Save):
    """Writes a film as the real writer does, which says where it could not."""

    kind = "film"
    full: tuple[str, ...] = ()

    def run(self, context: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        path = context.scratch / "film.mp4"
        path.write_bytes(inputs["a"].read())
        if any(part in str(path) for part in self.full):
            text = f"{path}: cannot be written (No space left on device)"
            raise S2VFlowError(text, "free some space on that disk", exit_code=ExitCode.DISK_FULL)
        return {"file": path}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("full", [(), ("cache/",), ("cache/", "temporary/"), ("cache/", "out/")])
def test_a_film_for_which_the_cache_has_no_space_is_made_elsewhere(full: tuple[str, ...], shop: Workshop) -> None:
    """In the folder for temporary files or beside the output, and stored if there is space for that by then."""
    nodes = {"word": Word(text="w"), "film": Film(a=R("$word"), file="out/film.mp4", full=full)}
    result = shop.run(nodes)
    assert (shop.folder / "out/film.mp4").read_bytes() == b"w"
    assert (len(warned(shop)), result.not_kept) == (len(full) > 0, ())
    assert leftovers(shop.folder) == []


@pytest.mark.usefixtures("quick")
def test_a_film_for_which_there_is_no_space_anywhere_ends_the_run(shop: Workshop) -> None:
    nodes = {"word": Word(text="w"), "film": Film(a=R("$word"), file="out/film.mp4", full=("/",))}
    with pytest.raises(S2VFlowError, match="no space left while writing under") as caught:
        shop.run(nodes)
    assert caught.value.exit_code == ExitCode.DISK_FULL
    assert leftovers(shop.folder) == []
    assert shop.store.lookup(shop.statuses["word"].fingerprint or "") is not None


@pytest.mark.usefixtures("quick")
def test_a_film_that_has_become_an_object_before_its_entry_was_refused_is_delivered(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scratch file is gone by then."""
    monkeypatch.setattr("s2v_flow.cache.store.flush_folder", _refuse_entries)
    nodes = {"word": Word(text="w"), "film": Film(a=R("$word"), file="out/film.mp4")}
    assert shop.run(nodes).not_kept == ("word", "film")
    assert (shop.folder / "out/film.mp4").read_bytes() == b"w"


def _refuse_entries(folder: Path) -> None:
    if folder.parent.name == "entries":
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.usefixtures("quick")
def test_what_a_killed_run_left_beside_the_output_goes_with_the_next(shop: Workshop) -> None:
    (shop.folder / "out").mkdir()
    left = shop.folder / "out" / ".s2vflow-00000000-1-abc"
    left.mkdir()
    os.utime(left, (1, 1))
    shop.run(diamond())
    assert leftovers(shop.folder) == []


@pytest.mark.parametrize("how", ["flip", "cut"])
@pytest.mark.usefixtures("quick")
def test_a_damaged_result_that_cannot_even_be_moved_away_is_computed_again(
    how: str, shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is read-only: what is damaged in it stays, and is not read."""
    shop.run(diamond())
    damage(shop.object_of(b"al"), how)
    for operation in OPERATIONS:
        refuse(monkeypatch, operation, shop.folder / "cache", errno.EROFS)
    result = shop.run(diamond("!"))
    assert (shop.folder / "out/saved.txt").read_bytes() == b"alar!"
    assert set(result.not_kept) == {"left", "both", "save"}


@pytest.mark.usefixtures("quick")
def test_too_many_open_files_blame_no_object(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be opened now may be sound: it is computed again, and stays where it is."""
    shop.run(diamond())
    path, read = shop.object_of(b"al"), Path.read_bytes

    def reading(self: Path) -> bytes:
        if self == path:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", reading)
    refuse(monkeypatch, "open", shop.folder / "cache", errno.EMFILE)
    assert "left" in shop.run(diamond("!")).not_kept
    assert (shop.folder / "out/saved.txt").read_bytes() == b"alar!"
    monkeypatch.undo()
    assert path.read_bytes() == b"al"
    assert not (shop.folder / "cache/quarantine").exists()


@pytest.mark.usefixtures("quick")
def test_equal_nodes_share_a_held_result(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "mkdir", shop.folder / "cache", errno.EROFS)
    nodes = {"one": Word(text="w"), "two": Word(text="w"), "save": Join(a=R("$one"), b=R("$two"))}
    shop.run({**nodes, "out": Save(a=R("$save"), file="out.txt")})
    assert shop.started() == ["one", "save", "out"]
    assert (shop.folder / "out.txt").read_bytes() == b"ww"


@pytest.mark.usefixtures("quick")
def test_a_stop_says_what_is_not_kept(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "mkdir", shop.folder / "cache", errno.EROFS)
    stops: Iterator[bool] = iter([False, False, True])
    made: Callable[..., None] = Run.__init__
    monkeypatch.setattr(Run, "__init__", lambda run, **given: made(run, **given, should_stop=lambda: next(stops, True)))
    with pytest.raises(StoppedError, match=r"stored \(except leaf, left: the cache could not be written\), and"):
        shop.run(diamond())


def test_a_limit_of_the_system_is_no_obstacle(tmp_path: Path) -> None:
    """A real one: no file may be larger than 2,000 bytes. What fits is stored."""

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        shop = Workshop(tmp_path)
        big = {"leaf": Word(text="a"), "big": Join(a=R("$leaf"), suffix="b" * 3000), "small": Word(text="c")}
        files = {"save": Save(a=R("$small"), file="out.txt"), "last": Cut(a=R("$big"), file="cut.txt")}
        result = shop.run({**big, **files})
        assert result.not_kept == ("big",)
        assert (tmp_path / "cut.txt").read_bytes() == b"abbb"
        (text,) = warned(shop)
        assert "File too large" in text
        assert "ulimit -f" in text

    forked(run)


class Cut(Save):
    kind = "cut"

    def run(self, context: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"file": inputs["a"].read()[:4]}
