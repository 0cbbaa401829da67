"""Laws of a scorecard: every task is there with what each model needs for it, and it depends on nothing else."""

from __future__ import annotations

import io
import json

import pyarrow.parquet as pq
import pytest
from judge_servers import judging

from aifactory.cluster.tasks import run_here
from aifactory.config import AnswerGuards, Evaluate, Judge, PromoteGate
from aifactory.errors import EmptyCorpusError, StorageError
from aifactory.evaluate.evidence import evidence_of, evidence_of_best
from aifactory.evaluate.gate import judge
from aifactory.evaluate.pipeline import evaluate_model
from aifactory.evaluate.scoring import answer_bits, answer_scores, deflate_bits
from aifactory.evaluate.statistics import ratio_interval
from aifactory.records.artifacts import Record, Scorecard
from aifactory.text.tasks import Task, cut_tasks

RECIPE = Evaluate(
    prompt_bytes=40, answer_bytes=60, max_tasks_per_row=3, max_tasks=50, bootstrap_samples=200, confidence=0.9
)


class Scored:
    """A scorecard: what the stage returned, and the files that it wrote."""

    def __init__(self, evaluated, storage, target):
        self.evidence, self.figures = evaluated.evidence, evaluated.figures
        self.bytes = {file.name: storage.read_bytes(*target, file.name) for file in evaluated.files}
        self.examples = pq.read_table(io.BytesIO(self.bytes["examples.parquet"])).to_pylist()

    def of(self, name):
        return [example for example in self.examples if example["set"] == name]


@pytest.fixture
def candidate(publish_model, make_model):
    return publish_model(1, make_model(1))


@pytest.fixture
def champion(publish_model, make_model):
    return publish_model(2, make_model(2))


@pytest.fixture
def sources(publish_corpus):
    return publish_corpus(10)


@pytest.fixture
def feedback(publish_corpus):
    return publish_corpus(11, num_rows=30, users=6)


@pytest.fixture
def evaluate(store):
    def run_stage(candidate, champion, sources, feedback=(), *, recipe=RECIPE, run=run_here, name="a", **options):
        target = ("scorecard", name)
        evaluated = evaluate_model(
            candidate=candidate,
            champion=champion,
            sources=sources,
            feedback=feedback,
            recipe=recipe,
            store=store,
            target=target,
            run=run,
            **options,
        )
        return Scored(evaluated, store.storage, target)

    return run_stage


def cut(row):
    if row.prompt:
        return [Task(row.prompt, row.text)]
    return cut_tasks(row.text, prompt_bytes=40, answer_bytes=60, max_tasks=3)


def test_every_example_is_a_task_of_the_right_side_with_the_bits_of_each_model(
    evaluate, candidate, champion, sources, feedback, make_model, tokenizer
):
    scored = evaluate(candidate, champion, sources[0], [feedback[0]])

    rows = {row.id: row for row in [*sources[1], *feedback[1]]}
    assert {(e["set"], rows[e["row"]].side, rows[e["row"]].source) for e in scored.examples} == {
        ("holdout", "holdout", "docs"),
        ("known", "train", "docs"),
        ("target", "holdout", "feedback"),
    }
    tasks = [cut(rows[e["row"]])[e["number"]] for e in scored.examples]
    assert [e["bytes"] for e in scored.examples] == [len(task.answer.encode()) for task in tasks]
    assert [e["cluster"] for e in scored.examples] == [rows[e["row"]].cluster for e in scored.examples]
    assert [e["gzip"] for e in scored.examples] == [deflate_bits(task) for task in tasks]
    by_candidate = answer_bits(make_model(1), tokenizer, tasks)
    by_champion = answer_bits(make_model(2), tokenizer, tasks)
    assert [e["candidate"] for e in scored.examples] == pytest.approx(by_candidate, rel=1e-4)
    for example, bits in zip(scored.examples, by_champion, strict=True):
        assert example["champion"] == (None if example["set"] == "known" else pytest.approx(bits, rel=1e-4))
    assert all(e["unigram"] > 0 for e in scored.examples)


def test_a_row_of_turns_is_one_task_that_is_asked_as_a_chat(evaluate, candidate, publish_corpus, make_model, tokenizer):
    sources, rows = publish_corpus(12, users=6, as_chats=True)

    scored = evaluate(candidate, None, sources, chat_fallback="plain")

    by_id = {row.id: row for row in rows}
    tasks = [Task("", by_id[e["row"]].text, by_id[e["row"]].messages) for e in scored.examples]
    assert all(task.messages for task in tasks)
    assert {e["number"] for e in scored.examples} == {0}
    bits = answer_bits(make_model(1), tokenizer, tasks, fallback="plain")
    assert [e["candidate"] for e in scored.examples] == pytest.approx(bits, rel=1e-4)
    assert [e["gzip"] for e in scored.examples] == [deflate_bits(task) for task in tasks]


def test_rows_with_a_label_that_is_left_out_are_no_tasks(evaluate, candidate, publish_corpus):
    labels = ["true", "False", "", "0"]
    (sources, rows), (feedback, more) = (publish_corpus(n, users=6, labels=labels) for n in (10, 11))
    labelled = {row.id: row.label for row in [*rows, *more]}

    def found(**options):
        scored = evaluate(candidate, None, sources, [feedback], **options)
        return {(e["set"], labelled[e["row"]]) for e in scored.examples}

    sets = ("holdout", "known", "target")
    assert found() == {(name, label) for name in sets for label in labels}
    assert found(leave_out=frozenset({"false", "0"}), name="b") == {(n, label) for n in sets for label in ("true", "")}


def test_no_task_is_there_twice_and_no_more_than_were_asked_for(evaluate, candidate, sources):
    scored = evaluate(candidate, None, sources[0])

    keys = [(e["set"], e["row"], e["number"]) for e in scored.examples]
    assert len(keys) == len(set(keys))
    for name, side in (("holdout", "holdout"), ("known", "train")):
        possible = [task for row in sources[1] if row.side == side for task in cut(row)]
        assert len(scored.of(name)) == min(50, len(possible))


def test_fewer_tasks_are_the_first_of_more(evaluate, candidate, sources):
    more = evaluate(candidate, None, sources[0])
    fewer = evaluate(candidate, None, sources[0], recipe=RECIPE.model_copy(update={"max_tasks": 7}), name="b")

    for name in ("holdout", "known"):
        assert [(e["row"], e["number"]) for e in fewer.of(name)] == [(e["row"], e["number"]) for e in more.of(name)[:7]]


def test_the_evidence_is_that_of_the_examples(evaluate, candidate, champion, sources, feedback):
    scored = evaluate(candidate, champion, sources[0], [feedback[0]])

    for name, found in (("holdout", scored.evidence.fixed), ("target", scored.evidence.target)):
        examples = scored.of(name)
        assert found.name == name
        assert found.over_champion == ratio_interval(
            [e["candidate"] - e["champion"] for e in examples],
            [e["bytes"] for e in examples],
            [e["cluster"] for e in examples],
            confidence=0.9,
            samples=200,
        )
        assert found.candidate.num_examples == len(examples)
        assert found.candidate.num_clusters == len({e["cluster"] for e in examples})
    assert scored.evidence.target.candidate.num_clusters > 3
    assert scored.evidence.target.prompt_gain is not None
    assert scored.evidence.fixed.prompt_gain is None
    assert 0 <= scored.evidence.parity_error < 1e-4


def test_the_evidence_survives_its_json(evaluate, candidate, champion, sources, feedback):
    scored = evaluate(candidate, champion, sources[0], [feedback[0]])

    assert evidence_of(json.loads(scored.bytes["evidence.json"])) == scored.evidence
    assert evidence_of(scored.figures) == scored.evidence
    json.dumps(scored.figures, allow_nan=False)


def test_of_references_it_is_scored_how_many_are_answered_to_the_letter(
    evaluate, candidate, champion, sources, publish_corpus, make_model, tokenizer
):
    feedback, rows = publish_corpus(11, num_rows=30, users=6)

    scored = evaluate(candidate, champion, sources[0], [feedback])

    assert {e["candidate_exact"] for e in scored.of("holdout")} == {None}, "what was cut from a text is no reference"
    assert scored.evidence.fixed.exact is None
    by_id = {row.id: row for row in rows}
    tasks = [Task(by_id[e["row"]].prompt, by_id[e["row"]].text) for e in scored.of("target")]
    for number, column in ((1, "candidate_exact"), (2, "champion_exact")):
        wanted = [score.is_exact for score in answer_scores(make_model(number), tokenizer, tasks)]
        assert [e[column] for e in scored.of("target")] == wanted
    assert scored.evidence.target.exact.num_examples == len(tasks)
    assert scored.evidence.target.exact_over_champion is not None


def test_new_batches_are_looked_at_alone_by_the_tasks_that_come_from_them(evaluate, candidate, sources, publish_corpus):
    (old, _), (new, rows) = (publish_corpus(number, num_rows=30, users=6) for number in (11, 12))

    scored = evaluate(
        candidate, None, sources[0], [old, new], new_batches={new.id: "batch/1", "corpus/none": "batch/2"}
    )

    (found,) = scored.evidence.new_batches
    mine = [e for e in scored.of("target") if e["corpus"] == new.id]
    assert {e["row"] for e in mine} <= {row.id for row in rows}
    assert (found.batch, found.prompt_gain.num_examples) == ("batch/1", len(mine))
    gain = sum(e["beginning_mispaired"] - e["beginning"] for e in mine) / sum(e["beginning_bytes"] for e in mine)
    assert found.prompt_gain.estimate == pytest.approx(gain)
    assert evidence_of(json.loads(scored.bytes["evidence.json"])) == scored.evidence


def test_without_feedback_no_answer_is_mispaired(evaluate, candidate, champion, sources):
    scored = evaluate(candidate, champion, sources[0])

    assert scored.evidence.target is None
    assert scored.evidence.fixed.prompt_gain is None
    assert {e["beginning_mispaired"] for e in scored.examples} == {None}


def beginning(text):
    return text.encode()[:32].decode("utf-8", "ignore")


def test_the_beginning_of_an_answer_follows_its_prompt_and_that_of_another_cluster(
    evaluate, candidate, sources, feedback, make_model, tokenizer
):
    scored = evaluate(candidate, None, sources[0], [feedback[0]])
    rows = {row.id: row for row in feedback[1]}
    prompts = {}
    for row in feedback[1]:
        prompts.setdefault(row.cluster, []).append(row.prompt)

    for example in scored.of("target"):
        others = [p for cluster, some in prompts.items() if cluster != example["cluster"] for p in some]
        row = rows[example["row"]]
        own, *possible = answer_bits(
            make_model(1), tokenizer, [Task(p, beginning(row.text)) for p in [row.prompt, *others]]
        )
        assert example["beginning_bytes"] == len(beginning(row.text).encode())
        assert example["beginning"] == pytest.approx(own, rel=1e-4)
        assert min(abs(bits - example["beginning_mispaired"]) for bits in possible) < 1e-3


def test_the_best_release_so_far_is_compared_on_the_holdout_alone_and_kept_by_example(
    evaluate, candidate, champion, sources, feedback, publish_model, make_model, tokenizer, store
):
    third = publish_model(3, make_model(3))
    plain = evaluate(candidate, champion, sources[0], [feedback[0]])
    scored = evaluate(candidate, champion, sources[0], [feedback[0]], best=("small-r1", third), name="b")

    for example in scored.examples:
        assert (example.pop("best") is not None) == (example["set"] == "holdout")
        example.pop("best_exact")
    assert scored.examples == plain.examples
    assert evidence_of(json.loads(json.dumps(scored.figures))) == scored.evidence
    best = scored.evidence.best
    assert best is not None and best.release == "small-r1" and plain.evidence.best is None
    # As if it were the one in production.
    beside = evaluate(candidate, third, sources[0], name="c").evidence.fixed
    assert (best.over, best.exact) == (beside.over_champion, beside.exact_over_champion)
    assert "best" not in plain.figures and not {"best", "best_exact"} & set(plain.examples[0])


def test_without_a_champion_nothing_is_compared_with_it(evaluate, candidate, sources):
    scored = evaluate(candidate, None, sources[0])

    assert scored.evidence.fixed.champion is None
    assert scored.evidence.fixed.over_champion is None
    assert {e["champion"] for e in scored.examples} == {None}
    assert evidence_of(json.loads(scored.bytes["evidence.json"])) == scored.evidence
    assert not any("production" in reason for reason in judge(scored.evidence, PromoteGate()).reasons)


def test_a_model_beside_itself_is_not_promoted(evaluate, candidate, sources):
    scored = evaluate(candidate, candidate, sources[0])

    assert scored.evidence.fixed.over_champion.high == 0.0
    assert judge(scored.evidence, PromoteGate()).to_json()["decision"] == "reject"


def test_the_order_of_tasks_changes_no_byte(evaluate, candidate, champion, sources, feedback):
    recipe = RECIPE.model_copy(update={"max_tasks": 200, "max_tasks_per_row": 9})

    def backwards(function, items):
        return run_here(function, items[::-1])[::-1]

    one = evaluate(candidate, champion, sources[0], [feedback[0]], recipe=recipe)
    two = evaluate(candidate, champion, sources[0], [feedback[0]], recipe=recipe, run=backwards, name="b")

    assert len(one.examples) > 150
    assert one.bytes == two.bytes


def test_a_holdout_without_a_task_is_an_error_that_says_which(evaluate, candidate, sources, publish_corpus):
    short, _ = publish_corpus(12, num_lines=1)
    nobody, _ = publish_corpus(13, num_rows=0, users=1)

    with pytest.raises(EmptyCorpusError, match="holdout of the sources"):
        evaluate(candidate, None, short)
    with pytest.raises(EmptyCorpusError, match="holdout of the feedback"):
        evaluate(candidate, None, sources[0], [nobody])


def test_what_was_chosen_of_several_is_judged_by_wider_intervals_around_the_same_estimates(
    evaluate, candidate, champion, sources, feedback, store
):
    scored = evaluate(candidate, champion, sources[0], [feedback[0]], name="0" * 16)
    record = Record(
        kind="scorecard",
        fingerprint="0" * 64,
        digest="",
        code_version=1,
        recipe={},
        inputs=[],
        files=[],
        figures=json.loads(scored.bytes["evidence.json"]),
    )
    scorecard = Scorecard(record=record, uri="")

    alone = evidence_of_best(store.storage, scorecard, RECIPE, of=1)
    of_five = evidence_of_best(store.storage, scorecard, RECIPE, of=5)
    assert alone == scored.evidence
    assert (of_five.num_candidates, of_five.parity_error) == (5, scored.evidence.parity_error)
    for one, five in ((alone.fixed, of_five.fixed), (alone.target, of_five.target)):
        for name in ("candidate", "over_champion", "over_unigram"):
            narrow, wide = getattr(one, name), getattr(five, name)
            assert wide.estimate == narrow.estimate
            assert (narrow.confidence, wide.confidence) == (0.9, pytest.approx(0.98))
            assert wide.low < narrow.low < narrow.high < wide.high
    store.storage.delete("scorecard", "0" * 16)
    with pytest.raises(StorageError, match=r"expected .*examples\.parquet"):
        evidence_of_best(store.storage, scorecard, RECIPE, of=2)


def test_a_judge_compares_answers_of_both_models_and_what_it_says_is_kept_by_example(
    evaluate, candidate, champion, sources, feedback, store
):
    with judging(lambda question, first, second: "A" if first < second else "B" if second < first else "C") as server:
        asked_of = Judge(url=server.url, model="judge-1", max_pairs=5, max_answer_tokens=6)
        recipe = RECIPE.model_copy(update={"judge": asked_of})
        scored = evaluate(candidate, champion, sources[0], [feedback[0]], recipe=recipe)
        alone = evaluate(candidate, None, sources[0], [feedback[0]], recipe=recipe, name="b")

    said = [e for e in scored.examples if e["judge_forward"] is not None]
    assert len(said) == 5
    assert {e["set"] for e in said} == {"target"}
    assert [e["judge_forward"] for e in said] == [e["judge_backward"] for e in said]
    found = scored.evidence.judge
    assert found is not None
    assert found.wins + found.losses + found.ties == 5
    assert found.preference.estimate == pytest.approx((found.wins - found.losses) / 5)
    assert scored.figures["judge"]["version"] == "judge-1"
    asked = {body["messages"][1]["content"] for body, _ in server.asked}
    assert len(asked) <= 10
    assert "judge_forward" not in alone.examples[0]
    assert alone.evidence.judge is None
    assert evidence_of(scored.figures) == scored.evidence


def test_answers_of_both_models_are_looked_through_and_what_they_break_is_kept_by_example(
    evaluate, candidate, champion, sources, feedback
):
    def check(model, answers):
        return [frozenset({"refusal"} if model.id == candidate.id else {"personal", "verbatim"}) for _ in answers]

    recipe = RECIPE.model_copy(update={"guards": AnswerGuards(max_answer_tokens=4, answers=10)})
    scored = evaluate(candidate, champion, sources[0], [feedback[0]], recipe=recipe, check=check)
    alone = evaluate(candidate, None, sources[0], [], recipe=recipe, name="b", check=check)

    number = min(10, len(scored.of("target")))
    said = [e for e in scored.examples if e["guards_candidate"] is not None]
    assert {(e["set"], e["guards_candidate"], e["guards_champion"]) for e in said} == {
        ("target", "refusal", "personal,verbatim")
    }
    assert [(each.guard, each.number, each.candidate, each.champion) for each in scored.evidence.guards] == [
        ("personal", number, 0, number),
        ("verbatim", number, 0, number),
        ("refusal", number, number, 0),
    ]
    assert evidence_of(scored.figures) == scored.evidence
    failed = [
        each for each in judge(scored.evidence, PromoteGate()).reasons if "guard" in each and each.startswith("failed")
    ]
    assert len(failed) == 1
    assert {e["guards_candidate"] for e in alone.examples if e["set"] == "holdout"} >= {"refusal"}
    assert [each.champion for each in alone.evidence.guards] == [None] * 3
