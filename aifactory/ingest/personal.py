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

import ipaddress
import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from aifactory.errors import ConfigError
from aifactory.text.buffers import text_buffers

if TYPE_CHECKING:
    from phonenumbers import PhoneMetadata

Kind = Literal["email", "phone", "ip", "credit_card", "iban", "secret", "name"]

# From the most to the least specific: where finds overlap the first one stays.
_ORDER: tuple[Kind, ...] = ("secret", "iban", "credit_card", "email", "ip", "phone", "name")
PLACEHOLDERS: dict[Kind, str] = {kind: f"<{kind.upper()}>" for kind in _ORDER}
_PLACEHOLDER = re.compile("|".join(PLACEHOLDERS.values()))


@dataclass(frozen=True, slots=True, order=True)
class Find:
    """Personal data at text[start:end], characters."""

    start: int
    end: int
    kind: Kind


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
    persons = _persons(names_model) if "name" in kinds else None
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
    persons = None if names_model is None else _persons(names_model)
    return next((finds for _, _, finds in _finds(pa.array([text], pa.large_string()), persons)), [])


def _replaced(text: str, finds: list[Find]) -> str:
    parts = []
    at = 0
    for find in finds:
        parts += [text[at : find.start], PLACEHOLDERS[find.kind]]
        at = find.end
    return "".join([*parts, text[at:]])


Persons = Callable[[str], list[Find]]


def _finds(texts: pa.Array, persons: Persons | None) -> Iterator[tuple[int, str, list[Find]]]:
    """Row, text and finds of the rows that may have any."""
    data_B, offsets_N1 = text_buffers(texts)
    row_A, at_A, mark_A = _marks(data_B, offsets_N1)
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


# ── places where a find may be ────────────────────────────────────────────────────────────────────────────────────────

_AT, _NUMBER, _QUAD, _HEXES, _ACCOUNT, _FORM, _ASSIGNED, _URL = range(8)

_OTHER, _AT_SIGN, _DIGIT, _COLON, _EQUALS, _JOINT, _LETTER = range(7)
_CLASSES = np.zeros(256, np.uint8)
_CLASSES[ord("@")] = _AT_SIGN
_CLASSES[list(b"0123456789")] = _DIGIT
_CLASSES[ord(":")] = _COLON
_CLASSES[ord("=")] = _EQUALS
_CLASSES[list(b"_-")] = _JOINT
_CLASSES[list(b"ASBJwW/")] = _LETTER

# What a byte can be part of.
_WORD, _HEX, _SPACER, _ENDS_NAME, _ENDS_HEAD = 1, 2, 4, 8, 16
_PARTS = np.zeros(256, np.uint8)
_PARTS[[i for i in range(128) if chr(i).isalnum() or chr(i) == "_"]] |= _WORD
_PARTS[list(b"0123456789abcdefABCDEF")] |= _HEX
_PARTS[list(b" .-()/")] |= _SPACER


def _words(listed: str) -> tuple[str, ...]:
    return tuple(listed.split())


def _packed(words: Sequence[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    raw = [word.encode() for word in words]
    return np.frombuffer(b"".join(raw), np.uint8).copy(), np.cumsum([0, *map(len, raw)])


# How the forms of secrets begin, up to a _ or -.
_HEAD_WORDS = _words(
    "ghp gho ghu ghs ghr github_pat sk rk whsec hf npm dop_v1 doo_v1 dor_v1 glpat pypi GOCSPX xapp "
    "xoxa xoxb xoxe xoxo xoxp xoxr xoxs"
)
_HEADS = _packed(_HEAD_WORDS)
_PARTS[[ord(head[-1]) for head in _HEAD_WORDS]] |= _ENDS_HEAD
_PASSWORDS = (*_words("password passwd passwort passphrase pwd pass contraseña senha"), "mot de passe")
_KEYS = _words(
    "secret token apikey api_key api-key accesskey access_key access-key privatekey private_key private-key secretkey "
    "secret_key secret-key signing_key signingkey encryption_key encryptionkey auth_key authkey account_key accountkey "
    "credential credentials _auth"
)
_NAMES = _packed([*_PASSWORDS, *_KEYS])
_PARTS[[ord(name[-1]) for name in (*_PASSWORDS, *_KEYS)]] |= _ENDS_NAME
_PARTS[[ord(name[-1].upper()) for name in (*_PASSWORDS, *_KEYS)]] |= _ENDS_NAME


def _marks(
    data_B: npt.NDArray[np.uint8], offsets_N1: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Row, byte and mark of the places, in order."""
    room = 1024 + len(data_B) // 128
    while True:
        row_A, at_A = np.empty(room, np.int64), np.empty(room, np.int64)
        mark_A = np.empty(room, np.uint8)
        count = _mark(data_B, offsets_N1, _CLASSES, _PARTS, *_HEADS, *_NAMES, row_A, at_A, mark_A)
        if count <= room:
            return row_A[:count], at_A[:count], mark_A[:count]
        room = count


@numba.njit(cache=True, nogil=True)
def _mark(
    data_B: Any,
    offsets_N1: Any,
    class_256: Any,
    parts_256: Any,
    heads: Any,
    heads_at: Any,
    names: Any,
    names_at: Any,
    row_A: Any,
    at_A: Any,
    mark_A: Any,
) -> int:
    """Writes the places as far as there is room, and returns how many there are."""
    count = 0
    for row in range(len(offsets_N1) - 1):
        begin, end = offsets_N1[row], offsets_N1[row + 1]
        number_end = begin
        hexes_end = begin
        i = begin - 1
        while i + 1 < end:
            i += 1
            while i < end and class_256[data_B[i]] == 0:
                i += 1
            if i == end:
                break
            kind = class_256[data_B[i]]
            mark = -1
            other = -1
            if kind == 1:  # @
                if i > begin and i + 1 < end:
                    before, after = data_B[i - 1], data_B[i + 1]
                    if (parts_256[before] & 1 or before >= 0x80 or before == 0x2D or before == 0x2B) and (
                        parts_256[after] & 1 or after >= 0x80
                    ):
                        mark = 0
            elif kind == 2:  # digit
                if i < number_end:
                    continue
                digits, dots, gaps, spacers, wide, last = 0, 0, 0, 0, 0, i
                j = i
                while j < end:
                    byte = data_B[j]
                    if 0x30 <= byte <= 0x39:
                        if j > last + 1:
                            gaps += 1
                            if j == last + 2 and data_B[j - 1] == 0x2E:
                                dots += 1
                        digits += 1
                        spacers, wide, last = 0, 0, j
                    elif parts_256[byte] & 4:
                        spacers += 1
                        if spacers > 2:
                            break
                    elif byte >= 0x80:
                        wide += 1
                        if wide > 3:
                            break
                    else:
                        break
                    j += 1
                number_end = last + 1
                if digits >= 7 and (gaps or _begins(data_B, begin, i, parts_256)):
                    mark = 1
                if dots >= 3:
                    other = 2
                if (
                    i >= begin + 2
                    and i + 1 < end
                    and 0x41 <= data_B[i - 1] <= 0x5A
                    and 0x41 <= data_B[i - 2] <= 0x5A
                    and 0x30 <= data_B[i + 1] <= 0x39
                    and _begins(data_B, begin, i - 2, parts_256)
                ):
                    if count < len(row_A):
                        row_A[count], at_A[count], mark_A[count] = row, i - 2, 4
                    count += 1
            elif kind == 3 or kind == 4:  # : =
                if kind == 3 and i + 2 < end and data_B[i + 1] == 0x2F and data_B[i + 2] == 0x2F:
                    colon = False
                    for j in range(i + 3, min(end, i + 400)):
                        byte = data_B[j]
                        if byte == 0x3A:
                            colon = True
                        elif byte == 0x40:
                            if colon:
                                mark = 7
                            break
                        elif byte <= 0x22 or byte == 0x2F or byte == 0x5C:
                            break
                else:
                    # Back over spaces, quotes and brackets to the name.
                    j = i - 1
                    while j >= begin and j > i - 6:
                        byte = data_B[j]
                        if not (
                            byte == 0x20 or byte == 0x22 or byte == 0x27 or byte == 0x5C or byte == 0x5D or byte == 0x3D
                        ):
                            break
                        j -= 1
                    if (
                        j >= begin
                        and parts_256[data_B[j]] & 8
                        and _ends_in(data_B, begin, j + 1, names, names_at, parts_256, True)
                    ):
                        mark = 6
                if kind == 3 and i >= hexes_end:
                    first, stop = i, i + 1
                    while first > begin and (parts_256[data_B[first - 1]] & 2 or data_B[first - 1] == 0x3A):
                        first -= 1
                    colons, double = 0, False
                    stop = first
                    while stop < end and (parts_256[data_B[stop]] & 2 or data_B[stop] == 0x3A):
                        if data_B[stop] == 0x3A:
                            colons += 1
                            double = double or (stop + 1 < end and data_B[stop + 1] == 0x3A)
                        stop += 1
                    hexes_end = stop
                    # A colon before it may end a name.
                    single = data_B[first] == 0x3A and first + 1 < end and data_B[first + 1] != 0x3A
                    alone = single or _begins(data_B, begin, first, parts_256)
                    if (double or colons >= 7) and stop - first > colons + 1 and alone:
                        if count < len(row_A):
                            row_A[count], at_A[count], mark_A[count] = row, first, 3
                        count += 1
                    if i > begin and i + 35 < end and data_B[i + 1] == 0x41 and data_B[i + 2] == 0x41:
                        other = 5
            elif kind == 5:  # _ -
                # -----BEGIN, or the head of a form.
                pem = data_B[i] == 0x2D and i + 10 < end and data_B[i + 5] == 0x42 and data_B[i + 9] == 0x4E
                before = data_B[i - 1] if i > begin else 0
                if pem or (parts_256[before] & 16 and _ends_in(data_B, begin, i, heads, heads_at, parts_256, False)):
                    mark = 5
            else:
                byte = data_B[i]
                if i + 7 >= end:
                    continue
                b1, b2, b3, b4 = data_B[i + 1], data_B[i + 2], data_B[i + 3], data_B[i + 4]
                if byte == 0x41:  # AKIA, ASIA, ABIA, AIza
                    if (b1 == 0x49 and b2 == 0x7A and b3 == 0x61) or (b2 == 0x49 and b3 == 0x41):
                        mark = 5
                elif byte == 0x53:  # SG.
                    if b1 == 0x47 and b2 == 0x2E:
                        mark = 5
                elif byte == 0x42:  # Bearer, Basic
                    if (b1 == 0x65 and b2 == 0x61 and b3 == 0x72) or (b1 == 0x61 and b2 == 0x73 and b3 == 0x69):
                        mark = 5
                elif byte == 0x4A:  # eyJ
                    if i >= begin + 2 and data_B[i - 1] == 0x79 and data_B[i - 2] == 0x65:
                        mark = 5
                elif byte == 0x2F:  # /services/T
                    if b1 == 0x54 and i >= begin + 8 and data_B[i - 1] == 0x73 and data_B[i - 8] == 0x73:
                        mark = 5
                else:  # password is
                    if (
                        (b1 | 0x20) == 0x6F
                        and (b2 | 0x20) == 0x72
                        and ((b3 | 0x20) == 0x64 or (b3 | 0x20) == 0x74)
                        and b4 == 0x20
                        and data_B[i + 5] == 0x69
                        and data_B[i + 6] == 0x73
                    ):
                        mark = 5
            if mark >= 0:
                if count < len(row_A):
                    row_A[count], at_A[count], mark_A[count] = row, i, mark
                count += 1
            if other >= 0:
                if count < len(row_A):
                    row_A[count], at_A[count], mark_A[count] = row, i, other
                count += 1
    return count


@numba.njit(cache=True, nogil=True)
def _begins(data_B: Any, begin: int, i: int, parts_256: Any) -> bool:
    """Whether a word may begin at i: after no part of a word, or after one that is an escape's."""
    if i <= begin or not parts_256[data_B[i - 1]] & 1:
        return True
    return (i >= begin + 2 and data_B[i - 2] == 0x5C) or (i >= begin + 6 and data_B[i - 6] == 0x5C)


@numba.njit(cache=True, nogil=True)
def _ends_in(data_B: Any, begin: int, stop: int, words: Any, words_at: Any, parts_256: Any, any_case: bool) -> bool:
    """Whether one of the words stands right before `stop`: in any case and after anything, or as it is and alone."""
    if stop <= begin:
        return False
    for w in range(len(words_at) - 1):
        size = words_at[w + 1] - words_at[w]
        if stop - size < begin:
            continue
        same = True
        for k in range(1, size + 1):
            byte = data_B[stop - k]
            if any_case and 0x41 <= byte <= 0x5A:
                byte |= 0x20
            if byte != words[words_at[w + 1] - k]:
                same = False
                break
        if same and (any_case or _begins(data_B, begin, stop - size, parts_256)):
            return True
    return False


# ── e-mail ────────────────────────────────────────────────────────────────────────────────────────────────────────────

_L = r"A-Za-z0-9À-ÖØ-öø-ɏ"
_LOCAL = re.compile(rf"[{_L}_+](?:[{_L}_+-]|\.(?=[{_L}_+-])|(?<=[oOdD])'(?=[A-Za-z]))*\Z")
_DOMAIN = re.compile(rf"(?:[{_L}](?:[{_L}-]{{0,61}}[{_L}])?\.)+(?:[A-Za-z]{{2,24}}|xn--[a-z0-9-]{{2,40}})(?![{_L}_-])")
# Domains of two letters are countries' (ISO 3166-1, and eu, uk, su, ac); of the generic ones those that people have
# addresses in.
_COUNTRIES = frozenset(
    _words(
        "ac ad ae af ag ai al am ao aq ar as at au aw ax az ba bb bd be bf bg bh bi bj bm bn bo br bs bt bw by bz ca cc cd "
        "cf cg ch ci ck cl cm cn co cr cu cv cw cx cy cz de dj dk dm do dz ec ee eg er es et eu fi fj fk fm fo fr ga gd ge "
        "gf gg gh gi gl gm gn gp gq gr gs gt gu gw gy hk hm hn hr ht hu id ie il im in io iq ir is it je jm jo jp ke kg kh "
        "ki km kn kp kr kw ky kz la lb lc li lk lr ls lt lu lv ly ma mc md me mg mh mk ml mm mn mo mp mq mr ms mt mu mv mw "
        "mx my mz na nc ne nf ng ni nl no np nr nu nz om pa pe pf pg ph pk pl pm pn pr ps pt pw py qa re ro rs ru rw sa sb "
        "sc sd se sg sh si sk sl sm sn so sr ss st su sv sx sy sz tc td tf tg th tj tk tl tm tn to tr tt tv tw tz ua ug uk "
        "us uy uz va vc ve vg vi vn vu wf ws ye yt za zm zw"
    )
)
_GENERIC = frozenset(
    _words(
        "com org net edu gov mil int info biz name pro mobi aero asia cat coop jobs museum post tel travel xxx academy "
        "accountants agency app art associates attorney bank berlin best bio blog boutique brussels build business cafe "
        "capital care careers center charity church city claims clinic cloud club coach codes coffee community company "
        "computer construction consulting contractors cool dental dentist design dev digital direct doctor education email "
        "energy engineer engineering enterprises events exchange expert family farm finance financial fit foundation fr "
        "fun fund gallery games gmbh golf group guide guru hamburg health help holdings hospital host hotel house icu "
        "immo inc industries institute insurance international investments kaufen koeln land law lawyer legal lgbt life "
        "limited link live llc loan london love ltd management market marketing media medical moe money network news ngo "
        "ninja nyc one online ooo org page paris partners photo photography pizza plus press productions properties pub "
        "realty recipes restaurant reviews rocks sale school science scot security services shop site social software "
        "solutions space sport store studio style support swiss systems team tech technology tips tirol tokyo tools top "
        "tours training university vet ventures vip wales website wien wiki work works world wtf xyz yoga zone"
    )
)


_TOP_DOMAINS = _COUNTRIES | _GENERIC


def _emails(read: str, at: int) -> Iterator[Find]:
    local = _LOCAL.search(read, max(0, at - 64), at)
    domain = _DOMAIN.match(read, at + 1, at + 256)
    if local is None or domain is None or read.startswith("://", max(0, local.start() - 3)):
        return
    end = domain.end()
    while True:
        # After a full stop the next sentence may have begun without a space.
        host, _, top = read[at + 1 : end].rpartition(".")
        if not host:
            return
        if top.lower().startswith("xn--") or ((top.islower() or top.isupper()) and top.lower() in _TOP_DOMAINS):
            break
        end = at + 1 + len(host)
    after = read[end : end + 2]
    if after[:1] != "(" and not (after[:1] == ":" and (after[1:].isalpha() or after[1:] in ("/", "~"))):
        yield Find(local.start(), end, "email")


# ── numbers: cards and phones ─────────────────────────────────────────────────────────────────────────────────────────

_GAP = " .\\-/()\u00a0\u2010\u2011\u2013\u202f"
_TIME = re.compile(r"(?:19|20)\d\d([-./])\d\d?\1\d\d?(?:[ ]\d\d?)?|\d\d?([-./])\d\d?\2(?:19|20)\d\d(?:[ ]\d\d?)?")
_DATE = re.compile(r"(?:19|20)\d\d([-./])\d\d?\1\d\d?(?!\d)|\d\d?([-./])\d\d?\2(?:19|20)\d\d(?!\d)")
# A number stands alone: it is no part of a word, of a decimal, of a path, and no amount.
_ALONE = r"(?<![\w.,/#$€£¥+\-])"
_ENDS = r"(?!\w|[-.,/:][0-9])"
_GROUPED_CARD = re.compile(
    _ALONE
    + r"(?=((?:[0-9]{4}(?P<s>[ \u00a0-])[0-9]{4}(?P=s)[0-9]{4}(?P=s)[0-9]{4}(?:(?P=s)[0-9]{3})?"
    + r"|[0-9]{4}[ \u00a0-][0-9]{6}[ \u00a0-][0-9]{4,5}|[0-9]{15,16})"
    + _ENDS
    + "))"
)
_INTERNATIONAL = re.compile(rf"(?<![\w+])(?:\+ ?|00(?=[1-9]))[1-9](?:[{_GAP}]{{0,3}}[0-9]){{6,16}}(?![0-9])")
_AMERICAN = re.compile(
    _ALONE + r"(?:1[-. ])?(?:\([2-9][0-9]{2}\)[ -]?[2-9][0-9]{2}[-. ]|[2-9][0-9]{2}(?P<s>[-.])[2-9][0-9]{2}(?P=s))"
    r"[0-9]{4}" + _ENDS
)
_TRUNK = re.compile(_ALONE + rf"\(?0[0-9]{{1,5}}\)?(?:[{_GAP}]{{1,3}}[0-9]{{2,8}}){{1,5}}" + _ENDS)
_ANY_PHONE = re.compile(_ALONE + rf"\(?[0-9](?:[{_GAP}]{{0,2}}[0-9]){{6,13}}" + _ENDS)
_PHONE_WORD = re.compile(
    r"(?:\b(?:tele)?(?:phone|fon|fono|fax|foon)s?|\btéléphone|\bteléfono|\bphonenumber|\btel|\btlf|\bmobile?|\bmob|\bcell"
    r"|\bcellulare|\bcelular|\bm[oó]vil|\bportable|\bhandy|\brufnummer|\bgsm|\bwhatsapp|\bsms|\bhotline|\bdial"
    r"|\bcall(?: me| us| him| her)?(?: at| on)?|\b(?:ring|text)(?: me| us| him| her)(?: at| on)?"
    r"|(?:reach|contact)(?: me| us| him| her)?(?: at| on)|\bcontact number|\btelefone|电话|手机|電話|電話番号|携帯|тел|телефон|моб)"
    r"(?:[\s:：=\"'(_-]|\.(?!\d)|number|nummer|numer|no\b|nr\b|is\b|ist\b|at\b|on\b|は|の)*\Z",
    re.IGNORECASE,
)
_PHONE_HINTS = _words(
    "fon phon foon fax tel tél tlf mob móv mov cel port handy ruf gsm what sms hotl dial call ring text reach contact "
    "电话 手机 電話 携帯 тел моб"
)
_EXTENSION = re.compile(r",? ?(?:ext\.?|extension|x) ?[0-9]{1,6}(?!\w)", re.IGNORECASE)
# Where numbers are written with a leading 0, and where they are looked up after a word for a phone.
_TRUNK_REGIONS = _words(
    "GB DE FR AU AT CH NL BE SE FI IE NZ ZA IT JP KR TW TR IN PK NG KE EG IL UA RO BG HR RS SI SK MY TH VN ID PH"
)
_REGIONS = (
    *_TRUNK_REGIONS,
    *_words("US CN ES PT PL CZ HU GR DK NO MX BR AR CL CO PE RU SG HK AE SA IS EE LV LT LU"),
)


def _run_end(read: str, at: int) -> int:
    """Where the run of numbers ends that the kernel found to begin at `at`."""
    end = at
    spacers, wide = 0, 0
    for i in range(at, len(read)):
        char = read[i]
        if char in "0123456789":
            end = i + 1
            spacers, wide = 0, 0
        elif char in " .-()/":
            spacers += 1
        elif char > "\x7f":
            wide += len(char.encode())
        else:
            break
        if spacers > 2 or wide > 3:
            break
    return end


def _numbers(read: str, at: int) -> Iterator[Find]:
    end = _run_end(read, at)
    if _TIME.fullmatch(read, at, end):
        return
    for match in _GROUPED_CARD.finditer(read, at, end + 8):
        if match.start() < end and _is_card(re.sub(r"\D", "", match[1])):
            yield Find(match.start(), match.end(1), "credit_card")
    for start, stop in _phones(read, max(0, at - 3), end):
        if extension := _EXTENSION.match(read, stop):
            stop = extension.end()
        start += read[start] == "(" and ")" not in read[start:stop]
        yield Find(start, stop, "phone")


def _is_card(digits: str) -> bool:
    """Whether the digits have the Luhn checksum, and prefix and length of an issuer."""
    two, three, four, six = (int(digits[:size]) for size in (2, 3, 4, 6))
    size = len(digits)
    if two in (34, 37):
        known = size == 15
    elif digits[0] == "4":
        known = size in (16, 19)
    elif 51 <= two <= 55 or 2221 <= four <= 2720:
        known = size == 16
    elif 300 <= three <= 305 or two in (36, 38, 39):
        known = size in (14, 16)
    else:
        discover = four == 6011 or 622126 <= six <= 622925 or 644 <= three <= 649 or two in (60, 65)
        others = 3528 <= four <= 3589 or two == 62 or 2200 <= four <= 2204 or three == 508
        known = (discover or others) and 16 <= size <= 19
    # The other digits doubled from the last but one on, and their digits added.
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return known and (doubled + sum(map(int, digits[-1::-2]))) % 10 == 0


def _phones(read: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    for match in _INTERNATIONAL.finditer(read, start, end + 8):
        if match.start() >= end:
            break
        bare = re.fullmatch(r"00[0-9]+", match[0])
        if bare and not _follows_phone_word(read, match.start()):
            continue
        for stop in _shorter(match):
            digits = re.sub(r"\D", "", read[match.start() : stop].replace("(0)", "")).removeprefix("00")
            if _is_international(digits) and not re.match(r"\w", read[stop : stop + 1]):
                yield match.start(), stop
                break
    for match in _AMERICAN.finditer(read, start, end + 8):
        if _is_valid("US", re.sub(r"\D", "", match[0])[-10:]):
            yield match.span()
    for match in _TRUNK.finditer(read, start, end + 8):
        groups = re.findall(r"[0-9]+", match[0])
        if 9 <= sum(map(len, groups)) <= 12 and not _DATE.match(read, match.start()) and _is_grouped(tuple(groups)):
            yield match.span()
    for match in _ANY_PHONE.finditer(read, start, end + 8):
        if not _follows_phone_word(read, match.start()) or _DATE.match(read, match.start()):
            continue
        for stop in _shorter(match):
            digits = re.sub(r"\D", "", read[match.start() : stop])
            if len(digits) >= 7 and any(_is_valid(region, _national(region, digits)) for region in _REGIONS):
                yield match.start(), stop
                break


def _follows_phone_word(read: str, at: int) -> bool:
    before = read[max(0, at - 32) : at].lower()
    # Much faster than the pattern, which has one of these in each of its words.
    return any(hint in before for hint in _PHONE_HINTS) and _PHONE_WORD.search(before) is not None


def _shorter(match: re.Match[str]) -> Iterator[int]:
    """Where a phone number may end: at the end of the match, or before a space in it after which another number begins."""
    yield match.end()
    for gap in reversed(list(re.finditer(r"[ \u00a0\u202f](?=[0-9])", match[0]))):
        if sum(map(str.isdigit, match[0][: gap.start()])) < 7:
            return
        yield match.start() + gap.start()


@lru_cache(maxsize=512)
def _metadata(region: str) -> tuple[PhoneMetadata, re.Pattern[str]]:
    import phonenumbers

    found = phonenumbers.PhoneMetadata.metadata_for_region(region)
    assert found is not None and found.general_desc is not None, region
    return found, re.compile(found.general_desc.national_number_pattern or "")


def _national(region: str, digits: str) -> str:
    """The digits without the 0 or other prefix for calls within the country."""
    prefix = _metadata(region)[0].national_prefix
    return digits.removeprefix(prefix) if prefix and digits.startswith(prefix) else digits


def _is_valid(region: str, digits: str) -> bool:
    import phonenumbers

    metadata, general = _metadata(region)
    if not general.fullmatch(digits):
        return False
    number = phonenumbers.PhoneNumber(
        country_code=metadata.country_code,
        national_number=int(digits),
        italian_leading_zero=digits.startswith("0") or None,
    )
    return bool(phonenumbers.is_valid_number(number))


def _is_international(digits: str) -> bool:
    import phonenumbers

    try:
        return bool(phonenumbers.is_valid_number(phonenumbers.parse("+" + digits)))
    except phonenumbers.NumberParseException:
        return False


def _is_grouped(groups: tuple[str, ...]) -> bool:
    """Whether this is a number of a country that writes a leading 0, and the first group is its area code."""
    import phonenumbers

    digits = "".join(groups)
    for region in _TRUNK_REGIONS:
        national = _national(region, digits)
        if not _is_valid(region, national):
            continue
        number = phonenumbers.parse(digits, region)
        written = phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.NATIONAL)
        official = re.findall(r"[0-9]+", written)
        if len(official) > 1 and official[0] == groups[0]:
            return True
    return False


# ── IP ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

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
    for network in _words(
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 "
        "192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 "
        "203.0.113.0/24 224.0.0.0/4 240.0.0.0/4"
    )
]
_PUBLIC_6 = ipaddress.IPv6Network("2000::/3")
_SPECIAL_6 = [ipaddress.IPv6Network(network) for network in _words("2001::/23 2001:db8::/32 3fff::/20")]


def _quads(read: str, at: int) -> Iterator[Find]:
    end = _run_end(read, at)
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


def _hexes(read: str, at: int) -> Iterator[Find]:
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


# ── IBAN ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

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


def _ibans(read: str, at: int) -> Iterator[Find]:
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


# ── secrets ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_FORMS = re.compile(
    "(?:"
    + "|".join(
        (
            r"A(?:KI|SI|BI)A[A-Z2-7]{16}",
            r"gh[pousr]_[A-Za-z0-9]{36,255}",
            r"github_pat_[A-Za-z0-9_]{22,255}",
            r"glpat-[A-Za-z0-9_-]{20,64}",
            r"xox[abeoprs]-(?=[A-Za-z0-9-]*[0-9])[A-Za-z0-9-]{10,255}",
            r"xapp-[0-9]-[A-Za-z0-9-]{20,255}",
            r"[sr]k_(?:live|test)_[A-Za-z0-9_]{16,255}",
            r"whsec_[A-Za-z0-9+/]{24,255}",
            r"AIza[A-Za-z0-9_-]{35}",
            r"GOCSPX-[A-Za-z0-9_-]{28}",
            r"sk-(?=[a-z0-9_-]*[A-Z])(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{20,255}",
            r"hf_[A-Za-z0-9]{34,40}",
            r"npm_[A-Za-z0-9]{36}",
            r"pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50,255}",
            r"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}",
            r"do[opr]_v1_[0-9a-f]{64}",
            r"[0-9]{8,10}:AA[A-Za-z0-9_-]{33}",
            r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*",
        )
    )
    + ")(?![A-Za-z0-9_])"
)
_WORD_BEFORE = re.compile(r"[A-Za-z0-9_]*\Z")
_BEARER = re.compile(r"(?:Bearer |(?<=Authorization: )Basic )(?=[A-Za-z_.~+/=-]*[0-9])([A-Za-z0-9_.~+/=-]{16,})")
_PEM = re.compile(
    r"-----BEGIN ([A-Z0-9 ]{0,24}PRIVATE KEY(?: BLOCK)?)-----"
    r"(?:(?:[A-Za-z0-9+/=\s:,.()]|-(?!----))*?-----END \1-----|(?:\s*[A-Za-z0-9+/=]{16,})*)"
)
_WEBHOOK = re.compile(r"T[A-Za-z0-9_]{8,12}/B[A-Za-z0-9_]{8,12}/[A-Za-z0-9]{20,32}(?!\w)")
_SAID = re.compile(r"(?:word|wort) (?:is|ist)[ :]+[\"'`]?([^\s\"'`<>\\,;(){}\[\]]{6,128})", re.IGNORECASE)
_IN_URL = re.compile(r"://[^\s/:@\"'<>\\]{0,64}:([^\s/@\"'<>\\{}]{3,256})@(?=[A-Za-z0-9\[])")
_NAME_BEFORE = re.compile(r"([A-Za-z_][\w.-]*|mot de passe)[\"'\]\s=]*\Z")
_VALUE = re.compile(
    r"[:=]?[=>]?[ \t\n]{0,3}(?:[bru](?=[\"']))?(?:(?P<quote>[\"'`])|)(?P<value>[^\s\"'`<>\\,;(){}\[\]]{6,512})(?P<after>.?)",
    re.DOTALL,
)
# Tokens that open nothing: where a list goes on, and what a text model reads.
_OPEN_TOKENS = re.compile(
    r"(?:page|next|continuation|sync|cursor|eos|bos|pad|unk|mask|special|stop|public)[ _-]?(?:token|key|key[_-]?token)\Z"
)
_STAND_INS = re.compile(
    r"(?:your|my|the|some|example|dummy|fake|test|change|replace|insert|enter|secret|password|passwd|pass|pwd|token|xxx|"
    r"\*\*|\.\.\.|\$|%|#\{|<|u?int[0-9]|float[0-9]|bytes[0-9]|utf|sha[0-9]|md5|base64|varchar|char[0-9]|str[0-9]|null|none|"
    r"process\.env|os\.environ|self\.|this\.|config\.|settings\.|env\.|args\.|request\.)",
    re.IGNORECASE,
)
# Words and names in code, which have no run of letters and digits.
_PLAIN = re.compile(r"(?:[A-Za-z]*[0-9]{0,2}[_/.-]+)+[A-Za-z]*[0-9]{0,2}\Z")
_DOTTED = re.compile(r"[A-Za-z_]\w*(?:(?:\.|->|::)[A-Za-z_]\w*)+\Z")


def _forms(read: str, at: int) -> Iterator[Find]:
    # No head is longer than github_pat.
    word = _WORD_BEFORE.search(read, max(0, at - 12), at)
    assert word is not None
    if match := _FORMS.match(read, word.start()):
        yield Find(*match.span(), "secret")
    if read.startswith("-----BEGIN", at) and (match := _PEM.match(read, at)):
        yield Find(*match.span(), "secret")
    elif read.startswith("B", at) and (match := _BEARER.match(read, at)):
        yield Find(*match.span(1), "secret")
    elif read.startswith("/T", at) and read.startswith("hooks.slack.com/services", max(0, at - 24)):
        if match := _WEBHOOK.match(read, at + 1):
            yield Find(*match.span(), "secret")
    elif read[at : at + 1] in ("w", "W") and (match := _SAID.match(read, at)):
        value = match[1].rstrip(".?:")
        if _is_password(value) and any(map(str.isdigit, value)):
            yield Find(match.start(1), match.start(1) + len(value), "secret")


def _in_urls(read: str, at: int) -> Iterator[Find]:
    match = _IN_URL.match(read, at)
    if match and not _STAND_INS.match(match[1]) and not re.fullmatch(r"[0-9]{1,5}|[*x]+", match[1]):
        yield Find(*match.span(1), "secret")


def _assigned(read: str, at: int) -> Iterator[Find]:
    before = _NAME_BEFORE.search(read, max(0, at - 64), at)
    match = _VALUE.match(read, at + 1)
    if before is None or match is None or read.startswith("://", max(0, before.start() - 3)):
        return
    name = before[1].lower()
    value, after, quote = match["value"], match["after"], match["quote"]
    if after == "(" or after == "[" or _OPEN_TOKENS.search(read[max(0, before.start() - 16) : before.end(1)].lower()):
        return
    if name.endswith("pass") and not quote and read[at] == ":":
        return
    if not quote:
        value = re.split(r"&(?=[\w.-]+=)|\|", value)[0].rstrip(".:?")
    elif after != quote and after != "\n" and not after.isspace():
        return
    if _STAND_INS.match(value) or _DOTTED.match(value) or "..." in value:
        return
    if name.endswith(tuple(_PASSWORDS)):
        found = _is_password(value)
    else:
        found = _is_random(value)
    if found:
        yield Find(match.start("value"), match.start("value") + len(value), "secret")


def _is_password(value: str) -> bool:
    """Whether these are letters with a digit or a sign among them, as only passwords are."""
    if len(value) < 6 or _STAND_INS.match(value):
        return False
    letters = any(map(str.isalpha, value))
    digits = any(map(str.isdigit, value))
    signs = re.search(r"[!@#$%^&*+?~=]", value[:-1]) is not None
    return letters and (digits or signs)


def _is_random(value: str) -> bool:
    """Whether these are 16 letters and digits or more, of 3 bits each or more."""
    if len(value) < 16 or not re.search(r"[0-9]", value) or not re.search(r"[A-Za-z]", value) or _PLAIN.match(value):
        return False
    counts = Counter(value).values()
    entropy = -sum(n / len(value) * math.log2(n / len(value)) for n in counts)
    return entropy >= 3


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

# What pipelines of different languages call a person.
_PERSON_LABELS = {"PERSON", "PER", "PERS", "PRS", "PS", "persName", "Person"}
_NAME = re.compile(r"[^\W\d_](?:[^\W\d_]|[ .'’-])*")
_LONGEST_READ = 100_000


@lru_cache(maxsize=4)
def _persons(names_model: str) -> Persons:
    """A function from a text to the names in it."""
    advice = "install aifactory[names] and a pipeline of spaCy's with a recogniser of names, such as en_core_web_sm"
    try:
        import spacy
    except ImportError as error:
        raise ConfigError(f"expected spaCy for the step personal with kind name, found none; {advice}.") from error
    installed = sorted({point.name for point in entry_points(group="spacy_models")})
    if names_model not in installed if names_model else len(installed) != 1:
        wanted = f"the spaCy pipeline {names_model!r}" if names_model else "one installed spaCy pipeline"
        found = ", ".join(installed) or "none"
        raise ConfigError(
            f"expected {wanted} for the step personal with kind name, found {found}; {advice}, "
            f"and name it in names_model where there are several."
        )
    pipeline = spacy.load(names_model or installed[0])
    labels = {label for labels in pipeline.pipe_labels.values() for label in labels}
    if not labels & _PERSON_LABELS:
        raise ConfigError(
            f"expected a spaCy pipeline that names persons, found {names_model or installed[0]!r} "
            f"with the labels {sorted(labels)}; {advice}."
        )

    def persons(read: str) -> list[Find]:
        finds = []
        for start, piece in _pieces(read):
            # One by one: in a batch the rounding of one text's scores depends on the others.
            for entity in pipeline(piece).ents:
                name = entity.text
                first = start + entity.start_char
                is_key = read.startswith('":', first + len(name))
                if entity.label_ in _PERSON_LABELS and _NAME.fullmatch(name) and not name[0].islower() and not is_key:
                    finds.append(Find(first, first + len(name), "name"))
        return finds

    return persons


def _pieces(read: str) -> Iterator[tuple[int, str]]:
    """A text in pieces that a pipeline takes, cut at lines or spaces."""
    start = 0
    while start < len(read):
        end = min(len(read), start + _LONGEST_READ)
        if end < len(read):
            cut = max(read.rfind("\n", start, end), read.rfind(" ", start, end))
            end = cut + 1 if cut > start else end
        yield start, read[start:end]
        start = end


_FINDERS: tuple[Callable[[str, int], Iterator[Find]], ...] = (
    _emails,
    _numbers,
    _quads,
    _hexes,
    _ibans,
    _forms,
    _assigned,
    _in_urls,
)
"""By mark."""
