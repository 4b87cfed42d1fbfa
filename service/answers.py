"""The JSON of a classification and what a request may choose of it, for HTTP routes and in-process use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidParameter

DEFAULT_TOP_K = 5
_NUMBER = re.compile(r"-?(?:[0-9]{1,18}(\.[0-9]*)?|(\.[0-9]+))([Ee][+-]?[0-9]{1,3})?")


@dataclass(frozen=True, slots=True)
class Options:
    """What a request asks for; each is None for the default.

    ``unknown`` is ``flag`` or ``reject``: with the latter an image that is not known gets no label.
    """

    top_k: int | None = None
    unknown: str | None = None
    threshold: float | None = None

    def joined(self, others: Options) -> Options:
        """Return these options and ``others``; raise InvalidParameter for one that is in both."""
        if self is DEFAULT_OPTIONS or others is DEFAULT_OPTIONS:
            return others if self is DEFAULT_OPTIONS else self
        both = {name: (getattr(self, name), getattr(others, name)) for name in OPTION_NAMES}
        require_once(name for name, values in both.items() if None not in values)
        return Options(*(first if second is None else second for first, second in both.values()))


class OptionArguments(TypedDict, total=False):
    """``Options`` as arguments of a function; what is None or missing is the default.

    ``top_k`` is how many classes an answer holds. An image whose typicality is below ``threshold`` (0 to 1) is not ``known``;
    with ``unknown="reject"`` its label and score are None.
    """

    top_k: int | None
    unknown: Literal["flag", "reject"] | None
    threshold: float | None


OPTION_NAMES = tuple(field.name for field in fields(Options))
DEFAULT_OPTIONS = Options()


def make_options(top_k: int | None = None, unknown: Any = None, threshold: Any = None) -> Options:
    """Check ``unknown`` and ``threshold``, each None where there is none; raise InvalidParameter for other values."""
    if unknown is None and threshold is None:
        return DEFAULT_OPTIONS if top_k is None else Options(top_k)
    if unknown not in (None, "flag", "reject"):
        raise InvalidParameter("unknown must be flag or reject")
    is_number = isinstance(threshold, int | float | np.number) and not isinstance(threshold, bool)
    if threshold is not None and not (is_number and 0 <= threshold <= 1):
        raise InvalidParameter("threshold must be a number from 0 to 1")
    return Options(top_k, unknown, threshold)


def number(text: str) -> int | float | None:
    """Return the number in ``text``, an int where it has neither point nor exponent; None for all else.

    Digits are ASCII's, and there are no spaces, underscores or plus signs, which Python's own conversions take.
    """
    match = _NUMBER.fullmatch(text)
    return None if match is None else float(text) if any(match.groups()) else int(text)


def require_once(repeated: Iterable[str]) -> None:
    """Raise InvalidParameter where ``repeated`` names something."""
    if names := ", ".join(repeated):
        raise InvalidParameter(f"{names} was given more than once; give it once")


def best_classes(probabilities: NDArray[np.float32], class_names: Sequence[str], top_k: int | None) -> list[dict[str, Any]]:
    """Label and score of the ``top_k`` likeliest classes, descending, of float32 (classes,); ties keep the order of classes.

    By default they are DEFAULT_TOP_K, or as many as there are.
    """
    scores = probabilities.tolist()
    order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[: top_k or DEFAULT_TOP_K]
    return [{"label": class_names[index], "score": rounded(scores[index])} for index in order]


def check_top_k(top_k: int | None, classes: int) -> None:
    """Raise InvalidParameter when ``top_k`` is not 1 to ``classes``; DEFAULT_TOP_K and None always fit."""
    if top_k not in (None, DEFAULT_TOP_K) and not 1 <= top_k <= classes:
        raise InvalidParameter(f"top_k must be between 1 and {classes}, the number of classes")


def rounded(score: float) -> float:
    """Round a score of 0 to 1 to six decimals; ``round`` takes five times as long because it formats text."""
    return int(score * 1e6 + 0.5) / 1e6
