"""A run that was asked to stop, as an error."""

from __future__ import annotations


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""
