"""The console script `lab`: one subcommand per module beside this one, imported when it is called.

lab --help
"""

from __future__ import annotations

from importlib import import_module

import typer
from typer.core import TyperGroup

from stages.running import be_quiet, one_line_errors

COMMANDS = {
    "chat": "lab.chat:chat",
    "adapt": "lab.adapt:adapt",
    "results": "lab.results:results",
    "review": "lab.review.command:review",
    "exp": "lab.experiments.table:table",
    "promote": "lab.experiments.promote:promote",
    "run": "lab.run:run",
    "dvc": "lab.dvc:dvc",
    "doctor": "lab.doctor:doctor",
    "fsck": "lab.fsck:fsck",
    "submit": "lab.azureml.submit:submit",
    "jobs": "lab.azureml.jobs:jobs",
    "cancel": "lab.azureml.jobs:cancel",
    "register": "lab.azureml.register:register",
    "download": "lab.azureml.download:download",
    "remote": "lab.remote_setup:group",
}
# square brackets in help texts are meant, a traceback is as Python writes it
PLAIN = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}
FORWARDING = {  # what dvc takes goes to dvc as it is
    "exp": {"context_settings": {"allow_extra_args": True, "ignore_unknown_options": True}},
    "dvc": {"context_settings": {"ignore_unknown_options": True}, "add_help_option": False},
}


class Commands(TyperGroup):
    """Imports one command, not all: together they take two seconds."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.commands = dict.fromkeys(COMMANDS)

    def get_command(self, ctx, cmd_name: str):
        """Return the command of a name, None where there is none."""
        if cmd_name not in COMMANDS:
            return None
        module, _, function = COMMANDS[cmd_name].partition(":")
        found = getattr(import_module(module), function)
        if isinstance(found, typer.Typer):
            return typer.main.get_command(found)
        alone = typer.Typer(**PLAIN)
        alone.command(name=cmd_name, **FORWARDING.get(cmd_name, {}))(found)
        return typer.main.get_command(alone)


app = typer.Typer(cls=Commands, no_args_is_help=True, **PLAIN)


@app.callback()
def lab() -> None:
    """Run, share, talk to and review what the pipeline makes."""


def main() -> None:
    """Run the command; what a user can put right ends in one line and exit code 1."""
    be_quiet()
    with one_line_errors("lab"):
        app()


if __name__ == "__main__":
    main()
