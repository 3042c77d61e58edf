"""The console script `lab`: one subcommand per module beside this one.

lab --help
"""

from __future__ import annotations

import typer

from lab import adapt, chat, doctor, dvc, fsck, remote_setup, run
from lab.azureml import download, jobs, register, submit
from lab.experiments import promote, table
from lab.review import command as review
from stages.running import be_quiet, one_line_errors

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command(name="chat")(chat.chat)
app.command(name="adapt")(adapt.adapt)
app.command(name="review")(review.review)
forwarding = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(name="exp", context_settings=forwarding)(table.table)
app.command(name="promote")(promote.promote)
app.command(name="run")(run.run)
app.command(name="dvc", context_settings={"ignore_unknown_options": True}, add_help_option=False)(
    dvc.dvc
)
app.command(name="doctor")(doctor.doctor)
app.command(name="fsck")(fsck.fsck)
app.command(name="submit")(submit.submit)
app.command(name="jobs")(jobs.jobs)
app.command(name="cancel")(jobs.cancel)
app.command(name="register")(register.register)
app.command(name="download")(download.download)
remote = typer.Typer(no_args_is_help=True, help="The Azure Blob remote.")
remote.command(name="setup")(remote_setup.setup)
app.add_typer(remote, name="remote")


@remote.callback()
def remote_commands() -> None:
    """Set up the Azure Blob remote."""


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
