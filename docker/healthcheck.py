"""The container's health check: exit 0 when ``GET /health`` answers 200 on this machine, else 1 and why.

Owns: asking. Does not know: what healthy means. It is started every few seconds, so it imports nothing slow.
"""

from __future__ import annotations

import http.client
import os
import sys

TIMEOUT_S = 2.5


def main() -> int:
    """Ask once; give the exit status and print the answer, which the engine keeps for ``docker inspect``."""
    connection = _connection(int(os.environ.get("SERVICE_PORT", "8000")))
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        sys.stdout.write(response.read().decode(errors="replace"))
    except (OSError, http.client.HTTPException) as error:
        sys.stdout.write(f"no answer: {error}")
        return 1
    finally:
        connection.close()
    return 0 if response.status == 200 else 1


def _connection(port: int) -> http.client.HTTPConnection:
    if not os.environ.get("SERVICE_TLS_CERTIFICATE"):
        return http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    import ssl

    # The certificate is made out to the service's public name, and this connection never leaves the machine.
    unverified = ssl._create_unverified_context()
    return http.client.HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT_S, context=unverified)


if __name__ == "__main__":
    sys.exit(main())
