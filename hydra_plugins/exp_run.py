"""What `dvc exp run` is asked for is checked before Hydra composes (lab/experiments/request.py)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as in conf_digest.py

if "dvc.cli" in sys.modules and "exp" in sys.argv:
    words = sys.argv[sys.argv.index("exp") :]
    if words[1:2] == ["run"]:
        from dvc.exceptions import InvalidArgumentError

        from lab.experiments.request import check
        from stages.core.errors import UserError

        try:
            check(words)
        except UserError as error:
            raise InvalidArgumentError(str(error)) from None
