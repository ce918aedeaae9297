"""The commands that look after the cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from s2v_flow.cli import report
from s2v_flow.cli.options import FILE, OrderedGroup, all_of, cache_option, json_option, make_options
from s2v_flow.errors import ExitCode, S2VFlowError, UsageError
from s2v_flow.wording import size_text

if TYPE_CHECKING:
    from s2v_flow.api import Options
    from s2v_flow.cache.housekeeping import Kept

_DRY = click.option("--dry-run", is_flag=True, help="Only say what would be done.")
_NODE = click.option("--node", "nodes", multiple=True, metavar="NAME", help="All results of a plan node; repeatable.")
_CHOSEN = click.argument("fingerprints", nargs=-1, metavar="[FINGERPRINT]...")
# of a command that changes the results which it is given
_of_results = all_of(cache_option, json_option, _DRY, _NODE, _CHOSEN)


@click.group(cls=OrderedGroup)
def cache() -> None:
    """Look after the cache: what is in it, is it sound, make it smaller, take parts elsewhere."""


@cache.command()
@json_option
@cache_option
def ls(as_json: bool, cache_dir: Path | None) -> None:
    """List what is stored, the cheapest to lose first."""
    _show([item.to_json() for item in _inventory(cache_dir)], as_json, {})


@cache.command()
@json_option
@cache_option
def stats(as_json: bool, cache_dir: Path | None) -> None:
    """Print figures about the cache, its limit and what it leaves free on the disk."""
    from s2v_flow.cache.budget import NO_LIMIT, default_reserve, free_bytes
    from s2v_flow.cache.housekeeping import stats as figures

    limit, root = _limit(cache_dir), _root(cache_dir)
    has_limit = limit != NO_LIMIT
    found = figures(root) | {
        "limit_bytes": limit if has_limit else None,
        "reserve_bytes": default_reserve(root) if has_limit else None,
        "free_bytes": free_bytes(root),
    }
    text = "\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in found.items())
    report.print_json(found) if as_json else report.print_result(text)


@cache.command()
@click.option("--repair", is_flag=True, help="Move what is damaged to quarantine; it is computed again when needed.")
@_DRY
@json_option
@cache_option
def verify(repair: bool, dry_run: bool, as_json: bool, cache_dir: Path | None) -> None:
    """Read every entry and object and compare digests; leave with 1 if something is damaged."""
    from s2v_flow.cache.housekeeping import verify as verified

    found = verified(_root(cache_dir), is_repair=repair and not dry_run)
    damaged = [f"damaged: {item['fingerprint'][:12]}: {item['reason']}" for item in found["damaged"]]
    text = "\n".join([*damaged, f"{found['sound']} sound, {len(damaged)} damaged"])
    report.print_json(found) if as_json else report.print_result(text)
    if damaged and not found["repaired"]:
        sys.exit(ExitCode.FAILED)


@cache.command()
@click.option("--limit", metavar="SIZE", help="Such as 20G; unless given, what a run is held to.")
@_DRY
@json_option
@cache_option
def gc(limit: str | None, dry_run: bool, as_json: bool, cache_dir: Path | None) -> None:
    """Make the cache smaller: first what is computed again most quickly for its size.

    Never what is pinned, younger than an hour, or of a run that lives, but for decoded frames.
    """
    from s2v_flow.cache.budget import parse_size
    from s2v_flow.cache.housekeeping import collect

    found = collect(_root(cache_dir), _limit(cache_dir) if limit is None else parse_size(limit), is_dry=dry_run)
    if as_json:
        report.print_json(found)
        return
    _show(found["removed"], False, {})
    words = "would shrink" if dry_run else "shrank"
    report.print_result(f"{words} from {size_text(found['bytes_before'])} to {size_text(found['bytes_after'])}")
    if not found["within_limit"]:
        report.print_message(
            f"note: the rest is pinned, young or in use; the limit is {size_text(found['limit_bytes'])}"
        )


@cache.command()
@_of_results
def rm(fingerprints: Sequence[str], nodes: Sequence[str], dry_run: bool, as_json: bool, cache_dir: Path | None) -> None:
    """Remove results, by the beginnings of their fingerprints or by node."""
    from s2v_flow.cache.housekeeping import remove

    chosen = _choose(cache_dir, fingerprints, nodes)
    gone = remove(_root(cache_dir), [item.entry.fingerprint for item in chosen], is_dry=dry_run)
    _show([item.to_json() for item in gone], as_json, {"dry_run": dry_run})


@cache.command()
@_of_results
def pin(
    fingerprints: Sequence[str], nodes: Sequence[str], dry_run: bool, as_json: bool, cache_dir: Path | None
) -> None:
    """Keep results whatever `gc` is told."""
    _pin(_choose(cache_dir, fingerprints, nodes), cache_dir, True, dry_run, as_json)


@cache.command()
@_of_results
def unpin(
    fingerprints: Sequence[str], nodes: Sequence[str], dry_run: bool, as_json: bool, cache_dir: Path | None
) -> None:
    """Take `pin` back."""
    _pin(_choose(cache_dir, fingerprints, nodes), cache_dir, False, dry_run, as_json)


def _pin(chosen: Sequence[Kept], cache_dir: Path | None, is_pinned: bool, dry_run: bool, as_json: bool) -> None:
    from s2v_flow.cache.housekeeping import pin as set_pins

    if not dry_run:
        set_pins(_root(cache_dir), [item.entry.fingerprint for item in chosen], is_pinned=is_pinned)
    _show([{**item.to_json(), "pinned": is_pinned} for item in chosen], as_json, {"dry_run": dry_run})


@cache.command("export")
@click.argument("target", type=FILE)
@_CHOSEN
@_NODE
@click.option("--run", "run_id", metavar="RUN", help="All results of a run.")
@_DRY
@json_option
@cache_option
def export(
    target: Path,
    fingerprints: Sequence[str],
    nodes: Sequence[str],
    run_id: str | None,
    dry_run: bool,
    as_json: bool,
    cache_dir: Path | None,
) -> None:
    """Write results into a tar file: those named, a run's, or all."""
    from s2v_flow.cache.bundle import export_bundle

    if run_id is not None and (fingerprints or nodes):
        raise click.UsageError("--run takes all results of a run: leave out the other names, or --run")
    root = _root(cache_dir)
    if run_id is not None:
        from s2v_flow.history.find import find
        from s2v_flow.runs.manifest import Manifest
        from s2v_flow.runs.record import runs_root

        run = find(runs_root(root), run_id)
        made = [node.fingerprint for node in (run.nodes if isinstance(run, Manifest) else run.nodes.values())]
        kept = [item for item in _inventory(cache_dir) if item.entry.fingerprint in made and not item.is_spare]
    elif fingerprints or nodes:
        kept = _choose(cache_dir, fingerprints, nodes)
    else:
        kept = _inventory(cache_dir)
    if not dry_run:
        export_bundle(root, kept, target)
    _show([item.to_json() for item in kept], as_json, {"file": str(target), "dry_run": dry_run})


@cache.command("import")
@click.argument("source", type=FILE)
@_DRY
@json_option
@cache_option
def import_(source: Path, dry_run: bool, as_json: bool, cache_dir: Path | None) -> None:
    """Take in what `export` wrote; every digest is checked first."""
    from s2v_flow.cache.bundle import import_bundle

    new = import_bundle(_root(cache_dir), source, is_dry=dry_run)
    rows = [
        {
            "fingerprint": entry.fingerprint,
            "node": entry.facts.get("node"),
            "kind": entry.preimage.get("kind"),
            "bytes": sum(item.size for item in set(entry.outputs.values())),
            "seconds": entry.facts.get("seconds"),
        }
        for entry in new
    ]
    _show(rows, as_json, {"file": str(source), "dry_run": dry_run})


def _options(cache_dir: Path | None) -> Options:
    return make_options(cache_dir=cache_dir, device=None)


def _root(cache_dir: Path | None) -> Path:
    """Return the cache folder, which need not be there; one that is there must be readable."""
    root = _options(cache_dir).cache_root
    try:
        with os.scandir(root):
            pass
    except FileNotFoundError:
        pass
    except OSError as error:
        text = f"{root}: the cache cannot be read: {error.strerror}"
        raise S2VFlowError(text, "name another with --cache-dir") from error
    return root


def _limit(cache_dir: Path | None) -> int:
    """Return what a run's cache is held to: the environment's, the user's default, or the program's."""
    from s2v_flow.cache.budget import default_limit

    given = _options(cache_dir).size_limit
    return default_limit(_root(cache_dir)) if given is None else given


def _inventory(cache_dir: Path | None) -> list[Kept]:
    from s2v_flow.cache.housekeeping import inventory

    return inventory(_root(cache_dir))


def _choose(cache_dir: Path | None, fingerprints: Sequence[str], nodes: Sequence[str]) -> list[Kept]:
    """Return the entries that are meant; each name has to mean something."""
    if not fingerprints and not nodes:
        raise click.UsageError("name results: the beginnings of their fingerprints, or --node NAME")
    kept = _inventory(cache_dir)
    found: dict[str, Kept] = {}
    for given in (*fingerprints, *nodes):
        is_node = given in nodes
        meant = [
            item
            for item in kept
            if (item.entry.facts.get("node") == given if is_node else item.entry.fingerprint.startswith(given))
        ]
        if not meant or (len(meant) > 1 and not is_node):
            count = "none" if not meant else str(len(meant))
            raise UsageError(f"{given}: {count} of the stored results are meant", "`s2vflow cache ls` lists them")
        found.update((item.entry.fingerprint, item) for item in meant)
    return list(found.values())


def _show(rows: Sequence[dict[str, Any]], as_json: bool, more: dict[str, Any]) -> None:

    if as_json:
        report.print_json({**more, "entries": list(rows)})
        return
    for row in rows:
        mark = "  pinned" if row.get("pinned") else ""
        seconds = row.get("seconds")
        took = f"{seconds:.1f} s" if isinstance(seconds, (int, float)) else ""
        line = f"{row['fingerprint'][:12]}  {row['node'] or '':<16}  {row['kind'] or '':<14}"
        report.print_result(f"{line}  {size_text(row['bytes']):>9}  {took:>9}{mark}")
    would = ", nothing was changed" if more.get("dry_run") else ""
    report.print_message(f"{len(rows)} results, {size_text(sum(row['bytes'] for row in rows))}{would}")
