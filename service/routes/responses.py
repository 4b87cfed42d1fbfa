"""The error answers as OpenAPI documents them, from the tree of errors itself.

Owns: the documentation of errors. Does not know: which route may answer with which.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from service.errors import ServiceError
from service.schemas import Problem
from service.web.problems import MEDIA_TYPE, problem


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the errors of these statuses, each code with an example."""
    described: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        errors = [error for error in _all_errors() if error.status == status]
        examples = {
            error.code: {"value": problem(error((error.__doc__ or error.title).strip()), "5f0c1d2e3b4a59687786a5b4c3d2e1f0")}
            for error in errors
        }
        described[status] = {
            "model": Problem,
            "description": "; ".join(f"`{error.code}`" for error in errors),
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": examples}},
        }
    return described


def _all_errors() -> Iterator[type[ServiceError]]:
    yield from ServiceError.__subclasses__()
