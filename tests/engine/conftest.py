"""The event loops on which the engine is tested."""

from __future__ import annotations

import pytest


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """Both event loops: the processes run on uvloop, whose clock counts milliseconds, and without it on asyncio's own."""
    return "asyncio", {"use_uvloop": request.param}
