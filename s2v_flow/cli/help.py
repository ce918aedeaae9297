"""The help: commands in groups, the first ones first, each with an example."""

from __future__ import annotations

from collections.abc import Mapping

import click

from s2v_flow.cli.options import OrderedGroup

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
