"""Two releases side by side, on a loop that was really turned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from here_loops import rows_that_train

from aifactory import Factory
from aifactory.cli import main
from aifactory.errors import ConfigError, StateError


def test_data_recipe_and_scores_of_a_retrain_are_compared(loop: Factory) -> None:
    diff = loop.diff("small-r1", "small-r2", limit=0)

    first, second = diff.first.corpora, diff.second.corpora
    assert list(second[:1]) == list(first)
    assert (list(diff.corpora.both), list(diff.corpora.only_first)) == (list(first), [])
    assert list(diff.corpora.only_second) == list(second[1:])
    (batch,) = diff.batches.only_second
    assert batch in loop.books.artifacts.get(type(loop.ingest()), second[1]).record.inputs
    assert (list(diff.sources.both), list(diff.sources.only_second)) == (["topics"], ["feedback"])
    rows = {
        source: len(rows_that_train(loop, corpus)) for source, corpus in zip(diff.rows, reversed(second), strict=True)
    }
    assert {source: (each.both, each.only_first, each.only_second) for source, each in diff.rows.items()} == {
        "feedback": (0, 0, rows["feedback"]),
        "topics": (rows["topics"], 0, 0),
    }

    assert diff.recipe["train.max_steps"] == (50, 60)
    assert diff.recipe["train.seed"] == (1, 2)
    assert "train.global_batch_rows" not in diff.recipe
    assert not [name for name in diff.recipe if name.startswith(("code", "evaluate", "tokenize", "ingest"))]
    assert diff.execution == {}

    scores = {pair.set: pair for pair in diff.scores}
    assert scores["target"].first is None and scores["target"].change is None
    card = loop.books.registry.named("small-r2").scorecard
    evaluated = next(e.detail for e in loop.books.journal.events(event="evaluated") if e.subject == card)
    # The second scorecard holds the scores of both releases on these tasks: the same comparison by another way.
    assert scores["holdout"].second == evaluated["holdout"]["candidate"]
    first_alone = scores["holdout"].first
    assert first_alone is not None
    assert first_alone["estimate"] == pytest.approx(evaluated["holdout"]["champion"]["estimate"], abs=1e-6)
    change = scores["holdout"].change
    assert change is not None
    assert change["estimate"] == pytest.approx(evaluated["holdout"]["over_champion"]["estimate"])
    assert change["num_examples"] == evaluated["holdout"]["candidate"]["num_examples"]


def test_a_release_does_not_differ_from_itself(loop: Factory) -> None:
    diff = loop.diff("2", "production", limit=3, max_tokens=8)

    assert (diff.first, diff.recipe, diff.execution) == (diff.second, {}, {})
    assert not [
        *diff.corpora.only_first,
        *diff.corpora.only_second,
        *diff.batches.only_first,
        *diff.batches.only_second,
    ]
    assert all(rows.only_first == rows.only_second == 0 for rows in diff.rows.values())
    assert all(pair.change is not None and pair.change["estimate"] == 0 for pair in diff.scores)
    assert len(diff.answers) == 3
    assert all(pair.is_equal and pair.first for pair in diff.answers)


def test_both_answer_held_out_tasks_greedily_and_the_same_whenever_asked(loop: Factory) -> None:
    diff = loop.diff("1", "2", limit=4, max_tokens=12)

    held_out = {row["text"] for row in _held_out(loop)}
    assert len(diff.answers) == 4
    for pair in diff.answers:
        assert any(pair.prompt + (pair.expected or "") in text for text in held_out)
        assert pair.error is None and pair.first and pair.second
    assert any(not pair.is_equal for pair in diff.answers)
    assert loop.diff("1", "2", limit=4, max_tokens=12).answers == diff.answers
    assert [pair.first for pair in loop.diff("2", "1", limit=4, max_tokens=12).answers] == [
        pair.second for pair in diff.answers
    ]


def test_prompts_come_from_a_file_and_one_that_can_not_be_answered_is_said(loop: Factory, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "karamika"}, {"messages": [{"role": "robot", "content": "hello"}]}, {"prompt": "lo " * 2000}]
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8")

    said, chat, long = loop.diff("1", "2", prompts=str(file), max_tokens=4).answers

    assert (said.prompt, said.expected, said.error) == ("karamika", None, None)
    assert said.first is not None and said.second is not None
    assert "role" in (chat.error or "")
    assert (chat.first, chat.second) == (None, None)
    assert "context" in (long.error or "") or "tokens" in (long.error or "")
    plain = tmp_path / "prompts.txt"
    plain.write_text("karamika\n\nlonepu\n", encoding="utf-8")
    first, second = loop.diff("1", "2", prompts=str(plain), max_tokens=4).answers
    assert (first.prompt, first.first, second.prompt) == ("karamika", said.first, "lonepu")
    assert len(loop.diff("1", "2", prompts=str(plain), limit=1, max_tokens=4).answers) == 1


def test_what_can_not_be_compared_is_an_error_that_says_what_to_do(loop: Factory, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="small-r1, small-r2"):
        loop.diff("small-r1", "small-r9")
    with pytest.raises(ConfigError, match="a file of prompts"):
        loop.diff("1", "2", prompts=str(tmp_path / "none.txt"))
    with pytest.raises(ConfigError, match="0 to 1000 prompts"):
        loop.diff("1", "2", limit=-1)
    file = tmp_path / "prompts.jsonl"
    for text, said in (("{", "expected JSON"), ('{"text": "a"}', '"prompt"'), ("\n", "found none")):
        file.write_text(f"\n{text}\n", encoding="utf-8")
        with pytest.raises(ConfigError, match=said):
            loop.diff("1", "2", prompts=str(file))


def test_the_command_says_the_same_in_text_and_json(
    loop: Factory, copied: Callable[..., Factory], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(loop.config.model_dump(mode="json", exclude_defaults=True)), encoding="utf-8")
    expected = loop.diff("1", "2", limit=2, max_tokens=6)
    arguments = ["diff", "1", "2", str(config), "--limit", "2", "--max-tokens", "6"]

    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(json.dumps(expected.to_json()))
    assert set(told["answers"][0]) == {"prompt", "expected", "first", "second", "error", "is_equal"}
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines() == "\n".join(expected.lines()).splitlines()
    assert "train.max_steps: 50 → 60" in shown
    assert main(["diff", "1", "9", str(config)]) == 1
    assert main(["diff", "1", "2", str(config), "--prompts", "nowhere.txt"]) == 2


def _held_out(factory: Factory) -> list[dict[str, str]]:
    import pyarrow.parquet as pq

    files = sorted(Path(factory.ingest().uri).glob("holdout-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]
