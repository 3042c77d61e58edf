"""GPUs that a stage has for itself: two stages of one machine never share one.

    take(["0", "1"], 1, 1)           # one of them, as soon as it is free
    take(["0", "1"], 1, 2)           # all that are free, at least one

Each GPU has a file in the temporary folder, which a stage locks. The kernel releases the lock when the
process ends, however it does. Where there is no NVIDIA GPU, nothing is locked.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import time

held: dict[str, int] = {}  # the locked files of this process, by the GPU's name


def take(gpus: list[str], least: int, most: int) -> list[str]:
    """Lock at least `least` and at most `most` of the GPUs; wait, and say so, while fewer are free.

    GPUs are numbers or UUIDs, as in CUDA_VISIBLE_DEVICES. What this process holds already counts as free, and
    what it does not take it gives back: two stages that wait for each other's GPU would wait forever.
    """
    known, said = known_gpus(), False
    while True:
        # those that are held first: a stage keeps the GPU that it began on
        order = sorted(gpus, key=lambda gpu: name_of(gpu, known) not in held)
        taken = [gpu for gpu in order if not known or lock(name_of(gpu, known))]
        enough = len(taken) >= least
        keep({name_of(gpu, known) for gpu in taken[:most]} if enough else set())
        if enough:
            return sorted(taken[:most], key=gpus.index)
        if not said:
            print(f"waits for a GPU: other stages use {', '.join(gpus)}", flush=True)
            said = True
        time.sleep(1)


def lock(name: str) -> bool:
    """Lock a GPU's file unless another process has; say whether it is ours."""
    if name in held:
        return True
    file = opened(os.path.join(tempfile.gettempdir(), f"olive-lab-gpu-{name}.lock"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return False
    held[name] = file
    return True


def keep(names: set[str]) -> None:
    """Give back all locks but these."""
    for name in held.keys() - names:
        os.close(held.pop(name))


def opened(path: str) -> int:
    """Open a file that any user may have made: reading is enough for a lock."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        flags = os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path, flags, 0o644)


def name_of(gpu: str, known: list[str]) -> str:
    """Return one name for a GPU, whether its number or the start of its UUID is given."""
    if gpu.isdigit() and int(gpu) < len(known):
        return known[int(gpu)]
    name = next((uuid for uuid in known if uuid.startswith(gpu)), gpu)
    return re.sub(r"[^\w-]", "_", name)  # MIG's names have slashes


def known_gpus() -> list[str]:
    """Return the UUIDs of this machine's GPUs by number, or the numbers where the driver hides UUIDs."""
    # a container has device files of its own GPUs only; nvidia-smi would take up to seconds
    files = [re.fullmatch(r"nvidia(\d+)", name) for name in os.listdir("/dev")]
    minors = sorted(int(found[1]) for found in files if found)
    folder, uuids = "/proc/driver/nvidia/gpus", []
    for bus in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        with open(os.path.join(folder, bus, "information"), encoding="utf-8") as file:
            facts = dict(re.findall(r"^(.+?):\s+(.+?)\s*$", file.read(), re.MULTILINE))
        if int(facts.get("Device Minor", -1)) in minors:
            uuids.append(facts.get("GPU UUID", ""))
    return (
        uuids if len(uuids) == len(minors) and all(uuids) else [str(n) for n in range(len(minors))]
    )
