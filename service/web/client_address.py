"""The address of the client behind trusted proxies."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from service.observability.request_record import Scope
from service.settings import SettingsError

# RFC 7239, section 4: a name, and a quoted string or a token; or a quote that is never closed. One step for each character.
_PAIR = re.compile(r'(?<![^\s=;,"])([^\s=;,"]+)=(?:"((?:[^"\\]|\\.)*)"|([^",;\s]*))|(")')
_MAX_HOPS = 32  # proxies that a request passes
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
        """Set ``scope.client`` to the last address in the headers that is no proxy's, if a trusted proxy sent them.

        A proxy that writes one of the headers may pass on the other as its client made it up: two clients are none.
        """
        if scope.client is None or not self._trusts(scope.client):
            return
        lines = [(name, value.decode("latin-1")) for name, value in scope.headers if name in (b"x-forwarded-for", b"forwarded")]
        plain = [hop for name, value in lines if name != b"forwarded" for hop in value.split(",") if hop.strip()]
        pairs = [pair for name, value in lines if name == b"forwarded" for pair in _PAIR.findall(value)]
        tagged = [quoted or token for name, quoted, token, unclosed in pairs if unclosed or name.lower() == "for"]
        clients = {self._client(scope.client, hops) for hops in (plain, tagged) if hops}
        if len(clients) == 1:
            scope.client = clients.pop()

    def _client(self, proxy: str, hops: Sequence[str]) -> str:
        for hop in hops[: -_MAX_HOPS - 1 : -1]:
            match = _PORT.match(hop.strip())
            address = (match[1] or match[2]) if match else hop.strip()
            if (parsed := _parsed(address)) is None:  # "unknown", an obfuscated name, nonsense: the proxy knows no better
                break
            proxy = str(parsed)
            if not self._trusts(proxy):
                break
        return proxy

    def _trusts(self, address: str) -> bool:
        parsed = _parsed(address)
        return parsed is not None and any(parsed in network for network in self._networks)


def caller_at(address: str | None) -> str:
    """Return what stands for whoever has this address: of IPv6 its first 64 bits, since one caller has all the others."""
    parsed = _parsed(address or "")
    return str(ipaddress.IPv6Address(int(parsed) >> 64 << 64)) if isinstance(parsed, ipaddress.IPv6Address) else str(parsed)


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address, the IPv4 one within an IPv6 one too (RFC 4291, section 2.5.5.2); None for what is none."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return None
    return getattr(parsed, "ipv4_mapped", None) or parsed
