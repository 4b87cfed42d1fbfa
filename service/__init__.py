"""The prediction service; its programs are ``python -m service`` and ``python -m service predict``.

``from service import Classifier`` is the model in one's own process, see ``service.predict.classifier``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.predict.classifier import Classifier

__version__ = "0.1.0"
__all__ = ["Classifier", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Classifier":  # only when it is asked for: the service's processes do not need what it imports
        from service.predict.classifier import Classifier

        return Classifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
