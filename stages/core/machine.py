"""The machine that a stage runs on: its name, for the metrics, and which of its GPUs is used.

    use_one_gpu()        # before anything imports torch: "GPU 0, the first of 2", "" without a choice
    machine()            # "AMD EPYC 9R14, 2 cores" or "..., 16 cores, NVIDIA H100 80GB HBM3"

Importing this imports no torch.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

from stages.core import gpu_locks

VISIBLE = "CUDA_VISIBLE_DEVICES"


def use_one_gpu(alone: bool = False) -> str:
    """Let CUDA see the first visible GPU only; return what `choice` says of it.

    `alone`: the first that no other stage uses, which is kept from them until this process ends.

    With several in sight, transformers' Trainer would wrap the model in DataParallel, which TRL refuses.
    CUDA reads the variable at the first call of any library, so this comes before the imports. A value
    that names no GPU (empty, -1) means the CPU, and stays.
    """
    gpus = visible_gpus()
    used = gpus[0] if gpus else "0"
    if alone and gpus and used != "-1":
        used = gpu_locks.take(gpus, 1, 1)[0]
    if VISIBLE not in os.environ or len(gpus) > 1:
        os.environ[VISIBLE] = used
    return choice(gpus, used)


def visible_gpus() -> list[str]:
    """Return the GPUs that CUDA may use, by number or UUID: those of CUDA_VISIBLE_DEVICES, else all."""
    given = os.environ.get(VISIBLE)
    if given is not None:
        return [gpu.strip() for gpu in given.split(",") if gpu.strip()]
    # a container has device files of its own GPUs only; nvidia-smi would take up to seconds
    files = [file for file in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", file.name)]
    return [str(number) for number in range(len(files))]


def choice(gpus: list[str], used: str | None = None) -> str:
    """Say which of several GPUs is used; nothing where there is no choice."""
    if len(gpus) < 2:
        return ""
    if used not in (None, gpus[0]):
        return f"GPU {used}, the first of {len(gpus)} that was free ({VISIBLE} chooses another)"
    return f"GPU {gpus[0]}, the first of {len(gpus)} ({VISIBLE} chooses another)"


def machine(gpus: list[str] | None = None) -> str:
    """Name the processor, the cores that this process may use, and the GPU that it or its ranks used."""
    parts = [processor(), f"{usable_cores()} cores"]
    if gpus:
        return ", ".join([*parts, gpus[0] if len(gpus) == 1 else f"{len(gpus)} x {gpus[0]}"])
    if used_gpu():
        parts.append(sys.modules["torch"].cuda.get_device_name())
    return ", ".join(parts)


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def used_gpu() -> bool:
    """Say whether this process has computed on a GPU, without importing torch for the question."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def processor() -> str:
    """Return the processor's name, as Linux or Python knows it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()
