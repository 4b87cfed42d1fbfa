"""TLS: whether a certificate is configured, and whether it can be used."""

from __future__ import annotations

import ssl

from service.settings import Settings, SettingsError


def open_tls(settings: Settings) -> ssl.SSLContext | None:
    """Return what serves the certificate of ``settings``, None without one; raise SettingsError where it cannot be served."""
    if settings.tls_certificate is None:
        if settings.tls_key is not None:
            raise SettingsError("tls_key is set and tls_certificate is not; set both or neither")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_certificate, settings.tls_key)
    except OSError as error:  # SSLError is one
        raise SettingsError(f"cannot use the TLS certificate {settings.tls_certificate}: {error}") from error
    return context
