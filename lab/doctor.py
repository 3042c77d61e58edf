"""Is this machine ready? Every check in one line, seconds for all of them.

lab doctor             # exit 1 when something that `lab run` needs is wrong
"""

from __future__ import annotations

import email.utils
import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer

from lab import disk_room
from lab.remote import config
from lab.remote.fsck import cache_folder
from stages.core.errors import UserError
from stages.core.machine import choice, visible_gpus

PACKAGES = ("dvc", "dvc-azure", "azure-storage-blob", "olive-ai", "torch", "transformers")
RUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "onnxruntime-genai-cuda",
    "onnxruntime-ep-webgpu",
)
TRIAL = 60  # seconds for a device to compute one sum
CPU_FEATURES = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16", "sve", "neon")
FREE_GIB = 2.0  # below that, nothing is begun: a run of the default model writes about 1 GiB
SKEW_SECONDS = 300  # Azure refuses a signature that is 15 minutes off
SAID: set[str] = set()  # one cause can be found by several checks
HEARD: dict[str, str] = {}  # headers of the remote's answer, which may be a refusal


def doctor() -> None:
    """Check this machine and the remote. Says what to do about each fault."""
    healthy = [report(name, check) for name, check in HERE.items()]
    if healthy[-1]:  # the remote lets us in
        healthy.append(report("push", writing))
    if HEARD:  # also when it does not, for a wrong clock may be why
        healthy.append(report("clock", clock))
    if not all(healthy):
        raise typer.Exit(1)


def report(name: str, check: Callable[[], str]) -> bool:
    """Print what a check found; return whether all is well."""
    try:
        print(f"ok    {name:10} {check()}", flush=True)
    except UserError as error:
        print(f"WRONG {name:10} {'as above' if str(error) in SAID else error}", flush=True)
        SAID.add(str(error))
        return False
    return True


def versions() -> str:
    """Name the packages that decide what a run makes."""
    found = [f"{name} {installed(name)}" for name in (*PACKAGES, *RUNTIMES) if installed(name)]
    missing = [name for name in PACKAGES if not installed(name)]
    if missing:
        raise UserError(f"not installed: {', '.join(missing)}; run make setup")
    return ", ".join([f"Python {platform.python_version()}", *found]) + compiled_anew()


def compiled_anew() -> str:
    """Say that every stage compiles its packages again, as in many images, which take 10 seconds of each."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None or not sys.dont_write_bytecode:
        return ""
    if Path(importlib.util.cache_from_source(torch.origin)).exists():
        return ""
    return (
        "; PYTHONDONTWRITEBYTECODE is set and they lie here without .pyc, so every stage compiles them "
        f"anew, some 10 s: unset it, or python -m compileall -q {Path(torch.origin).parents[1]}"
    )


def installed(package: str) -> str | None:
    """Return a package's version, None where it is absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu() -> str:
    """Name the cores, the memory, and what the CPU multiplies fast: that decides how stages compute."""
    import psutil
    import torch

    found = torch.cpu.get_capabilities()
    fast = [name for name in CPU_FEATURES if found.get(name)]
    memory = psutil.virtual_memory().total / 2**30
    return f"{psutil.cpu_count()} cores, {memory:.0f} GiB, {' '.join(fast) or 'no vector units'}"


def gpu() -> str:
    """Name GPU and driver; an NVIDIA GPU that torch cannot use is a fault."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    if shutil.which("nvidia-smi") is None:
        return "none: the pipeline runs on the CPU"
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        raise UserError(
            "nvidia-smi does not answer: the driver hangs, restart the machine"
        ) from None
    if done.returncode:
        raise UserError(f"nvidia-smi fails: {first_line(done)}; check the NVIDIA driver")
    import torch

    from stages.weights.hardware import why_not

    if not torch.cuda.is_available():
        reason = why_not() if torch.version.cuda else "rm -rf .venv, make setup EXTRA=cuda"
        raise UserError(f"torch cannot use {done.stdout.strip()}: {reason}")
    used = choice(visible_gpus())
    remark = f"; finetune uses all that are free, other stages {used}" if used else ""
    return "; ".join(done.stdout.strip().splitlines()) + remark


def devices() -> str:
    """List the devices that the installed runtimes compute on: each has just done so, in its own process.

    None is needed but the CPU, so what another lacks is no fault.
    """
    found = []
    for device in ("cpu", "cuda", "webgpu"):
        word = [sys.executable, "-m", "stages.answers.devices", device]
        try:
            done = subprocess.run(word, capture_output=True, text=True, timeout=TRIAL)
        except subprocess.TimeoutExpired:
            found.append(f"not {device}, which does not answer within {TRIAL} s")
            continue
        said = (done.stdout.strip().splitlines() or [""])[-1]
        if done.returncode < 0 or not said:  # a driver may take its process along
            said = f"{device} ended the process that tried it: {first_line(done)}"
        found.append(said if done.returncode == 0 else f"not {said}")
    return "; ".join(found)


def adapters() -> str:
    """Say how adapters will act: by our operator, or in the runtime's own way, which is slower."""
    from stages.lora_op.library import why_not

    reason = why_not(on_gpu=bool(installed("onnxruntime-gpu") and visible_gpus()))
    if reason:
        return f"in ONNX Runtime's own way, which is slower, as {reason}"
    return "by an operator that is compiled for this machine"


def folder() -> str:
    """Name the folder: where its path is beyond ASCII, DVC cannot run experiments beside the workspace."""
    here = str(Path.cwd())
    remark = "" if here.isascii() else " (beyond ASCII: DVC fails with --temp and --queue here)"
    return here + remark


def disk() -> str:
    """Say how much room is left, in the workspace or the cache, whichever has less, and what a run fills."""
    places = (writable_cache(), Path.cwd())
    free = min(shutil.disk_usage(place).free for place in places) / 2**30
    outputs = disk_room.of_a_run()
    need, why = (
        FREE_GIB,
        "a run (of a model whose size is known once it is fetched) needs at least",
    )
    if outputs is not None:
        twice = same_disk(*places) and link_types()[1] != "reflink"  # workspace and cache
        need = max(FREE_GIB, outputs * (2 if twice else 1) / 2**30)
        why = "a run of this model needs about"
    if free < need:
        raise UserError(
            f"only {free:.1f} GiB of disk are free, {why} {need:.1f}: dvc gc -w frees some"
        )
    return f"{free:.0f} GiB free; {why} {need:.1f}"


def same_disk(one: Path, other: Path) -> bool:
    """Say whether two folders share their free space."""
    return one.stat().st_dev == other.stat().st_dev


def writable_cache() -> Path:
    """Return DVC's cache. Raises `UserError` where this user may not write: the first result would fail."""
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise UserError(
            f"DVC's cache {cache} cannot be written: {error.strerror}; "
            "`dvc cache dir --local FOLDER` chooses another"
        ) from None
    return cache


def links() -> str:
    """Say how files come out of the cache: ONNX Runtime accepts no symlink and no hard link."""
    wanted, usable = link_types()
    if set(wanted) & {"symlink", "hardlink"}:
        raise UserError(
            "cache.type must be reflink,copy: ONNX Runtime rejects weights behind links"
        )
    cost = "no second copy on disk" if usable == "reflink" else "every file twice on disk"
    return f"{usable} ({cost})"


def link_types() -> tuple[list[str], str]:
    """Return the kinds of link that DVC's settings name, and the one that works here."""
    from dvc.repo import Repo
    from dvc_objects.fs.generic import test_links

    writable_cache()  # links are tried out there
    with Repo() as repo:
        odb = repo.cache.local
        odb.fs.makedirs(odb.path)
        return odb.cache_types, test_links(
            odb.cache_types, odb.fs, odb.path, repo.fs, repo.root_dir
        )[0]


def settings() -> str:
    """Say whether params.yaml is what conf/ composes to."""
    done = subprocess.run(
        [sys.executable, "-m", "stages.params", "--strict"], capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(first_line(done).removeprefix("params: "))
    return "params.yaml is what conf/ composes to"


def first_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a failed command said first."""
    said = (done.stderr + done.stdout).strip().splitlines()
    return said[0] if said else f"exit code {done.returncode}, without a word"


def sign_in() -> str:
    """Name the kind of sign-in that DVC takes."""
    found = config.load()
    plain = f"; not plain dvc's default: `dvc remote default --local {config.NAME}`"
    return f"{found.sign_in}, account {found.account}{'' if config.has_default() else plain}"


def reach() -> str:
    """Say whether the remote answers, with its container, and how fast."""
    found = config.load()
    started = time.monotonic()
    found.check(HEARD)
    return f"{found} answers in {(time.monotonic() - started) * 1000:.0f} ms"


def writing() -> str:
    """Prove that this machine may push."""
    return config.load().check_writing()


def clock() -> str:
    """Compare this machine's clock with the remote's."""
    headers = {name.lower(): value for name, value in HEARD.items()}
    skew = time.time() - email.utils.parsedate_to_datetime(headers["date"]).timestamp()
    if abs(skew) > SKEW_SECONDS:
        raise UserError(
            f"{skew:+.0f} s off the remote's: Azure will refuse signatures; set the clock"
        )
    return f"{abs(skew):.0f} s off the remote's"


HERE: dict[str, Callable[[], str]] = {
    "versions": versions,
    "cpu": cpu,
    "gpu": gpu,
    "devices": devices,
    "adapters": adapters,
    "folder": folder,
    "disk": disk,
    "links": links,
    "settings": settings,
    "sign-in": sign_in,
    "remote": reach,
}
