"""IP addresses."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from aifactory.ingest.personal.finds import Find, words_of
from aifactory.ingest.personal.numbers import run_end

_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_FOUR_OCTETS = re.compile(rf"(?<![\w.])({_OCTET})\.({_OCTET})\.({_OCTET})\.({_OCTET})(?!\w|\.\w|-[A-Za-z])")
_BEHIND = re.compile(r"(?:[:#][0-9]{1,5}\b)?(?:/([0-9]{1,3})\b)?")
_OF_VERSION = re.compile(
    r"(?:(?:(?<![A-Za-z])(?:v|ver|rel|releases?|rev|revision|builds?|firmware|driver|patch|sections?|sec|chapters?"
    r"|figures?|fig|tables?|clauses?|articles?|oid|schema|kapitel|abschnitt)|versions?)[\W_]{0,8}v?|§ ?"
    r"|(?:upgrad|updat|downgrad)\w*\b[^.\n]{0,30}|[=<>~!^]=\s?[\"']?|[A-Za-z][-_])\Z",
    re.IGNORECASE,
)
_OF_HOST = re.compile(
    r"(?:\bip|\bipv4|addr|address|forwarded-for|\bpeer|client|remote|host)[\W_]{1,6}\Z", re.IGNORECASE
)
_OF_PRODUCT = re.compile(r"[A-Za-z]/\Z")
# Addresses that name no one host of the public network: IANA's special-purpose registries, multicast and reserved.
_SPECIAL_4 = [
    ipaddress.IPv4Network(network)
    for network in words_of(
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 "
        "192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 "
        "203.0.113.0/24 224.0.0.0/4 240.0.0.0/4"
    )
]
_PUBLIC_6 = ipaddress.IPv6Network("2000::/3")
_SPECIAL_6 = [ipaddress.IPv6Network(network) for network in words_of("2001::/23 2001:db8::/32 3fff::/20")]


def find_quads(read: str, at: int) -> Iterator[Find]:
    end = run_end(read, at)
    for match in _FOUR_OCTETS.finditer(read, at, end + 2):
        if match.end() > end:
            break
        behind = _BEHIND.match(read, match.end())
        assert behind is not None
        port = read.startswith((":", "#"), match.end()) and behind.end() > match.end()
        few = len(match[0]) <= 9 and not _OF_HOST.search(read, max(0, match.start() - 24), match.start())
        if few and not port:
            continue
        if _OF_VERSION.search(read, max(0, match.start() - 40), match.start()):
            continue
        if _OF_PRODUCT.search(read, max(0, match.start() - 2), match.start()) and not port:
            continue
        address = ipaddress.IPv4Address(match[0])
        prefix = int(behind[1] or 32)
        is_network = prefix < 32 and int(address) % (1 << (32 - prefix)) == 0
        if not is_network and not any(address in network for network in _SPECIAL_4):
            yield Find(match.start(), match.end(), "ip")


_HEX_GROUPS = re.compile(r"[0-9A-Fa-f:]+")


def find_hexes(read: str, at: int) -> Iterator[Find]:
    match = _HEX_GROUPS.match(read, at)
    if match is None or len(match[0]) > 48:
        return
    start, end = match.span()
    # A colon by itself belongs to the words before or after.
    start += match[0].startswith(":") and not match[0].startswith("::")
    end -= match[0].endswith(":") and not match[0].endswith("::")
    if re.match(r"\w", read[start - 1 : start] or " ") or re.match(r"\w", read[end : end + 1] or " "):
        return
    try:
        address = ipaddress.IPv6Address(read[start:end])
    except ValueError:
        return
    prefix = re.compile(r"/([0-9]{1,3})\b").match(read, end)
    bits = min(128, int(prefix[1])) if prefix else 128
    is_network = bits < 128 and int(address) % (1 << (128 - bits)) == 0
    if address in _PUBLIC_6 and not is_network and not any(address in network for network in _SPECIAL_6):
        yield Find(start, end, "ip")
