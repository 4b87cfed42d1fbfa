"""The JSON of a classification and ``top_k``, for HTTP routes and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidParameter

DEFAULT_TOP_K = 5


@dataclass(frozen=True, slots=True)
class Options:
    """What a request asks for; ``top_k`` and ``threshold`` are None for the defaults.

    ``rejects``: an image that is not known gets no label.
    """

    top_k: int | None = None
    rejects: bool = False
    threshold: float | None = None

    def known(self, typicality: float, threshold: float) -> bool:
        """Whether an image of this ``typicality`` is known; ``threshold`` is the model's."""
        return typicality >= (threshold if self.threshold is None else self.threshold)


DEFAULT_OPTIONS = Options()


def make_options(top_k: int | None, unknown: Any, threshold: Any) -> Options:
    """Check ``unknown`` and ``threshold``, each None where there is none; raise InvalidParameter for other values."""
    if unknown is None and threshold is None:
        return DEFAULT_OPTIONS if top_k is None else Options(top_k)
    if unknown not in (None, "flag", "reject"):
        raise InvalidParameter("unknown must be flag or reject")
    if threshold is not None:
        try:
            threshold = float(threshold)
        except (TypeError, ValueError):
            threshold = -1.0
        if not 0 <= threshold <= 1:
            raise InvalidParameter("threshold must be a number from 0 to 1")
    return Options(top_k, unknown == "reject", threshold)


def best_classes(probabilities: NDArray[np.float32], class_names: Sequence[str], top_k: int) -> list[dict[str, Any]]:
    """Label and score of the ``top_k`` likeliest classes, descending, of float32 (classes,); ties keep the order of classes."""
    scores = probabilities.tolist()
    order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:top_k]
    return [{"label": class_names[index], "score": _rounded(scores[index])} for index in order]


def make_answer(
    best: Sequence[dict[str, Any]],
    model_name: str,
    model_version: str,
    filename: str | None,
    typicality: float | None = None,
    known: bool = True,
    rejects: bool = False,
) -> dict[str, Any]:
    """JSON of one image's prediction; ``best`` is what ``best_classes`` returns.

    ``typicality`` is None for a model without it, whose answers do not say ``known``. One that ``rejects`` has no label for
    an image that is not known.
    """
    of_typicality = {} if typicality is None else {"known": known, "typicality": _rounded(typicality)}
    return {
        **({"label": None, "score": None} if rejects and not known else best[0]),
        "predictions": best,
        **of_typicality,
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
