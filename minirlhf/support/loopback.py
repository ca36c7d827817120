"""Whether a request is meant for a server on this machine: its Host header, checked against DNS rebinding."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def is_ours(asked: str, host: str) -> bool:
    """Whether a request with the Host header `asked` may be meant for a server bound to `host`.

    A page elsewhere can point a name of its own at any address, but cannot take the address itself: beyond
    loopback, literal addresses are accepted as well.
    """
    try:
        name = urlsplit(f"//{asked}").hostname or ""
        return (
            is_loopback(name)
            or name == host.strip("[]")
            or (not is_loopback(host) and bool(ipaddress.ip_address(name)))
        )
    except ValueError:
        return False
