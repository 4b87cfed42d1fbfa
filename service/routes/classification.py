"""Encoded images, or their pixels, to predictions: the one path of every route through gate, decoder and engine.

    begin ──gate──► room in the engine? ──► read ──► decode ──► submit ──► finish(Answered)
                            │                 │         │          │
                            └─────────────────┴─────────┴──────────┴─────► finish(error)

A request's only image passes it by callbacks: a task that awaits each step costs more than the steps, so nothing is awaited
unless the image is large. ``classify`` awaits it, for requests of several images.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.answers import DEFAULT_OPTIONS, Options, check_top_k
from service.engine.interface import ModelInfo, Prediction, Request, settle
from service.errors import NotReady, Overloaded, ServiceError
from service.model.images import EncodedImage
from service.observability.request_record import Answered
from service.routes.context import ServiceContext
from service.routes.uploads import Upload, one_upload, text_options
from service.web.body import LARGE_BODY_BYTES, in_thread, read_body
from service.web.exchange import Exchange, Handler, Reply

_T = TypeVar("_T")

Data = bytes | memoryview
Pixels = NDArray[np.uint8]  # (n, 3, size, size)


def headers(answered: Answered) -> list[tuple[bytes, bytes]]:
    """``Server-Timing`` in milliseconds and ``X-Batch-Size``."""
    prediction = answered.prediction
    timing = b"decode;dur=%.3f, queue;dur=%.3f, compute;dur=%.3f" % (
        answered.decode_s * 1e3,
        prediction.queue_s * 1e3,
        prediction.compute_s * 1e3,
    )
    return [(b"server-timing", timing), (b"x-batch-size", b"%d" % prediction.batch_size)]


@dataclass(slots=True, eq=False)
class Call:
    """One image, or pixels that fit a batch, on the path.

    ``read`` returns the image of this call, encoded, or its pixels: once the engine has room and ``model`` is known, and in a
    thread where it ``reads_long``. ``finish`` is called once with this call and what came of it, an Answered, an error, or the
    pixels where it ``only_decodes``; or never after ``cancel``. It raises nothing, since whoever calls it has others to call.

    ``began`` is the ``time.monotonic()`` at which decoding began where ``read`` returns pixels that were decoded before;
    ``slots`` lets one request's large images into the decoder a few at a time. ``read`` may set ``filename`` and ``options``.
    """

    context: ServiceContext
    exchange: Exchange
    read: Callable[[Call], Data | Pixels]
    finish: Callable[[Call, Any], object]
    reads_long: bool = False
    only_decodes: bool = False
    slots: asyncio.Semaphore | None = None
    began: float | None = None
    model: ModelInfo = field(init=False)
    filename: str | None = field(default=None, init=False)
    options: Options = field(default=DEFAULT_OPTIONS, init=False)
    _data: Data | None = field(default=None, init=False)
    _submitted: float = field(default=0.0, init=False)
    _is_over: bool = field(default=False, init=False)
    _step: Request | asyncio.Task[None] | None = field(default=None, init=False)  # that is under way

    def begin(self) -> None:
        """Begin at the end of this iteration of the event loop, or of a later one."""
        self.context.gate.enter(self._begin)

    def cancel(self) -> None:
        """Forget the call: nobody waits for its outcome."""
        self._is_over = True
        if isinstance(self._step, Request):
            self.context.engine.cancel(self._step)
        elif self._step is not None:
            self._step.cancel()
        self._step = None

    def _begin(self) -> bool:
        """Return whether there was still something to begin.

        A full queue refuses before the image is read, and the gate backs off: under overload most requests end here, and what
        they cost is taken from those that are answered.
        """
        if self._is_over:
            return False
        try:
            self.model = self.context.engine.check_room()
            if self.reads_long:
                self._prepare(partial(in_thread, partial(self.read, self), self.exchange.deadline), self._decode)
            else:
                self._decode(self.read(self))
        except Exception as error:
            if isinstance(error, NotReady | Overloaded):
                self.context.gate.back_off()
            self._end(error)
        return True

    def _prepare(self, work: Callable[[], Awaitable[_T]], go_on: Callable[[_T], None]) -> None:
        """Go on with what ``work`` returns; its task is cancelled with the call."""

        async def prepare() -> None:
            try:
                result = await work()
                if not self._is_over:  # Python 3.11 loses a cancellation that comes together with the result
                    go_on(result)
            except Exception as error:
                self._end(error)

        self._step = asyncio.get_running_loop().create_task(prepare())

    def _decode(self, data: Data | Pixels) -> None:
        if isinstance(data, np.ndarray):
            self._submit(data)
            return
        if self.context.kept is not None:
            self._data = data
        self.began = time.monotonic()
        image = EncodedImage(data, self.model.input, max_pixels=self.context.settings.max_image_pixels)
        if image.is_quick():
            self._submit(image.decode()[None], self.model)
        else:
            decoding = partial(self.context.decoder.decode_large, image, self.exchange.deadline, self.slots)
            self._prepare(decoding, lambda pixels: self._submit(pixels[None]))

    def _submit(self, pixels: Pixels, model: ModelInfo | None = None) -> None:
        """Have the engine predict; for ``model`` see ``Engine.submit``."""
        if self.only_decodes:
            self._end(pixels)
            return
        self._submitted = time.monotonic()
        self._step = self.context.engine.submit(pixels, self.exchange.deadline, self._predicted, model=model)

    def _predicted(self, outcome: Prediction | ServiceError) -> None:
        self._step = None  # it refers to this call: only the garbage collector could undo that cycle
        if isinstance(outcome, ServiceError):
            self._end(outcome)
        else:
            answered = Answered(self.began, self._submitted, outcome)
            self.exchange.record.answered.append(answered)
            if self._data is not None and self.context.kept is not None:
                self.context.kept.offer(self._data, outcome)
            self._end(answered)

    def _end(self, outcome: Answered | Pixels | Exception) -> None:
        if not self._is_over:
            self._is_over = True
            self.finish(self, outcome)


# Finds the image in a body of this Content-Type.
Find = Callable[[bytes, bytes | None], Upload]
# Makes the body of the answer from the prediction of the only image, the options and the file's name.
Write = Callable[[Prediction, Options, str | None], bytes]


def one_image_handler(context: ServiceContext, find: Find, write: Write) -> Handler:
    """Make a handler of requests about one image, which ``find`` finds and whose answers ``write`` makes."""

    def read(call: Call) -> Data:
        exchange, scope = call.exchange, call.exchange.scope
        upload = find(exchange.body, scope.header(b"content-type"))
        exchange.body = b""  # it need not be kept while the request waits
        call.filename = upload.filename
        call.options = upload.options.joined(text_options(scope.params)) if scope.query else upload.options
        check_top_k(call.options.top_k, len(call.model.class_names))
        return upload.data

    def finish(call: Call, outcome: Answered | Exception) -> None:
        if isinstance(outcome, Answered):
            try:
                body = write(outcome.prediction, call.options, call.filename)
                call.exchange.answer(Reply(body, headers(outcome)))
                return
            except Exception as error:
                outcome = error
        call.exchange.refuse(outcome)

    def handle(exchange: Exchange) -> None:
        is_raw = (exchange.scope.header(b"content-type") or b"").startswith(b"image/")
        call = Call(context, exchange, read, finish, len(exchange.body) > LARGE_BODY_BYTES and not is_raw)
        exchange.on_left = call.cancel
        call.begin()

    return handle


async def classify(context: ServiceContext, exchange: Exchange, data: Data | Pixels, **options: Any) -> Answered:
    """Predict one encoded image, or as many in pixels as fit a batch; raise what decoder and engine raise.

    ``options`` are ``slots`` and ``began`` of ``Call``.
    """
    answered: Answered = await _run(context, exchange, data, **options)
    return answered


async def decode(
    context: ServiceContext, exchange: Exchange, data: Data, slots: asyncio.Semaphore | None = None
) -> NDArray[np.uint8]:
    """Decode to uint8 (3, size, size), if the engine has room; see ``classify``."""
    image: NDArray[np.uint8] = (await _run(context, exchange, data, slots=slots, only_decodes=True))[0]
    return image


async def decode_only(context: ServiceContext, exchange: Exchange) -> tuple[NDArray[np.uint8], str | None]:
    """Decode the one image of a body, of any Content-Type, to uint8 (3, size, size); with its file's name. See ``decode``."""
    upload = await read_body(exchange, one_upload, exchange.scope.header(b"content-type"))
    return await decode(context, exchange, upload.data), upload.filename


async def _run(context: ServiceContext, exchange: Exchange, data: Data | Pixels, **options: Any) -> Any:
    future = asyncio.get_running_loop().create_future()
    call = Call(context, exchange, lambda _: data, partial(_settle, future), **options)
    call.begin()
    try:
        return await future
    finally:
        call.cancel()
        del call, future  # an error's traceback has this frame: only the garbage collector could undo that cycle


def _settle(future: asyncio.Future[Any], _: Call, outcome: Answered | Pixels | Exception) -> None:
    settle(future, outcome)
