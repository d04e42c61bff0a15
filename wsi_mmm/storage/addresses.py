"""Kinds of network addresses: public ones, and inner ones, which answer only who is inside."""

from __future__ import annotations

import socket
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

Kinds = frozenset[str]
"""Kinds of inner addresses; empty for public ones."""

# Services that give machines of a cloud their keys, where they are not link-local: AWS over IPv6, Alibaba, Azure.
_KEY_SERVICES = frozenset(map(ip_address, ("fd00:ec2::254", "100.100.100.200", "168.63.129.16")))
_NAT64 = ip_network("64:ff9b::/96")  # the last 32 bits are an IPv4 address


def kind_of(address: str) -> str:
    """Return the kind of an inner address ('loopback', 'link-local', 'key service', 'private'), '' for a public one.

    Any way of writing that a connection accepts: IPv4 as one number, octal or hexadecimal, and within IPv6.
    """
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        number = _embedded_address(ip_address(str(found[0][4][0]).partition("%")[0]))
    except (OSError, ValueError):
        return "unknown"
    if number in _KEY_SERVICES:
        return "key service"
    if number.is_loopback or number.is_unspecified:  # 0.0.0.0 connects to this machine
        return "loopback"
    if number.is_link_local:
        return "link-local"
    return "" if number.is_global and not number.is_multicast else "private"


def _embedded_address(number: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """Return the IPv4 address that an IPv6 one stands for (mapped, compatible, 6to4, Teredo, NAT64), or itself."""
    if isinstance(number, IPv4Address):
        return number
    if number in _NAT64 or (int(number) >> 32 == 0 and int(number) > 1):
        return IPv4Address(int(number) & 0xFFFFFFFF)
    return number.ipv4_mapped or number.sixtofour or (number.teredo[1] if number.teredo else number)


@lru_cache(maxsize=256)
def kinds_of(host: str) -> Kinds:
    """Return the kinds of inner addresses that a host name, or an address, stands for; empty when it has none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return frozenset()  # connecting to it says so
    return frozenset(kind for entry in found if (kind := kind_of(str(entry[4][0]))))


def checked_socket(inner: Kinds, place: tuple[Any, ...]) -> socket.socket:
    """Return a socket for ``place`` (family, type, protocol, name, address). OSError unless public or of ``inner``."""
    family, kind, protocol, _, address = place
    found = kind_of(str(address[0]))
    if found and found not in inner:
        raise ConnectionRefusedError(f"a redirect to an inner address ({found}) is not followed")
    opened = socket.socket(family=family, type=kind, proto=protocol)
    opened.setblocking(False)
    return opened
