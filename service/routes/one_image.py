"""A request about one image: from its body through decoder and engine to the reply, by callbacks.

Owns: the order of its steps, and that it ends once: with a reply, an error, or because its client has left. Does not know:
HTTP, how the image lies in the body, the JSON of the reply.

A task that awaits each step costs a request more than the steps, so that nothing here is awaited unless the image is large.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from starlette.types import Receive, Scope, Send

from service.answers import check_top_k
from service.engine.interface import Outcome, Request, settle
from service.errors import ServiceError
from service.model.images import EncodedImage, InputSpec
from service.observability.request_record import note_answered
from service.routes.classification import Classification
from service.routes.context import ServiceContext
from service.routes.uploads import Upload
from service.web.exchange import Reply, respond

# Takes the request and its whole body; gives the image, and how many classes are asked for.
Read = Callable[[Scope, bytes], tuple[Upload, int]]
# Takes what was found, how many classes to tell and the file's name; gives the body of the answer.
Write = Callable[[Classification, int, str | None], bytes]
Finish = Callable[[Reply | Exception], None]


class OneImageEndpoint:
    """A route whose requests ``read`` makes sense of and whose answers ``write`` makes; an ASGI callable, or called back."""

    def __init__(self, context: ServiceContext, read: Read, write: Write) -> None:
        self.context = context
        self.read = read
        self.write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request under any ASGI server."""
        await respond(self.context, scope, receive, send, self._handle)

    async def _handle(self, scope: Scope, body: bytes, deadline: float) -> Reply:
        finished: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        call = OneImageCall(self, scope, body, deadline, partial(settle, finished))
        call.begin()
        try:
            return await finished
        except asyncio.CancelledError:
            call.cancel()
            raise
        finally:
            del finished  # it has the error, whose traceback has this frame: only the garbage collector could undo that


class OneImageCall:
    """One request on its way; ``finish``, which must raise nothing, is called once, or never after ``cancel``."""

    __slots__ = (
        "_began",
        "_body",
        "_deadline",
        "_decoding",
        "_endpoint",
        "_filename",
        "_finish",
        "_request",
        "_scope",
        "_submitted",
        "_top_k",
    )

    def __init__(self, endpoint: OneImageEndpoint, scope: Scope, body: bytes, deadline: float, finish: Finish) -> None:
        """Take the request of ``scope``, due by ``deadline`` (``time.monotonic()``, seconds)."""
        self._endpoint = endpoint
        self._scope = scope
        self._body = body
        self._deadline = deadline
        self._finish: Finish | None = finish
        self._decoding: asyncio.Task[None] | None = None
        self._request: Request | None = None

    def begin(self) -> None:
        """Begin at the end of this turn of the event loop, or of a later one."""
        self._endpoint.context.turns.enter(self._begin)

    def cancel(self) -> None:
        """Forget the request: nobody waits for its answer."""
        self._finish = None
        self._let_go()

    def _begin(self) -> bool:
        """Give whether there was still something to begin.

        A full queue refuses before the body is looked at: under overload most requests end here, and what they cost is taken
        from those that are answered.
        """
        if self._finish is None:
            return False
        context = self._endpoint.context
        try:
            context.check_room()
            upload, top_k = self._endpoint.read(self._scope, self._body)
            self._body = b""  # it need not be kept while the request waits
            model = context.model()
            self._top_k = check_top_k(top_k, len(model.class_names))
            self._filename = upload.filename
            self._began = time.monotonic()
            image = context.decoder.open(upload.data)
            if image.is_small:
                self._submit(image.decode(model.input))
            else:
                self._decoding = asyncio.get_running_loop().create_task(self._decode(image, model.input))
        except Exception as error:
            self._end(error)
        return True

    async def _decode(self, image: EncodedImage, spec: InputSpec) -> None:
        try:
            decoded = await self._endpoint.context.decoder.decode_large(image, spec, self._deadline)
            self._decoding = None
            self._submit(decoded)
        except Exception as error:
            self._end(error)

    def _submit(self, image: NDArray[np.uint8]) -> None:
        """Ask the engine about uint8 (3, size, size)."""
        context = self._endpoint.context
        self._submitted = time.monotonic()
        self._request = context.engine.submit(image[None], self._deadline, self._predicted)

    def _predicted(self, outcome: Outcome) -> None:
        self._request = None
        if isinstance(outcome, ServiceError):
            self._end(outcome)
            return
        try:
            note_answered(self._scope, outcome, self._submitted, self._began)
            done = Classification(outcome, self._submitted - self._began)
            self._end(Reply(self._endpoint.write(done, self._top_k, self._filename), done.headers()))
        except Exception as error:
            self._end(error)

    def _end(self, outcome: Reply | Exception) -> None:
        self._let_go()
        finish, self._finish = self._finish, None
        if finish is not None:
            finish(outcome)

    def _let_go(self) -> None:
        """Leave nothing that would call back."""
        context = self._endpoint.context
        if self._request is not None:
            context.engine.cancel(self._request)
            self._request = None
        if self._decoding is not None:
            self._decoding.cancel()
