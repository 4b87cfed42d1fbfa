"""The whole service as processes: what is killed, what hangs and what is stopped, and what clients see of it."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from benchmarks.servers.service_process import ServiceProcess
from tests.support.load import Load
from tests.support.patience import wait_until

_PATIENCE_S = 120.0  # no expectation of speed: only the end of a test that would hang


@pytest.fixture
def image(image_paths: list[Path]) -> bytes:
    return image_paths[0].read_bytes()


@pytest.fixture
def two_workers(checkpoint_path: Path) -> Iterator[ServiceProcess]:
    with ServiceProcess(checkpoint_path, workers=2) as service:
        yield service


def health(service: ServiceProcess, path: str = "/health") -> tuple[int, str]:
    """The status code of a health route, and the state that it tells."""
    response = httpx.get(service.url + path, timeout=_PATIENCE_S)
    return response.status_code, response.json()["status"]


def predict(service: ServiceProcess, image: bytes, client: httpx.Client | None = None) -> httpx.Response:
    """Post one image, over a connection of its own unless ``client`` has one."""
    headers = {"content-type": "image/png"}
    return (client or httpx).post(service.url + "/predict", content=image, headers=headers, timeout=_PATIENCE_S)


@contextlib.contextmanager
def connection_to(service: ServiceProcess) -> Iterator[http.client.HTTPConnection]:
    """One connection, opened by its first request and never again behind the test's back."""
    parts = urlsplit(service.url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=_PATIENCE_S)
    try:
        yield connection
    finally:
        connection.close()


def ask(connection: http.client.HTTPConnection, image: bytes) -> int:
    """Post one image over this connection; give the status."""
    connection.request("POST", "/predict", image, {"content-type": "image/png"})
    response = connection.getresponse()
    response.read()
    return response.status


def test_a_killed_engine_costs_503_until_it_is_back_and_no_worker(two_workers: ServiceProcess, image: bytes) -> None:
    """SIGKILL of the engine under load: requests end with 503 and not with silence, health says so, another engine serves."""
    service = two_workers
    with Load(service.url, image) as load:
        load.wait_for_more(200, 20)
        os.kill(service.pid, signal.SIGSTOP)  # so that the next engine does not come before the test has looked
        os.kill(service.engine_pids[-1], signal.SIGKILL)
        wait_until(lambda: health(service) == (503, "starting"))
        assert health(service, "/health/ready") == (503, "starting")
        assert health(service, "/health/live") == (200, "starting")
        load.wait_for_more(503, 10)
        os.kill(service.pid, signal.SIGCONT)
        service.wait_until_ready(times=2)
        load.wait_for_more(200, 20)
    assert health(service) == (200, "ready")
    assert set(load.statuses) == {200, 503}
    assert load.lost == []
    assert len(set(service.engine_pids)) == 2
    assert [len(service.worker_pids(index)) for index in range(2)] == [1, 1]


def test_sigterm_under_load_loses_nothing(checkpoint_path: Path, image: bytes) -> None:
    """SIGTERM: not ready at once, still answering through the grace, then every accepted request answered, exit 0."""
    with (
        ServiceProcess(checkpoint_path, workers=2, shutdown_grace_s=0.5) as service,
        Load(service.url, image, clients=8) as load,
    ):
        load.wait_for_more(200, 50)
        service.send_signal(signal.SIGTERM)  # make and systemd signal the group, and make passes it on once more
        assert service.stop() == 0
    assert set(load.statuses) == {200}
    assert load.lost == []
    assert "ERROR" not in service.output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_stops_in_order(checkpoint_path: Path, image: bytes, number: signal.Signals) -> None:
    """Ctrl-C and systemd signal every process: the children wait for the supervisor's word, and nothing is lost."""
    with (
        ServiceProcess(checkpoint_path, workers=2, shutdown_grace_s=0.5) as service,
        Load(service.url, image, clients=4) as load,
    ):
        load.wait_for_more(200, 50)
        os.killpg(service.pid, number)
        assert service.wait() == 0
    assert set(load.statuses) == {200}
    assert load.lost == []
    assert len(service.engine_pids) == 1


def test_a_draining_service_answers_and_a_second_signal_stops_it_at_once(checkpoint_path: Path, image: bytes) -> None:
    """In the grace health says draining, live stays 200 and predictions are answered; a later SIGTERM ends it, exit 1."""
    with ServiceProcess(checkpoint_path, workers=1, shutdown_grace_s=3600) as service:
        with httpx.Client() as client:
            assert predict(service, image, client).status_code == 200
            service.send_signal(signal.SIGTERM)
            wait_until(lambda: health(service) == (503, "draining"))
            assert health(service, "/health/ready") == (503, "draining")
            assert health(service, "/health/live") == (200, "draining")
            answer = predict(service, image, client)
            assert answer.status_code == 200
            assert answer.headers["connection"] == "close"

        def stopped_at_once() -> bool:
            service.send_signal(signal.SIGTERM)
            return "second signal" in service.output

        wait_until(stopped_at_once)
        assert service.wait() == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"there is no checkpoint at"),
        (b"no weights at all", r"not a safetensors file, or is damaged"),
    ],
    ids=["missing", "broken"],
)
def test_a_checkpoint_that_cannot_be_served_is_told_clearly(tmp_path: Path, content: bytes | None, message: str) -> None:
    """The service ends with exit status 1 and an error that says why, without a stack and without starting again."""
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    with ServiceProcess(path, until_ready=False) as service:
        assert service.wait() == 1
        service.wait_for_output(message)
        assert "Traceback" not in service.output
        assert len(service.engine_pids) == 1
        assert "restart" not in service.output
        assert re.search(message, service.output.splitlines()[-1]), "the reason is not buried"


def test_a_port_that_is_taken_is_told_clearly(checkpoint_path: Path) -> None:
    """The service says which address it cannot have and what to do, and ends with exit status 1."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with ServiceProcess(checkpoint_path, until_ready=False, port=port) as service:
            assert service.wait() == 1
            service.wait_for_output(rf"cannot listen on 127.0.0.1:{port}.*set SERVICE_PORT")
            assert service.engine_pids == []


def test_a_killed_supervisor_leaves_no_process_behind(two_workers: ServiceProcess) -> None:
    """When the supervisor itself is killed, engine and workers end by themselves."""
    os.kill(two_workers.pid, signal.SIGKILL)
    assert two_workers.wait() == -signal.SIGKILL


def test_a_supervisor_killed_while_the_model_loads_leaves_no_process_behind(checkpoint_path: Path) -> None:
    """The same holds before anything is ready."""
    with ServiceProcess(checkpoint_path, until_ready=False, workers=1) as service:
        service.wait_for_output("engine started")
        os.kill(service.pid, signal.SIGKILL)
        assert service.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_worker_loses_its_own_connections_only(two_workers: ServiceProcess, image: bytes) -> None:
    """SIGKILL of a worker breaks the connections it had accepted, and no others; another worker takes its place."""
    service = two_workers
    [first], [second] = service.worker_pids(0), service.worker_pids(1)
    with connection_to(service) as to_first, connection_to(service) as to_second:
        os.kill(first, signal.SIGSTOP)  # so that the other one accepts
        assert ask(to_second, image) == 200
        os.kill(first, signal.SIGCONT)
        os.kill(second, signal.SIGSTOP)
        wait_until(lambda: ask(to_first, image) == 200)
        os.kill(second, signal.SIGCONT)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: ask(to_second, image) == 200)
        with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
            ask(to_first, image)
        service.wait_until_ready(times=2)
        assert ask(to_second, image) == 200
    assert predict(service, image).status_code == 200
    assert len(service.worker_pids(0)) == 2
    assert service.worker_pids(1) == [second]
    assert len(service.engine_pids) == 1


@pytest.mark.slow
def test_a_hanging_engine_is_noticed_and_replaced(checkpoint_path: Path, image: bytes) -> None:
    """An engine that stands still is not ready, is killed, and what waited for it gets 503; the next one serves."""
    with (
        ServiceProcess(checkpoint_path, workers=1, device_timeout_s=4, request_timeout_s=100) as service,
        Load(service.url, image) as load,
    ):
        load.wait_for_more(200, 10)
        os.kill(service.engine_pids[-1], signal.SIGSTOP)
        wait_until(lambda: health(service) == (503, "starting"))
        service.wait_for_output("engine hangs")
        service.wait_until_ready(times=2)
        load.wait_for_more(200, 10)
        assert len(service.engine_pids) == 2
        assert len(service.worker_pids(0)) == 1
    assert set(load.statuses) == {200, 503}
    assert load.lost == []


@pytest.mark.slow
def test_an_engine_that_dies_again_and_again_turns_live_503(checkpoint_path: Path) -> None:
    """Deaths right after each ready count: after five, health asks the orchestrator to act; then one comes back, ready."""
    with ServiceProcess(checkpoint_path, workers=1) as service:
        for deaths in range(1, 6):
            service.wait_until_ready(times=deaths)
            os.kill(service.engine_pids[-1], signal.SIGKILL)
            service.wait_for_output(f"deaths_in_a_row={deaths} ")
            if deaths < 5:
                assert health(service, "/health/live") == (200, "starting")
        os.kill(service.pid, signal.SIGSTOP)  # so that the next engine does not come before the test has looked
        wait_until(lambda: health(service, "/health/live") == (503, "failed"))
        assert health(service) == (503, "failed")
        os.kill(service.pid, signal.SIGCONT)
        service.wait_until_ready(times=6)
        assert health(service, "/health/live") == (200, "ready")
        assert service.stop() == 0


@pytest.mark.slow
def test_the_only_worker_is_started_again_every_time(checkpoint_path: Path, image: bytes) -> None:
    """However often the one worker is killed, the address stays, another worker answers there, the engine is the same."""
    with ServiceProcess(checkpoint_path, workers=1) as service:
        for times in (2, 3):
            os.kill(service.worker_pids(0)[-1], signal.SIGKILL)
            service.wait_until_ready(times)
            assert predict(service, image).status_code == 200
        assert len(service.engine_pids) == 1
