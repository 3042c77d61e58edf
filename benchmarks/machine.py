"""What a measurement was taken on, and where its JSON goes."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from stages.core.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "liger-kernel",
    "olive-ai",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "onnxruntime-genai-cuda",
    "onnxruntime-ep-webgpu",
)


def describe() -> dict[str, Any]:
    """Return hardware, versions and commit."""
    return {
        "commit": commit(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: found for package in PACKAGES if (found := installed(package))},
    }


def commit() -> str:
    """Return the commit of the working tree, marked when files differ from it."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


def processor() -> str:
    """Return the processor's name as the kernel reports it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def installed(package: str) -> str | None:
    """Return a package's version, None where it is absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def keep(name: str, figures: dict[str, Any]) -> None:
    """Write results/<name>.json: the machine, then the figures."""
    write_json(RESULTS / f"{name}.json", {"machine": describe(), **figures})
