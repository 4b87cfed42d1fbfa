"""Routes about one image, answered by callbacks."""

from __future__ import annotations

from collections.abc import Callable

from service.answers import Options, check_top_k
from service.engine.interface import Prediction
from service.routes.classification import Call, Classification, Data
from service.routes.context import ServiceContext
from service.routes.uploads import Upload
from service.web.body import LARGE_BODY_BYTES
from service.web.exchange import Exchange, Handler
from service.web.reply import Reply

# Finds the image and the options in a complete request.
Read = Callable[[Exchange], tuple[Upload, Options]]
# Makes the body of the answer from the prediction of the only image, the options and the file's name.
Write = Callable[[Prediction, Options, str | None], bytes]


def one_image_handler(context: ServiceContext, read: Read, write: Write) -> Handler:
    """Make a handler whose requests ``read`` understands and whose answers ``write`` makes."""

    def handle(exchange: Exchange) -> None:
        call = _OneImageCall(context, exchange.record, exchange.deadline)
        call.exchange, call.reader, call.writer = exchange, read, write
        exchange.on_left = call.cancel
        call.begin()

    return handle


class _OneImageCall(Call):
    """Answers its exchange."""

    __slots__ = ("exchange", "filename", "options", "reader", "writer")

    exchange: Exchange
    reader: Read
    writer: Write

    def takes_long_to_read(self) -> bool:
        exchange = self.exchange
        return len(exchange.body) > LARGE_BODY_BYTES and not (exchange.scope.header(b"content-type") or b"").startswith(
            b"image/"
        )

    def read(self) -> Data:
        upload, self.options = self.reader(self.exchange)
        self.exchange.body = b""  # it need not be kept while the request waits
        check_top_k(self.options.top_k, len(self.context.model().class_names))
        self.filename = upload.filename
        return upload.data

    def finish(self, outcome: Classification | Exception) -> None:
        if isinstance(outcome, Classification):
            try:
                body = self.writer(outcome.prediction, self.options, self.filename)
                self.exchange.answer(Reply(body, outcome.headers()))
                return
            except Exception as error:
                outcome = error
        self.exchange.refuse(outcome)
