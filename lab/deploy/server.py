"""What a container of `lab deploy` runs: `lab serve`, as its environment says.

    LAB_API_KEY=... LAB_HOST=0.0.0.0 LAB_MODEL=/model python -m lab.deploy.server

LAB_MODEL             the model's folder, which is only read: with onnx/ and onnx_adapter/, as `lab download`
                      lays them out, or one that `lab bake` wrote
LAB_API_KEY           what clients must send; needed wherever LAB_HOST is not loopback
LAB_ADAPTER           the adapter's name
LAB_BEHIND_GATEWAY=1  somebody in front checks who asks, so that no key is needed

LAB_HOST, LAB_PORT, LAB_SLOTS, LAB_QUEUE, LAB_KEEP, LAB_MAX_TOKENS are the options of `lab serve`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from lab.models.chat import DEFAULT
from lab.serve.command import serve
from stages.core.errors import UserError

CONFIG = "genai_config.json"
ADAPTER = "onnx_adapter/adapter.onnx_adapter"  # beside onnx/
DEEPEST = 4  # a cloud mounts a version below its name, number and folder


def start(environment: Mapping[str, str]) -> None:
    """Serve until SIGTERM. Raises `UserError` for a variable or a folder that is wrong."""
    onnx = find_model(Path(environment.get("LAB_MODEL", "/model")))
    adapter = onnx.parent / ADAPTER
    has_adapter = onnx.name == "onnx" and adapter.is_file()
    serve(
        adapter=[f"{environment.get('LAB_ADAPTER', DEFAULT)}={adapter}"] if has_adapter else None,
        no_adapter=not has_adapter,
        model=onnx,
        host=environment.get("LAB_HOST", "127.0.0.1"),
        port=number(environment, "LAB_PORT", 8000),
        api_key=environment.get("LAB_API_KEY") or None,
        max_tokens=number(environment, "LAB_MAX_TOKENS", 256, least=1),
        slots=number(environment, "LAB_SLOTS", 8, least=1),
        queue=number(environment, "LAB_QUEUE", 16),
        keep=number(environment, "LAB_KEEP", 4),
        allow_loading=False,
        behind_gateway=environment.get("LAB_BEHIND_GATEWAY") == "1",
    )


def find_model(folder: Path) -> Path:
    """Return the one folder with a model, at or below `folder`. Raises `UserError` for none or several."""
    for depth in range(DEEPEST + 1):
        found = sorted(file.parent for file in folder.glob(f"{'*/' * depth}{CONFIG}"))
        if len(found) > 1:
            raise UserError(
                f"LAB_MODEL {folder} holds several models: name one, such as {found[0]}"
            )
        if found:
            return found[0]
    raise UserError(f"LAB_MODEL {folder} holds no ONNX model: mount the folder that has {CONFIG}")


def number(environment: Mapping[str, str], name: str, default: int, least: int = 0) -> int:
    """Return a variable's number. Raises `UserError` for what is none, or less than it may be."""
    text = environment.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name} is {text!r}: must be a number, {least} or more")
    return int(text)


def main() -> None:
    """Serve; what an operator can put right ends in one line and exit code 1."""
    try:
        start(os.environ)
    except UserError as error:
        sys.exit(f"server: {error}")


if __name__ == "__main__":
    main()
