"""A stash of its own for every `dvc exp run --temp`, so that two that begin at once do not take each other's.

    use()  # before DVC's command line is called

DVC puts a temporary run on a stash that all runs share, and takes from there whatever lies on top, again
until nothing is left: of two that begin in the same second one computed both, and the other one of them too.
"""

from __future__ import annotations

import os


def use() -> None:
    """Let this process put its temporary runs where no other looks."""
    from dvc.repo.experiments import Experiments
    from dvc.repo.experiments.queue.tempdir import TempDirQueue
    from dvc.repo.experiments.refs import TEMP_NAMESPACE

    # a folder of refs that DVC leaves out where it lists experiments
    mine = f"{TEMP_NAMESPACE}/stash-{os.getpid()}"
    Experiments.tempdir_queue = property(lambda self: TempDirQueue(self.repo, mine))
