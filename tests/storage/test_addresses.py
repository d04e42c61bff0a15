"""Inner addresses are told from public ones however they are written."""

from __future__ import annotations

import socket

import pytest

from wsi_mmm.storage.addresses import checked_socket, kind_of, kinds_of


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("93.184.216.34", ""), ("2606:2800:220:1:248:1893:25c8:1946", ""), ("::ffff:93.184.216.34", ""),
        ("127.0.0.1", "loopback"), ("127.9.9.9", "loopback"), ("2130706433", "loopback"), ("0x7f000001", "loopback"),
        ("0177.0.0.1", "loopback"), ("127.1", "loopback"), ("0.0.0.0", "loopback"), ("::1", "loopback"),
        ("::", "loopback"), ("::ffff:127.0.0.1", "loopback"), ("::ffff:7f00:1", "loopback"),
        ("::127.0.0.1", "loopback"),
        ("64:ff9b::127.0.0.1", "loopback"), ("2002:7f00:1::", "loopback"),
        ("169.254.169.254", "link-local"), ("2852039166", "link-local"), ("::ffff:169.254.169.254", "link-local"),
        ("64:ff9b::a9fe:a9fe", "link-local"), ("2002:a9fe:a9fe::", "link-local"), ("fe80::1", "link-local"),
        ("fd00:ec2::254", "key service"), ("100.100.100.200", "key service"), ("168.63.129.16", "key service"),
        ("10.1.2.3", "private"), ("172.16.0.1", "private"), ("192.168.1.1", "private"), ("100.64.0.1", "private"),
        ("fd12::1", "private"), ("224.0.0.1", "private"), ("255.255.255.255", "private"), ("no address", "unknown"),
    ],
)  # fmt: skip
def test_every_way_of_writing_an_address_has_its_kind(address: str, kind: str) -> None:
    """Decimal, octal, hexadecimal and short IPv4; IPv4 mapped, compatible, translated and tunnelled in IPv6."""
    assert kind_of(address) == kind


def test_a_name_has_the_kinds_of_all_its_addresses() -> None:
    """The machine's own name is loopback; a name without address has none."""
    assert kinds_of("localhost") == {"loopback"}
    assert kinds_of("2130706433") == {"loopback"}
    assert kinds_of("no-such-host.invalid") == frozenset()


def test_a_socket_is_opened_for_allowed_addresses_only() -> None:
    """Whatever a name was when it was looked up: what is connected to counts."""
    place = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 80))
    with pytest.raises(ConnectionRefusedError, match="loopback"):
        checked_socket(frozenset(), place)
    with pytest.raises(ConnectionRefusedError, match="loopback"):
        checked_socket(frozenset({"private"}), place)
    checked_socket(frozenset({"loopback"}), place).close()
