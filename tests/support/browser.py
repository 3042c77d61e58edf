"""A real browser, where this machine has one: Debian's `chromium` and `chromium-driver`, or Chrome's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from support.processes import wait_until

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 30  # seconds
# as selenium.webdriver.common.keys has them
ENTER, ESCAPE, TAB, SHIFT = "\ue007", "\ue00c", "\ue004", "\ue008"


class Page:
    """A page in the browser, as people use it: by its keys, its labels and what it shows."""

    def __init__(self, driver: Any, url: str, width: int = 1000, dark: bool = False):
        from selenium.webdriver.common.by import By

        self.driver, self.css = driver, By.CSS_SELECTOR
        size = {"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": False}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.get_log("browser")  # empties it
        driver.get(url)

    def all(self, selector: str) -> list[Any]:
        """Return the elements that a selector finds."""
        return self.driver.find_elements(self.css, selector)

    def texts(self, selector: str) -> list[str]:
        """Return what elements show."""
        return [element.text for element in self.all(selector)]

    def press(self, *keys: str) -> None:
        """Press keys wherever the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def run(self, script: str) -> Any:
        """Return what a script returns."""
        return self.driver.execute_script(script)

    def run_async(self, script: str, *words: Any) -> Any:
        """Return what a script hands to the function that is its last argument."""
        self.driver.set_script_timeout(10 * PATIENCE)
        return self.driver.execute_async_script(script, *words)

    def waits(self, condition: Any) -> None:
        """Wait for something to come about."""
        wait_until(condition, PATIENCE)

    def complaints(self) -> list[str]:
        """Return what the browser has complained of, such as what the policy forbids."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


# WebGPU computed by SwiftShader, which the browser brings
SOFTWARE_WEBGPU = (
    "--enable-unsafe-webgpu",
    "--enable-features=Vulkan,WebGPU",
    "--use-webgpu-adapter=swiftshader",
    "--use-vulkan=swiftshader",
)


def started(*words: str) -> Iterator[Any]:
    """A headless browser. Without one on this machine its tests are skipped: it is no Python package."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if not (found and driver):
        pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = found
    # a container's root has no sandbox; a container's /dev/shm is small
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", *words):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # with the path of the driver selenium looks for none in the network
    window = webdriver.Chrome(options=options, service=Service(driver))
    yield window
    window.quit()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A browser without a GPU."""
    yield from started("--disable-gpu")


@pytest.fixture(scope="session")
def webgpu_browser() -> Iterator[Any]:
    """A browser with WebGPU, which the processor computes."""
    yield from started(*SOFTWARE_WEBGPU)
