"""A file that is written whole or not at all.

Owns: the temporary file beside it and its replacement. Does not know: what is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from training.errors import RunError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of ``path`` when the block ends well.

    Readers see the old file or the new one, whole. When the block fails, or the disk is full, nothing is left and
    ``path`` is as it was; OSError becomes RunError. The temporary name is always the same one, so a process killed here
    leaves at most one file, which the next write takes over.
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
        raise RunError(f"cannot write {path}: {error.strerror or error}; free some space or choose another folder") from error
    finally:
        with suppress(OSError):  # it is gone already, or its folder never was one
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8, whole or not at all; raise RunError when it cannot be written."""
    with replacing(path) as file:
        file.write(text.encode())
