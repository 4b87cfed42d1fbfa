"""The page in a real browser: Chromium, headless, with an empty profile.

Starting it, what a person does with the page, what the browser has to say about it.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_PATIENCE_S = 60.0  # no expectation of speed: only the end of a test that would hang


@contextmanager
def open_browser(profile: Path) -> Iterator[webdriver.Chrome]:
    """Run Debian's Chromium with the empty folder ``profile`` and a camera that is not there; nothing is downloaded."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=CHROMEDRIVER))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page in a browser, as a person has it: what they do, what they see."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        self.url = url

    def open(self, *, width: int = 1200, height: int = 900, scheme: str = "light") -> None:
        """Load it anew in a window of this size, by day or by night; wait until it knows the service's state."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}, {"name": "prefers-reduced-motion", "value": "reduce"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get(self.url)
        self.wait(lambda: self.element("model").get_attribute("data-state") != "unknown")

    def element(self, id_: str) -> WebElement:
        """Give the element with this id."""
        return self.driver.find_element(By.ID, id_)

    def elements(self, selector: str) -> list[WebElement]:
        """Give the elements of a CSS selector."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, id_: str) -> str:
        """Give the text in an element, seen or not."""
        return str(self.element(id_).get_property("textContent"))

    def wait(self, condition: Callable[[], object]) -> None:
        """Wait until it holds."""
        WebDriverWait(self.driver, _PATIENCE_S, poll_frequency=0.05).until(lambda _: condition())

    def wait_for_alert(self, part: str) -> None:
        """Wait until an error is shown that contains these words."""
        self.wait(lambda: self.element("alert").is_displayed() and part in self.text("alert-text"))

    def wait_for_heatmap(self, label: str | None = None) -> None:
        """Wait until the heatmap is drawn, of ``label`` if given."""
        said = (f"Where it found {label or ''}", f"Nothing here speaks for {label or ''}")
        self.wait(lambda: self.text("heatmap-text").startswith(said))

    def wait_for_result(self, name: str) -> None:
        """Wait until the image of this name has its answer and its heatmap."""
        self.wait(lambda: self.text("result-name") == name)
        self.wait_for_heatmap()

    def pick(self, *paths: Path) -> None:
        """Choose files in the file dialogue."""
        self.element("files").send_keys("\n".join(str(path) for path in paths))

    def drop(self, *paths: Path) -> None:
        """Drag files onto the page and let them go there."""
        drop = self.element("drop").rect
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            event = {"type": kind, "x": drop["x"] + 10, "y": drop["y"] + 10, "data": data}
            self.driver.execute_cdp_cmd("Input.dispatchDragEvent", event)

    def paste(self, png: bytes) -> None:
        """Copy an image and paste it with the keyboard."""
        self.copy(png)
        ActionChains(self.driver).key_down(Keys.CONTROL).send_keys("v").key_up(Keys.CONTROL).perform()

    def copy(self, png: bytes) -> None:
        """Put an image into the clipboard."""
        permissions = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": self.url.rstrip("/")}
        self.driver.execute_cdp_cmd("Browser.grantPermissions", permissions)
        copy = """
            const [encoded, done] = arguments;
            const bytes = Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0));
            const image = new Blob([bytes], { type: "image/png" });
            const item = new ClipboardItem({ "image/png": image });
            navigator.clipboard.write([item]).then(() => done(null), (error) => done(String(error)));
        """
        assert self.driver.execute_async_script(copy, base64.b64encode(png).decode()) is None

    def save_to(self, folder: Path) -> None:
        """Let downloads go there."""
        self.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})

    def press(self, *keys: str) -> None:
        """Press keys, one after the other."""
        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def scores(self) -> dict[str, float]:
        """Give the classes with the percentages that are shown, in their order."""
        rows = [row.text.split("\n") for row in self.elements("#scores button")]
        return {name: float(percent.strip("< %")) for name, percent in rows}

    def run(self, script: str) -> Any:
        """Run JavaScript in the page and give what it returns."""
        return self.driver.execute_script(script)

    def errors(self) -> list[str]:
        """Give what the browser has complained of since the last call: policies, scripts, failed requests."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]

    def requests(self) -> list[str]:
        """Give the addresses that were asked for since the last call, each as often as it was."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]  # type: ignore[no-untyped-call]
        return [message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"]

    def screenshot(self) -> bytes:
        """Give the whole page as PNG, also what lies below the window's edge."""
        width, height = self.run("return [innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        options = {"format": "png", "captureBeyondViewport": True, "clip": clip}
        return base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"])
