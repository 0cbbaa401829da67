"""Numbers: credit cards and phones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from aifactory.ingest.personal.finds import Find, words_of

if TYPE_CHECKING:
    from phonenumbers import PhoneMetadata

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
_PHONE_HINTS = words_of(
    "fon phon foon fax tel tél tlf mob móv mov cel port handy ruf gsm what sms hotl dial call ring text reach contact "
    "电话 手机 電話 携帯 тел моб"
)
_EXTENSION = re.compile(r",? ?(?:ext\.?|extension|x) ?[0-9]{1,6}(?!\w)", re.IGNORECASE)
# Where numbers are written with a leading 0, and where they are looked up after a word for a phone.
_TRUNK_REGIONS = words_of(
    "GB DE FR AU AT CH NL BE SE FI IE NZ ZA IT JP KR TW TR IN PK NG KE EG IL UA RO BG HR RS SI SK MY TH VN ID PH"
)
_REGIONS = (
    *_TRUNK_REGIONS,
    *words_of("US CN ES PT PL CZ HU GR DK NO MX BR AR CL CO PE RU SG HK AE SA IS EE LV LT LU"),
)


def run_end(read: str, at: int) -> int:
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


def find_numbers(read: str, at: int) -> Iterator[Find]:
    end = run_end(read, at)
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
