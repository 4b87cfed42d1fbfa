"""The JSON of a classification and ``top_k``, for HTTP routes and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidParameter

DEFAULT_TOP_K = 5


def best_classes(probabilities: NDArray[np.float32], class_names: Sequence[str], top_k: int) -> list[dict[str, Any]]:
    """Label and score of the ``top_k`` likeliest classes, descending, of float32 (classes,); ties keep the order of classes."""
    scores = probabilities.tolist()
    order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:top_k]
    return [{"label": class_names[index], "score": _rounded(scores[index])} for index in order]


def make_answer(best: Sequence[dict[str, Any]], model_name: str, model_version: str, filename: str | None) -> dict[str, Any]:
    """JSON of one image's prediction; ``best`` is what ``best_classes`` returns."""
    return {
        **best[0],
        "predictions": best,
        "filename": filename,
        "model": {"name": model_name, "version": model_version},
    }


def check_top_k(top_k: int | None, classes: int) -> int:
    """Number of classes to answer with: ``top_k``, or by default DEFAULT_TOP_K or as many as there are.

    Raises InvalidParameter when ``top_k`` is not 1 to ``classes``.
    """
    if top_k is None or top_k == DEFAULT_TOP_K:
        return min(DEFAULT_TOP_K, classes)
    if not 1 <= top_k <= classes:
        raise InvalidParameter(f"top_k must be between 1 and {classes}, the number of classes")
    return top_k


def _rounded(score: float) -> float:
    """Round a score of 0 to 1 to six decimals; ``round`` takes five times as long because it formats text."""
    return int(score * 1e6 + 0.5) / 1e6
