"""Put a finished checkpoint where a running service watches for it."""

from __future__ import annotations

from pathlib import Path

from service.model.atomic_file import replacing
from service.model.checkpoint import load_checkpoint


def publish(source: Path, target: Path) -> str:
    """Copy the checkpoint ``source`` over ``target`` atomically, byte for byte; give its version.

    Raises CheckpointError when ``source`` does not load and WriteError when ``target`` cannot be written; ``target`` is then
    as it was.
    """
    version = load_checkpoint(source).version
    with replacing(target) as file:
        file.write(source.read_bytes())
    return version
