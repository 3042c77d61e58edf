"""The console script `lab`: one subcommand per module beside this one, imported when it is called.

lab --help
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from stages.core.running import be_quiet, one_line_errors

COMMANDS = {  # name: where it is, and the first sentence of its help
    "chat": ("lab.models.chat:chat", "Ask the ONNX model."),
    "adapt": ("lab.models.adapt:adapt", "Convert a PEFT adapter for the ONNX model."),
    "merge": ("lab.models.merge:merge", "Put a PEFT adapter into the 4-bit weights."),
    "bake": (
        "lab.models.bake:bake",
        "Write the model and an adapter as one folder that runs elsewhere.",
    ),
    "serve": ("lab.serve.command:serve", "Serve the ONNX model to OpenAI clients."),
    "results": (
        "lab.results:results",
        "Show the results of the last run, with and without the adapter.",
    ),
    "benchmark": (
        "lab.benchmark.command:benchmark",
        "Ask the model tasks of lm-evaluation-harness.",
    ),
    "review": ("lab.review.command:review", "Print what changed since BASE."),
    "noise": ("lab.noise:noise", "Measure what another training seed does to the metrics."),
    "search": ("lab.search.command:search", "Find the best settings within limits."),
    "watch": ("lab.watch.command:watch", "Follow a run while it runs."),
    "exp": ("lab.experiments.table:table", "Show experiments with what decides."),
    "promote": ("lab.experiments.promote:promote", "Make an experiment the default."),
    "run": ("lab.run:run", "Run what changed here, and push it."),
    "dvc": ("lab.remote.watched_dvc:dvc", "Run any dvc command; a dead remote ends it in seconds."),
    "doctor": ("lab.doctor:doctor", "Check this machine and the remote."),
    "fsck": ("lab.remote.fsck:fsck", "Check that the remote holds all that dvc.lock names."),
    "submit": ("lab.azureml.submit:submit", "Run what changed on an Azure ML cluster."),
    "jobs": ("lab.azureml.jobs:jobs", "List the jobs of lab submit."),
    "cancel": ("lab.azureml.jobs:cancel", "Cancel a job."),
    "register": ("lab.registry.register:register", "Register the model and its adapter."),
    "download": ("lab.registry.download:download", "Bring a registered model to a folder."),
    "deploy": ("lab.deploy.command:deploy", "Put a model behind OpenAI's API."),
    "remote": ("lab.remote.setup:group", "Set up the Azure Blob remote."),
}
# square brackets in help texts are meant, a traceback is as Python writes it
PLAIN: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
}
FORWARDING: dict[str, dict[str, Any]] = {  # what dvc takes goes to dvc as it is
    "exp": {"context_settings": {"allow_extra_args": True, "ignore_unknown_options": True}},
    "dvc": {"context_settings": {"ignore_unknown_options": True}, "add_help_option": False},
}


class Commands(TyperGroup):
    """Imports the command that is called and no other: together they take two seconds."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands: dict[str, Any] = dict.fromkeys(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of a name, None where there is none."""
        if cmd_name not in COMMANDS:
            return None
        module, _, function = COMMANDS[cmd_name][0].partition(":")
        found = getattr(import_module(module), function)
        if isinstance(found, typer.Typer):
            return typer.main.get_command(found)
        alone = typer.Typer(**PLAIN)
        alone.command(name=cmd_name, **FORWARDING.get(cmd_name, {}))(found)
        return typer.main.get_command(alone)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of `lab --help` without importing a command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in COMMANDS.items()])


app = typer.Typer(cls=Commands, no_args_is_help=True, **PLAIN)


@app.callback()
def lab() -> None:
    """Run, share, talk to and review what the pipeline makes."""


def main() -> None:
    """Run the command; errors that a user can fix end in one line and exit code 1."""
    be_quiet()
    with one_line_errors("lab"):
        app()


if __name__ == "__main__":
    main()
