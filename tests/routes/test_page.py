"""The page in a real browser.

Every test ends with a look at the browser's logs: nothing was asked of another host, and no policy was violated.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from io import StringIO
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.servers.service_process import ServiceProcess
from service.model.architectures import ModelConfig
from service.model.checkpoint import CheckpointMetadata, save_checkpoint
from service.predict.output import csv_rows
from training.step.network import build_model, weights_of

pytest.importorskip("selenium", reason="needs selenium")
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.support.browser import CHROMEDRIVER, CHROMIUM, Page, open_browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="needs Debian's chromium and chromium-driver"),
]

_ROOT = Path(__file__).parents[2]

# For every element with text of its own: its WCAG contrast with the nearest background that is not transparent.
_CONTRASTS = """
const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
const light = (colour) => {
  const [r, g, b] = channels(colour).slice(0, 3).map((value) => linear(value / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (channels(colour)[3] !== 0) return colour;
  }
  return "rgb(255, 255, 255)";
};
return [...document.body.querySelectorAll("*")]
  .filter((e) => e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
  .map((e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))];
    return [e.textContent.trim().slice(0, 40), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
  });
"""

# Notes every layout shift since the page was opened, and when the person did something (the half second after does not count).
_WATCH_SHIFTS = """
window.shifts = [];
window.acts = [];
addEventListener("change", () => window.acts.push(performance.now()), true);
const note = (entry) => window.shifts.push({
  at: entry.startTime,
  value: entry.value,
  what: entry.sources.map(({ node }) => node?.id || node?.className || node?.nodeName),
});
new PerformanceObserver((list) => list.getEntries().forEach(note)).observe({ type: "layout-shift", buffered: true });
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """One browser for all tests of this file."""
    with open_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def page(driver: webdriver.Chrome, service: ServiceProcess) -> Iterator[Page]:
    """The page of the service, open; what the browser complained of, and what left this host, fails the test."""
    page = Page(driver, service.url + "/")
    page.requests(), page.errors()
    page.open()
    yield page
    assert page.errors() == []
    assert {
        url for url in page.requests() if not url.startswith((page.url, "blob:", "data:", "chrome:", "chrome-untrusted:"))
    } == set()
    driver.get("about:blank")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A service with another model, of three classes of its own and 16 pixels a side, behind an API key."""
    torch.manual_seed(0)
    config = ModelConfig(num_classes=3, widths=(8, 16, 24), depths=(1, 1, 1))
    metadata = CheckpointMetadata(
        name="leaves",
        architecture="resnet18",
        config=config,
        class_names=("oak & elm", "<b>ash</b>", "a leaf of a very long name indeed, longer than any bar"),
    )
    metadata = metadata.model_copy(update={"input": metadata.input.__class__(size=16)})
    path = tmp_path_factory.mktemp("leaves") / "leaves.safetensors"
    save_checkpoint(path, weights_of(build_model("resnet18", config)), metadata)
    with ServiceProcess(path, api_keys="open sesame") as running:
        yield running


def test_pick_a_file(page: Page, image_paths: list[Path], service: ServiceProcess) -> None:
    """A file that is picked is answered: the class, a bar for every class as the API tells them, pictures and times."""
    path = image_paths[0]
    page.pick(path)
    page.wait_for_heatmap()
    answer = httpx.post(f"{service.url}/predict?top_k=10", files={"file": path.read_bytes()}).json()
    assert page.element("result-title").text.startswith((answer["label"], f"Perhaps {answer['label']}"))
    assert list(page.scores()) == [prediction["label"] for prediction in answer["predictions"]]
    assert list(page.scores().values()) == pytest.approx([100 * each["score"] for each in answer["predictions"]], abs=0.11)
    assert page.text("result-name") == path.name
    assert page.text("view-size") == ", 32\u00a0\u00d7\u00a032"
    parts = [term.text for term in page.elements("#timing-parts dt")]
    assert parts == ["decode", "queue", "compute", "transfer"]
    assert page.text("announcement").startswith(f"{path.name}: {answer['label']}, ")


def test_what_the_network_sees_is_drawn_by_the_service(page: Page, image_paths: list[Path], service: ServiceProcess) -> None:
    """The second picture holds the pixels of ``/view``."""
    page.pick(image_paths[5])
    page.wait_for_heatmap()
    shown = page.run(
        """
        const image = document.getElementById("view");
        const canvas = document.createElement("canvas");
        Object.assign(canvas, { width: image.naturalWidth, height: image.naturalHeight });
        const context = canvas.getContext("2d");
        context.drawImage(image, 0, 0);
        return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
        """
    )
    pixels = np.array(shown, np.uint8).reshape(32, 32, 4)[..., :3]
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(image_paths[5]).convert("RGB")))


def test_click_a_sample(page: Page) -> None:
    """Each of the model's known images is offered, and classified when it is clicked."""
    page.wait(lambda: page.elements("#samples button"))
    samples = page.elements("#samples button")
    assert len(samples) == 8
    for sample in samples:
        name = sample.find_element(By.TAG_NAME, "img").get_attribute("alt")
        sample.click()
        page.wait_for_heatmap(name)
        assert page.text("result-name") == f"{name}.png"
        assert next(iter(page.scores())) == name


def test_paste_an_image(page: Page, image_paths: list[Path]) -> None:
    """An image from the clipboard is classified."""
    page.paste(image_paths[9].read_bytes())
    page.wait_for_heatmap()
    assert len(page.scores()) == 10
    assert page.text("result-name") == "image.png"


def test_paste_without_a_keyboard(page: Page, image_paths: list[Path]) -> None:
    """The button takes the image from the clipboard; a clipboard without one is told so."""
    page.copy(image_paths[9].read_bytes())
    page.element("paste").click()
    page.wait_for_result("image.png")
    page.driver.execute_async_script("navigator.clipboard.writeText('a cat').then(arguments[0])")
    page.element("paste").click()
    page.wait_for_alert("no image in the clipboard")


def test_drop_a_file(page: Page, image_paths: list[Path]) -> None:
    """A file that is dropped on the page is classified, and the mark of the drag is gone."""
    page.drop(image_paths[13])
    page.wait_for_heatmap()
    assert page.text("result-name") == image_paths[13].name
    assert "is-over" not in (page.element("drop").get_attribute("class") or "")


def test_photograph(page: Page) -> None:
    """The camera's picture is classified, and the camera is off again."""
    page.element("photograph").click()
    page.wait(lambda: page.run("return document.getElementById('camera-video').videoWidth > 0"))
    page.element("shoot").click()
    page.wait_for_heatmap()
    assert page.text("result-name") == "photo.jpg"
    assert page.run("return document.getElementById('camera-video').srcObject") is None
    assert not page.element("camera").is_displayed()


def test_several_at_once(page: Page, image_paths: list[Path], service: ServiceProcess) -> None:
    """Several images are answered in a list; the first is shown, and any other when it is chosen."""
    page.pick(*image_paths)
    page.wait(lambda: page.text("album-title").startswith(f"{len(image_paths)} images in"))
    page.wait_for_heatmap()
    files = [("file", (path.name, path.read_bytes())) for path in image_paths]
    results = httpx.post(f"{service.url}/predict/batch", files=files).json()["results"]
    tiles = page.elements("#album-items button")
    assert [tile.text.split("\n")[0] for tile in tiles] == [
        result["label"] if result["known"] else "not known" for result in results
    ]
    assert page.text("result-name") == image_paths[0].name
    tiles[-1].click()
    page.wait_for_result(image_paths[-1].name)
    assert [tile.get_attribute("aria-pressed") for tile in tiles] == ["false"] * (len(tiles) - 1) + ["true"]


def test_many_at_once(page: Page, image_paths: list[Path]) -> None:
    """More images than one request may hold are sent in several; none is lost."""
    page.pick(*(image_paths * 7))
    page.wait(lambda: page.text("album-title").startswith("280 images in"))
    page.wait_for_heatmap()
    assert all("%" in tile.text for tile in page.elements("#album-items button")[::40])
    assert len([url for url in page.requests() if "/predict/batch" in url]) == 5


def test_one_bad_file_among_many(page: Page, image_paths: list[Path]) -> None:
    """A file that is no image says so when it is chosen; its neighbours are answered."""
    page.drop(image_paths[0], _ROOT / "pyproject.toml", image_paths[1])
    page.wait(lambda: page.text("album-title").endswith("1 without an answer"))
    page.wait_for_heatmap()
    tiles = page.elements("#album-items button")
    tiles[1].click()
    page.wait_for_alert("pyproject.toml: This is not an image")
    assert not page.element("result").is_displayed()
    tiles[2].click()
    page.wait_for_result(image_paths[1].name)
    assert not page.element("alert").is_displayed()


def test_a_file_that_is_too_large_among_many(page: Page, image_paths: list[Path], tmp_path: Path) -> None:
    """It fails alone, though the request that it is in is refused as a whole."""
    large = tmp_path / "large.png"
    large.write_bytes(image_paths[0].read_bytes() + bytes(2**25))
    page.pick(image_paths[0], large, image_paths[1])
    page.wait(lambda: page.text("album-title").endswith("1 without an answer"))
    page.wait_for_result(image_paths[0].name)
    page.elements("#album-items button")[1].click()
    page.wait_for_alert("large.png: ")
    assert all("413" in message or "ERR_" in message for message in page.errors()), "as Chromium logs every failed request"


def test_an_image_like_none_of_the_classes(page: Page, tmp_path: Path) -> None:
    """Noise has no verdict: a sentence says so, the best guess is small, and the bars are grey."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    path = tmp_path / "noise.png"
    Image.fromarray(noise).save(path)
    page.pick(path)
    page.wait_for_heatmap()
    sentence = "This does not look like any of the 10 kinds I know"
    assert page.text("result-title") == sentence
    label, score = next(iter(page.scores().items()))
    assert page.text("result-guess") == f"Best guess: {label}, {score:.1f}\u00a0%".replace("\u00a0", " ")
    assert sentence in page.text("announcement")
    colours = page.run("return [...document.querySelectorAll('.fill')].map((e) => getComputedStyle(e).backgroundColor)")
    assert len(set(colours)) == 1
    page.elements("#samples img[alt=cat]")[0].click()
    page.wait_for_result("cat.png")
    assert page.text("result-title").startswith("cat")
    assert page.run("return getComputedStyle(document.querySelector('.fill')).backgroundColor") != colours[0]


def test_results_as_csv(page: Page, image_paths: list[Path], tmp_path: Path) -> None:
    """A row for each image, in the columns of ``python -m service predict``; a failure has its reason."""
    page.save_to(tmp_path)
    page.pick(image_paths[0], _ROOT / "pyproject.toml")
    page.wait(lambda: page.text("album-title").endswith("1 without an answer"))
    page.element("csv").click()
    page.wait((tmp_path / "results.csv").exists)
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [row["file"] for row in rows] == [image_paths[0].name, "pyproject.toml"]
    assert rows[0]["label"] == image_paths[0].name.split("-")[0]
    assert float(rows[0]["score"]) > float(rows[0]["score_5"])
    assert (rows[0]["known"], rows[0]["error"]) == ("yes", "")
    assert (rows[1]["label"], "not an image" in rows[1]["error"]) == ("", True)
    written = StringIO()
    csv_rows(written, top_k=5)
    assert list(rows[0]) == written.getvalue().strip().split(",")


def test_use_it_from_code(page: Page, image_paths: list[Path]) -> None:
    """The three snippets are for this service and this image, and run as they stand."""
    path = image_paths[3]
    label = path.name.split("-")[0]
    page.pick(path)
    page.wait_for_heatmap()
    curl, python, javascript = (page.text(f"code-{name}") for name in ("curl", "python", "javascript"))
    run = partial(subprocess.run, cwd=path.parent, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(run(["bash", "-c", curl]).stdout)["label"] == label
    assert run([sys.executable, "-c", python]).stdout.startswith(f"{label} 0.")
    body = javascript.replace("console.log(answer.label, answer.score)", "return answer.label")
    call = f"const file = arguments[0].files[0], done = arguments[1]; (async () => {{ {body} }})().then(done, done)"
    page.run(
        "document.getElementById('files').id = 'keep'; const i = document.createElement('input'); i.type = 'file';"
        "i.id = 'again'; document.body.append(i)"
    )
    page.element("again").send_keys(str(path))
    assert page.driver.execute_async_script(call, page.element("again")) == label


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_moves_by_itself(page: Page, image_paths: list[Path], width: int) -> None:
    """No element moves but in answer to the person: not while the page loads, nor when answers come late."""
    page.driver.execute_cdp_cmd("Network.enable", {})
    slow = {"offline": False, "latency": 700, "downloadThroughput": -1, "uploadThroughput": -1}
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", slow)
    try:
        page.open(width=width)
        page.run(_WATCH_SHIFTS)
        page.wait(lambda: page.text("lede-classes"))
        page.wait(lambda: page.text("live-throughput") != "\u2013")
        for number, said in ((1, image_paths[0].name), (6, "6 images")):
            page.pick(*image_paths[:number])
            page.wait(partial(lambda said: page.text("announcement").startswith(said), said))
            page.wait_for_result(image_paths[0].name)
        page.wait(lambda: page.text("live-p95") != "\u2013")
        moved = page.run(
            "return window.shifts.filter((shift) => !window.acts.some((act) => shift.at - act < 500 && shift.at > act))"
        )
        assert page.run("return window.shifts.length"), "showing a result moves what is below it, so they are seen"
        assert sum(shift["value"] for shift in moved) < 0.05, moved  # half of what browsers' makers call good
    finally:
        page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", {**slow, "latency": 0})


def test_an_error_in_words(page: Page, image_paths: list[Path]) -> None:
    """A file that is no image is refused in the service's own words, and the next image makes them go."""
    page.pick(_ROOT / "pyproject.toml")
    page.wait_for_alert("pyproject.toml: This is not an image of a known format")
    assert not page.element("result").is_displayed()
    assert not page.element("retry").is_displayed()
    assert all("422" in message for message in page.errors()), "the refusal itself, as Chromium logs every failed request"
    page.pick(image_paths[0])
    page.wait_for_heatmap()
    assert not page.element("alert").is_displayed()


def test_choose_a_class(page: Page, image_paths: list[Path]) -> None:
    """Choosing another class draws where that one was found."""
    page.pick(image_paths[20])
    page.wait_for_heatmap()
    picture = "return document.getElementById('heatmap').toDataURL()"
    first = page.run(picture)
    button = page.elements("#scores button")[3]
    label = button.get_attribute("data-label")
    button.click()
    page.wait_for_heatmap(label)
    assert page.run(picture) != first
    assert [b.get_attribute("data-label") for b in page.elements("#scores button[aria-pressed=true]")] == [label]


def test_the_strongest_place_in_words(page: Page) -> None:
    """The caption names the ninth of the picture in which the heatmap has its peak, and says when there is none."""
    places = page.driver.execute_async_script(
        """
        const done = arguments[0];
        import("/page/heatmap.js").then(({ strongestPlace }) => {
          const peakAt = (x, y) => Array.from({ length: 9 }, (_, row) => Array.from({ length: 9 }, (_, column) =>
            (row === y && column === x ? 1 : 0.5)));
          done([[0, 0], [4, 1], [8, 4], [4, 4], [6, 8]].map(([x, y]) => strongestPlace(peakAt(x, y))).concat(
            strongestPlace([[0, 0], [0, 0]])));
        });
        """
    )
    assert places == ["top left", "top", "right", "centre", "bottom right", None]


def test_keyboard_only(page: Page) -> None:
    """Without a mouse: past the skip link to the samples, to a result, and to another class of it."""
    page.wait(lambda: page.elements("#samples button"))
    page.press(Keys.TAB)
    assert page.driver.switch_to.active_element.text == "Skip to the content"
    page.press(Keys.ENTER)
    for name in ("pick", "photograph", "paste"):
        page.press(Keys.TAB)
        assert page.driver.switch_to.active_element.get_attribute("id") == name
    page.press(Keys.TAB, Keys.TAB, Keys.ENTER)
    page.wait_for_heatmap()
    assert page.text("result-name") == "dog.png"
    focus = page.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert focus == "solid"
    page.press(*[Keys.TAB] * 8, Keys.SPACE)  # over six samples and the first class
    label = page.driver.switch_to.active_element.get_attribute("data-label")
    assert label == list(page.scores())[1]
    page.wait_for_heatmap(label)


def test_screen_reader(page: Page) -> None:
    """Every control, picture and region has a name, and results and errors are announced."""
    page.pick(*(_ROOT / "tests" / "images" / name for name in ("cat-00008.png", "dog-00016.png")))
    page.wait_for_heatmap()
    page.driver.execute_cdp_cmd("Accessibility.enable", {})
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    page.driver.execute_cdp_cmd("Accessibility.disable", {})
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in ("button", "image", "img", "link", "textbox", "region", "list")
    ]
    assert ("button", "airplane") in named
    assert ("region", "The service now, over the last 10 seconds") in named
    assert any(role == "region" and ("cat" in name or "dog" in name) for role, name in named)
    assert [role for role, name in named if not name] == []
    assert page.run("return document.documentElement.lang") == "en"
    roles = [page.element(id_).get_attribute("role") for id_ in ("announcement", "alert")]
    assert roles == ["status", "alert"]


@pytest.mark.parametrize("width", [320, 390, 760, 1600])
def test_no_screen_is_too_narrow(page: Page, image_paths: list[Path], width: int) -> None:
    """Nothing is cut off and nothing scrolls sideways, on a small phone as on a wide screen."""
    page.open(width=width)
    page.pick(*image_paths[:12])
    page.wait_for_heatmap()
    assert page.run("return document.documentElement.scrollWidth") <= width
    outside = "return [...document.querySelectorAll('main *, header *')].filter((e) => e.checkVisibility() &&" + (
        " e.getBoundingClientRect().right > innerWidth + 0.5 && !e.closest('.visually-hidden')).map((e) => e.outerHTML)"
    )
    assert page.run(outside) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_by_day_and_by_night(page: Page, image_paths: list[Path], scheme: str) -> None:
    """The page follows the system's colour scheme, and every text has the contrast of WCAG 2.2, level AA."""
    page.open(scheme=scheme)
    page.pick(*image_paths[:3], _ROOT / "pyproject.toml")
    page.wait_for_heatmap()
    contrasts = page.run(_CONTRASTS)
    page.elements("#album-items button")[3].click()
    page.wait_for_alert("not an image")
    contrasts += page.run(_CONTRASTS)
    assert len(contrasts) > 80
    assert [(text, contrast) for text, contrast in contrasts if contrast < 4.5] == []
    paper = page.run("return getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).map(Number)")
    assert (min(paper) > 200) == (scheme == "light")
    assert (max(paper) < 60) == (scheme == "dark")


def test_the_policy_holds(page: Page) -> None:
    """What the policy forbids is stopped by the browser: a foreign image, an inline style, a string that becomes HTML."""
    violated = page.driver.execute_async_script(
        """
        const done = arguments[0];
        const seen = new Set();
        document.addEventListener("securitypolicyviolation", (event) => {
          seen.add(event.effectiveDirective);
          if (seen.size === 3) done([...seen].sort());
        });
        const image = new Image();
        image.src = "https://example.invalid/cat.png";
        image.setAttribute("style", "color: red");
        try { image.innerHTML = "<p>"; } catch {}
        """
    )
    assert violated == ["img-src", "require-trusted-types-for", "style-src-attr"]
    assert len(page.errors()) >= 3
    page.requests()


def test_live_figures(page: Page, image_paths: list[Path]) -> None:
    """After some predictions the panel tells of throughput, batches and latency."""
    page.pick(*image_paths[:8])
    page.wait_for_heatmap()
    names = ("live-throughput", "live-batch", "live-median", "live-p95")
    page.wait(lambda: all(page.text(name) not in ("\u2013", "0") for name in names))
    throughput, batch, median, p95 = (float(page.text(name).replace(",", "")) for name in names)
    assert throughput > 0
    assert 1 <= batch <= 64
    assert 0 < median <= p95
    assert len(page.elements(".spark path")) == 4


def test_figures_are_what_the_metrics_say(page: Page) -> None:
    """Rates, means and quantiles come out of Prometheus's text as Prometheus itself would compute them."""
    text = """# HELP service_predictions_total Images answered.
service_predictions_total{{label="a \\"cat\\""}} {cats}
service_predictions_total{{label="dog"}} 5.0
service_batch_images_sum {images}
service_batch_images_count {batches}
service_request_seconds_bucket{{le="0.01",route="/predict"}} {fast}
service_request_seconds_bucket{{le="0.02",route="/predict"}} {all}
service_request_seconds_bucket{{le="+Inf",route="/predict"}} {all}
service_request_seconds_bucket{{le="0.01",route="/health"}} 1e6
service_request_seconds_bucket{{le="+Inf",route="/health"}} 1e6
"""
    before = text.format(cats=10, images=15, batches=10, fast=5, all=5)
    after = text.format(cats=50, images=55, batches=20, fast=15, all=25)
    rates = page.driver.execute_async_script(
        """
        const [before, after, done] = arguments;
        import("/page/metrics.js").then(({ snapshotOf, ratesBetween }) =>
          done(ratesBetween(snapshotOf(before, 1000), snapshotOf(after, 3000))));
        """,
        before,
        after,
    )
    assert rates == {"throughput": 20, "batch": 4, "median": pytest.approx(10), "p95": pytest.approx(19)}


def test_another_model_behind_a_key(driver: webdriver.Chrome, guarded: ServiceProcess, image_paths: list[Path]) -> None:
    """Where a key is needed the page asks for it; then it shows the classes of whatever model there is, as text."""
    page = Page(driver, guarded.url + "/")
    page.open()
    page.pick(image_paths[0])
    page.wait_for_alert("API key")
    page.element("key").send_keys("open sesame", Keys.ENTER)
    page.wait_for_heatmap()
    assert set(page.scores()) == {"oak & elm", "<b>ash</b>", "a leaf of a very long name indeed, longer than any bar"}
    assert page.text("view-size") == ", 16\u00a0\u00d7\u00a016"
    page.wait(lambda: page.text("lede-classes") == " that knows 3 kinds of things")
    assert not page.element("samples").is_displayed(), "it has no known images"
    assert "leaves" in page.text("model-text")
    page.open(width=320)
    page.pick(image_paths[1])
    page.wait_for_heatmap()
    assert page.run("return document.documentElement.scrollWidth") <= 320
    assert all("401" in message for message in page.errors())


def test_the_service_is_gone(driver: webdriver.Chrome, checkpoint_path: Path, image_paths: list[Path]) -> None:
    """A service that cannot be reached is said to be so, in the page's head and where an image was sent."""
    with ServiceProcess(checkpoint_path) as service:
        page = Page(driver, service.url + "/")
        page.open()
        assert page.element("model").get_attribute("data-state") == "ready"
    page.pick(image_paths[0])
    page.wait_for_alert("cannot be reached")
    assert page.element("retry").is_displayed()
    page.wait(lambda: page.element("model").get_attribute("data-state") == "unreachable")
