"""A certificate for TLS on this machine, by the ``openssl`` command."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any


def self_signed(folder: Path) -> dict[str, Any]:
    """Write a certificate for localhost and 127.0.0.1 and its key to ``folder``; return the settings that name them."""
    key, certificate = folder / "key.pem", folder / "cert.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 2 -subj /CN=localhost"
    subprocess.run([*command.split(), "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    return {"tls_key": key, "tls_certificate": certificate}
