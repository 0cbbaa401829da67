"""The page of a cycle: what came in, what was trained, what got better and worse, and why it was decided so.

In       the story of a cycle (`explain`)
Out      one HTML file that asks for nothing else, without a script, and whose policy forbids both
Law      every number on the page is one of the story's, or adds them up. Everything that comes from data goes through `escaped`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from aifactory.ingest.charts import Series, horizontal_bars, share_bar
from aifactory.ingest.corpus_page import page_of
from aifactory.ingest.page_style import STYLE
from aifactory.ingest.page_text import count, counted, cut, escaped, share, shown
from aifactory.ingest.rule_words import rule_words, step_of
from aifactory.proof.cycle_charts import Whisker, curve, intervals
from aifactory.proof.explain import SETS, CycleStory, ScoreStory, interval

_LABEL_CHARS = 22
_MOST_BARS = 12
_STAGES = {"ingested": "ingest", "tokenized": "tokenize", "trained": "train", "evaluated": "evaluate"}
_SOURCES = {
    "estimate": "estimated: CPUs × seconds × watts per CPU by configuration",
    "nvml": "measured: counters of the GPUs of the driver’s node (NVML)",
    "rapl": "measured: counters of the processors of the driver’s node (RAPL)",
}
CYCLE_STYLE = """
.chart.drawn .guide { stroke: var(--line); stroke-width: 1; }
.chart.drawn .guide.zero { stroke: var(--soft); }
.chart.drawn .tick { fill: var(--soft); text-anchor: middle; }
.chart.drawn .tick.side { text-anchor: end; }
.chart.drawn .curve { fill: none; stroke: var(--kept); stroke-width: 2; stroke-linejoin: round; }
.chart .whisker line { stroke-width: 3; stroke-linecap: round; }
.chart .whisker.kept { fill: var(--kept); stroke: var(--kept); }
.chart .whisker.held { fill: var(--held); stroke: var(--held); }
.chart .whisker.taken { fill: var(--taken); stroke: var(--taken); }
.checks { margin: 1.25rem 0 0; padding: 0; list-style: none; max-width: 52rem; }
.checks li { display: grid; grid-template-columns: 5rem minmax(0, 1fr); gap: 0 1rem; padding: .4375rem 0; border-bottom: 1px solid var(--line); }
.checks b { font-weight: 600; }
.checks .failed b { color: var(--accent-text); }
.key .rest::before { background: var(--rest); }
table.wide { max-width: 52rem; }
@media (max-width: 44rem) { .checks li { grid-template-columns: 4rem minmax(0, 1fr); gap: 0 .5rem; } }
"""


def cycle_page(story: CycleStory) -> bytes:
    """The page of a cycle, as UTF-8."""
    sections = (
        _headline(story),
        _came_in(story),
        _rejected(story),
        _trained(story),
        _found(story),
        _decided(story),
        _cost(story),
        _how_to_go_on(story),
    )
    return page_of(f"Cycle {story.number} of {escaped(story.factory)}", sections, style=f"{STYLE}{CYCLE_STYLE}")


# ── the first screen ──────────────────────────────────────────────────────────────────────────────────────────────────


def _headline(story: CycleStory) -> str:
    new = [corpus for corpus in story.corpora if corpus.is_new]
    kept, rejected = (sum(getattr(corpus, name) for corpus in new) for name in ("rows_kept", "rows_rejected"))
    judged = next((score for score in story.scores if score.change is not None), None)
    given = len(story.batches)
    batches = f"{count(given)} {'batch' if given == 1 else 'batches'} of feedback"
    tiles = [
        ("rows came in", count(kept + rejected), batches, ""),
        ("rejected", count(rejected), share(rejected, kept + rejected), "rejected" if rejected else ""),
    ]
    chosen = next((each for each in story.trainings if each.is_chosen), None)
    if chosen is not None:
        tiles.append(("tokens trained on", count(chosen.tokens), f"{counted(chosen.steps, 'step')}", ""))
    if judged is not None and judged.change is not None:
        found = judged.change["estimate"]
        tiles.append(
            (f"change on {judged.set}", f"{found:+.3f}".replace("-", "−"), "bits per byte, less is better", "")
        )
    elif story.scores:
        estimate = f"{story.scores[0].candidate['estimate']:.3f}"
        tiles.append((f"on {story.scores[0].set}", estimate, "bits per byte, less is better", ""))
    tiles.append(
        (
            "energy",
            f"{story.joules:,.0f} J",
            f"{story.seconds:,.0f} s in the stages ({escaped(story.joules_source)})",
            "",
        )
    )
    numbers = "".join(
        f'<div class="{tone}"><dt>{escaped(label)}</dt><dd class="number">{number}</dd><dd class="beside">{beside}</dd></div>'
        for label, number, beside, tone in tiles
    )
    when = datetime.fromtimestamp(story.opened_at, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f'<header>\n<p class="eyebrow">Cycle {story.number} of <bdi>{escaped(story.factory)}</bdi>, begun {when}</p>\n'
        f"<h1>{_said(story)}</h1>\n"
        f'<p class="soft">{escaped(story.trigger)}: {escaped("; ".join(story.why_begun))}</p>\n'
        f'<dl class="numbers">{numbers}</dl>\n</header>'
    )


def _said(story: CycleStory) -> str:
    verdicts = [f"{_VERDICTS[score.verdict]} on {score.set}" for score in story.scores if score.change is not None]
    found = f" It is {' and '.join(verdicts)}." if verdicts else ""
    match story.state:
        case "promoted":
            return f"The candidate became the release {escaped(story.release or '')}.{found}"
        case "trial":
            return f"The candidate is on trial as the release {escaped(story.release or '')}.{found}"
        case "rejected" if story.release is not None:
            return f"The candidate was withdrawn from its trial as the release {escaped(story.release)}.{found}"
        case "rejected":
            failed = [reason for reason in story.reasons if reason.startswith("failed")]
            return f"The candidate was rejected by {counted(len(failed), 'check')} of the gate.{found}"
        case "failed":
            return f"The cycle failed after {counted(max(1, len(story.failed_attempts)), 'attempt')}."
        case _:
            return "The cycle is running."


_VERDICTS = {"better": "better", "worse": "worse", "no difference found": "not found to differ"}


# ── what came in, what was rejected ───────────────────────────────────────────────────────────────────────────────────


def _came_in(story: CycleStory) -> str:
    if not story.corpora:
        return ""
    labels, trained, held, rejected = [], [], [], []
    for corpus in story.corpora:
        of = "feedback" if corpus.batch is not None else ", ".join(corpus.sources) or corpus.id
        labels.append(cut(shown(of if corpus.is_new else f"{of} (before)"), _LABEL_CHARS))
        trained.append(corpus.rows_kept - corpus.rows_holdout)
        held.append(corpus.rows_holdout)
        rejected.append(corpus.rows_rejected if corpus.is_new else 0)
    parts = (("kept", "to train on", trained), ("held", "held out", held), ("taken", "rejected", rejected))
    series = [
        Series(
            tone=tone,
            values=values,
            written=[count(sum(row)) if tone == "taken" else "" for row in zip(trained, held, rejected, strict=True)],
            said=[f"{label}: {counted(number, 'row')} {said}" for label, number in zip(labels, values, strict=True)],
        )
        for tone, said, values in parts
    ]
    picture = horizontal_bars(labels, series, title="Rows by corpus: " + ", ".join(labels))
    key = "".join(f'<li class="{tone}">{said} {count(sum(values))}</li>' for tone, said, values in parts)
    rows = "".join(
        f'<tr><th scope="row"><code>{escaped(corpus.id)}</code></th><td>{"new" if corpus.is_new else "taken over"}</td>'
        f'<td class="number">{count(corpus.rows_kept)}</td><td class="number">{count(corpus.rows_rejected)}</td></tr>'
        for corpus in story.corpora
    )
    return (
        '<section id="came-in">\n<h2>What came in</h2>\n<p class="soft">Rows of the sources and of users’ corrections. What was '
        "there before is replayed beside what is new, so that it is not forgotten.</p>\n"
        f'<div class="grid">\n<figure>{picture}<ul class="key">{key}</ul></figure>\n'
        '<div><table><thead><tr><th scope="col">corpus</th><th scope="col"></th><th scope="col" class="number">kept</th>'
        f'<th scope="col" class="number">rejected</th></tr></thead><tbody>{rows}</tbody></table></div>\n</div>\n</section>'
    )


def _rejected(story: CycleStory) -> str:
    rules = story.rejected_by_rule
    if not rules:
        return ""
    steps = [step for corpus in story.corpora for step in corpus.steps]
    total, shares = sum(rules.values()), list(rules.items())[:_MOST_BARS]
    if len(rules) > _MOST_BARS:
        shares.append((f"{len(rules) - _MOST_BARS} more", total - sum(number for _, number in shares)))
    labels = [cut(shown(rule).replace("_", " "), _LABEL_CHARS) for rule, _ in shares]
    numbers = [number for _, number in shares]
    picture = horizontal_bars(
        labels,
        [
            Series(
                tone="taken",
                values=numbers,
                written=[f"{count(number)} · {share(number, total)}" for number in numbers],
                said=[f"{label}: {counted(number, 'row')}" for label, number in zip(labels, numbers, strict=True)],
            )
        ],
        title="Rejected rows by rule: " + ", ".join(labels),
    )
    words = "".join(
        f'<tr><th scope="row">{escaped(rule.replace("_", " "))}</th><td>{escaped(said)}</td></tr>'
        for rule in rules
        if (said := rule_words(rule, step_of(rule, steps)))
    )
    table = f"<div><table><tbody>{words}</tbody></table></div>" if words else ""
    attacks = "".join(
        f"<li>{escaped(shown(each))}</li>" for corpus in story.corpora for each in corpus.attacks if corpus.is_new
    )
    if attacks:
        table = f"<div><h3>Feedback that is not believed</h3><ul>{attacks}</ul></div>{table}"
    return (
        f'<section id="rejected">\n<h2>What was rejected, and why</h2>\n<p class="soft">{counted(total, "row")}, each in the '
        f'ledger with its rule, score and text.</p>\n<div class="grid">\n<figure>{picture}</figure>\n{table}\n</div>\n</section>'
    )


# ── what was trained, and what was found ──────────────────────────────────────────────────────────────────────────────


def _trained(story: CycleStory) -> str:
    if not story.trainings:
        return ""
    figures = []
    for each in story.trainings:
        differs = ", ".join(f"{name}: {value}" for name, value in each.differs.items()) or each.model
        mark = " (chosen)" if each.is_chosen and len(story.trainings) > 1 else ""
        said = (
            f"{counted(each.steps, 'step')} over {counted(each.tokens, 'token')} at {each.tokens_per_s:,.0f} tokens/s in "
            f"{escaped(each.precision)}, from {escaped(each.parent or 'its base')}. Loss in nats per token, "
            f"{each.final_loss:.3f} in the last tenth."
        )
        picture = curve(each.curve, title=f"Loss of {shown(each.model)} over its steps") if each.curve else ""
        figures.append(f"<figure><h3>{escaped(differs)}{mark}</h3><figcaption>{said}</figcaption>{picture}</figure>")
    chosen = next((each for each in story.trainings if each.is_chosen), story.trainings[0])
    rows = "".join(
        f'<tr><th scope="row">{escaped(", ".join(mixed["sources"]))}</th><td class="number">{share(mixed["share"], 1)}</td>'
        f'<td class="number">{mixed["epochs"]:.2f}</td></tr>'
        for mixed in chosen.mixture
    )
    table = (
        '<div><h3>What it read</h3><table><thead><tr><th scope="col">source</th><th scope="col" class="number">of a batch</th>'
        f'<th scope="col" class="number">times read</th></tr></thead><tbody>{rows}</tbody></table></div>'
        if rows
        else ""
    )
    return (
        '<section id="trained">\n<h2>What was trained</h2>\n<div class="grid">\n'
        + "\n".join(figures)
        + f"\n{table}\n</div>\n</section>"
    )


def _found(story: CycleStory) -> str:
    if not story.scores:
        return ""
    before = story.champion or "before"
    figures = []
    for score in story.scores:
        whiskers = [_whisker(score, "candidate", "candidate", "kept")]
        if score.champion is not None:
            whiskers.append(_whisker(score, "champion", cut(shown(before), _LABEL_CHARS), "held"))
        said = (
            f"{SETS[score.set]}: {counted(score.candidate['num_examples'], 'task')} of "
            f"{counted(score.candidate['num_clusters'], 'independent row')} or users"
        )
        picture = intervals(whiskers, title=f"Bits per byte on {score.set}")
        figures.append(
            f"<figure><h3>{escaped(score.set)}: {score.verdict}</h3><figcaption>{escaped(said)}</figcaption>{picture}</figure>"
        )
    changed = [score for score in story.scores if score.change is not None]
    change = ""
    if changed:
        whiskers = [
            Whisker(
                label=score.set,
                tone="taken" if score.verdict == "worse" else "kept" if score.verdict == "better" else "held",
                low=score.change["low"],
                estimate=score.change["estimate"],
                high=score.change["high"],
                said=f"{score.set}: {interval(score.change, signed=True)} bits per byte, {score.verdict}",
            )
            for score in changed
            if score.change is not None
        ]
        change = (
            "<figure><h3>Change, task by task</h3><figcaption>Candidate minus "
            f"{escaped(before)}: better where all of an interval lies left of 0.</figcaption>"
            f"{intervals(whiskers, title='Change in bits per byte', zero=True)}</figure>"
        )
    confidence = story.scores[0].candidate["confidence"]
    return (
        '<section id="found">\n<h2>What got better and worse</h2>\n<p class="soft">Bits that a byte of the right answer costs '
        f"the model; less is better. Points are estimates, lines their {confidence:.0%} intervals, which resample whole rows or "
        'users.</p>\n<div class="grid">\n'
        + "\n".join([change, *figures] if change else figures)
        + "\n</div>\n</section>"
    )


def _whisker(score: ScoreStory, which: str, label: str, tone: str) -> Whisker:
    found = getattr(score, which)
    return Whisker(
        label=label,
        tone=tone,
        low=found["low"],
        estimate=found["estimate"],
        high=found["high"],
        said=f"{label}: {interval(found)} bits per byte",
    )


# ── what was decided, what it cost ────────────────────────────────────────────────────────────────────────────────────


def _decided(story: CycleStory) -> str:
    if not story.reasons:
        return ""
    lines = []
    for reason in story.reasons:
        mark, colon, text = reason.partition(": ")
        if not colon or mark not in ("passed", "failed"):
            mark, text = "", reason
        lines.append(f'<li class="{mark}"><b>{mark}</b><span>{escaped(text)}</span></li>')
    decided = f"{story.state} as {story.release}" if story.release is not None else story.state
    return (
        f'<section id="decided">\n<h2>What was decided, and why</h2>\n<p class="soft">{escaped(decided)}. The checks of the gate '
        f'in their order, in their own words.</p>\n<ul class="checks">{"".join(lines)}</ul>\n</section>'
    )


def _cost(story: CycleStory) -> str:
    if not story.costs:
        return ""
    stages: dict[str, list[float]] = {}
    for cost in story.costs:
        seconds, joules = stages.setdefault(_STAGES[cost.stage], [0.0, 0.0])
        stages[_STAGES[cost.stage]] = [seconds + cost.seconds, joules + cost.joules]
    total = sum(joules for _, joules in stages.values())
    bar = _bar(stages, total)
    rows = "".join(
        f'<tr><th scope="row">{_STAGES[cost.stage]} <code>{escaped(cost.artifact)}</code></th>'
        f'<td class="number">{cost.seconds:,.1f} s</td><td class="number">{cost.joules:,.0f} J</td></tr>'
        for cost in story.costs
    )
    known = "; ".join(
        _SOURCES.get(each, escaped(each)) for each in sorted({cost.joules_source for cost in story.costs})
    )
    return (
        f'<section id="cost">\n<h2>What it cost</h2>\n<p class="soft">{story.joules:,.0f} J in {story.seconds:,.0f} s of the stages; '
        f"energy is {known}. What lies between the stages, such as processes that start, is in neither.</p>\n{bar}"
        '<table class="wide"><thead><tr><th scope="col">made</th><th scope="col" class="number">time</th>'
        f'<th scope="col" class="number">energy</th></tr></thead><tbody>{rows}</tbody></table>\n</section>'
    )


def _bar(stages: dict[str, list[float]], total: float) -> str:
    tones = dict(zip(_STAGES.values(), ("held", "rest", "kept", "taken"), strict=True))
    parts = [(name, tones[name], round(joules)) for name, (_, joules) in stages.items() if round(joules)]
    if not parts:
        return ""
    series = [
        Series(tone=tone, values=[number], written=[""], said=[f"{name}: {number:,} J"]) for name, tone, number in parts
    ]
    title = "Energy by stage: " + ", ".join(f"{name} {number:,} J" for name, _, number in parts)
    key = "".join(f'<li class="{tone}">{name} {share(number, total)}</li>' for name, tone, number in parts)
    return f'<div class="whole">{share_bar(series, title=title)}<ul class="key">{key}</ul></div>\n'


def _how_to_go_on(story: CycleStory) -> str:
    pages = _links([corpus.page for corpus in story.corpora])
    return (
        "<footer>\n<p>All of it as JSON: <code>aifactory explain "
        f"{story.number} CONFIG --json</code>. Pages of the corpora: {pages or 'none'}.</p>\n</footer>"
    )


def _links(pages: Sequence[str]) -> str:
    return ", ".join(f"<code>{escaped(page)}</code>" for page in pages)
