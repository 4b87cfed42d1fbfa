"""Files that are read or written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


class WriteError(Exception):
    """A file that cannot be written; the message says why and what to do."""


def read_whole(path: Path) -> bytes:
    """Return what a file holds; raise OSError where it cannot be read, or is a pipe or a device, which may never end."""
    if path.exists() and not path.is_file():
        raise OSError("it is not a file")
    return path.read_bytes()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces ``path`` when the block ends without an error.

    Readers see the old file or the new one, whole. When the block fails or the disk is full, ``path`` is unchanged and nothing
    else is left. Raises WriteError for an OSError. The temporary file always has the same name, so a killed process leaves at
    most one, which the next write replaces.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}; free some space or choose another folder") from error
    finally:
        with suppress(OSError):  # already renamed, or its folder could not be made
            partial.unlink()
