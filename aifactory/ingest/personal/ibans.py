"""IBANs (ISO 13616)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from aifactory.ingest.personal.finds import Find

# Characters of an IBAN by country (SWIFT, IBAN Registry).
_IBAN_LENGTHS = {
    code: int(size)
    for size, codes in {
        "15": "NO", "16": "BE", "18": "DK FI FO GL NL SD", "19": "MK SI", "20": "AT BA EE KZ LT LU MN XK", "21": "CH CR HR LI LV",
        "22": "BG BH DE GB GE IE ME RS VA", "23": "AE GI IL IQ OM SO TL", "24": "AD CZ ES MD PK RO SA SE SK TN VG", "25": "LY PT ST",
        "26": "IS TR", "27": "BI DJ FR GR IT MC MR SM", "28": "AL AZ BY CY DO GT HN HU LB NI PL SV", "29": "BR EG PS QA UA",
        "30": "JO KW MU YE", "31": "MT SC", "32": "LC", "33": "RU",
    }.items()
    for code in codes.split()
}  # fmt: skip
_IBAN = re.compile(r"[A-Z]{2}[0-9]{2}(?:[A-Z0-9]{11,30}|(?:[ \u00a0][A-Z0-9]{4}){2,7}(?:[ \u00a0][A-Z0-9]{1,4})?)")


def find_ibans(read: str, at: int) -> Iterator[Find]:
    match = _IBAN.match(read, at)
    size = _IBAN_LENGTHS.get(read[at : at + 2])
    if match is None or size is None or re.match(r"\w", read[at - 1 : at] if at else ""):
        return
    # What follows may look like one more group.
    length = size if match[0][4] not in " \u00a0" else size + (size - 1) // 4
    written = match[0][:length]
    iban = re.sub(r"\W", "", written)
    if len(iban) != size or re.match(r"\w", read[at + length : at + length + 1]):
        return
    if int("".join(str(int(char, 36)) for char in iban[4:] + iban[:4])) % 97 == 1:
        yield Find(at, at + length, "iban")
