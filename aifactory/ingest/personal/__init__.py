"""Personal data and secrets: found in a column of texts, and masked with typed placeholders.

In       string[N] or large_string[N] without nulls.
Out      the same texts with <EMAIL>, <PHONE>, <IP>, <CREDIT_CARD>, <IBAN>, <SECRET> or <NAME> in place of each find.
Laws     A text's finds depend on that text alone, never on what else is in its block. Nothing outside a find changes.
         Masking what is masked changes nothing: a text is looked at until nothing is found in it.
         The finds of some kinds are those of all kinds, less those of the kinds that weren't asked for.
         Where finds overlap one stays: by kind in the order secret, iban, credit_card, email, ip, phone, name, and of one
         kind the longest. So an IBAN is no phone number, and the password in a URL is no part of an e-mail address.
         JSON stays JSON: an escape (\\n, \\", \\u00e9) in a text is read as white space or a quote and never cut in two,
         and no find of a string reaches over a quote.
Raises   ConfigError where `name` is asked for and there is no model for names. No text raises.

Kinds
email        An address whose top-level domain is a country's or one of the generic ones in `_GENERIC`. Not: user@host
             without a domain, user@host:path as scp and git write it, scheme://user@host, user@domain( in code.
phone        A number that `phonenumbers` holds for valid, written in one of these ways: with + or 00 and a country
             code; as North Americans do, (212) 555-0123 or 212-555-0123 or with dots; with a leading 0, in groups of
             which the first is the area code; or in any way after a word such as phone, Tel., Handy or 电话. Digits
             alone without such a word are no phone number. ASCII digits.
ip           Versions 4 and 6, public addresses only: loopback, private, link-local, shared, multicast, reserved and
             documentation addresses (IANA's special-purpose registries, RFC 6890) name nobody and stay, and so do
             networks (a prefix length after an address without host bits). Four numbers of six digits in all or fewer
             (1.2.3.4, 2.5.29.14; two in a thousand public addresses) without a port or a word such as host, and those
             after a word or mark of a version, section or product (version 22.1.30.4, ==1.2.30.4, Chrome/91.0.4.120,
             client-21.14.0.35), are taken for versions.
credit_card  13 to 19 digits with the Luhn checksum (ISO/IEC 7812-1, annex B), the prefix and length of an issuer, and
             the groups that are printed on cards; without groups 15 or 16 digits. One in ten of other numbers that
             look like this has the checksum too.
iban         ISO 13616: country, its length, checksum modulo 97; in capitals, without or with spaces after each four.
secret       Keys of AWS, GitHub, GitLab, Slack, Stripe, Google, OpenAI, Anthropic, Hugging Face, npm, PyPI, SendGrid,
             DigitalOcean and Telegram by their forms; JSON Web Tokens (RFC 7519); private keys (PEM, RFC 7468);
             bearer tokens; passwords in URLs; and values assigned to a name that ends in password, secret, token,
             api_key and the like, if they look like one: for passwords letters with a digit or a sign, for the others 16
             characters or more of letters and digits with 3 bits of entropy each. Hashes and UUIDs elsewhere stay.
name         Persons that an installed spaCy pipeline names. Slow (it reads every text).

How      One pass of a compiled kernel over Arrow's bytes marks the few places where a find may be (an @ between letters, seven
         digits, a name of a secret before an = …); regular expressions and checksums look at these places alone.

Measured on the 298 texts of tests/ingest/personal_labelled.jsonl, 156 of them without a find and hard to leave alone,
all invented by the author of this file before it was written; it was changed after a look at the seen two thirds alone.
A find is right if its kind and both its ends are. The sample is small: one error in 10 is a tenth.

               seen                          held back
kind           labels  precision  recall     labels  precision  recall
email              18      1.000   0.944         10      1.000   1.000
phone              25      1.000   1.000         13      1.000   0.923
ip                 15      1.000   1.000          9      1.000   1.000
credit_card        12      1.000   1.000          5      1.000   1.000
iban               12      1.000   1.000          7      1.000   1.000
secret             21      1.000   1.000         10      1.000   1.000

Known to be missed: addresses spelt out (anna at example dot org), numbers in other digits than ASCII's, national phone
numbers without groups or a word before them. Known to be masked: numbers of sections and versions of four parts and
seven digits or more without such a word, and of random 16 digits with an issuer's prefix one in ten.

Import this module where it is needed: numba takes its time.

Legend   N texts, B bytes of all of them, A marked places.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aifactory.ingest.personal.addresses import find_hexes, find_quads
from aifactory.ingest.personal.emails import find_emails
from aifactory.ingest.personal.finds import Find, Kind
from aifactory.ingest.personal.ibans import find_ibans
from aifactory.ingest.personal.marks import mark_places
from aifactory.ingest.personal.names import Persons, names_in
from aifactory.ingest.personal.numbers import find_numbers
from aifactory.ingest.personal.secrets import find_assigned, find_forms, find_in_urls
from aifactory.text.buffers import text_buffers

__all__ = ["PLACEHOLDERS", "Find", "Kind", "Masked", "find_personal", "mask_personal"]

# From the most to the least specific: where finds overlap the first one stays.
_ORDER: tuple[Kind, ...] = ("secret", "iban", "credit_card", "email", "ip", "phone", "name")
PLACEHOLDERS: dict[Kind, str] = {kind: f"<{kind.upper()}>" for kind in _ORDER}
_PLACEHOLDER = re.compile("|".join(PLACEHOLDERS.values()))


@dataclass(frozen=True, slots=True)
class Masked:
    """N texts, masked."""

    texts: pa.Array
    """Of the type that came in; the very array that came in where nothing was found."""
    counts: dict[Kind, int]
    """By kind, for each that was asked for, how many finds were masked."""


def mask_personal(texts: pa.Array, kinds: Sequence[Kind], *, names_model: str = "") -> Masked:
    """The texts with a placeholder for each find of one of `kinds`.

    names_model   the installed spaCy pipeline that finds names; "": the only one that is installed.
    """
    counts: Counter[Kind] = Counter(dict.fromkeys(kinds, 0))
    persons = names_in(names_model) if "name" in kinds else None
    masked: dict[int, str] = {}
    rows, column = np.arange(len(texts)), texts
    while len(rows):
        # What was masked is looked at again, since a placeholder may end what kept its neighbour from being found.
        again = []
        for i, text, finds in _finds(column, persons):
            finds = [find for find in finds if find.kind in counts]
            if finds:
                again.append(i)
                counts.update(find.kind for find in finds)
                masked[int(rows[i])] = _replaced(text, finds)
        rows = rows[again]
        column = pa.array([masked[row] for row in rows.tolist()], texts.type)
    if not masked:
        return Masked(texts, dict(counts))
    changed_N = np.zeros(len(texts), np.bool_)
    changed_N[list(masked)] = True
    values = pa.array([masked[row] for row in sorted(masked)], texts.type)
    return Masked(pc.replace_with_mask(texts, pa.array(changed_N), values), dict(counts))


def find_personal(text: str, *, names_model: str | None = None) -> list[Find]:
    """What is found in one text, in order, without overlaps; names only where a model is named ("": the only one)."""
    persons = None if names_model is None else names_in(names_model)
    return next((finds for _, _, finds in _finds(pa.array([text], pa.large_string()), persons)), [])


def _replaced(text: str, finds: list[Find]) -> str:
    parts = []
    at = 0
    for find in finds:
        parts += [text[at : find.start], PLACEHOLDERS[find.kind]]
        at = find.end
    return "".join([*parts, text[at:]])


def _finds(texts: pa.Array, persons: Persons | None) -> Iterator[tuple[int, str, list[Find]]]:
    """Row, text and finds of the rows that may have any."""
    data_B, offsets_N1 = text_buffers(texts)
    row_A, at_A, mark_A = mark_places(data_B, offsets_N1)
    bounds_N1 = np.searchsorted(row_A, np.arange(len(texts) + 1))
    rows = np.arange(len(texts)) if persons is not None else np.unique(row_A)
    for row in rows.tolist():
        raw = data_B[offsets_N1[row] : offsets_N1[row + 1]]
        text = raw.tobytes().decode()
        here = slice(bounds_N1[row], bounds_N1[row + 1])
        places = at_A[here] - offsets_N1[row]
        if len(text) != len(raw):
            # From bytes to characters: less those bytes before it that continue one.
            places = places - np.searchsorted(np.flatnonzero((raw & 0xC0) == 0x80), places)
        read = _without_escapes(text)
        finds = [
            find
            for at, mark in zip(places.tolist(), mark_A[here].tolist(), strict=True)
            for find in _FINDERS[mark](read, at)
        ]
        if persons is not None:
            finds += persons(read)
        yield row, text, _apart(text, finds) if finds else finds


def _apart(text: str, finds: list[Find]) -> list[Find]:
    """The finds that stay, in order: none overlaps another one or a placeholder."""
    taken = [match.span() for match in _PLACEHOLDER.finditer(text)]
    stay: list[Find] = []
    for find in sorted(set(finds), key=lambda f: (_ORDER.index(f.kind), f.start - f.end, f.start)):
        after = bisect_left(taken, (find.start, find.end))
        is_free = after == 0 or taken[after - 1][1] <= find.start
        if is_free and (after == len(taken) or find.end <= taken[after][0]):
            taken.insert(after, (find.start, find.end))
            stay.append(find)
    return sorted(stay)


_ESCAPE = re.compile(r'\\(?:u[0-9a-fA-F]{4}|[bfnrt"\\/])')


def _without_escapes(text: str) -> str:
    """The text, as long as it was, with white space for JSON's escapes, so that \\n before a word is no part of it."""
    if "\\" not in text:
        return text
    return _ESCAPE.sub(lambda match: ' "' if match[0] == '\\"' else "\n" * len(match[0]), text)


_FINDERS: tuple[Callable[[str, int], Iterator[Find]], ...] = (
    find_emails,
    find_numbers,
    find_quads,
    find_hexes,
    find_ibans,
    find_forms,
    find_assigned,
    find_in_urls,
)
"""By mark."""
