"""WebGPU without a GPU: SwiftShader, a Vulkan driver in software that Debian's `chromium` package brings."""

from __future__ import annotations

import ctypes
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from stages.answers.devices import SOFTWARE

FOLDERS = ("/usr/lib/chromium", "/usr/lib/chromium-browser", "/opt/google/chrome")
DRIVER, LOADER = "vk_swiftshader_icd.json", "libvulkan.so.1"


def folder() -> Path | None:
    """Return the folder of a browser with SwiftShader and a Vulkan loader, None where there is none."""
    found = (Path(each) for each in FOLDERS)
    return next((p for p in found if (p / DRIVER).is_file() and (p / LOADER).is_file()), None)


def environment(place: Path) -> dict[str, str]:
    """Return what a process needs to find them."""
    return {
        "LD_LIBRARY_PATH": str(place),
        "VK_ICD_FILENAMES": str(place / DRIVER),
        SOFTWARE: "1",
    }


@pytest.fixture(scope="session")
def swiftshader() -> dict[str, str]:
    """The environment in which the processor computes WebGPU, here too. Skipped where it is not to be had."""
    place = folder()
    if place is None:
        pytest.skip("no SwiftShader: apt-get install chromium")
    if find_spec("onnxruntime_ep_webgpu") is None:
        pytest.skip("no onnxruntime-ep-webgpu: make setup")
    # of a process that runs already, the loader reads no LD_LIBRARY_PATH
    ctypes.CDLL(str(place / LOADER), mode=ctypes.RTLD_GLOBAL)
    variables = environment(place)
    os.environ |= {name: value for name, value in variables.items() if name != "LD_LIBRARY_PATH"}
    return variables
