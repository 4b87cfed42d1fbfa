"""The shared socket's end, over real connections: who had begun is answered, who comes after is refused, nobody is reset."""

from __future__ import annotations

import errno
import os
import select
import socket

import pytest

from service.processes.listener import begin_no_connection, open_listener
from service.processes.supervisor import _open_engine_listener


def test_who_has_connected_is_accepted_and_who_comes_after_is_refused_once_the_listener_is_closed() -> None:
    with open_listener("127.0.0.1", 0) as listener, socket.socket() as late:
        with socket.create_connection(listener.getsockname()) as early:
            begin_no_connection(listener)
            late.setblocking(False)
            assert late.connect_ex(listener.getsockname()) == errno.EINPROGRESS
            accepted, _ = listener.accept()
            with accepted:
                early.sendall(b"question")
                assert accepted.recv(100) == b"question"
                accepted.sendall(b"answer")
                assert early.recv(100) == b"answer"
            with pytest.raises(BlockingIOError):
                listener.accept()
        assert select.select([], [late], [], 0) == ([], [], [])
        listener.close()
        assert select.select([], [late], [], 30.0)[1] == [late]
        assert late.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED


def test_an_address_in_use_is_an_error() -> None:
    with open_listener("127.0.0.1", 0) as listener, pytest.raises(OSError, match="in use"):
        open_listener("127.0.0.1", listener.getsockname()[1])


def test_the_engine_s_address_names_no_file() -> None:
    """From Python 3.13 on event loops look for it: it is missing, whatever descriptors are open, and not another file."""
    listener, _ = _open_engine_listener()
    with listener, open(os.devnull), pytest.raises(FileNotFoundError):
        os.stat(listener.getsockname())
