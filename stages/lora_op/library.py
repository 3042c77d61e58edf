"""Compile and load the operator AddLora, and keep adapters in it.

    operator = open_operator(on_gpu=False)      # None where this machine has no C compiler
    number = operator.add(tensors)              # {"model.layers.0.mlp.up_proj": (A, B), ..}
    config: {"session_options": {"custom_ops_library": operator.name}}
    generator.set_model_input("adapter", np.array([number]))

The library is compiled for the processor at hand when it is first needed, in about a second, and kept in the
user's cache. Without it adapters run as the runtime has them, as inputs of lora.onnx: far slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from ctypes import c_char_p, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).with_name("add_lora.c")
KERNELS = Path(__file__).with_name("add_lora.cu")
FLAGS = ["-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC"]
LIBRARIES = ["-ldl", "-lm", "-lpthread"]
# the driver compiles for the card at hand from this
PTX_FOR = "compute_75"
EIGHT = 8  # a GPU reads ranks in eights


class Unavailable(Exception):
    """The operator cannot be had here; the text says why."""


class Operator:
    """The loaded library. `name` is what a session's options call it."""

    def __init__(self, file: Path, on_gpu: bool):
        self.name, self.on_gpu = file.name, on_gpu
        # once it is loaded, the runtime finds it by this name, wherever it lies
        try:
            library = ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise Unavailable(f"it cannot be loaded: {error}{advice(error)}") from None
        for name, result, arguments in (
            ("adapter_add", c_int64, [c_int]),
            ("adapter_site", c_char_p, [c_int64, c_char_p, *[c_int64] * 3, *[c_void_p] * 2]),
            ("adapter_remove", None, [c_int64]),
            ("projection", c_char_p, [c_int, c_void_p, c_void_p]),
            ("gpu_open", c_char_p, [c_char_p]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._library = library
        if on_gpu and (wrong := library.gpu_open(compiled_kernels())):
            raise Unavailable(wrong.decode())

    def add(self, tensors: Mapping[str, tuple[np.ndarray, np.ndarray]], kind: int) -> int:
        """Keep A, [in, rank], and B, [rank, out], by the projection's name; return the adapter's number.

        `kind` is that of the kernels that will read them. Raises `ValueError` for what they cannot.
        """
        number = self._library.adapter_add(kind)
        for name, pair in tensors.items():
            a, b = for_gpu(*pair) if self.on_gpu else for_cpu(*pair)
            sizes = a.shape[0], b.shape[1], a.shape[1]
            addresses = a.ctypes.data, b.ctypes.data
            if wrong := self._library.adapter_site(number, name.encode(), *sizes, *addresses):
                self.remove(number)
                raise ValueError(f"{name}: {wrong.decode()}")
        return number

    def remove(self, number: int) -> None:
        """Forget an adapter, with which nothing may run any more."""
        self._library.adapter_remove(number)

    def kernels(self) -> dict[str, tuple[int, int]]:
        """Return how many kernels graphs have made for each projection so far, and the last one's kind."""
        found: dict[str, tuple[int, int]] = {}
        count, kind = c_int64(), c_int()
        while name := self._library.projection(len(found), ctypes.byref(count), ctypes.byref(kind)):
            found[name.decode()] = count.value, kind.value
        return found


def advice(error: OSError) -> str:
    """Return what to do about the usual reason, a home or /tmp from which nothing may be run."""
    if "failed to map segment" not in str(error):
        return ""
    return " (mounted noexec?): let XDG_CACHE_HOME name a folder from which programs may run"


def for_gpu(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B in float16, with zeros up to a rank that is a multiple of eight."""
    more = -a.shape[1] % EIGHT
    a, b = np.pad(a, ((0, 0), (0, more))), np.pad(b, ((0, more), (0, 0)))
    return np.ascontiguousarray(a, np.float16), np.ascontiguousarray(b, np.float16)


def for_cpu(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B in float32. Raises `ValueError` for NaN or infinity, for which no integer stands."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("it holds NaN or infinity")
    return np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)


@cache
def open_operator(on_gpu: bool) -> Operator | None:
    """Return the operator, or None where it cannot be had; `why_not` says why."""
    return None if why_not(on_gpu) else _opened(on_gpu)


@cache
def why_not(on_gpu: bool) -> str:
    """Return why there is no operator here, or an empty text."""
    try:
        _opened(on_gpu)
    except Unavailable as error:
        return str(error)
    return ""


@cache
def _opened(on_gpu: bool) -> Operator:
    if sys.platform != "linux":
        raise Unavailable("the operator is written for Linux")
    return Operator(compiled(), on_gpu)


def compiled() -> Path:
    """Return the library for this processor: what LORA_OP_LIBRARY names, or compiled unless it is cached.

    Raises `Unavailable` without a C compiler.
    """
    if given := os.environ.get("LORA_OP_LIBRARY"):  # a container has no compiler
        return Path(given)
    compiler, words = found_compiler(), " ".join
    key: list[str | bytes] = [SOURCE.read_bytes(), words(FLAGS), words(compiler), processor()]
    # a home that containers share: a library may want a newer C library than another container has
    key.append(words(platform.libc_ver()))
    return in_cache("libadd_lora", ".so", key, lambda file: compile_with(compiler, file))


def found_compiler() -> list[str]:
    """Return the C compiler as words of a command: CC's, which may be several, or the system's."""
    asked = shlex.split(os.environ.get("CC", ""))
    for words in (asked, ["cc"], ["gcc"], ["clang"]):
        if words and (program := shutil.which(words[0])):
            return [program, *words[1:]]
    raise Unavailable("there is no C compiler: install gcc or clang")


def compile_with(compiler: list[str], file: Path) -> None:
    """Compile the library to a file. Raises `Unavailable` with the compiler's first error."""
    named = f"-Wl,-soname,{file.name}"
    command = [*compiler, *FLAGS, named, str(SOURCE), "-o", str(file), *LIBRARIES]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        errors = [line for line in lines if "error" in line] or lines
        raise Unavailable(f"{' '.join(compiler)} failed: {errors[0]}")


def processor() -> str:
    """Return what the compiler looks at when it compiles for this processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))


def compiled_kernels() -> bytes:
    """Return the GPU's kernels as PTX. Raises `Unavailable` where CUDA's compiler library is missing."""
    key: list[str | bytes] = [KERNELS.read_bytes(), PTX_FOR]
    return in_cache("add_lora", ".ptx", key, write_ptx).read_bytes() + b"\0"


def write_ptx(file: Path) -> None:
    """Compile the kernels with NVRTC, which comes with ONNX Runtime for CUDA."""
    try:
        from cuda.bindings import nvrtc
    except ImportError:
        raise Unavailable("there is no NVRTC: `make setup EXTRA=cuda` installs it") from None

    def checked(result, *values):
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise Unavailable(f"NVRTC says {result.name}")
        return values[0] if values else None

    program = checked(
        *nvrtc.nvrtcCreateProgram(KERNELS.read_bytes(), KERNELS.name.encode(), 0, [], [])
    )
    options = [f"--gpu-architecture={PTX_FOR}".encode(), b"--std=c++17"]
    checked(*nvrtc.nvrtcCompileProgram(program, len(options), options))
    ptx = b" " * checked(*nvrtc.nvrtcGetPTXSize(program))
    checked(*nvrtc.nvrtcGetPTX(program, ptx))
    file.write_bytes(ptx.rstrip(b"\0"))


def in_cache(
    stem: str, suffix: str, key: list[str | bytes], write: Callable[[Path], object]
) -> Path:
    """Return a file of the user's cache, named by what it is made from; write it unless it is there."""
    digest = hashlib.sha256()
    for each in key:
        digest.update((each.encode() if isinstance(each, str) else each) + b"\0")
    file = cache_folder() / f"{stem}-{digest.hexdigest()[:16]}{suffix}"
    if not file.is_file():
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            # the name is the library's own, too: the runtime looks for it by that
            part = Path(scratch, file.name)
            write(part)
            part.replace(file)
    return file


@cache
def cache_folder() -> Path:
    """Return a folder that only this user writes to: in the cache, or for this process alone."""
    try:
        cache = os.environ.get("XDG_CACHE_HOME")
        folder = Path(cache or Path.home().resolve(strict=True) / ".cache") / "olive-lab"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mine = folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK)
    except (OSError, RuntimeError):  # no home, or one that cannot be written to
        mine = False
    return folder if mine else Path(_scratch().name)


@cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="olive-lab-")
