"""Secrets: keys by their forms, private keys, and what is assigned to a name that says so."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from aifactory.ingest.personal.finds import Find
from aifactory.ingest.personal.marks import PASSWORDS

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


def find_forms(read: str, at: int) -> Iterator[Find]:
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


def find_in_urls(read: str, at: int) -> Iterator[Find]:
    match = _IN_URL.match(read, at)
    if match and not _STAND_INS.match(match[1]) and not re.fullmatch(r"[0-9]{1,5}|[*x]+", match[1]):
        yield Find(*match.span(1), "secret")


def find_assigned(read: str, at: int) -> Iterator[Find]:
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
    if name.endswith(tuple(PASSWORDS)):
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
