"""The socket that the workers share: opened by the supervisor, and closed without resetting a connection."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct

_BACKLOG = 4096
_SO_ATTACH_FILTER = 26  # asm-generic/socket.h; Python has no name for it
# Classic BPF over the TCP header: load the flags, byte 13; where SYN is set, keep 0 bytes of the packet, else all.
_INSTRUCTIONS = ((0x30, 0, 0, 13), (0x45, 0, 1, 2), (0x06, 0, 0, 0), (0x06, 0, 0, 2**32 - 1))
_DROP_SYN = b"".join(struct.pack("=HBBI", *instruction) for instruction in _INSTRUCTIONS)


def open_listener(host: str, port: int) -> socket.socket:
    """Listen on ``host`` and ``port``, without blocking; raise OSError where that cannot be done."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # :: has the IPv4 addresses too
    listener = socket.create_server((host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    listener.setblocking(False)
    return listener


def begin_no_connection(listener: socket.socket) -> None:
    """Drop the first packet of new connections to ``listener``; connections that have begun are accepted as before.

    Closing a listener resets connections that are not accepted yet, and another can always arrive between the last accept and
    the close. A client whose first packet is dropped sends it again after a second, and is refused by then. Where the
    system, such as gVisor, has no such filter, nothing happens.
    """
    program = ctypes.create_string_buffer(_DROP_SYN, len(_DROP_SYN))
    described = struct.pack("@HP", len(_DROP_SYN) // 8, ctypes.addressof(program))
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, described)
