"""``python -m tests.support.page_picture [FOLDER]``: take the pictures of the page that docs/ has, on a desk and on a phone."""

from __future__ import annotations

import sys
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image

from benchmarks.servers.service_process import ServiceProcess
from service.settings import DEFAULT_CHECKPOINT
from tests.support.browser import Page, open_browser

_PICTURES = {
    # file: width in pixels, colour scheme, image
    "page.png": (1200, "light", "horse"),
    "page-dark.png": (1200, "dark", "ship"),
    "page-phone.png": (390, "light", "cat"),
    "page-phone-unknown.png": (390, "dark", "noise"),
}


def take(folder: Path) -> None:
    """Write the pictures of the shipped model's page; in full colour, since a palette spoils the photographs in them."""
    with (
        ServiceProcess(DEFAULT_CHECKPOINT) as service,
        tempfile.TemporaryDirectory() as profile,
        open_browser(Path(profile)) as driver,
    ):
        page = Page(driver, service.url + "/")
        noise = Path(profile) / "noise.png"
        Image.effect_noise((32, 32), 100).save(noise)
        for file, (width, scheme, name) in _PICTURES.items():
            page.open(width=width, height=844 if width < 600 else 900, scheme=scheme)
            page.wait(lambda: page.elements("#samples img"))
            for sample in ("frog", "dog", "bird"):
                page.elements(f"#samples img[alt={sample}]")[0].click()
                page.wait_for_result(f"{sample}.png")
            if name == "noise":
                page.pick(noise)
            else:
                page.elements(f"#samples img[alt={name}]")[0].click()
            page.wait_for_result(f"{name}.png")
            page.wait(lambda: page.text("live-p95") != "\N{EN DASH}")
            Image.open(BytesIO(page.screenshot())).convert("RGB").save(folder / file, optimize=True)


if __name__ == "__main__":
    take(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
