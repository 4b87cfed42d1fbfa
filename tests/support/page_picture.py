"""``python -m tests.support.page_picture FILE [CHECKPOINT]``: draw the README's picture of the page.

Owns: what the picture shows. Does not know: the page.
"""

from __future__ import annotations

import sys
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image

from benchmarks.servers.service_process import ServiceProcess
from service.settings import DEFAULT_CHECKPOINT
from tests.support.browser import Page, open_browser

_SAMPLES = ("cat", "ship", "frog", "dog", "horse")  # the last one is what the picture shows


def draw(checkpoint: Path) -> Image.Image:
    """Give the page with the answer for a sample of ``checkpoint``, RGB, 1200 pixels wide."""
    with (
        ServiceProcess(checkpoint) as service,
        tempfile.TemporaryDirectory() as profile,
        open_browser(Path(profile)) as driver,
    ):
        page = Page(driver, service.url + "/")
        page.open()
        for name in _SAMPLES:
            page.elements(f"#samples img[alt={name}]")[0].click()
            page.wait_for_result(f"{name}.png")
        page.wait(lambda: page.text("live-p95") != "\u2013")
        return Image.open(BytesIO(page.screenshot())).convert("RGB")


def main() -> int:
    """Write the picture; in full colour, since a palette spoils the photographs in it."""
    checkpoint = Path(sys.argv[2]) if len(sys.argv) > 2 else DEFAULT_CHECKPOINT
    draw(checkpoint).save(sys.argv[1], optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
