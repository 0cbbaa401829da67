"""The card of a model: README.md in the Hub's format, written from the records alone, and the picture of its losses.

A card says what is known of a model: it changes when a scorecard is added, and the model does not. So neither file is one
of the artifact's: no digest and no fingerprint depends on them, and what is fetched of a model is the same without them.

Source   Hugging Face Hub, "Model Cards" and its specification of the YAML at the top of README.md (model-index).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from aifactory.records.artifacts import Corpus, Model, Record, Scorecard

CARD = "README.md"
CHART = "loss.svg"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LANGUAGE = re.compile(r"[a-z]{2,3}")
_SETS = {
    "holdout": "rows of the sources that never trained",
    "target": "corrections by users that never trained",
    "known": "a sample of the rows that it was trained on",
}


def model_card(
    name: str,
    model: Model,
    *,
    corpora: Sequence[Corpus],
    scorecard: Scorecard | None = None,
    base: str | None = None,
    parent: str | None = None,
    licenses: Mapping[str, str] | None = None,
    num_candidates: int = 1,
) -> str:
    """README.md of a model of the factory `name`.

    corpora    what it was trained on, in the order of its token sets
    base       what training started from, if not from scratch: a hub id, or the name of a folder
    parent     the same, where that is a model of the factory: its id
    licenses   of the data, by source, where the configuration names them
    num_candidates   of its cycle, of which it is one
    """
    figures, record = model.figures, model.record
    title = f"{name} {record.fingerprint[:16]}"
    parts = [
        f"---\n{yaml.safe_dump(_head(title, corpora, scorecard, base), sort_keys=False, allow_unicode=True)}---\n",
        f"# {title}\n",
        f"A causal language model of {figures['parameters']:,} parameters, trained by the AI Factory `{name}` "
        + (f"from `{parent or base}`" if parent or base else "from scratch")
        + f" for {figures['steps']:,} steps over {figures['tokens']:,} tokens. Everything here is taken from the records of the "
        f"artifacts `{model.id}`"
        + "".join(f", `{corpus.id}`" for corpus in corpora)
        + (f", `{scorecard.id}`" if scorecard is not None else "")
        + ".\n",
        _USE,
        "## Data\n",
        _data(figures, corpora, licenses or {}),
        "## Training\n",
        f"![Training loss]({CHART})\n" if figures.get("curve") else "",
        _training(record),
        "## Scores\n",
        _scores(scorecard, num_candidates),
        "## Energy\n",
        _energy(record, corpora),
        "## Licence\n",
        "Not stated: whoever publishes the model knows what the data and the base allow; this program does not.\n",
        "## Limits\n",
        _limits(record, scorecard),
    ]
    return "\n".join(part for part in parts if part)


_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
```
"""


def _head(title: str, corpora: Sequence[Corpus], scorecard: Scorecard | None, base: str | None) -> dict[str, Any]:
    rows: dict[str, int] = {}
    for corpus in corpora:
        for code, count in corpus.figures.get("languages", {}).items():
            rows[code] = rows.get(code, 0) + count
    languages = [code for code in sorted(rows, key=lambda code: (-rows[code], code)) if _LANGUAGE.fullmatch(code)]
    head: dict[str, Any] = {
        **({"language": languages} if languages else {}),
        "license": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": base} if base is not None and _HUB_ID.fullmatch(base) else {}),
    }
    if scorecard is not None:
        results = [
            {
                "task": {"type": "text-generation"},
                "dataset": {"name": f"{which} ({_SETS[which]})", "type": which},
                "metrics": [
                    {
                        "type": "bits_per_byte",
                        "name": f"bits per byte, {found['confidence']:.0%} interval [{found['low']:.3f}, {found['high']:.3f}]",
                        "value": round(found["estimate"], 4),
                    }
                ],
            }
            for which, found in _candidate_scores(scorecard)
        ]
        head["model-index"] = [{"name": title, "results": results}]
    return head


def _data(figures: Mapping[str, Any], corpora: Sequence[Corpus], licenses: Mapping[str, str]) -> str:
    rows = (
        (f"`{source}`", f"`{corpus.id}`", f"{counts['kept']:,}", licenses.get(source, "not stated"))
        for corpus in corpora
        for source, counts in corpus.figures["sources"].items()
    )
    mixed = (
        (", ".join(f"`{source}`" for source in each["sources"]), f"{each['share']:.1%}", f"{each['epochs']:.2f}")
        for each in figures.get("mixture", ())
    )
    held = sum(corpus.rows_holdout for corpus in corpora)
    return (
        _table(("source", "corpus", "rows", "licence"), rows)
        + f"\n{held:,} of these rows are held out: they judge the model and never train. Each corpus has a card and a page of "
        "its own (`README.md`, `report.html`).\n\n" + _table(("of these", "share of a batch", "times read"), mixed)
    )


def _training(record: Record) -> str:
    figures, recipe, execution = record.figures, record.recipe["train"], record.execution
    found = [
        ("final loss", f"{figures['final_loss']:.4f} nats per token, mean of the last tenth of the steps"),
        (
            "tokens/s",
            f"{figures['tokens_per_s']:,.0f} by {execution.get('workers', 1)} worker(s), {figures['precision']}",
        ),
    ]
    if figures.get("mfu") is not None:
        peak = f"{figures['peak_flops_per_s'] / 1e12:.4g} TFLOP/s, {figures['peak_source']}"
        found.append(
            (
                "MFU",
                f"{figures['mfu']:.1%}: tokens/s x {figures['flops_per_token'] / 1e6:,.4g} MFLOP per token / (workers x peak "
                f"of {peak})",
            )
        )
    if parity := figures.get("parity"):
        found.append(
            (
                "parity",
                f"another process loaded the export: {parity['tokens']:,} tokens of {parity['documents']} documents equal, "
                f"log-probabilities within {parity['largest_difference']:.2g} nats (at most {parity['tolerance']:g})",
            )
        )
    if figures.get("skipped"):
        found.append(("batches left out", str(len(figures["skipped"]))))
    settings = [(f"`{name}`", str(value)) for name, value in _flat(recipe)]
    return _table(("what", "found"), found) + "\n" + _table(("train", "value"), settings)


def _scores(scorecard: Scorecard | None, num_candidates: int) -> str:
    if scorecard is None:
        return "Not evaluated yet.\n"
    rows = []
    for which, found in _candidate_scores(scorecard):
        interval = f"{found['estimate']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
        rows.append((which, _SETS[which], interval, f"{found['num_examples']}", f"{found['num_clusters']}"))
    figures = scorecard.figures
    confidence = f"{figures['holdout']['candidate']['confidence']:.0%}"
    return (
        _table(
            ("set", "what it is", f"bits per byte, {confidence} interval", "tasks", "independent rows or users"), rows
        )
        + f"\nLower is better. On the holdout a model of token frequencies needs {figures['unigram_bits_per_byte']:.3f} bits per "
        f"byte, gzip {figures['gzip_bits_per_byte']:.3f}. Intervals resample whole rows or users (bootstrap-t).\n"
        + (
            f"\nIt is one of {num_candidates} candidates, of which the best on these scores was judged: for that one an interval "
            "here is narrower than the choice allows, and the gate's are wider.\n"
            if num_candidates > 1
            else ""
        )
    )


def _energy(record: Record, corpora: Sequence[Corpus]) -> str:
    made = [("training", record), *((f"corpus `{corpus.id}`", corpus.record) for corpus in corpora)]
    rows = (
        (what, f"{each.joules:,.0f} J", _SOURCES.get(each.joules_source, each.joules_source), f"{each.seconds:,.0f} s")
        for what, each in made
    )
    return _table(("of", "energy", "how it is known", "time"), rows)


_SOURCES = {
    "estimate": "estimated: CPUs x seconds x watts per CPU by configuration",
    "nvml": "measured: counters of the GPUs of the driver's node (NVML)",
    "rapl": "measured: counters of the processors of the driver's node (RAPL)",
}


def _limits(record: Record, scorecard: Scorecard | None) -> str:
    lines = [
        "It predicts text like that which it was trained on. Nothing was done to make its answers true, safe or polite.",
        "Filters and masks of the corpora miss some of what they look for; personal data of the sources may be in its answers.",
    ]
    if scorecard is None:
        lines.append("It was judged on nothing yet.")
    else:
        lines.append(
            "Its scores are of how well it predicts held-out text, not of any task; they hold for such text alone."
        )
    if architecture := record.recipe.get("architecture"):
        lines.append(f"It was made for at most {architecture['context_length']:,} tokens.")
    return "".join(f"- {line}\n" for line in lines)


def _candidate_scores(scorecard: Scorecard) -> list[tuple[str, Mapping[str, Any]]]:
    return [(which, scorecard.figures[which]["candidate"]) for which in _SETS if scorecard.figures.get(which)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in sorted(values.items()):
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif value not in (None, {}, [], ()):
            yield prefix + name, value


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )
