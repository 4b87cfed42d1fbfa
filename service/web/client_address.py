"""The address of the client behind trusted proxies."""

from __future__ import annotations

import ipaddress
import re

from service.observability.request_record import Scope
from service.settings import SettingsError

_FORWARDED_FOR = re.compile(r'(?:^|[;,\s])for="?(\[[^\]]*\]|[^",;\s]*)', re.IGNORECASE)  # RFC 7239, section 4
_PORT = re.compile(r"^(?:\[(.+?)\]|([^:]+))(?::\w+)?$")


class TrustedProxies:
    """Believes ``X-Forwarded-For`` and ``Forwarded`` of ``proxies``, comma-separated addresses and networks.

    Raises SettingsError for what is neither.
    """

    def __init__(self, proxies: str) -> None:
        try:
            self._networks = [ipaddress.ip_network(proxy.strip()) for proxy in proxies.split(",") if proxy.strip()]
        except ValueError as error:
            raise SettingsError(f"trusted_proxies: {error}; write addresses and networks such as 10.0.0.0/8") from error

    def find_client(self, scope: Scope) -> None:
        """Set ``scope.client`` to the last address in the headers that is no proxy's, if a trusted proxy sent them."""
        if not self._trusts(scope.client):
            return
        forwarded = [value.decode("latin-1") for name, value in scope.headers if name == b"x-forwarded-for"]
        hops = ",".join(forwarded).split(",")
        if not forwarded:
            values = (value.decode("latin-1") for name, value in scope.headers if name == b"forwarded")
            hops = [hop for value in values for hop in _FORWARDED_FOR.findall(value)]
        for hop in reversed(hops):
            match = _PORT.match(hop.strip())
            address = (match[1] or match[2]) if match else hop.strip()
            if (parsed := _parsed(address)) is None:  # "unknown", an obfuscated name, nonsense: the proxy knows no better
                return
            scope.client = str(parsed)
            if not self._trusts(scope.client):
                return

    def _trusts(self, address: str | None) -> bool:
        parsed = _parsed(address or "")
        return parsed is not None and any(parsed in network for network in self._networks)


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address, the IPv4 one within an IPv6 one too (RFC 4291, section 2.5.5.2); None for what is none."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return None
    return getattr(parsed, "ipv4_mapped", None) or parsed
