"""Put a finished checkpoint where a running service watches for it.

Owns: that the service sees the old checkpoint or the new one, whole. Does not know: how it was trained, who serves it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from service.checkpoint import CheckpointError, load_checkpoint


def publish(source: Path, target: Path) -> str:
    """Copy the checkpoint ``source`` over ``target`` atomically, byte for byte; give its version.

    Raises CheckpointError, and leaves ``target`` as it is, when ``source`` does not load or ``target`` cannot be written.
    """
    version = load_checkpoint(source).version
    temporary: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(handle, "wb") as file, source.open("rb") as original:
            shutil.copyfileobj(original, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide it from a service that runs as another user
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise CheckpointError(f"cannot publish the checkpoint as {target}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return version
