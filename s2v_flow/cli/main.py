"""The command line: its help, commands about a recipe, streams that never fail, and where errors become exit codes."""

from __future__ import annotations

import errno
import io
import os
import shlex
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

import s2v_flow
from s2v_flow.cli import report, start
from s2v_flow.cli.batch import batch
from s2v_flow.cli.cache import cache
from s2v_flow.cli.models import models
from s2v_flow.cli.options import (
    OrderedGroup,
    folder_options,
    gpus_option,
    level_options,
    make_options,
    output_options,
    recipe_options,
    record_options,
    selection_options,
    view_options,
)
from s2v_flow.cli.runs import diff, lock, quality, report_, reproduce, runs, show
from s2v_flow.errors import ExitCode, S2VFlowError, broken_package
from s2v_flow.graph.interrupt import StoppedError, StopRequest

if TYPE_CHECKING:
    from s2v_flow.cli.progress import Level

_GROUPS: Mapping[str, Mapping[str, str]] = {
    "Make a video": {
        "make": "portrait.png voice.wav 'She speaks calmly.' -o talk.mp4",
        "run": "talk.yaml --set steps=20",
        "plan": "talk.yaml -m seed=1..8",
        "try": "talk.yaml",
        "batch": "talk.yaml --jobs jobs.csv",
        "ui": "",
        "import": "workflow.json -o talk.yaml",
    },
    "Write a recipe": {
        "init": "portrait.png voice.wav -o talk.yaml",
        "check": "talk.yaml -p quality",
        "config": "talk.yaml --origin",
        "graph": "talk.yaml --format mermaid",
        "nodes": "sample",
        "schema": "-o recipe.schema.json",
        "export": "talk.yaml -o workflow.json",
        "recipe": "talk.mp4 -o talk.yaml",
    },
    "Look back": {
        "runs": "--keep-last 20",
        "show": "last",
        "quality": "talk.mp4",
        "report": "last -o report.html",
        "diff": "talk.mp4 other.mp4",
        "reproduce": "talk.mp4",
        "lock": "talk.yaml",
    },
    "Look after this machine": {
        "models": "talk.yaml",
        "doctor": "",
        "explain": "R051",
        "cache": "stats",
        "completion": "bash",
        "help": "run",
        "version": "",
    },
}
_EXAMPLES = {name: f"{name} {text}".strip() for group in _GROUPS.values() for name, text in group.items()}
EXIT_CODES = """\
  0  all is well
  1  a node failed while running
  2  the command line is wrong
  3  the recipe is wrong; nothing was run
  4  a model or an input is missing or cannot be used
  5  refused for safety (pickles, paths outside the allowed folders, limits)
  6  the disk is full
  7  out of memory
  8  NaN or infinity in a result
  9  a defect of s2vflow
  10  plan --detailed-exitcode: a run would compute something
  11  a video, which is there, does not meet the recipe's require
  75  stopped with a resume point by SIGUSR1: the same command goes on
  130  interrupted (Ctrl-C); the same command goes on
  143  terminated, or the terminal was closed; the same command goes on"""


class MainGroup(OrderedGroup):
    """The program's commands; one that is in no group comes last."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, with its example at the end of its help."""
        command = super().get_command(ctx, cmd_name)
        if command is not None and command.epilog is None and cmd_name in _EXAMPLES:
            command.epilog = f"Example: s2vflow {_EXAMPLES[cmd_name]}"
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the groups."""
        rest = {name: "" for name in self.list_commands(ctx) if name not in _EXAMPLES}
        limit = formatter.width - max(map(len, self.commands)) - 4
        for title, names in [*_GROUPS.items(), ("More", rest)]:
            rows = [(name, self.commands[name].get_short_help_str(limit)) for name in names if name in self.commands]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


@click.group(
    cls=MainGroup,
    commands=[
        *(batch, runs, show, quality, report_, diff, reproduce, lock, cache, models),
        *(start.init, start.make, start.recipe_, start.import_, start.export, start.nodes, start.schema, start.ui),
        *(start.doctor, start.completion, start.explain, start.help_, start.version),
    ],
    epilog=f"\b\nExit codes:\n{EXIT_CODES}",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(s2v_flow.__version__, prog_name="s2vflow")
def cli() -> None:
    """Talking videos from a portrait, a voice and a prompt, with Wan2.2-S2V, from a recipe that lives in git."""


@cli.command()
@recipe_options
@output_options
@selection_options
@record_options
@view_options
@level_options
@gpus_option
@folder_options
def run(recipe: Path, as_json: bool, events: str | None, level: Level, **given: Any) -> None:
    """Run a recipe: compute what is not stored yet, and write the results."""
    from s2v_flow.cli.running import execute

    if events == "-" and as_json:
        raise click.UsageError("--events - and --json both write to stdout: give --events a file")
    again = shlex.join(["s2vflow", *sys.argv[1:]])
    view = {name: given.pop(name) for name in ("previews", "first_look", "has_report")}
    options = make_options(**given)
    execute(s2v_flow.plan(recipe, options), options, level, again, as_json=as_json, events=events, **view)


@cli.command("try")
@recipe_options
@level_options
@folder_options
def try_(recipe: Path, as_json: bool, level: Level, **given: Any) -> None:
    """Make the first chunk alone, at half size in few steps, and estimate the whole by it."""
    from s2v_flow.cli.running import execute, trial

    options = make_options(**given)

    def estimate() -> dict[str, Any]:
        return {"estimate": s2v_flow.plan(recipe, options).to_json()["estimate"]}

    whole = shlex.join(["s2vflow", "run", *(word for word in sys.argv[1:] if word != "try")])
    execute(*trial(s2v_flow.plan(recipe, options), options), level, whole, as_json=as_json, also=estimate)
    if not as_json:
        report.print_result(report.whole_text(s2v_flow.plan(recipe, options)))


@cli.command()
@recipe_options
def check(recipe: Path, as_json: bool, **given: Any) -> None:
    """Check a recipe, without looking at models or inputs."""

    checked = s2v_flow.check(recipe, make_options(**given))
    if as_json:
        report.print_json({"recipe": str(checked.path), "ok": True, "nodes": list(checked.nodes)})
    else:
        report.print_table(f"{checked.path}: {len(checked.nodes)} nodes, no mistakes")


@cli.command()
@recipe_options
@output_options
@selection_options
@gpus_option
@folder_options
@click.option("--detailed-exitcode", is_flag=True, help="Leave with 10 if a run would compute something.")
@click.option("--calibrate", is_flag=True, help="Measure this machine first, once, to estimate what never ran here.")
def plan(recipe: Path, as_json: bool, detailed_exitcode: bool, calibrate: bool, **given: Any) -> None:
    """Show what a run would do: the order, the chunks, what is stored, what must run and why, what is missing."""
    from s2v_flow import api

    options = make_options(**given)
    planned = api.plan(recipe, options)
    planned = api.calibrated(planned, options) if calibrate else planned
    report.print_json(planned.to_json()) if as_json else report.print_plan(planned)
    if planned.plan.missing:
        sys.exit(ExitCode.MISSING)
    if detailed_exitcode and planned.has_work:
        sys.exit(ExitCode.WORK_TO_DO)


@cli.command()
@recipe_options
@selection_options
@folder_options
@click.option("--format", "form", type=click.Choice(["ascii", "mermaid", "dot"]), default="ascii")
def graph(recipe: Path, as_json: bool, form: str, **given: Any) -> None:
    """Draw the plan, with every node's status."""
    from s2v_flow.cli.describe import DRAWERS

    planned = s2v_flow.plan(recipe, make_options(**given))
    text = DRAWERS[form](planned.plan, planned.statuses)
    report.print_json({"format": form, "graph": text}) if as_json else report.print_result(text)


@cli.command()
@recipe_options
@click.option("--origin", "with_origins", is_flag=True, help="Say where each value was written.")
@click.option("--resolved/--references", default=True, help="Put parameters in (the default), or keep $params.NAME.")
def config(recipe: Path, as_json: bool, with_origins: bool, resolved: bool, **given: Any) -> None:
    """Print a recipe as one text, with everything that is laid over it."""
    from s2v_flow.recipe.config import config_json, config_text

    checked = s2v_flow.check(recipe, make_options(**given))
    if as_json:
        report.print_json(config_json(checked, resolved=resolved, with_origins=with_origins))
    else:
        report.print_result(config_text(checked, resolved=resolved, with_origins=with_origins).rstrip("\n"))


class _Sink(io.FileIO):
    """A file descriptor that takes everything; the first error is remembered, and nothing is written from then on."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return len(data)


class Streams:
    """This process's stdout and stderr, exchanged for some that never fail; tests that have their own keep them."""

    def __init__(self) -> None:
        self._stdout: _Sink | None = None
        if sys.stdout is sys.__stdout__ and sys.stderr is sys.__stderr__:
            _open_closed()
            self._stdout = _Sink(1, "w", closefd=False)
            is_terminal = self._stdout.isatty()
            # what goes into a file or a pipe is read again, by this program too, which reads UTF-8
            sys.stdout = _text(self._stdout, getattr(sys.stdout, "encoding", None) if is_terminal else "utf-8")
            sys.stderr = _text(_Sink(2, "w", closefd=False), getattr(sys.stderr, "encoding", None))

    def check(self) -> None:
        """Do nothing if all that was printed has arrived, or if nobody wanted more of it.

        Raises:
            S2VFlowError: A result could not be written to stdout.
        """
        if self._stdout is None:
            return
        with suppress(ValueError):  # it is closed
            sys.stdout.flush()
        error = self._stdout.error
        if error is not None and error.errno != errno.EPIPE:
            is_full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
            code = ExitCode.DISK_FULL if is_full else ExitCode.FAILED
            fix = "free some space, or send it elsewhere"
            raise S2VFlowError(f"stdout cannot be written: {error.strerror}", fix, exit_code=code)


def _open_closed() -> None:
    """Open what is closed of stdin, stdout and stderr on the null device: else a video would get the number 1 or 2."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free


def _text(sink: _Sink, encoding: str | None) -> io.TextIOWrapper:
    buffer = io.BufferedWriter(sink)
    return io.TextIOWrapper(buffer, encoding or "utf-8", errors="backslashreplace", line_buffering=sink.isatty())


def main() -> NoReturn:
    """Run the command line and leave with its exit code."""
    streams = Streams()
    stop = StopRequest(_tell)
    stop.install()
    try:
        try:
            _main(stop, streams)
        finally:
            stop.ignore()
    except StoppedError as stopped:  # by one more signal, on the way out
        stop.ignore()
        sys.exit(stopped.exit_code)


def _main(stop: StopRequest, streams: Streams) -> NoReturn:
    code: Any = ExitCode.OK
    try:
        try:
            cli(prog_name="s2vflow", standalone_mode=False, obj=stop)
        except SystemExit as left:
            code = left.code
        streams.check()
    except click.ClickException as error:
        error.show()
        sys.exit(ExitCode.USAGE)
    except (click.Abort, KeyboardInterrupt):
        _leave(str(StoppedError()), ExitCode.INTERRUPTED)
    except StoppedError as stopped:
        _leave(str(stopped), stopped.exit_code)
    except S2VFlowError as error:
        report.print_error(error)
        sys.exit(error.exit_code)
    except Exception as error:
        _explain_unexpected(error)
    sys.exit(code)


def _tell(text: str) -> None:
    """Write to stderr inside a signal handler, where its buffer may be in use."""
    with suppress(OSError):
        os.write(2, text.encode())


def _leave(text: str, code: ExitCode) -> NoReturn:
    click.echo(text, err=True)
    sys.exit(code)


def _explain_unexpected(error: Exception) -> NoReturn:
    """Leave after an error that is not ours: another package, no memory, a file that may not be read; or a defect."""
    if broken := broken_package(error):
        _leave(f"error: {broken.message}\n  fix: {broken.fix}", broken.exit_code)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        text = f"out of memory: {error}\n  fix: a smaller width and height, or a lower frames_per_call in decode"
        _leave(f"error: {text}\n  kept: every chunk that was finished", ExitCode.OUT_OF_MEMORY)
    if isinstance(error, PermissionError):
        text = f"error: {error.filename}: {error.strerror}\n  fix: check its permissions, or name another folder"
        _leave(text, ExitCode.MISSING)
    traceback.print_exc()
    _leave("error: this is a defect of s2vflow, please report it with the lines above", ExitCode.INTERNAL)
