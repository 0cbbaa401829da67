"""E-mail addresses."""

from __future__ import annotations

import re
from collections.abc import Iterator

from aifactory.ingest.personal.finds import Find, words_of

_L = r"A-Za-z0-9À-ÖØ-öø-ɏ"
_LOCAL = re.compile(rf"[{_L}_+](?:[{_L}_+-]|\.(?=[{_L}_+-])|(?<=[oOdD])'(?=[A-Za-z]))*\Z")
_DOMAIN = re.compile(rf"(?:[{_L}](?:[{_L}-]{{0,61}}[{_L}])?\.)+(?:[A-Za-z]{{2,24}}|xn--[a-z0-9-]{{2,40}})(?![{_L}_-])")
# Domains of two letters are countries' (ISO 3166-1, and eu, uk, su, ac); of the generic ones those that people have
# addresses in.
_COUNTRIES = frozenset(
    words_of(
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
    words_of(
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


def find_emails(read: str, at: int) -> Iterator[Find]:
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
