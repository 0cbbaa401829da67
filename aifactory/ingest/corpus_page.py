"""The page of a corpus: what came in, what each rule took and what is left, for a person who has a minute.

In       the figures of a corpus (see `pipeline`)
Out      report.html: one file that asks for nothing else, without a script, and whose policy forbids both
Law      the bytes depend on the name and the figures alone. Every number on the page is one of the figures, or adds them up.
         Everything that comes from data goes through `escaped`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from aifactory.ingest.charts import Series, histogram, horizontal_bars, share_bar
from aifactory.ingest.page_style import STYLE
from aifactory.ingest.page_text import binary_size, count, counted, cut, escaped, megabytes, share, shown
from aifactory.ingest.rule_words import DECISION_RULES, TRUST_RULES, rule_words
from aifactory.ingest.stages import Stage, stages

REPORT_FILE = "report.html"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_COUNTED_BY_ALL = frozenset({"step", "rows_in", "rows_kept", "rows_rejected", "changed", "agreement"})
_MOST_BARS = 12
_MOST_RULES = 5
_LABEL_CHARS = 24
_KINDS = {
    "email": "e-mail address",
    "phone": "phone number",
    "ip": "IP address",
    "credit_card": "credit card number",
    "iban": "bank account (IBAN)",
    "secret": "key or password",
    "name": "name of a person",
}


def corpus_report(name: str, figures: Mapping[str, Any]) -> bytes:
    """The page of the corpus of the factory `name`, from the corpus's figures, as UTF-8."""
    sections = (
        _headline(name, figures),
        _what_was_taken(figures),
        _what_is_left(figures),
        _agreement(figures),
        _trust(figures),
        _duplicates(figures),
        _personal(figures),
        _how_to_go_on(figures),
    )
    return page_of(f"Corpus of {escaped(name)}", sections)


def page_of(title: str, sections: Iterable[str | None], *, style: str = STYLE) -> bytes:
    """A page that stands alone, asks for nothing and runs nothing, as UTF-8; the title is escaped, what is empty left out."""
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<link rel="icon" href="data:,">\n'
        f"<style>{style}</style>\n</head>\n<body>\n" + "\n".join(filter(None, sections)) + "\n</body>\n</html>\n"
    )
    return page.encode()


def _step_notes(step: Mapping[str, Any]) -> Iterator[str]:
    """What a step did beside taking rows."""
    if not step:
        return
    if step.get("changed"):
        yield f"changed {counted(step['changed'], 'row')}"
    if step["step"] != "personal":
        for name, number in sorted(step.items()):
            if name not in _COUNTED_BY_ALL and isinstance(number, int | float) and number:
                yield f"{shown(name).replace('_', ' ')}: {number:,}"
        labels = step.get("labels")
        if isinstance(labels, Mapping):
            yield f"labelled {counted(sum(labels.values()), 'row')}"
    elif masked := sum(_masked(step).values()):
        yield f"masked {counted(masked, 'find')}"


def _masked(step: Mapping[str, Any]) -> dict[str, int]:
    """What a step that masks personal data found, by kind."""
    return {kind: number for kind, number in step.items() if kind not in _COUNTED_BY_ALL}


def _masked_by_kind(figures: Mapping[str, Any]) -> dict[str, int] | None:
    """The same over all steps, most first; None if none of them looked."""
    steps = [_masked(step) for step in figures["steps"] if step["step"] == "personal"]
    if not steps:
        return None
    kinds = {kind: sum(step.get(kind, 0) for step in steps) for kind in sorted(set().union(*steps))}
    return dict(sorted(kinds.items(), key=lambda item: (-item[1], item[0])))


# ── the first screen ──────────────────────────────────────────────────────────────────────────────────────────────────


def _headline(name: str, figures: Mapping[str, Any]) -> str:
    rows_in, kept, rejected = (figures[f"rows_{each}"] for each in ("in", "kept", "rejected"))
    holdout, erased = figures["rows_holdout"], figures["rows_erased"]
    files, sources = counted(figures["source_files"], "file"), counted(len(figures["sources"]), "source")
    tiles = [
        ("rows came in", count(rows_in), f"{files} of {sources}", ""),
        ("kept", count(kept), share(kept, rows_in), "kept"),
        ("rejected", count(rejected), share(rejected, rows_in), "rejected"),
        ("held out", count(holdout), f"{share(holdout, kept)} of the kept, never train", ""),
        ("text kept", megabytes(figures["bytes_kept"]), f"{megabytes(figures['bytes_kept'] / max(kept, 1))} a row", ""),
    ]
    if erased:
        tiles.append(("erased", count(erased), "on request, without a trace of their text", ""))
    if copies := sum(figures["rejected_by_rule"].get(rule, 0) for rule in DECISION_RULES):
        tiles.append(("duplicates and leaks", count(copies), f"{share(copies, rows_in)}, among the rejected", ""))
    masked = _masked_by_kind(figures)
    if masked is not None:
        rows = sum(step.get("changed", 0) for step in figures["steps"] if step["step"] == "personal")
        tiles.append(("personal data masked", count(sum(masked.values())), f"finds in {counted(rows, 'row')}", ""))
    numbers = "".join(
        f'<div class="{tone}"><dt>{label}</dt><dd class="number">{number}</dd><dd class="beside">{beside}</dd></div>'
        for label, number, beside, tone in tiles
    )
    taken = max(stages(figures), key=lambda stage: stage.taken)
    most = (
        f" Most of them went at {escaped(taken.name.replace('_', ' '))}."
        if rejected and taken.taken * 2 > rejected
        else ""
    )
    rest = "none was rejected" if not rejected else f"{count(rejected)} {'was' if rejected == 1 else 'were'} rejected"
    return (
        f'<header>\n<p class="eyebrow">Corpus of <bdi>{escaped(name)}</bdi></p>\n'
        f"<h1>{count(kept)} of {counted(rows_in, 'row')} {'was' if kept == 1 else 'were'} kept, {rest}.{most}</h1>\n"
        f'<dl class="numbers">{numbers}</dl>\n{_whole(figures)}</header>'
    )


def _whole(figures: Mapping[str, Any]) -> str:
    """All rows as one bar, by what became of them."""
    rows_in, holdout = figures["rows_in"], figures["rows_holdout"]
    rows = (figures["rows_kept"] - holdout, holdout, figures["rows_rejected"])
    words = (("kept", "to train on"), ("held", "held out"), ("taken", "rejected"))
    parts = [(tone, said, number) for (tone, said), number in zip(words, rows, strict=True) if number]
    if not parts:
        return ""
    bar = share_bar(
        [
            Series(tone=tone, values=[number], written=[""], said=[f"{said}: {counted(number, 'row')}"])
            for tone, said, number in parts
        ],
        title=f"Of {counted(rows_in, 'row')}: "
        + ", ".join(f"{share(number, rows_in)} {said}" for _, said, number in parts),
    )
    key = "".join(f'<li class="{tone}">{said} {share(number, rows_in)}</li>' for tone, said, number in parts)
    return f'<div class="whole">{bar}<ul class="key">{key}</ul></div>\n'


# ── what was taken ────────────────────────────────────────────────────────────────────────────────────────────────────


def _what_was_taken(figures: Mapping[str, Any]) -> str:
    if not figures["rows_rejected"]:
        return ""
    found = stages(figures)
    labels = [cut(shown(stage.name).replace("_", " "), _LABEL_CHARS) for stage in found]
    stays = [stage.rows_in - stage.taken for stage in found]
    fall = horizontal_bars(
        labels,
        [
            Series(
                tone="rest",
                values=stays,
                written=[""] * len(found),
                said=[f"after {label}: {counted(rows, 'row')} left" for label, rows in zip(labels, stays, strict=True)],
            ),
            Series(
                tone="taken",
                values=[stage.taken for stage in found],
                written=[f"−{count(stage.taken)}" if stage.taken else "0" for stage in found],
                said=[f"{label}: {counted(s.taken, 'row')} taken" for label, s in zip(labels, found, strict=True)],
            ),
        ],
        title="Rows left after each step, and what it took: "
        + ", ".join(f"{label} {count(stage.taken)}" for label, stage in zip(labels, found, strict=True)),
    )
    greatest = max(figures["rejected_by_rule"].values())
    lists = "\n".join(
        _stage(stage, figures, greatest)
        for stage in found
        if stage.taken or stage.rules or any(_step_notes(stage.figures))
    )
    return (
        '<section id="rules">\n<h2>What each step took</h2>\n'
        '<p class="soft">From the top down: the rows that are left after each step, and in the accent those that it took. '
        "A row goes by the first rule that it breaks.</p>\n"
        f'<div class="grid"><figure>{fall}</figure>{_most(figures, found)}</div>\n{lists}\n</section>'
    )


def _most(figures: Mapping[str, Any], found: Sequence[Stage]) -> str:
    """The rules that took most, in words."""
    rules = [(rows, rule, rule_words(rule, stage.step)) for stage in found for rule, rows in stage.rules.items()]
    first = sorted(rules, key=lambda each: (-each[0], each[1]))[:_MOST_RULES]
    lines = "".join(
        f"<li><b>{share(rows, figures['rows_in'])}</b> {escaped(words) or f'<code>{escaped(rule)}</code>'}</li>"
        for rows, rule, words in first
    )
    return (
        f'<div><h3>What took most</h3><ol class="most">{lines}</ol><p class="soft" style="margin-top:.75rem">Of the '
        f"{counted(figures['rows_in'], 'row')} that came in. Below is every rule; open one to see rows that it took.</p></div>"
    )


def _stage(stage: Stage, figures: Mapping[str, Any], greatest: int) -> str:
    took = f"took {counted(stage.taken, 'row')}" if stage.taken else "took nothing"
    notes = ", ".join([took, *_step_notes(stage.figures)])
    rules = "\n".join(_rule(rule, rows, stage, figures, greatest) for rule, rows in stage.rules.items())
    return (
        f'<div class="stage"><header><h3>{escaped(stage.name.replace("_", " "))}</h3><b>{escaped(notes)}</b></header>'
        f'<p class="soft">{escaped(stage.words)}</p>\n{rules}</div>'
    )


def _rule(rule: str, rows: int, stage: Stage, figures: Mapping[str, Any], greatest: int) -> str:
    examples = "".join(map(_example, figures["examples"].get(rule, ())))
    row = _rule_row(rule, rule_words(rule, stage.step), rows, rows / greatest, figures["rows_in"])
    if not examples:
        return f'<div class="rule">{row}</div>'
    return f'<details class="rule"><summary>{row}</summary>{examples}</details>'


def _rule_row(rule: str, words: str, rows: int, length: float, rows_in: int) -> str:
    """A line of the list of rules; its bar has that share of the longest one's length."""
    step, dot, name = shown(rule).rpartition(".")
    named = f'<span class="of">{escaped(step + dot)}</span><wbr>{escaped(name)}'
    return (
        f'<code class="name">{named}</code><span class="words">{escaped(words)}</span>'
        f'<span class="bar" aria-hidden="true"><span style="width:{100 * length:.2f}%"></span></span>'
        f'<span class="number">{count(rows)}</span><span class="percent">{share(rows, rows_in)}</span>'
    )


def _example(row: Mapping[str, Any]) -> str:
    where = f"{row['source']}:{row['origin']}:{row['position']}"
    return (
        f'<figure class="example"><figcaption><bdi>{escaped(where)}</bdi> · score {row["score"]:.6g} · '
        f'<bdi>{escaped(row["detail"])}</bdi></figcaption><pre dir="auto">\n{escaped(row["text"], keep=chr(10) + chr(9))}'
        f"</pre></figure>"
    )


# ── what is left ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _what_is_left(figures: Mapping[str, Any]) -> str:
    pictures = [_lengths(figures), _sources(figures), _languages(figures), _labels(figures)]
    return (
        '<section id="kept">\n<h2>What is left</h2>\n'
        f'<div class="grid">\n{chr(10).join(filter(None, pictures))}\n</div>\n</section>'
        if any(pictures)
        else ""
    )


def _lengths(figures: Mapping[str, Any]) -> str:
    lengths = {int(least): rows for least, rows in figures["lengths"].items()}
    if not lengths:
        return ""
    least, most = min(lengths), max(lengths)
    bins = [least << i for i in range((most // least).bit_length())]
    rows = [lengths.get(size, 0) for size in bins]
    total = sum(rows)
    middle = next(size for i, size in enumerate(bins) if 2 * sum(rows[: i + 1]) >= total)
    picture = histogram(
        [binary_size(size) for size in bins],
        Series(
            tone="kept",
            values=rows,
            written=[count(number) if number == max(rows) else "" for number in rows],
            said=[
                f"{binary_size(size)} up to {binary_size(2 * size)}: {counted(number, 'row')}, {share(number, total)}"
                for size, number in zip(bins, rows, strict=True)
            ],
        ),
        title=f"How many rows have which length, from {binary_size(least)} to {binary_size(2 * most)}",
        every=1 + len(bins) // 7,
    )
    said = f"Each bar is the rows from its length up to twice that. The middle row has {binary_size(middle)} to {binary_size(2 * middle)}."
    return _figure("Length", said, picture)


def _languages(figures: Mapping[str, Any]) -> str:
    return _counts_figure("Language", figures["languages"], "row", "As the step for languages named them (ISO 639-1).")


def _labels(figures: Mapping[str, Any]) -> str:
    labelled = share(sum(figures["labels"].values()), figures["rows_kept"])
    return _counts_figure("Label", figures["labels"], "row", f"{labelled} of the kept rows have a label.")


def _sources(figures: Mapping[str, Any]) -> str:
    sources = figures["sources"]
    if len(sources) < 2:
        return ""
    totals = {name: each["kept"] + each["rejected"] for name, each in sources.items()}
    names = sorted(totals, key=lambda name: (-totals[name], name))
    shares, more = names[:_MOST_BARS], names[_MOST_BARS:]
    table = {name: (sources[name]["kept"], sources[name]["rejected"]) for name in shares}
    if more:
        table[f"{len(more)} more"] = (sum(sources[n]["kept"] for n in more), sum(sources[n]["rejected"] for n in more))
    labels = [cut(shown(name), _LABEL_CHARS) for name in table]
    kept, rejected = ([each[at] for each in table.values()] for at in (0, 1))
    picture = horizontal_bars(
        labels,
        [
            Series(tone="rest", values=kept, written=[""] * len(kept), said=_said(labels, kept, "kept")),
            Series(
                tone="taken",
                values=rejected,
                written=[share(lost, stays + lost) for stays, lost in zip(kept, rejected, strict=True)],
                said=_said(labels, rejected, "rejected"),
            ),
        ],
        title="Rows of each source, kept and rejected: "
        + ", ".join(f"{n} {count(a)} and {count(b)}" for n, a, b in zip(labels, kept, rejected, strict=True)),
    )
    return _figure("Source", "Rows kept, and in the accent those rejected, with their share of the source's.", picture)


def _said(labels: Iterable[str], rows: Iterable[int], what: str) -> list[str]:
    return [f"{label}: {counted(number, 'row')} {what}" for label, number in zip(labels, rows, strict=True)]


def _counts_figure(title: str, counts: Mapping[str, int], noun: str, said: str, tone: str = "kept") -> str:
    """Bars of the commonest values, the rest as one."""
    if not counts:
        return ""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shares, more = ordered[:_MOST_BARS], ordered[_MOST_BARS:]
    if more:
        shares.append((f"{len(more)} more", sum(number for _, number in more)))
    labels = [cut(shown(value), _LABEL_CHARS) for value, _ in shares]
    rows = [number for _, number in shares]
    total = sum(rows)
    written = [f"{count(number)} · {share(number, total)}" for number in rows]
    spoken = [f"{label}: {counted(number, noun)}" for label, number in zip(labels, rows, strict=True)]
    picture = horizontal_bars(
        labels, [Series(tone=tone, values=rows, written=written, said=spoken)], title=f"{title}: " + ", ".join(spoken)
    )
    return _figure(title, said, picture)


def _figure(title: str, said: str, picture: str) -> str:
    head = f"<h3>{title}</h3><figcaption>{said}</figcaption>" if said else ""
    return f"<figure>{head}{picture}</figure>"


# ── agreement, duplicates, personal data ─────────────────────────────────────────────────────────────────────────────────


def _agreement(figures: Mapping[str, Any]) -> str:
    """A table of how far labels of the same rows agree; what a step does not say of them is left open."""
    found = list(_agreements(figures))
    if not found:
        return ""
    lines = "".join(
        f'<tr><th scope="row">{escaped(step.replace("_", " "))}</th><td class="number">{count(said["rows"])}</td>'
        f'<td class="number">{share(said["same"], said["rows"])}</td><td class="number">{_kappa(said.get("kappa"))}</td></tr>'
        for step, said in found
    )
    heads = "".join(f'<th scope="col" class="number">{head}</th>' for head in ("rows", "same", "kappa"))
    return (
        '<section id="agreement">\n<h2>Labels agree</h2>\n'
        '<p class="soft">Where a row had a label before a step gave it one: how often both say the same. Cohen’s kappa '
        "takes off what chance would give: 1 is always, 0 is chance.</p>\n"
        f'<table><thead><tr><th scope="col">step</th>{heads}</tr></thead><tbody>{lines}</tbody></table>\n</section>'
    )


def _agreements(figures: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What each step says of two labels of the same rows: rows, same, kappa."""
    for step in figures["steps"]:
        found = step.get("agreement")
        if isinstance(found, Mapping) and found.get("rows"):
            yield step["step"], found


def _kappa(kappa: float | None) -> str:
    return "–" if kappa is None else f"{kappa:.3f}".replace("-", "−")


def _duplicates(figures: Mapping[str, Any]) -> str:
    found = {rule: figures["rejected_by_rule"][rule] for rule in DECISION_RULES if rule in figures["rejected_by_rule"]}
    if not found:
        return ""
    most, rows_in = max(found.values()), figures["rows_in"]
    lines = "\n".join(
        f'<div class="rule">{_rule_row(rule, DECISION_RULES[rule], rows, rows / most, rows_in)}</div>'
        for rule, rows in found.items()
    )
    return (
        '<section id="duplicates">\n<h2>Duplicates and leaks</h2>\n'
        '<p class="soft">What is there twice is kept once, and what releases are judged on never trains. The ledger names '
        f'for each of these rows the one that it is like.</p>\n<div class="stage">\n{lines}\n</div>\n</section>'
    )


def _trust(figures: Mapping[str, Any]) -> str:
    """What of the feedback was not believed; nothing where all was."""
    trust = figures.get("trust") or {}
    found = {rule: number for rule, number in figures["rejected_by_rule"].items() if rule in TRUST_RULES}
    if not (found or trust.get("attacks")):
        return ""
    most, rows_in = max(found.values(), default=1), figures["rows_in"]
    lines = "\n".join(
        f'<div class="rule">{_rule_row(rule, TRUST_RULES[rule], rows, rows / most, rows_in)}</div>'
        for rule, rows in found.items()
    )
    attacks = "".join(f"<li>{escaped(shown(attack))}</li>" for attack in trust.get("attacks", ()))
    return (
        '<section id="trust">\n<h2>Feedback that is not believed</h2>\n'
        f'<p class="soft">Of {counted(trust.get("users", 0), "user")}. What one user or key gives is capped, and whoever '
        f"disagrees with the others far more often than is usual is not learnt from.</p>\n<ul>{attacks}</ul>\n"
        f'<div class="stage">\n{lines}\n</div>\n</section>'
    )


def _personal(figures: Mapping[str, Any]) -> str:
    masked = _masked_by_kind(figures)
    if not masked or not any(masked.values()):
        return ""
    kinds = {_KINDS.get(kind, kind): number for kind, number in masked.items() if number}
    total = counted(sum(kinds.values()), "find")
    picture = _counts_figure("Personal data by kind", kinds, "find", "", tone="taken")
    return (
        '<section id="personal">\n<h2>Personal data</h2>\n'
        f'<p class="soft">{total}, each replaced by the name of its kind, such as &lt;EMAIL&gt;. What was found is shown '
        f'nowhere on this page.</p>\n<div class="grid">\n{picture}\n</div>\n</section>'
    )


def _how_to_go_on(figures: Mapping[str, Any]) -> str:
    rejected = (
        "<p>All rejected rows: <code>aifactory rejected CONFIG --rule RULE</code>. To bring those of a rule back in the "
        "next cycle: <code>aifactory restore CONFIG --rule RULE</code>.</p>"
        if figures["rows_rejected"]
        else ""
    )
    return (
        "<footer>\n<p>This folder opens with <code>datasets.load_dataset(folder)</code>; README.md says what its columns "
        f"are.</p>\n{rejected}\n</footer>"
    )
