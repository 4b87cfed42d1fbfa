"""The Python client over real sockets: answers and errors as types, and when it tries again."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage

from benchmarks.servers.service_process import ServiceProcess
from service.client.client import AsyncClient, Client, ServiceProblem, ServiceUnreachable, UnexpectedAnswer
from service.client.retry import RetryPolicy, Tries, retry_after_s
from service.model.checkpoint import Checkpoint
from service.schemas import Answer, FailedEntry
from tests.support.image_file import noise
from tests.support.scripted_server import ANSWER, LABELS, ScriptedServer, problem

NO_WAIT = RetryPolicy(first_wait_s=0)


@pytest.fixture(scope="module")
def client(service: ServiceProcess) -> Iterator[Client]:
    with Client(service.url) as client:
        yield client


# Answers


def test_predict_takes_a_path_and_bytes(client: Client, image_paths: list[Path], checkpoint: Checkpoint) -> None:
    """Both get the same classes by the served model; a path's answer has the file's name, bytes have none."""
    path = image_paths[0]
    by_path, by_bytes, by_name = client.predict(path), client.predict(path.read_bytes()), client.predict(str(path))
    assert by_path.label == path.name.split("-")[0]
    assert by_path.model.version == checkpoint.version
    assert by_path.filename == by_name.filename == path.name
    assert by_bytes.filename is None
    assert by_path.predictions == by_bytes.predictions == by_name.predictions


def test_predict_takes_open_files_and_pixels(client: Client, image_paths: list[Path]) -> None:
    """Also among the images of a batch; an open file has its name."""
    path = image_paths[0]
    expected = client.predict(path)
    with path.open("rb") as file, PillowImage.open(path) as image:
        kinds: list[Any] = [file, image, np.asarray(image.convert("RGB"))]
        assert client.predict(file) == expected
        file.seek(0)
        entries = client.predict_batch(kinds)
    assert [entry.predictions for entry in entries if isinstance(entry, Answer)] == [expected.predictions] * 3
    assert [entry.filename for entry in entries] == [path.name, "1", "2"]


def test_top_k_says_how_many_classes(client: Client, image_paths: list[Path]) -> None:
    """One image and several images alike."""
    assert len(client.predict(image_paths[0], top_k=2).predictions) == 2
    entry = client.predict_batch(image_paths[:1], top_k=3)[0]
    assert isinstance(entry, Answer)
    assert len(entry.predictions) == 3


def test_an_answer_says_whether_the_image_is_known(service: ServiceProcess, client: Client, image_paths: list[Path]) -> None:
    """``unknown`` and ``threshold`` are arguments of both methods of both clients."""
    known, flagged = client.predict_batch([image_paths[0], noise()])
    assert isinstance(known, Answer)
    assert isinstance(flagged, Answer)
    assert known.known
    assert known.typicality is not None
    assert flagged.typicality is not None
    assert (flagged.known, flagged.typicality < 0.01) == (False, True)
    assert flagged.label is not None
    rejected = client.predict(noise(), unknown="reject")
    assert (rejected.label, rejected.score, rejected.predictions) == (None, None, flagged.predictions)
    assert client.predict(noise(), threshold=0).known

    async def ask() -> None:
        async with AsyncClient(service.url) as asynchronous:
            assert await asynchronous.predict(noise(), unknown="reject") == rejected
            (entry,) = await asynchronous.predict_batch([noise()], unknown="reject", threshold=0)
            assert isinstance(entry, Answer)
            assert entry.label == flagged.label

    asyncio.run(ask())


def test_a_batch_has_an_entry_for_each_image_in_order(client: Client, image_paths: list[Path]) -> None:
    """A bad image among the good ones is an entry of its own, with its error; bytes and paths may be mixed."""
    entries = client.predict_batch([image_paths[0], b"no image", image_paths[-1].read_bytes()])
    first, bad, last = entries
    assert isinstance(first, Answer)
    assert isinstance(bad, FailedEntry)
    assert isinstance(last, Answer)
    assert first.label == image_paths[0].name.split("-")[0]
    assert bad.error.code == "invalid_image"
    assert last.label == image_paths[-1].name.split("-")[0]


def test_an_empty_batch_needs_no_request() -> None:
    """No images, no entries, and nothing is sent: the address answers nobody."""
    with Client("http://127.0.0.1:1") as client:
        assert client.predict_batch([]) == []


def test_labels_and_health(client: Client, checkpoint: Checkpoint) -> None:
    """The class names in order, and the state with the model that serves."""
    assert tuple(client.labels().labels) == checkpoint.metadata.class_names
    health = client.health()
    assert health.status == "ready"
    assert health.model is not None
    assert health.model.version == checkpoint.version


def test_the_async_client_answers_as_the_other_does(service: ServiceProcess, client: Client, image_paths: list[Path]) -> None:
    """Every method, several at once over the same connections."""

    async def ask() -> None:
        async with AsyncClient(service.url) as asynchronous:
            answers = await asyncio.gather(*(asynchronous.predict(path) for path in image_paths[:8]))
            assert [answer.filename for answer in answers] == [path.name for path in image_paths[:8]]
            assert [answer.label for answer in answers] == [client.predict(path).label for path in image_paths[:8]]
            entries = await asynchronous.predict_batch([image_paths[0], b""])
            assert [type(entry) for entry in entries] == [Answer, FailedEntry]
            assert await asynchronous.predict_batch([]) == []
            assert await asynchronous.labels() == client.labels()
            assert (await asynchronous.health()).status == "ready"
            with pytest.raises(ServiceProblem) as refused:
                await asynchronous.predict(b"no image")
            assert refused.value.code == "invalid_image"

    asyncio.run(ask())


def test_an_address_needs_no_scheme(service: ServiceProcess) -> None:
    """``host:port`` is enough."""
    with Client(service.url.removeprefix("http://")) as client:
        assert client.health().status == "ready"


# Errors


def test_a_refusal_is_raised_with_all_it_says(client: Client) -> None:
    """Status, code, detail and request id of the problem are the error's."""
    with pytest.raises(ServiceProblem) as refused:
        client.predict(b"no image")
    assert (refused.value.status, refused.value.code) == (422, "invalid_image")
    assert refused.value.detail.startswith("this is not an image")
    assert refused.value.request_id
    assert refused.value.retry_after_s is None
    assert "422 invalid_image" in str(refused.value)


def test_a_file_that_cannot_be_read_is_the_callers_own_error(client: Client, tmp_path: Path) -> None:
    """It is raised as it is, before anything is sent."""
    with pytest.raises(FileNotFoundError):
        client.predict(tmp_path / "none.png")


def test_the_api_key_is_sent(checkpoint_path: Path, image_paths: list[Path]) -> None:
    """A service with keys answers who has one, and tells the others what is missing; health needs none."""
    with ServiceProcess(checkpoint_path, workers=1, api_keys="secret") as service:
        with Client(service.url, api_key="secret") as client:
            assert client.predict(image_paths[0]).label == image_paths[0].name.split("-")[0]
        with Client(service.url) as client:
            assert client.health().status == "ready"
            with pytest.raises(ServiceProblem) as refused:
                client.predict(image_paths[0])
        assert (refused.value.status, refused.value.code) == (401, "unauthorized")


def test_an_address_where_nothing_listens_is_unreachable() -> None:
    """The error names the address."""
    with ScriptedServer((200, {}, LABELS)) as server:
        url = server.url
    with Client(url) as client, pytest.raises(ServiceUnreachable, match=url):
        client.labels()


def test_another_server_is_told_apart() -> None:
    """An answer of another shape is no answer, and an error page has its status and what it says."""
    with ScriptedServer((200, {}, b"<html>"), (502, {}, b"<html>bad gateway")) as server, Client(server.url) as client:
        with pytest.raises(UnexpectedAnswer, match="not this service"):
            client.labels()
        with pytest.raises(ServiceProblem, match="bad gateway") as refused:
            client.labels()
    assert (refused.value.status, refused.value.code, refused.value.request_id) == (502, "http_error", "")


@pytest.mark.parametrize("url", ["", "ftp://host", "http://", "http://host:port", "http://[::1", "/path"])
def test_what_is_no_address_is_refused_at_once(url: str) -> None:
    """Before anything is sent, with an example of an address."""
    with pytest.raises(ValueError, match="http://localhost:8000"):
        Client(url)


# Retries


@pytest.mark.parametrize("status", [429, 503])
def test_a_passing_refusal_is_tried_again(status: int) -> None:
    """Both refusals that pass are followed by another try, with the same body and headers."""
    refusal = (status, {"Retry-After": "0"}, problem(status, "overloaded"))
    with ScriptedServer(refusal, refusal, (200, {}, ANSWER)) as server, Client(server.url, api_key="k") as client:
        assert client.predict(b"image", top_k=1).label == "cat"
    assert [path for path, _ in server.requests] == ["/predict?top_k=1"] * 3
    assert {headers["authorization"] for _, headers in server.requests} == {"Bearer k"}
    assert {headers["content-length"] for _, headers in server.requests} == {"5"}


def test_retry_after_is_waited_for() -> None:
    """A server that refuses whoever comes before the second it asked for answers the very next try."""
    once_more = RetryPolicy(max_tries=2, first_wait_s=0)
    with ScriptedServer((200, {}, LABELS), not_before_s=1) as server, Client(server.url, retry=once_more) as client:
        assert client.labels().labels == LABELS["labels"]
    assert len(server.requests) == 2


def test_the_async_client_waits_for_retry_after_too() -> None:
    """The same server, asked by the other client."""

    async def ask(url: str) -> list[str]:
        async with AsyncClient(url, retry=RetryPolicy(max_tries=2, first_wait_s=0)) as client:
            return (await client.labels()).labels

    with ScriptedServer((200, {}, LABELS), not_before_s=1) as server:
        assert asyncio.run(ask(server.url)) == LABELS["labels"]
    assert len(server.requests) == 2


def test_it_gives_up_after_its_tries() -> None:
    """A service that stays full is asked ``max_tries`` times, and its last refusal is raised."""
    refusal = (429, {"Retry-After": "0"}, problem(429, "overloaded"))
    with (
        ScriptedServer(refusal) as server,
        Client(server.url, retry=RetryPolicy(max_tries=3)) as client,
        pytest.raises(ServiceProblem) as refused,
    ):
        client.labels()
    assert len(server.requests) == 3
    assert (refused.value.code, refused.value.retry_after_s, refused.value.request_id) == ("overloaded", 0, "r1")


def test_a_wait_beyond_its_time_is_not_begun() -> None:
    """Told to come back in an hour, a client with a minute raises the refusal at once."""
    refusal = (503, {"Retry-After": "3600"}, problem(503, "not_ready"))
    with (
        ScriptedServer(refusal) as server,
        Client(server.url, retry=RetryPolicy(max_total_s=60)) as client,
        pytest.raises(ServiceProblem) as refused,
    ):
        client.labels()
    assert len(server.requests) == 1
    assert refused.value.retry_after_s == 3600


def test_other_refusals_are_not_tried_again() -> None:
    """A deadline that passed, a device that failed: asking for the same again is the caller's decision."""
    for status, code in ((400, "malformed_request"), (500, "inference_failed"), (504, "deadline_exceeded")):
        with (
            ScriptedServer((status, {}, problem(status, code))) as server,
            Client(server.url, retry=NO_WAIT) as client,
            pytest.raises(ServiceProblem, match=code),
        ):
            client.labels()
        assert len(server.requests) == 1


def test_health_tells_at_once_that_the_service_is_not_ready() -> None:
    """503 with a state is an answer; without one, it is a refusal. Neither is tried again."""
    body = {"status": "starting", "model": None, "device": "", "runtime": "", "queue_depth": 0, "uptime_s": 0.5}
    with ScriptedServer((503, {"Retry-After": "1"}, body), (503, {}, b"no upstream")) as server, Client(server.url) as client:
        assert client.health().status == "starting"
        with pytest.raises(ServiceProblem, match="no upstream"):
            client.health()
    assert len(server.requests) == 2


def test_waits_double_where_the_service_does_not_say() -> None:
    """From the first wait on, as long as the next one ends within the total time."""
    tries = Tries(RetryPolicy(max_tries=9, max_total_s=4.0, first_wait_s=0.5), clock=lambda: 0.0)
    assert [tries.wait_s(503, None) for _ in range(4)] == [0.5, 1.0, 2.0, None]


def test_the_time_that_is_left_bounds_a_try() -> None:
    """It shrinks with the clock, and is never nothing."""
    now = [100.0]
    tries = Tries(RetryPolicy(max_total_s=10), clock=lambda: now[0])
    now[0] = 104.0
    assert tries.left_s == 6.0
    now[0] = 200.0
    assert 0 < tries.left_s < 1


def test_retry_after_is_seconds_or_a_date() -> None:
    """Both forms of RFC 9110 are read, a date that has passed is now, and anything else is as if it were missing."""
    assert retry_after_s("7") == 7
    later = retry_after_s(format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True))
    assert later is not None
    assert 3000 < later <= 3600
    assert retry_after_s("Fri, 31 Dec 1999 23:59:59 GMT") == 0
    for text in (None, "", "-1", "1.5", "soon", "٣"):
        assert retry_after_s(text) is None


@pytest.mark.parametrize("values", [{"max_tries": 0}, {"max_total_s": 0}, {"first_wait_s": -1}])
def test_a_policy_without_any_try_is_refused(values: dict[str, Any]) -> None:
    """A policy allows one try at least."""
    with pytest.raises(ValueError, match="at least one try"):
        RetryPolicy(**values)


# The service


def test_the_service_imports_no_client() -> None:
    """None of its processes loads httpx, which is installed with the client only."""
    modules = (
        "service.processes.supervisor, service.processes.worker, service.processes.engine_process, service.predict.command"
    )
    code = f"import sys, {modules}; sys.exit('httpx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
