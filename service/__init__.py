"""The prediction service; its programs are ``python -m service`` and ``python -m service predict``."""

__version__ = "0.1.0"
