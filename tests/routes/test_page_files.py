"""The page without a browser: its files, their headers, and that all it needs is there."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import httpx
import numpy as np
import pytest

import service.routes.page
from benchmarks.servers.service_process import ServiceProcess
from service.engine.interface import ModelInfo
from service.model.checkpoint import Checkpoint
from service.model.images import InputSpec, decode_image
from service.routes.page import SECURITY_HEADERS
from tests.support.scripted_engine import ApplicationServer

FOLDER = Path(service.routes.page.__file__).parents[1] / "page"
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file())


def test_the_page_is_at_the_root(service: ServiceProcess) -> None:
    """``/`` is the page, to look at and to ask about."""
    answer = httpx.get(service.url + "/")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.text == (FOLDER / "index.html").read_text()
    asked = httpx.head(service.url + "/")
    assert asked.status_code == 200
    assert asked.content == b""


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_served(service: ServiceProcess, name: str) -> None:
    """Every file comes as it lies in the package, with its type, and with 304 when it has not changed."""
    answer = httpx.get(f"{service.url}/page/{name}")
    assert answer.status_code == 200
    assert answer.content == (FOLDER / name).read_bytes()
    types = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert answer.headers["Content-Type"].partition(";")[0] == types[name.rpartition(".")[2]]
    again = httpx.get(f"{service.url}/page/{name}", headers={"If-None-Match": answer.headers["ETag"]})
    assert again.status_code == 304
    assert again.content == b""


@pytest.mark.parametrize("path", ["/", "/page/page.js", "/docs"])
def test_security_headers(service: ServiceProcess, path: str) -> None:
    """The page and its files carry every security header, and no source is allowed but the service itself."""
    headers = httpx.get(service.url + path).headers
    for name, value in SECURITY_HEADERS.items():
        assert headers[name] == value or (path, name) == ("/docs", "Content-Security-Policy")
    policy = dict(directive.split(" ", 1) for directive in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["Content-Security-Policy"]


def test_text_is_compressed(service: ServiceProcess) -> None:
    """For a client that asks for it, which every browser does."""
    sizes = {}
    for encoding in ("gzip", "identity"):
        with httpx.stream("GET", service.url + "/page/page.js", headers={"Accept-Encoding": encoding}) as answer:
            assert answer.headers.get("Content-Encoding", "identity") == encoding
            assert answer.headers["Vary"] == "Accept-Encoding"
            sizes[encoding] = len(b"".join(answer.iter_raw()))
    assert sizes["gzip"] < sizes["identity"] / 2


def test_nothing_else_is_served(service: ServiceProcess) -> None:
    """A path that is no file of the page is not found, wherever it points."""
    for name in ("nothing.js", "../settings.py", "%2e%2e/settings.py", "page/../../app.py", ""):
        answer = httpx.get(f"{service.url}/page/{name}")
        assert answer.status_code == 404, name
        assert answer.headers["Content-Type"] == "application/problem+json"


def test_the_page_names_no_other_host() -> None:
    """No file refers to another host; the only absolute names are those of XML namespaces."""
    for name in FILES:
        found = re.findall(r"\b(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", (FOLDER / name).read_text())
        assert set(found) <= {"http://www.w3.org/2000/svg"}, name


@pytest.mark.parametrize("name", ["index.html", "docs.html"])
def test_the_page_has_no_inline_code(name: str) -> None:
    """No script, style or handler is in the HTML, so the policy needs no exception."""
    html = (FOLDER / name).read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", html)
    assert set(re.findall(r"<script[^>]*>([^<]*)</script>", html)) == {""}


def test_what_the_page_refers_to_exists() -> None:
    """Every file that the HTML and the modules name is there, and every element that a module asks for by its id."""
    html = (FOLDER / "index.html").read_text()
    named = {*re.findall(r'(?:src|href)="page/([^"]+)"', html)}
    ids = set(re.findall(r'\sid="([^"]+)"', html))
    for name in FILES:
        if name.endswith(".js"):
            text = (FOLDER / name).read_text()
            named |= set(re.findall(r'from "\./([^"]+)"', text))
            assert set(re.findall(r'\$\("([^"]+)"\)', text)) <= ids, name
    docs = set(re.findall(r'(?:src|href)="page/([^"]+)"', (FOLDER / "docs.html").read_text()))
    assert named | {name for name in docs if not name.startswith("swagger/")} == set(FILES) - {"index.html", "docs.html"}


def test_the_samples_are_the_models_known_images(service: ServiceProcess, checkpoint: Checkpoint) -> None:
    """They come with the labels that the checkpoint has for them, and each is recognised."""
    answer = httpx.get(f"{service.url}/samples").json()
    known = checkpoint.canary
    assert known is not None
    assert answer["model"] == httpx.get(f"{service.url}/labels").json()["model"]
    labels = [sample["label"] for sample in answer["samples"]]
    assert labels == [checkpoint.metadata.class_names[label] for label in known.probabilities.argmax(1)]
    images = [base64.b64decode(sample["image"]) for sample in answer["samples"]]
    files = [("file", (f"{index}.png", image)) for index, image in enumerate(images)]
    results = httpx.post(f"{service.url}/predict/batch", files=files).json()["results"]
    assert [result["label"] for result in results] == labels
    np.testing.assert_array_equal(decode_image(images[0], checkpoint.metadata.input), known.images[0])


def test_another_model_is_documented_with_examples_of_its_own() -> None:
    """Title, names, labels and sizes are the model's, and nothing is left of the shipped one."""
    image = base64.b64encode(b"a picture").decode()
    names = ("ant", 'the "queen" \\ bee', "Жук")
    with ApplicationServer() as application:
        application.engine.model = ModelInfo("bees", "0123456789ab", names, InputSpec(size=224), samples=(("ant", image),))
        assert httpx.get(f"{application.url}/samples").json()["samples"] == [{"label": "ant", "image": image}]
        text = httpx.get(f"{application.url}/openapi.json").text
        application.engine.model = None
        assert httpx.get(f"{application.url}/openapi.json").json()["info"]["title"] == "Image prediction service"
    document = json.loads(text)
    assert document["info"]["title"] == "Image prediction service: bees"
    schemas = document["components"]["schemas"]
    assert schemas["Labels"]["properties"]["labels"]["examples"] == [["ant", 'the "queen" \\ bee']]
    assert schemas["Model"]["properties"]["version"]["examples"] == ["0123456789ab"]
    assert schemas["Tensor"]["properties"]["shape"]["examples"] == [[-1, 3, 224, 224]]
    assert '0.014400:1:the \\"queen\\" \\\\ bee"' in text
    assert re.findall(r"airplane|\bcat\b|\bdog\b|resnet18", text) == []


def test_the_routes_are_documented(service: ServiceProcess) -> None:
    """OpenAPI tells of the page, of ``/view`` and of ``/explain``, with what they take and give."""
    paths = httpx.get(f"{service.url}/openapi.json").json()["paths"]
    assert "text/html" in paths["/"]["get"]["responses"]["200"]["content"]
    view, explain = paths["/view"]["post"], paths["/explain"]["post"]
    assert "image/png" in view["responses"]["200"]["content"]
    assert set(view["requestBody"]["content"]) == set(paths["/predict"]["post"]["requestBody"]["content"])
    assert "label" in [parameter["name"] for parameter in explain["parameters"]]
    assert explain["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/Heatmap")
    assert {"422", "429", "503"} <= set(explain["responses"])
    assert not any(path.startswith("/page") for path in paths)
