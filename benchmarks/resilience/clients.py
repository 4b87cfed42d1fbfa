"""What clients do to a real service, on purpose or not; each docstring is what is promised."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import Counter
from io import BytesIO
from typing import Any

from PIL import Image

from benchmarks.load.closed_loop import run_wrk
from benchmarks.load.http_connection import HttpConnection, NoAnswer
from benchmarks.load.uploads import FORM_TYPE, http_request, large_photo, photo
from benchmarks.resilience.scene import Ground, Outcome, Scene, fault, open_scene
from benchmarks.servers.certificate import self_signed
from benchmarks.servers.footprint import group_resident_mb

_HEALTH_S = 1.0  # for a probe over a new connection, on a machine that the clients share
_PATIENCE_S = 60.0
_SLACK_MB = 64  # not counted in the budget: small bodies, one body that is joined or parsed, codecs loaded, gaps in the heap
_JPEG = "image/jpeg"


@fault("Overload, tenfold for a minute (a queue of 64)")
async def overload(ground: Ground) -> Outcome:
    """Ten times the connections that keep it busy, none of which heeds `Retry-After`: the queue's bound holds.

    What is beyond it gets 429, nobody waits past the deadline, and `/health` responds all along.
    """
    bound, timeout_s, connections, seconds = 64, 5.0, 640, 60
    requests = [http_request("POST", "/predict", sample.image, "image/png") for sample in ground.samples]
    limits: dict[str, Any] = {"max_queue_images": bound, "max_images_per_request": bound, "request_timeout_s": timeout_s}
    async with open_scene(ground, workers=1, pause_s=1.0, **limits) as scene:
        url = scene.service.url
        result = await asyncio.to_thread(run_wrk, url, requests, connections=connections, duration_s=seconds)
    outcome, watch, slowest_s = scene.outcome, scene.watch, scene.load.slowest_answer_s
    outcome.sent += result.requests + result.broken
    outcome.answered += result.requests - result.refused
    outcome.refused += result.refused
    outcome.lost += result.broken
    outcome.seen = (
        f"{result.answered_per_s:.0f} answered a second; queue at most {watch.deepest_queue} of {bound};"
        f" slowest response {slowest_s:.2f} s, slowest `/health` {watch.slowest_s:.2f} s"
    )
    scene.require(watch.deepest_queue <= bound, f"{watch.deepest_queue} images waited")
    scene.require(slowest_s <= timeout_s + 1, f"a response took {slowest_s:.1f} s")
    scene.require(watch.slowest_s <= timeout_s, "a health probe over a new connection waited longer than any request may")
    scene.require(not result.broken, "some of the crowd's requests got no response")
    scene.require(result.refused > 0, "it was never overloaded")
    return outcome


@fault("Clients that leave")
async def leave_in_the_middle(ground: Ground) -> Outcome:
    """Clients that leave with a reset, every other one within its request, harm nobody else."""
    request = http_request("POST", "/predict", ground.samples[0].image, "image/png")

    async def leave(url: str) -> None:
        for number in range(250):
            connection = await HttpConnection.open(url)
            connection.send(request[: len(request) // 2 if number % 2 else None])
            await asyncio.sleep(0.005 * (number % 5))
            connection.abort()

    async with open_scene(ground) as scene, asyncio.timeout(120):
        await asyncio.gather(*(leave(scene.service.url) for _ in range(8)))
    scene.outcome.seen = "2,000 clients left"
    scene.require("ERROR" not in scene.service.output, "it was an error to the service")
    return scene.outcome


@fault("Slow clients (slowloris)")
async def slow_clients(ground: Ground) -> Outcome:
    """They are cut off after the time limits (here 2 s), and nobody else waits for them.

    They send headers, a body, trailers or empty lines without end, or are silent after an answer, or from the beginning.
    """
    head = b"POST /predict HTTP/1.1\r\nhost: chaos\r\ncontent-type: image/png\r\n"
    ways = (
        (head + b"x-slow: ", b"a"),
        (head + b"content-length: 100000\r\n\r\n", b"a"),
        (head + b"transfer-encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n"),
        (http_request("GET", "/health/live"), b"\r\n"),
        (http_request("GET", "/health/live"), b""),
        (b"", b""),
    )

    async def dribble(url: str, begin: bytes, go_on: bytes) -> None:
        connection = await HttpConnection.open(url)
        connection.send(begin)
        with contextlib.suppress(NoAnswer):
            while connection.is_open:
                answer = asyncio.create_task(connection.answer(patience_s=30))
                while not answer.done():
                    connection.send(go_on)
                    await asyncio.wait([answer], timeout=0.1)
                answer.result()
        await connection.close()

    async with open_scene(ground, header_timeout_s=2, body_timeout_s=2, keep_alive_s=2) as scene, asyncio.timeout(60):
        await asyncio.gather(*(dribble(scene.service.url, *way) for way in ways for _ in range(30)))
    scene.outcome.seen = f"{30 * len(ways)} slow clients in {len(ways)} ways were all cut off"
    return scene.outcome


@fault("Clients that never read their answers")
async def never_read(ground: Ground) -> Outcome:
    """They are cut off after `body_timeout_s` (here 2 s), and nothing is answered from memory before."""
    wire = http_request("GET", "/page/swagger/swagger-ui-bundle.js") * 500
    async with open_scene(ground, body_timeout_s=2) as scene, asyncio.timeout(60):
        _, grown_mb = await _grown_mb(scene, asyncio.ensure_future(_outstay(scene.service.url, 20, wire)))
    scene.outcome.seen = f"20 clients, each of which asked for 760 MB, were cut off; memory grew by {grown_mb:.0f} MB"
    scene.require(grown_mb < 2 * _SLACK_MB, "memory held what nobody read")
    return scene.outcome


@fault("Silent TLS handshakes")
async def silent_handshakes(ground: Ground) -> Outcome:
    """Ten times as many as `max_connections` (here 32) allow keep nobody out, and all are closed (here after 2 s)."""
    tls = self_signed(ground.folder)
    async with open_scene(ground, max_connections=32, header_timeout_s=2, **tls) as scene, asyncio.timeout(60):
        await _outstay(scene.service.url.replace("https", "http"), 640)
    scene.outcome.seen = f"all 640 were closed; slowest `/health` {scene.watch.slowest_s:.2f} s"
    return scene.outcome


@fault("Bodies that are long to parse")
async def costly_to_parse(ground: Ground) -> Outcome:
    """Megabytes of tiny segments, chunks, boundaries or lists are refused or passed over, and `/health` responds all along."""
    jpeg, png, count = photo(), ground.samples[0].image, 500_000
    chunk = struct.pack(">I", 0) + b"tEXt" + b"\x6b\xc5\x3a\x51"
    wires = [
        http_request("POST", "/predict", jpeg[:2] + b"\xff\xe1\0\x08Exif\0\0" * count + jpeg[2:], _JPEG),
        http_request("POST", "/predict", png[:33] + chunk * count + png[33:], "image/png"),
        http_request("POST", "/predict", b"\r\n--" * 3 * count, FORM_TYPE),
        http_request("POST", "/predict", b'{"inputs": [' + b"[]," * count + b"0]}", "application/json"),
        http_request("POST", "/predict/batch", b"\r\n------------------------d74496d6695887" * 100_000, FORM_TYPE),
    ]
    return await _attack(ground, wires * 4, {200, 400, 422})


@fault("Images that are long to decode")
async def costly_to_decode(ground: Ground) -> Outcome:
    """They are refused by their headers or end at the deadline (here 5 s); the others go on, and `/health` responds."""
    out = BytesIO()
    with Image.open(BytesIO(photo())) as picture:
        picture.save(out, "JPEG", progressive=True)
    progressive = out.getvalue()
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    runs = b"BM" + struct.pack("<IIIIiiHHIIiiII", 0, 0, 1078, 40, 4000, 4000, 1, 8, 1, 0, 0, 0, 0, 0) + bytes(1024)
    images = [progressive[:-2] + scan * 500, progressive[:-2] + scan * 80, runs + b"\x01\0" * 4_000_000, large_photo()]
    for kind in ("AVIF", "WEBP"):
        out = BytesIO()
        Image.effect_noise((4000, 3000), 40).convert("RGB").save(
            out, kind, **({"speed": 10} if kind == "AVIF" else {"method": 0})
        )
        images.append(out.getvalue())
    wires = [http_request("POST", "/predict", image, _JPEG) for image in images]
    return await _attack(ground, wires * 6, {200, 422, 503, 504}, request_timeout_s=5)


@fault("More uploads than memory")
async def fill_memory(ground: Ground) -> Outcome:
    """Half-sent bodies and images under decode share `memory_budget_bytes` (here 64 MiB); beyond it 503 with `Retry-After`."""
    head = http_request("POST", "/predict", b"", _JPEG, {"Content-Length": str(2**24)})
    return await _attack(ground, [head + bytes(2**22)] * 60, {408, 503}, memory_budget_bytes=2**26, body_timeout_s=5)


@fault("A full house")
async def fill_house(ground: Ground) -> Outcome:
    """With every place taken by slow uploads, `/health` still responds, and says that it is ready."""
    head = http_request("POST", "/predict", b"", _JPEG, {"Content-Length": "1000"})
    return await _attack(ground, [head] * 80, {408, 503}, workers=1, max_connections=64, body_timeout_s=5)


@fault("An Upgrade header on every request")
async def ask_for_upgrade(ground: Ground) -> Outcome:
    """It is ignored: the request is answered over HTTP/1.1 with its whole body."""
    upgrade = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAEAAEAAAAIAAAAA"}
    wires = [http_request("POST", "/predict", sample.image, "image/png", upgrade) for sample in ground.samples]
    return await _attack(ground, wires * 4, {200})


@fault("Bodies over the limit from clients that read only afterwards")
async def refuse_and_close(ground: Ground) -> Outcome:
    """Who sends all before he reads, with `Connection: close`, gets his 413 and no reset."""
    wire = http_request("POST", "/predict", bytes(300_000), _JPEG, {"connection": "close"})
    return await _attack(ground, [wire] * 100, {413}, max_body_bytes=100_000)


@fault("Clients that end their own side of the connection")
async def end_own_side(ground: Ground) -> Outcome:
    """Who has sent his request and half-closes the connection gets his answer."""
    wires = [http_request("POST", "/predict", sample.image, "image/png") for sample in ground.samples]
    return await _attack(ground, wires * 4, {200}, ends=True)


@fault("Requests at the moment at which idle connections are closed")
async def close_idle(ground: Ground) -> Outcome:
    """A request that is on its way is answered (`keep_alive_s` here 0.5 s, as long as the clients' pause)."""
    async with open_scene(ground, keep_alive_s=0.5, pause_s=0.5) as scene:
        await scene.load.wait_for_more(500)
    return scene.outcome


async def _attack(ground: Ground, wires: list[bytes], statuses: set[int], ends: bool = False, **settings: Any) -> Outcome:
    """Send all at once, each in two segments; require these ``statuses``, that nobody is lost, and quick health."""
    async with open_scene(ground, **settings) as scene:
        sending = asyncio.gather(*(_send(scene.service.url, wire, ends=ends) for wire in wires))
        statuses_seen, grown_mb = await _grown_mb(scene, sending)
    found, slowest_s = Counter(statuses_seen), scene.watch.slowest_s
    scene.outcome.seen = f"{dict(sorted(found.items()))}; slowest `/health` {slowest_s:.2f} s; memory grew by {grown_mb:.0f} MB"
    scene.require(set(found) <= statuses, f"statuses {sorted(found)}")
    scene.require(slowest_s <= _HEALTH_S, "health was slow")
    if budget := settings.get("memory_budget_bytes"):
        scene.require(grown_mb < 2 * (budget / 1e6 + _SLACK_MB), "memory went over the budget")  # two workers
    return scene.outcome


async def _outstay(url: str, clients: int, wire: bytes = b"") -> None:
    """Send ``wire`` again and again over so many connections, and read nothing, until all of them are closed."""
    crowd = [await HttpConnection.open(url) for _ in range(clients)]
    while crowd := [connection for connection in crowd if connection.is_open]:
        for connection in crowd:
            connection.send(wire)
        await asyncio.sleep(0.2)


async def _grown_mb(scene: Scene, work: asyncio.Future[Any]) -> tuple[Any, float]:
    """Return the result of ``work``, and by how much the service's memory grew meanwhile at most."""
    before_mb = peak_mb = group_resident_mb(scene.service.pid)
    while not work.done():
        await asyncio.wait([work], timeout=0.5)
        peak_mb = max(peak_mb, group_resident_mb(scene.service.pid))
    return work.result(), peak_mb - before_mb


async def _send(url: str, wire: bytes, *, ends: bool = False) -> int:
    """Return the status of the answer, 0 where there was none; ``ends`` half-closes the connection before it comes."""
    connection = await HttpConnection.open(url)
    head = wire.index(b"\r\n\r\n") + 4
    try:
        connection.send(wire[:head])
        await asyncio.sleep(0.02)
        connection.send(wire[head:])
        if ends:
            connection.end()
        return (await connection.answer(patience_s=_PATIENCE_S)).status
    except NoAnswer:
        return 0
    finally:
        await connection.close()
