"""The container's health check: exit 0 when ``GET /health`` answers 200, else 1 and why.

It asks the socket that the service listens on, found in /proc, so it needs no setting: address, port and TLS may come from
flags, variables or a file. It is started every few seconds, so it imports nothing slow.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import struct
import sys
from collections.abc import Iterator

TIMEOUT_S = 2.5
_EVERY_ADDRESS = {"0.0.0.0": ("127.0.0.1",), "::": ("127.0.0.1", "::1")}  # a container may have no ::1
_LISTENING = "0A"  # include/net/tcp_states.h


def main() -> int:
    """Ask once; return the exit status and print the answer, which the engine keeps for ``docker inspect``.

    The arguments are the processes whose socket is asked; without any it is all that can be seen.
    """
    processes = sys.argv[1:] or [name for name in os.listdir("/proc") if name.isdigit()]
    why: object = "no answer: nothing listens"
    for host, port in _listeners(processes):
        for connect in (http.client.HTTPConnection, _https):
            connection = connect(host, port, timeout=TIMEOUT_S)
            try:
                connection.request("GET", "/health")
                response = connection.getresponse()
                sys.stdout.write(response.read().decode(errors="replace"))
                return 0 if response.status == 200 else 1
            except TimeoutError:
                why = "no answer in time"
                break
            except (OSError, http.client.HTTPException) as error:
                why = f"no answer: {error}"
            finally:
                connection.close()
    sys.stdout.write(str(why))
    return 1


def _https(host: str, port: int, timeout: float) -> http.client.HTTPSConnection:
    import ssl

    # The certificate is made out to the service's public name, and this connection never leaves the machine.
    return http.client.HTTPSConnection(host, port, timeout=timeout, context=ssl._create_unverified_context())


def _listeners(processes: list[str]) -> Iterator[tuple[str, int]]:
    """Yield address and port of every TCP socket that one of the processes listens on; see proc_pid_net(5)."""
    held = set()
    for process in processes:
        with contextlib.suppress(OSError):  # it has ended, or is not ours
            for descriptor in os.listdir(f"/proc/{process}/fd"):
                with contextlib.suppress(OSError):
                    held.add(os.readlink(f"/proc/{process}/fd/{descriptor}"))
    for family, table in ((socket.AF_INET, "/proc/net/tcp"), (socket.AF_INET6, "/proc/net/tcp6")):
        with contextlib.suppress(OSError), open(table) as lines:
            for fields in map(str.split, lines):
                if fields[3] == _LISTENING and f"socket:[{fields[9]}]" in held:
                    host, port = fields[1].split(":")
                    words = [int(host[start : start + 8], 16) for start in range(0, len(host), 8)]
                    address = socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))
                    for here in _EVERY_ADDRESS.get(address, (address,)):
                        yield here, int(port, 16)


if __name__ == "__main__":
    sys.exit(main())
