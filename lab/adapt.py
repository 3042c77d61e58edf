"""Convert a PEFT adapter that was trained elsewhere to a file for `lab chat --adapter NAME=FILE`.

lab adapt my-peft-adapter                            # to my-peft-adapter.onnx_adapter
lab adapt my-peft-adapter --out travel.onnx_adapter --model ft-for-travel-1/onnx

Plain LoRA and rsLoRA, with rank and alpha patterns, on fused or split projections. Whatever else it holds is
refused here, by name, and so is an adapter of another base model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages.errors import UserError
from stages.running import in_megabytes, size_of, written_beside


def adapt(
    peft: Annotated[Path, typer.Argument(metavar="PEFT_DIR", help="With adapter_config.json.")],
    out: Annotated[
        Path | None, typer.Option(help="The file [default: PEFT_DIR.onnx_adapter].")
    ] = None,
    model: Annotated[Path, typer.Option(help="The ONNX model's folder.")] = Path("models/onnx"),
) -> None:
    """Convert a PEFT adapter for the ONNX model, or say in one line why that cannot be."""
    from stages.adapt import convert, read_config  # a second that other lab commands need not wait

    target = out or peft.with_name(f"{peft.resolve().name}.onnx_adapter")
    if target.is_dir():
        raise UserError(
            f"--out {target} is a folder: name a file, such as {target}/my.onnx_adapter"
        )
    with written_beside(target) as beside:
        inputs = convert(peft, model, beside)
    base = read_config(peft).get("base_model_name_or_path")
    print(f"{target} ({in_megabytes(size_of(target))}, {inputs} inputs, trained on {base})")
    print(f"lab chat --model {model} --adapter {peft.resolve().name}={target}")
