"""Convert a PEFT adapter that was trained elsewhere to a file for `lab chat --adapter NAME=FILE`.

lab adapt my-peft-adapter                            # to my-peft-adapter.onnx_adapter
lab adapt my-peft-adapter --out travel.onnx_adapter --model ft-for-travel-1/onnx

Plain LoRA and rsLoRA, with rank and alpha patterns, on fused or split projections. Whatever else it holds is
refused here, by name, and so is an adapter whose shapes are another model's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from stages.adapters.convert import convert
from stages.adapters.lora_inputs import BASE, load_graph
from stages.adapters.peft_adapter import read_config
from stages.core.errors import UserError
from stages.core.files import in_megabytes, size_of, written_beside


def adapt(
    peft: Annotated[Path, typer.Argument(metavar="PEFT_DIR", help="With adapter_config.json.")],
    out: Annotated[
        Path | None, typer.Option(help="The file [default: PEFT_DIR.onnx_adapter].")
    ] = None,
    model: Annotated[Path, typer.Option(help="The ONNX model's folder.")] = Path("models/onnx"),
) -> None:
    """Convert a PEFT adapter for the ONNX model. Or say in one line why that cannot be."""
    target = out or peft.with_name(f"{peft.resolve().name}.onnx_adapter")
    if target.is_dir():
        raise UserError(
            f"--out {target} is a folder: name a file, such as {target}/my.onnx_adapter"
        )
    with written_beside(target) as beside:
        inputs = convert(peft, model, beside)
    print(f"{target} ({in_megabytes(size_of(target))}, {inputs} inputs)")
    warn_of_another_base(peft, model, str(load_graph(model).metadata_props.get(BASE)))
    print(f"lab chat --model {model} --adapter {peft.resolve().name}={target}")


def warn_of_another_base(peft: Path, model: Path, base: str) -> None:
    """Name both bases where they are called differently: equal shapes do not make equal weights."""
    trained_on = str(read_config(peft).get("base_model_name_or_path"))
    if Path(trained_on).name.casefold() != base.casefold():
        print(
            f"lab: warning: the adapter was trained on {trained_on}, and {model} is {base}: it fits in "
            "shape; where these are not the same weights, its answers will be wrong",
            file=sys.stderr,
        )
