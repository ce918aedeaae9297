"""The command `ui`: a page on this machine."""

from __future__ import annotations

import os
import sys
import webbrowser
from typing import Any

import click

from s2v_flow.cli.options import folder_options, make_options
from s2v_flow.errors import ExitCode, S2VFlowError


@click.command()
@click.option("--port", type=click.IntRange(0, 65_535), default=0, help="On 127.0.0.1; any free one unless given.")
@click.option("--no-browser", is_flag=True, help="Only print the address.")
@folder_options
def ui(port: int, no_browser: bool, **given: Any) -> None:
    """Serve a page for this folder: drop a portrait and a voice, run, watch, compare. Ctrl-C ends it.

    The address, with a secret token, is the one line on stdout. Only this machine can open it. (extra: ui)
    """
    from s2v_flow.cli import report

    try:
        from s2v_flow.views.ui.app import serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        fix = f"{sys.executable} -m pip install 's2vflow[ui]'"
        raise S2VFlowError(f"ui needs {error.name}, which is not installed", fix, exit_code=ExitCode.USAGE) from error
    words = []
    for option in click.get_current_context().command.params:
        value = given.get(option.name or "")
        for each in value if isinstance(value, tuple) else [value] if value else []:
            words += [option.opts[0], str(each)]

    def tell(address: str) -> None:
        report.print_result(address)
        report.print_message("the page is open until Ctrl-C; recipes, inputs and videos go to ./ui")
        if not no_browser and (sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
            webbrowser.open(address)

    serve(make_options(**given), words, port, is_ready=tell)
