"""The dataset card of a corpus: `datasets.load_dataset(folder)` opens the corpus as it lies there.

Source   Hugging Face Hub, "Dataset Cards" and "Data files Configuration": the YAML at the top of README.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from aifactory.ingest.stages import stages
from aifactory.records.rows import CORPUS_SCHEMA, LEDGER_SCHEMA

_COLUMNS = {
    "id": "names the row and its text: it follows both to the tokens, the model and its answers",
    "key": "names the row for good, whatever becomes of its text: by the file that it is, or by its content",
    "cluster": "is shared by rows that depend on one another, such as those of one user",
    "source": "the source's name in the configuration",
    "origin": "the file below the source's path, the table, or the completion that was corrected",
    "position": "line, record or row in it, from 0",
    "side": "`train` or `holdout`",
    "content_hash": "hash of prompt, text, messages and rejected",
    "prompt": "what was asked",
    "text": "the text, the answer, or of two answers the one that was preferred",
    "messages": "the turns before the answer, as JSON: a list of `role` and `content`",
    "rejected": "of two answers the other one",
    "label": "the row's label",
    "language": "ISO 639-1 code, where a step named it",
    "user": "who wrote it",
    "timestamp": "when, as the source says it",
    "weight": "how much the row counts; 1 where the source does not say",
    "rule": "the rule that rejected the row",
    "score": "what the rule measured, in its unit",
    "detail": "in words what was expected and found, or the id of the row that it is like",
}
_CODE = re.compile(r"[a-z]{2,3}")
_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
"""The bounds of the Hub's size categories, each ten times the one before."""


def dataset_card(name: str, figures: Mapping[str, Any]) -> str:
    """README.md of the corpus of a factory, from its figures.

    The configuration `default` has the rows that are kept, as splits `train` and `holdout`; `rejected` has the ledger.
    """
    default = [{"split": "train", "path": "train-*.parquet"}]
    if figures["rows_holdout"]:
        default.append({"split": "holdout", "path": "holdout-*.parquet"})
    configs: list[dict[str, Any]] = [{"config_name": "default", "default": True, "data_files": default}]
    if figures["rows_rejected"]:
        configs.append({"config_name": "rejected", "data_files": [{"split": "train", "path": "rejected-*.parquet"}]})
    head = {
        "pretty_name": f"Corpus of {name}",
        **({"language": languages} if (languages := _languages(figures["languages"])) else {}),
        # Whoever publishes a corpus knows what its sources allow; this program does not.
        "license": "unknown",
        "size_categories": [_size(figures["rows_kept"])],
        "task_categories": ["text-generation"],
        "configs": configs,
    }
    taken = ((stage.name, f"{stage.rows_in:,}", f"{stage.taken:,}") for stage in stages(figures))
    rules = ((f"`{rule}`", f"{rows:,}") for rule, rows in figures["rejected_by_rule"].items())
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n# Corpus of {name}\n\n"
        f"{figures['rows_in']:,} rows came in, {figures['rows_kept']:,} were kept ({figures['bytes_kept']:,} bytes of text), "
        f"{figures['rows_rejected']:,} were rejected. {figures['rows_holdout']:,} of those that were kept are held out: they "
        "never train. `report.html` shows the same in pictures.\n"
        + _opening(figures)
        + (
            "\n## What was rejected\n" + _table(("step", "rows in", "rejected"), taken)
            if figures["rows_rejected"]
            else ""
        )
        + (_table(("rejected by", "rows"), rules) if figures["rows_rejected"] else "")
        + "\n## Columns\n\nNo value is null: what a source does not say is an empty string.\n"
        + _table(("column", "type", "meaning"), _columns(CORPUS_SCHEMA))
        + (
            "\nThe ledger (`rejected`) has every row that was not kept, with the text that it had when the rule rejected "
            "it:\n" + _table(("column", "type", "meaning"), _columns(LEDGER_SCHEMA))
            if figures["rows_rejected"]
            else ""
        )
    )


def _opening(figures: Mapping[str, Any]) -> str:
    lines = ["from datasets import load_dataset", "", 'corpus = load_dataset(FOLDER)["train"]']
    if figures["rows_holdout"]:
        lines.append('holdout = load_dataset(FOLDER)["holdout"]')
    if figures["rows_rejected"]:
        lines.append('ledger = load_dataset(FOLDER, "rejected")["train"]')
    return "\n```python\n" + "\n".join(lines) + "\n```\n"


def _languages(rows: Mapping[str, int]) -> list[str]:
    """The codes of the languages, the commonest first."""
    codes = sorted(rows, key=lambda code: (-rows[code], code))
    return [code for code in codes if _CODE.fullmatch(code)]


def _size(rows: int) -> str:
    """The Hub's name for so many rows."""
    bounds = [10 ** (3 + i) for i in range(len(_SIZES))]
    at = sum(rows >= bound for bound in bounds)
    if at == 0:
        return f"n<{_SIZES[0]}"
    return f"n>{_SIZES[-1]}" if at == len(_SIZES) else f"{_SIZES[at - 1]}<n<{_SIZES[at]}"


def _columns(schema: Any) -> Iterable[tuple[str, str, str]]:
    return ((f"`{field.name}`", str(field.type), _COLUMNS[field.name]) for field in schema)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n" + "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
