"""Which model serves: one decision in memory, and copies of the checkpoints that it names. Both survive every engine."""

from __future__ import annotations

import json
import mmap
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

_SLOTS = 3  # the model that serves, the one before, and a new one that has yet to prove itself
_DECISION_BYTES = 2**16
_MAX_REJECTED, _MAX_REFUSAL = 1_000, 1_000  # versions of 12 digits, characters


@dataclass(frozen=True)
class Decision:
    """``slots`` hold the checkpoint that serves and the one before it, where there is one; none before the first start.

    ``rejected`` are the versions that were refused or rolled back; ``refusal`` says in words what was last rejected, empty
    where nothing is amiss.
    """

    slots: tuple[int, ...] = ()
    rejected: tuple[str, ...] = ()
    refusal: str = ""

    def __post_init__(self) -> None:
        """Keep each rejected version once and the newest of them, and the beginning of the refusal, however long it runs."""
        object.__setattr__(self, "slots", tuple(self.slots))
        object.__setattr__(self, "rejected", tuple(dict.fromkeys(self.rejected))[-_MAX_REJECTED:])
        object.__setattr__(self, "refusal", self.refusal[:_MAX_REFUSAL])

    @property
    def free_slot(self) -> int:
        """The slot that holds neither model."""
        return next(slot for slot in range(_SLOTS) if slot not in self.slots)


class ModelFiles:
    """Shared memory and unnamed temporary files, opened by the supervisor and inherited by every engine.

    Without names no cleaner of the temporary folder removes them, and a killed service leaves none behind.
    """

    def __init__(self) -> None:
        """Open the files; raise OSError where the temporary folder cannot hold them."""
        self._decision = mmap.mmap(-1, _DECISION_BYTES)  # no file, so that a full disk loses no decision
        self._slots = [tempfile.TemporaryFile(buffering=0) for _ in range(_SLOTS)]  # noqa: SIM115  # open while the service runs

    def slot(self, index: int) -> Path:
        """Return a path at which this process can read and replace the file."""
        return Path(f"/proc/self/fd/{self._slots[index].fileno()}")

    def decision(self) -> Decision:
        """Return the last decision."""
        line, _, _ = self._decision[:].partition(b"\n")
        return Decision() if line.startswith(b"\0") else Decision(**json.loads(line))

    def decide(self, decision: Decision) -> None:
        """Replace the decision."""
        line = json.dumps(asdict(decision)).encode() + b"\n"
        self._decision[: len(line)] = line
