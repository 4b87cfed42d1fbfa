"""What people make of the OpenAPI document: a generated client, and ``/docs`` in a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

from benchmarks.servers.service_process import ServiceProcess
from tests.support.browser import CHROMEDRIVER, CHROMIUM, open_browser
from tests.support.package_index import install
from tests.support.scripted_engine import ApplicationServer

GENERATOR = "openapi-python-client==0.29.1"
USE = """
import base64, sys
from io import BytesIO
from generated import Client
from generated.api.health import health, labels
from generated.api.open_inference import model_metadata
from generated.api.predict import predict, predict_batch
from generated.models import PredictBatchBody, PredictFilesBody, PredictParameters, PredictRequest
from generated.types import File

url, path = sys.argv[1:]
data = open(path, "rb").read()
client = Client(base_url=url)
form = predict.sync(client=client, body=PredictFilesBody(file=File(BytesIO(data), "a.png")), top_k=3)
raw = predict.sync(client=client, body=File(BytesIO(data)), top_k=3)
text = base64.b64encode(data).decode()
sent = predict.sync(client=client, body=PredictRequest(inputs=text, parameters=PredictParameters(top_k=3)))
assert form.predictions == raw.predictions == sent.predictions and len(raw.predictions) == 3
assert 0 <= raw.typicality <= 1
bad = predict.sync_detailed(client=client, body=File(BytesIO(b"no image")))
assert (bad.status_code, bad.parsed.code) == (422, "invalid_image")
batch = predict_batch.sync(client=client, body=PredictBatchBody(file=[File(BytesIO(data), "a.png"), File(BytesIO(b""), "b")]))
first, second = batch.results
assert (first.label, second.error.code) == (raw.label, "invalid_image")
assert raw.label in labels.sync(client=client).labels
assert health.sync(client=client).status == "ready"
assert model_metadata.sync(raw.model.name, client=client).outputs[0].name == "probabilities"
print(raw.label)
"""
TYPESCRIPT = ["openapi-typescript@7.13.0", "openapi-fetch@0.17.0", "typescript@5.9.3", "@types/node@20.19.25"]
COMPILER = {"module": "nodenext", "target": "es2022", "types": ["node"], "strict": True, "skipLibCheck": True}
# The types call a file a string; openapi-fetch sends what the serializer makes of it.
TYPESCRIPT_USE = """
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import createClient from "openapi-fetch";
import type { components, paths } from "./service.js";

const [url = "", path = ""] = process.argv.slice(2);
const data = await readFile(path);
const { GET, POST } = createClient<paths>({ baseUrl: url });
const query = { top_k: 3 };
function form(...files: Buffer[]) {
    const made = new FormData();
    files.forEach((file, index) => made.append("file", new Blob([new Uint8Array(file)]), `${index}.png`));
    return made;
}
function label(answer?: components["schemas"]["Answer"]): string | null {
    assert(answer);
    assert.equal(answer.predictions.length, 3);
    assert(answer.typicality! >= 0);
    return answer.label;
}

const sent = await POST("/predict", { body: { inputs: data.toString("base64"), parameters: { top_k: 3, unknown: "flag" } } });
const raw = await POST("/predict", {
    params: { query },
    body: "",
    bodySerializer: () => new Uint8Array(data),
    headers: { "Content-Type": "application/octet-stream" },
});
const part = await POST("/predict", { params: { query }, body: { file: "" }, bodySerializer: () => form(data) });
assert.deepEqual([label(raw.data), label(part.data)], [label(sent.data), label(sent.data)]);
const bad = await POST("/predict", { body: { inputs: "" } });
assert.deepEqual([bad.response.status, bad.error?.code], [422, "invalid_image"]);
const batch = await POST("/predict/batch", { body: { file: [] }, bodySerializer: () => form(data, Buffer.from("no image")) });
const [first, second] = batch.data!.results;
assert(first && "label" in first && second && "error" in second);
assert.deepEqual([first.label, second.error.code], [raw.data!.label, "invalid_image"]);
assert.equal((await GET("/health")).data?.status, "ready");
const model = await GET("/v2/models/{model_name}", { params: { path: { model_name: raw.data!.model.name } } });
assert.equal(model.data?.outputs[0]?.name, "probabilities");
console.log(raw.data!.label);
"""


def document(**settings: Any) -> dict[str, Any]:
    """The OpenAPI document of a service with these settings."""
    with ApplicationServer(**settings) as application:
        answered: dict[str, Any] = httpx.get(f"{application.url}/openapi.json", timeout=60).json()
        return answered


@pytest.mark.slow
def test_a_generated_client_predicts(service: ServiceProcess, image_paths: list[Path], tmp_path: Path) -> None:
    """openapi-python-client makes every operation without a warning, and its client uses every kind of body."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=300)
    install(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", GENERATOR)
    (tmp_path / "config.yml").write_text("post_hooks: []\n")
    command = [str(python.with_name("openapi-python-client")), "generate", "--url", f"{service.url}/openapi.json"]
    options = ["--meta", "none", "--output-path", "generated", "--config", "config.yml", "--fail-on-warning"]
    made = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    used = subprocess.run(
        [python, "-c", USE, service.url, image_paths[0]], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert used.returncode == 0, used.stderr
    assert used.stdout.strip() == image_paths[0].name.split("-")[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node.js and npm")
def test_a_typescript_client_predicts(service: ServiceProcess, image_paths: list[Path], tmp_path: Path) -> None:
    """openapi-typescript's types hold, compiled strictly, for what openapi-fetch sends and gets."""

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)

    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "tsconfig.json").write_text(json.dumps({"compilerOptions": COMPILER, "files": ["use.ts"]}))
    (tmp_path / "use.ts").write_text(TYPESCRIPT_USE)
    install("npm", "install", "--prefer-offline", "--no-audit", "--no-fund", "--ignore-scripts", *TYPESCRIPT, folder=tmp_path)
    for command in (
        ("npx", "openapi-typescript", f"{service.url}/openapi.json", "--output", "service.d.ts"),
        ("npx", "tsc"),
        ("node", "use.js", service.url, image_paths[0]),
    ):
        done = run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == image_paths[0].name.split("-")[0]


def test_operations_are_named_as_methods() -> None:
    """Each has a name of its own, in camel case."""
    names = [operation["operationId"] for operations in document()["paths"].values() for operation in operations.values()]
    assert len(set(names)) == len(names)
    assert {"predict", "predictBatch", "imageClassification", "infer", "inferOfVersion", "labels"} <= set(names)
    assert all(name.isalpha() and name[0].islower() for name in names)


def test_no_option_has_a_default_that_a_generated_client_would_send() -> None:
    """In the query beside JSON or a form, it would be the same option given twice."""
    paths, schemas = (made := document())["paths"], made["components"]["schemas"]
    assert not any(
        "default" in each["schema"]
        for path in paths.values()
        for each in path["post" if "post" in path else "get"].get("parameters", [])
    )
    assert not any("default" in each for each in schemas["PredictParameters"]["properties"].values())


def test_keys_are_documented_where_they_are_required() -> None:
    """Both headers; health and the page need none, and without keys nothing does."""
    open_document, keyed = document(), document(api_keys="secret")
    assert "securitySchemes" not in open_document["components"]
    assert {scheme["type"] for scheme in keyed["components"]["securitySchemes"].values()} == {"http", "apiKey"}
    needing = {path for path, operations in keyed["paths"].items() for each in operations.values() if "security" in each}
    assert {"/predict", "/hf", "/labels", "/metrics"} <= needing
    assert not {"/", "/health", "/v2/health/live"} & needing


def test_a_route_has_every_error_and_examples() -> None:
    """An error that any request may meet is on every route, and generators find only kinds of bodies that they know."""
    made = document()
    for path in ("/predict", "/predict/batch", "/view", "/explain", "/hf"):
        operation = made["paths"][path]["post"]
        assert {"400", "401", "408", "413", "415", "422", "429", "431", "500", "503", "504"} <= set(operation["responses"])
        assert all(way in operation["description"] for way in ("curl ", "httpx.post(", "fetch("))
        assert not any(kind.startswith("image/") for kind in operation["requestBody"]["content"]), "generators know no ranges"
    for name in ("PredictRequest", "HuggingFaceRequest"):
        assert made["components"]["schemas"][name]["properties"]["inputs"]["examples"]


def examples(service: ServiceProcess, language: str) -> Iterator[tuple[list[str], int]]:
    """The lines of each operation's example in a language, at this service, and how many requests they make."""
    answer = httpx.get(f"{service.url}/openapi.json").json()
    model = httpx.get(f"{service.url}/health").json()["model"]
    for path, operations in answer["paths"].items():
        for operation in operations.values():
            if "requestBody" in operation:
                shown = [line[4:] for line in operation["description"].splitlines() if line.startswith("    ")]
                marks = [
                    0,
                    shown.index("# Python"),
                    next(n for n, line in enumerate(shown) if line.startswith("//")),
                    len(shown),
                ]
                first = ["curl", "Python", "JavaScript"].index(language)
                text = "\n".join(shown[marks[first] : marks[first + 1]]).replace("http://localhost:8000", service.url)
                text = text.replace("MODEL_NAME", model["name"]).replace("MODEL_VERSION", model["version"])
                kinds = len(operation["requestBody"]["content"]) if not path.startswith("/v2") else 1
                yield text.strip().splitlines(), kinds


@pytest.fixture
def folder(tmp_path: Path, image_paths: list[Path]) -> Path:
    """A folder with the images that the examples name."""
    Image.open(image_paths[0]).convert("RGB").save(tmp_path / "photo.jpg")
    Image.open(image_paths[0]).save(tmp_path / "another.png")
    return tmp_path


@pytest.mark.slow
def test_every_body_has_an_example_for_curl(service: ServiceProcess, folder: Path) -> None:
    """Each line is a command that gets an answer."""
    for lines, kinds in examples(service, "curl"):
        assert len(lines) == kinds
        for line in lines:
            command = line.replace("curl ", "curl --silent --fail --output answer ", 1)
            assert subprocess.run(["sh", "-c", command], cwd=folder, timeout=60).returncode == 0, line


@pytest.mark.slow
def test_every_body_has_an_example_in_python(service: ServiceProcess, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines run as they stand, and each request is answered."""
    monkeypatch.chdir(folder)
    for lines, kinds in examples(service, "Python"):
        assert sum("httpx.post(" in line for line in lines) == kinds
        names: dict[str, Any] = {}
        for line in lines:
            exec(line.replace('open("photo.jpg", "rb").read()', 'Path("photo.jpg").read_bytes()'), {"Path": Path}, names)
            assert "answer" not in names or names["answer"].status_code == 200, line


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
def test_every_body_has_an_example_in_javascript(service: ServiceProcess, folder: Path) -> None:
    """The lines run as they stand, but for the check of each answer."""
    program = ['const file = new Blob([require("fs").readFileSync("photo.jpg")], { type: "image/jpeg" });']
    program.append(
        "const check = async (url, how) => { const a = await fetch(url, how); if (!a.ok) throw Error(await a.text()); };"
    )
    for lines, kinds in examples(service, "JavaScript"):
        assert sum("await fetch(" in line for line in lines) == kinds
        program += ["await (async () => {", *(line.replace("await fetch(", "await check(") for line in lines), "})();"]
    text = "(async () => {\n" + "\n".join(program) + "\n})().catch((e) => { console.error(e); process.exit(1); });"
    done = subprocess.run(["node", "-e", text], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None or CHROMEDRIVER is None, reason="needs Chromium and its driver")
@pytest.mark.skipif(find_spec("fastapi_offline") is None, reason="needs fastapi-offline, which brings Swagger UI")
@pytest.mark.parametrize("prefix", ["", "/api"])
def test_the_docs_need_no_other_host(tmp_path: Path, prefix: str) -> None:
    """Swagger UI shows every operation, also behind a prefix, and the browser finds no fault with page or policy."""
    with ApplicationServer(root_path=prefix) as application, open_browser(tmp_path) as browser:
        document = httpx.get(f"{application.url}/openapi.json", timeout=60).json()
        names = {operation["operationId"] for operations in document["paths"].values() for operation in operations.values()}
        browser.get(f"{application.url}{prefix}/docs")

        def shown(driver: WebDriver) -> set[str]:
            blocks = driver.find_elements(By.CLASS_NAME, "opblock")
            return {(block.get_attribute("id") or "").rpartition("-")[2] for block in blocks}

        WebDriverWait(browser, 60).until(lambda driver: names <= shown(driver))
        browser.find_element(By.CSS_SELECTOR, "#operations-predict-predict .opblock-summary-control").click()
        WebDriverWait(browser, 60).until(lambda driver: driver.find_elements(By.CLASS_NAME, "opblock-description-wrapper"))
        levels = browser.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map((e) => +e.tagName[1])")
        assert levels[0] == 1
        assert all(level <= before + 1 for before, level in pairwise(levels)), levels
        sizes = browser.execute_script(
            "return [...document.querySelectorAll('a.nostyle')].map((e) => [e.offsetWidth, e.offsetHeight])"
        )
        assert all(min(size) >= 24 for size in sizes), "a link that a finger misses"
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []  # type: ignore[no-untyped-call]
        asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]  # type: ignore[no-untyped-call]
        urls = [each["params"]["request"]["url"] for each in asked if each["method"] == "Network.requestWillBeSent"]
        assert [url for url in urls if url.startswith("http") and not url.startswith(application.url + prefix)] == []
