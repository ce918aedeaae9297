"""A part of a cache as one tar file: entries and their objects, checked again where they are taken in."""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from s2v_flow.cache.housekeeping import Kept
from s2v_flow.cache.store import Entry, Store, file_sha256, read_entry
from s2v_flow.errors import MissingError, RefusedError
from s2v_flow.files.atomic import finish, is_file_there, temporary, writing

_ENTRY = re.compile(r"entries/[0-9a-f]{2}/[0-9a-f]{64}\.json")
_OBJECT = re.compile(r"objects/[0-9a-f]{2}/[0-9a-f]{64}\.[a-z0-9]{1,16}")
MAX_MEMBERS = 100_000
_FIX = "use a file that `s2vflow cache export` wrote"


def export_bundle(root: Path, chosen: Sequence[Kept], target: Path) -> int:
    """Write entries and their objects into a tar file, whole or not at all; return how many objects there are.

    Raises:
        DamagedObjectError: An object is damaged or gone.
        RefusedError: Another file is there, and no earlier bundle.
        S2VFlowError: The file cannot be written.
    """
    store = Store(root)
    if is_file_there(target) and not _is_bundle(target):
        raise RefusedError(f"{target}: another file is there, and stays", fix="name a new one, or remove it")
    for item in {item for kept in chosen for item in kept.entry.outputs.values()}:
        store.check(item)
    with writing(target), temporary(target.absolute().parent, ".tar") as (file, name):
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            names = {item.file_name: item for kept in chosen for item in kept.entry.outputs.values()}
            for _, item in sorted(names.items()):
                _add(tar, root / item.place, item.place)
            for kept in chosen:
                _add(tar, kept.path, f"entries/{kept.path.parent.name}/{kept.path.name}")
        finish(file)
        os.replace(name, target)
    return len(names)


def _is_bundle(path: Path) -> bool:
    with suppress(OSError, tarfile.TarError), tarfile.open(path, mode="r:") as tar:
        first = tar.next()
        return first is None or _is_known(first.name)
    return False


def _is_known(name: str) -> bool:
    return bool(_ENTRY.fullmatch(name) or _OBJECT.fullmatch(name))


def _add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    info = tarfile.TarInfo(name)  # neither times nor owners: equal results make equal files
    info.size = path.stat().st_size
    with path.open("rb") as file:
        tar.addfile(info, file)


def import_bundle(root: Path, source: Path, *, is_dry: bool = False) -> list[Entry]:
    """Take in what a tar file brings, each object compared with its digest; return the entries that were not there.

    Raises:
        RefusedError: It holds something that does not belong there, or that is damaged; nothing was taken in.
        MissingError: It cannot be read.
        S2VFlowError: The cache cannot be written.
    """
    store = Store(root)
    with store.scratch() as scratch, writing(scratch):
        entries = [entry for entry in _unpacked(source, scratch) if store.lookup(entry.fingerprint) is None]
        for number, entry in enumerate([] if is_dry else entries):
            outputs: dict[str, bytes | Path] = {}
            for port, item in entry.outputs.items():  # a port each: publishing moves the files, and objects are shared
                own = scratch / f"{number}-{len(outputs)}{item.suffix}"
                shutil.copyfile(scratch / item.file_name, own)
                outputs[port] = own
            store.publish(entry.fingerprint, entry.preimage, outputs, entry.facts)
    return entries


def _unpacked(source: Path, scratch: Path) -> list[Entry]:
    """Unpack into a scratch folder what has an expected name, and check all of it."""
    try:
        source.open("rb").close()
    except OSError as error:
        raise MissingError(f"{source}: cannot be read: {error.strerror}") from error
    try:
        with tarfile.open(source, mode="r:") as tar:  # not compressed: nothing small becomes large
            for number, member in enumerate(tar):
                if not _is_known(member.name) or not member.isreg() or member.issparse() or number >= MAX_MEMBERS:
                    raise RefusedError(f"{source}: {member.name!r} does not belong into a cache", fix=_FIX)
                content = tar.extractfile(member)
                assert content is not None, "regular files have content"
                with (scratch / Path(member.name).name).open("wb") as file:
                    shutil.copyfileobj(content, file)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise RefusedError(f"{source} is no sound tar file: {error}", fix=_FIX) from error
    found = []
    for path in sorted(scratch.glob("*.json")):
        entry = read_entry(path)
        if entry is None:
            raise RefusedError(f"{source}: the entry {path.stem[:12]} is damaged", fix=_FIX)
        for item in entry.outputs.values():
            held = scratch / item.file_name
            if not held.is_file() or held.stat().st_size != item.size or file_sha256(held) != item.sha256:
                raise RefusedError(f"{source}: the object {item.sha256[:12]} is missing or damaged", fix=_FIX)
        found.append(entry)
    return found
