"""What can go wrong for a user of the training program.

Every message says why and what to do; the command line prints it and exits with 2.
"""

from __future__ import annotations


class TrainingError(Exception):
    """The command cannot do what it was asked."""


class DataError(TrainingError):
    """Data that cannot be trained on or evaluated."""


class RunError(TrainingError):
    """A run that cannot start or go on."""


class EvaluationError(TrainingError):
    """A service or a runtime that cannot be asked."""


class Interrupted(TrainingError):
    """The run was asked to stop; its state is saved."""


class ExportError(TrainingError):
    """An export that is not the model it was made from, or cannot be written."""
