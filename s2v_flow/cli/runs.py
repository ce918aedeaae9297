"""The commands that look back: runs, show, diff, reproduce; and lock."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from s2v_flow.cli import report
from s2v_flow.cli.completion import complete_run
from s2v_flow.cli.options import (
    FILE,
    FOLDER,
    OrderedCommand,
    folder_options,
    json_option,
    level_options,
    make_options,
    recipe_options,
)
from s2v_flow.errors import ExitCode

if TYPE_CHECKING:
    from s2v_flow.cli.progress import Level

_CACHE = click.option("--cache-dir", type=FOLDER, help="Where artifacts and runs are kept.  [env: S2VFLOW_CACHE_DIR]")


@click.command(cls=OrderedCommand)
@click.option("--keep-last", type=click.IntRange(min=0), metavar="N", help="Forget all runs but the last N.")
@click.option("--dry-run", is_flag=True, help="With --keep-last: only say which would be forgotten.")
@json_option
@_CACHE
def runs(keep_last: int | None, dry_run: bool, as_json: bool, cache_dir: Path | None) -> None:
    """List the runs, the newest first, with what changed since the run before of the same recipe.

    A run is running, finished, failed, interrupted (by Ctrl-C or a signal) or killed. Results and videos do not depend
    on a run's manifest.
    """
    from s2v_flow.history.find import forget_runs, list_runs
    from s2v_flow.history.text import listing_json, runs_text
    from s2v_flow.runs.record import runs_root

    if dry_run and keep_last is None:
        raise click.UsageError("--dry-run says what --keep-last would forget: runs --keep-last 20 --dry-run")
    root = runs_root(make_options(cache_dir=cache_dir, device=None).cache_root)
    if keep_last is not None:
        gone = forget_runs(root, keep_last, is_dry=dry_run)
        verb = "would be forgotten" if dry_run else "forgotten"
        report.print_message(f"{len(gone)} runs {verb}: {', '.join(gone)}" if gone else f"0 runs {verb}")
    listing = list_runs(root)
    for note in listing.notes:
        report.print_message(f"note: skipped: {note}")
    report.print_json(listing_json(listing)) if as_json else report.print_table(runs_text(listing))


@click.command(cls=OrderedCommand)
@click.argument("run", shell_complete=complete_run)
@json_option
@_CACHE
def show(run: str, as_json: bool, cache_dir: Path | None) -> None:
    """Show a run (its id, the beginning of one, or `last`), or how an mp4 was made."""
    from s2v_flow.history.find import find
    from s2v_flow.history.text import show_text
    from s2v_flow.runs.record import runs_root

    found = find(runs_root(make_options(cache_dir=cache_dir, device=None).cache_root), run)
    report.print_json(found.model_dump(mode="json")) if as_json else report.print_table(show_text(found))


class _Box(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """A rectangle of pixels: x,y,width,height."""

    name = "x,y,w,h"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int, int, int]:
        try:
            x, y, width, height = map(int, value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not four whole numbers like 52,80,24,16", param, ctx)
        return x, y, width, height


@click.command(cls=OrderedCommand)
@click.argument("video", metavar="VIDEO|RUN", shell_complete=complete_run)
@click.option("--mouth", type=_Box(), help="Where the mouth is, in pixels, unless it is to be found.")
@json_option
@_CACHE
def quality(video: str, mouth: tuple[int, int, int, int] | None, as_json: bool, cache_dir: Path | None) -> None:
    """Measure a video, or what a run wrote: lips against voice, drift, seams, pictures that show nothing."""
    from s2v_flow.history.text import figures_of, figures_text

    found = figures_of(video, make_options(cache_dir=cache_dir, device=None).cache_root, mouth)
    report.print_json(found) if as_json else report.print_result(figures_text(found))


@click.command("report", cls=OrderedCommand)
@click.argument("subject", metavar="VIDEO|RUN", shell_complete=complete_run)
@click.option("-o", "--output", type=FILE, default="report.html", help="The page to write.", show_default=True)
@click.option("--embed", is_flag=True, help="Put small copies of the videos inside, as far as they fit.")
@json_option
@_CACHE
def report_(subject: str, output: Path, embed: bool, as_json: bool, cache_dir: Path | None) -> None:
    """Write a page about a run (its id, or `last`) or a video: one HTML file that needs no network.

    It shows the video with its film strip, wave, chunks and prompts, lips against voice, drift and seams; of a run also
    time, memory, the graph and what differs from the run before; a matrix as a grid.
    """
    from s2v_flow.views.report import write_report

    page = write_report(subject, output, make_options(cache_dir=cache_dir, device=None), embed=embed)
    report.print_json({"report": str(page)}) if as_json else report.print_result(str(page))


@click.command(cls=OrderedCommand)
@click.argument("a", shell_complete=complete_run)
@click.argument("b", shell_complete=complete_run)
@click.option("--exit-code", is_flag=True, help="Leave with 1 if anything but times differs.")
@click.option(
    "--report", "page", type=FILE, metavar="FILE", help="Write a page too that shows both and the difference."
)
@json_option
@_CACHE
def diff(a: str, b: str, exit_code: bool, page: Path | None, as_json: bool, cache_dir: Path | None) -> None:
    """Compare two runs, mp4s or recipes: values, models, inputs, environment, times, results."""
    from s2v_flow.history.compare import compare

    options = make_options(cache_dir=cache_dir, device=None)
    if page is not None:
        from s2v_flow.views.report import write_report

        report.print_message(f"the report is {write_report(a, page, options, against=b)}")
    found = compare(a, b, options)
    report.print_json(found.to_json()) if as_json else report.print_table(found.to_text())
    if exit_code and not found.is_same:
        sys.exit(ExitCode.FAILED)


@click.command(cls=OrderedCommand)
@click.argument("video", type=FILE)
@json_option
@click.option("-o", "--output", type=FOLDER, metavar="DIRECTORY", help="Keep the new video there.")
@level_options
@folder_options
def reproduce(video: Path, as_json: bool, output: Path | None, level: Level, **given: Any) -> None:
    """Make an mp4 again from what it says of itself; leave with 1, and name what differs, if its frames do."""
    from s2v_flow.cli.progress import Progress
    from s2v_flow.history.reproduce import reproduce as make_again

    progress = Progress(video.stem, level=level)
    try:
        found = make_again(video, make_options(**given), output_dir=output, on_event=progress)
    finally:
        progress.close()
    report.print_json(found.to_json()) if as_json else report.print_result(found.to_text())
    if not found.is_same:
        sys.exit(ExitCode.FAILED)


@click.command(cls=OrderedCommand)
@recipe_options
@click.option("-o", "--output", type=FILE, help="The lock to write, instead of <recipe>.lock.yaml beside the recipe.")
@click.option("--force", is_flag=True, help="Overwrite another file that is there.")
@folder_options
def lock(recipe: Path, as_json: bool, output: Path | None, force: bool, **given: Any) -> None:
    """Write down the digests of a recipe's models and inputs; `run --locked` refuses any others."""
    from s2v_flow.history.reproduce import make_lock
    from s2v_flow.runs.lockfile import lock_path
    from s2v_flow.start.project import write_recipe

    target = output or lock_path(recipe)
    text = make_lock(recipe, make_options(**given))
    write_recipe(target, text, force=force, replaces=b"\nlock: ")
    report.print_json({"lock": str(target)}) if as_json else report.print_result(str(target))
