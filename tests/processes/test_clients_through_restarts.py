"""Usual clients upload a hundred photographs while the engine is killed and the service is restarted: none is lost.

A client may be refused in a way that says "try again": 503 with ``Retry-After``, or no connection at all.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load.uploads import photo
from benchmarks.servers.service_process import ServiceProcess
from tests.support.patience import wait_until

pytestmark = pytest.mark.slow

PHOTOS = 100
TYPE = {"Content-Type": "image/jpeg"}
PATIENCE_S = 240.0  # no expectation of speed: only the end of a test that would hang
JAVA = """
import java.io.*; import java.net.*; import java.net.http.*; import java.nio.file.*;
public class Upload {
  public static void main(String[] arguments) throws Exception {
    var client = HttpClient.newHttpClient();
    var lines = new BufferedReader(new InputStreamReader(System.in));
    var body = HttpRequest.BodyPublishers.ofFile(Path.of(arguments[1]));
    var request = HttpRequest.newBuilder(URI.create(arguments[0])).header("Content-Type", "image/jpeg").POST(body).build();
    while (lines.readLine() != null) {
      try {
        var response = client.send(request, HttpResponse.BodyHandlers.ofString());
        System.out.println(response.statusCode() + " " + response.headers().firstValue("retry-after").orElse(""));
      } catch (ConnectException error) {
        System.out.println("refused");
      } catch (IOException error) {
        System.out.println("lost " + error);
      }
    }
  }
}
"""
FETCH = """
const [photo, done] = arguments;
fetch("/predict", {
  method: "POST",
  headers: {"Content-Type": "image/jpeg"},
  body: Uint8Array.from(atob(photo), (character) => character.charCodeAt(0)),
}).then(async (response) => { await response.json(); done([response.status, response.headers.get("Retry-After")]); })
  .catch((error) => done([0, String(error)]));
"""

Upload = Callable[[], tuple[int, str | None]]
"""Uploads the photograph; returns status and Retry-After. Raises ConnectionRefusedError; all else that it raises is a loss."""
Client = Callable[[str, Path], contextlib.AbstractContextManager[Upload]]


@contextmanager
def by_urllib(url: str, path: Path) -> Iterator[Upload]:
    image = path.read_bytes()

    def upload() -> tuple[int, str | None]:
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{url}/predict", image, TYPE), timeout=60) as answer:
                return answer.status, None
        except urllib.error.HTTPError as error:
            return error.code, error.headers.get("Retry-After")
        except urllib.error.URLError as error:
            raise error.reason if isinstance(error.reason, OSError) else error from None

    yield upload


@contextmanager
def by_requests(url: str, path: Path) -> Iterator[Upload]:
    requests = pytest.importorskip("requests")
    image = path.read_bytes()
    with requests.Session() as session:

        def upload() -> tuple[int, str | None]:
            try:
                answer = session.post(f"{url}/predict", data=image, headers=TYPE, timeout=60)
            except requests.ConnectionError as error:
                if "Connection refused" in str(error):
                    raise ConnectionRefusedError from None
                raise
            return answer.status_code, answer.headers.get("Retry-After")

        yield upload


@contextmanager
def by_aiohttp(url: str, path: Path) -> Iterator[Upload]:
    aiohttp = pytest.importorskip("aiohttp")
    image = path.read_bytes()
    with asyncio.Runner() as runner:

        async def open_session() -> Any:
            return aiohttp.ClientSession()

        session = runner.run(open_session())

        async def post() -> tuple[int, str | None]:
            try:
                async with session.post(f"{url}/predict", data=image, headers=TYPE) as answer:
                    await answer.read()
                    return answer.status, answer.headers.get("Retry-After")
            except aiohttp.ClientConnectorError as error:
                raise ConnectionRefusedError from error

        yield lambda: runner.run(post())
        runner.run(session.close())


@contextmanager
def by_curl(url: str, path: Path) -> Iterator[Upload]:
    need("curl")
    command = ["curl", "--http2", "-sS", "-o", "/dev/null", "-w", "%{http_code} %header{retry-after}", "-F", f"file=@{path}"]

    def upload() -> tuple[int, str | None]:
        done = subprocess.run([*command, f"{url}/predict"], capture_output=True, text=True, timeout=60, check=False)
        if done.returncode == 7:  # "Failed to connect to host"
            raise ConnectionRefusedError
        assert done.returncode == 0, done.stderr
        return read_line(done.stdout)

    yield upload


@contextmanager
def by_java(url: str, path: Path) -> Iterator[Upload]:
    need("java", "javac")
    source = path.with_name("Upload.java")
    source.write_text(JAVA)
    command = ["java", str(source), f"{url}/predict", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def upload() -> tuple[int, str | None]:
            assert process.stdin is not None, "it is a pipe"
            assert process.stdout is not None, "it is a pipe"
            process.stdin.write("\n")
            process.stdin.flush()
            line = process.stdout.readline().strip()
            if line == "refused":
                raise ConnectionRefusedError
            return read_line(line)

        yield upload


@contextmanager
def by_chromium(url: str, path: Path) -> Iterator[Upload]:
    pytest.importorskip("selenium", reason="needs selenium")
    need("chromium", "chromedriver")
    from tests.support.browser import open_browser

    image = base64.b64encode(path.read_bytes()).decode()
    with open_browser(path.with_name("profile")) as driver:
        driver.get(url)
        driver.set_script_timeout(60)

        def upload() -> tuple[int, str | None]:
            status, detail = driver.execute_async_script(FETCH, image)
            if status == 0:
                entries = driver.get_log("browser")  # type: ignore[no-untyped-call]
                log = [entry["message"] for entry in entries if "/predict" in entry["message"]]
                if any("ERR_CONNECTION_REFUSED" in message for message in log):
                    raise ConnectionRefusedError
                raise ConnectionError(f"{detail}: {log}")
            return status, detail

        yield upload


@contextmanager
def by_nginx(url: str, path: Path, *, keeps_alive: bool = False) -> Iterator[Upload]:
    """A client of nginx, which says 502 where it cannot connect; anything else in its log of errors is a loss."""
    need("nginx")
    port, folder = free_port(), path.parent / "nginx"
    folder.mkdir()
    folders = "".join(f"{of}_temp_path {folder}/{of};" for of in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    reuse = 'proxy_http_version 1.1; proxy_set_header Connection "";' if keeps_alive else ""
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log; events {{}}"
        f" http {{ access_log off; {folders} upstream service {{ server {url.removeprefix('http://')};"
        f" {'keepalive 4;' if keeps_alive else ''} }}"
        f" server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://service; {reuse} }} }} }}"
    )
    with subprocess.Popen(["nginx", "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]) as process:
        try:
            wait_until(lambda: is_open(port))
            with by_urllib(f"http://127.0.0.1:{port}", path) as upload:
                yield upload
        finally:
            process.terminate()
    errors = [line for line in (folder / "error.log").read_text().splitlines() if "[error]" in line]
    assert [line for line in errors if "Connection refused" not in line and "no live upstreams" not in line] == []


@contextmanager
def by_nginx_that_keeps_connections(url: str, path: Path) -> Iterator[Upload]:
    with by_nginx(url, path, keeps_alive=True) as upload:
        yield upload


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")


def read_line(line: str) -> tuple[int, str | None]:
    status, _, retry_after = line.partition(" ")
    if not status.isdigit():
        raise ConnectionError(line)
    return int(status), retry_after or None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


class Uploads(threading.Thread):
    """Uploads one photograph after the other; asks again where it is told so."""

    def __init__(self, upload: Upload, again: Set[int]) -> None:
        super().__init__(daemon=True)
        self._upload = upload
        self._again = again
        self.done = self.refused = 0
        self.lost: list[str] = []

    def run(self) -> None:
        limit = time.monotonic() + PATIENCE_S
        while self.done < PHOTOS and time.monotonic() < limit:
            try:
                status, retry_after = self._upload()
            except ConnectionRefusedError:
                status, retry_after = 503, "1"
            except Exception as error:
                self.lost.append(repr(error))
                continue
            if status == 200:
                self.done += 1
                time.sleep(0.01)
            elif status in self._again or (status == 503 and retry_after):
                self.refused += 1
                time.sleep(0.1)
            else:
                self.lost.append(f"status {status}, Retry-After {retry_after}")


@pytest.mark.parametrize(
    "client",
    [by_urllib, by_requests, by_aiohttp, by_curl, by_java, by_chromium, by_nginx, by_nginx_that_keeps_connections],
    ids=lambda client: client.__name__[3:],
)
def test_no_upload_is_lost_through_restarts(client: Client, checkpoint_path: Path, tmp_path: Path) -> None:
    """The engine is killed after 30 photographs; the service is stopped after 60, and started again."""
    path, port = tmp_path / "photo.jpg", free_port()
    path.write_bytes(photo())
    again = {502} if client in (by_nginx, by_nginx_that_keeps_connections) else set()
    with ServiceProcess(checkpoint_path, port=port, workers=2, shutdown_grace_s=0.5) as old, client(old.url, path) as upload:
        uploads = Uploads(upload, again)
        uploads.start()
        wait_until(lambda: uploads.done >= 30)
        os.kill(old.engine_pids[-1], signal.SIGKILL)
        wait_until(lambda: uploads.done >= 60)
        assert old.stop() == 0
        with ServiceProcess(checkpoint_path, port=port, workers=2):
            uploads.join(PATIENCE_S)
    assert uploads.lost == []
    assert uploads.done == PHOTOS
    assert uploads.refused > 0, "no client noticed a restart"
