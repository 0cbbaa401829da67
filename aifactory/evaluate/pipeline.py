"""Evaluate: Model, champion -> Scorecard.

Reads    the holdouts of the corpora, a sample of the rows that trained, the candidate and the release in production
Writes   scorecard/<fp>/examples.parquet   every task with the bits of each model
         scorecard/<fp>/lm_eval.parquet    every example of lm-eval's tasks with the score of each model, where some are asked for
         scorecard/<fp>/evidence.json      what the gate looks at
Depends  on the recipe, the models and the corpora; never on the number of workers.

Three sets of tasks: `holdout` (rows of the sources that never trained), `target` (feedback that never trained), and `known`
(rows that did train): what the release answers about those is its standard for live answers. Rows that have a prompt are
references: of those it is also scored how many a model would answer to the letter.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from aifactory.cluster.tasks import RunTasks
from aifactory.config import AnswerGuards, Evaluate
from aifactory.errors import EmptyCorpusError
from aifactory.evaluate.answering import greedy_answers
from aifactory.evaluate.comparisons import bits_per_byte, compared, integrity, over_best
from aifactory.evaluate.evidence import EXAMPLES_FILE
from aifactory.evaluate.examples import Example, beginning, beginnings, beginnings_after_others, tasks_of
from aifactory.evaluate.gate import Evidence
from aifactory.evaluate.guards import GUARDS, GuardFigures, counted
from aifactory.evaluate.judge import (
    JudgeClient,
    Judged,
    Judgement,
    Pair,
    agreement,
    judgement,
    read_labelled,
)
from aifactory.evaluate.lm_eval import (
    LM_EVAL_FILE,
    lm_eval_figures,
    lm_eval_table,
    run_lm_eval,
)
from aifactory.records.artifacts import ArtifactStore, Corpus, Model
from aifactory.records.rows import read_corpus
from aifactory.records.storage import Storage, StoredFile
from aifactory.text.tasks import Task

CODE_VERSION = 3
EXAMPLES_SCHEMA = pa.schema(
    [
        ("set", pa.string()),
        ("corpus", pa.string()),
        ("row", pa.string()),
        ("number", pa.int64()),
        ("cluster", pa.string()),
        ("bytes", pa.int64()),
        ("candidate", pa.float64()),
        ("champion", pa.float64()),
        ("unigram", pa.float64()),
        ("gzip", pa.float64()),
        ("candidate_exact", pa.bool_()),
        ("champion_exact", pa.bool_()),
        ("beginning_bytes", pa.int64()),
        ("beginning", pa.float64()),
        ("beginning_mispaired", pa.float64()),
    ]
)
Check = Callable[[Model, Sequence[str]], list[frozenset[str]]]
"""Which guards each of the answers of a model breaks."""
Scored = tuple[float, bool]
"""Bits of an answer, and whether the model would give just it."""
_CHUNK_TASKS = 150


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """What was written and found."""

    files: list[StoredFile]
    evidence: Evidence
    figures: dict[str, Any]


def evaluate_model(
    *,
    candidate: Model,
    champion: Model | None,
    sources: Corpus,
    feedback: Sequence[Corpus],
    recipe: Evaluate,
    store: ArtifactStore,
    target: tuple[str, ...],
    run: RunTasks,
    leave_out: frozenset[str] = frozenset(),
    chat_fallback: str = "none",
    check: Check | None = None,
    new_batches: Mapping[str, str] | None = None,
    best: tuple[str, Model] | None = None,
    lm_eval_python: str | None = None,
) -> Evaluated:
    """Score the candidate, and the champion on the same tasks, and write the scorecard to the directory `target`.

    leave_out       labels, in lower case, of rows that are no tasks
    chat_fallback   names the template of chats for a tokenizer that has none (`aifactory.text.chat`)
    check           which guards the answers of a model break; needed where the recipe has guards
    new_batches     by id of a corpus of `feedback` the batch that it was made of, where no ancestor has trained on it: each is
                    looked at alone, too
    best            name and model of the release that is the best so far on the sources' holdout, where that is another one than the
                    champion
    lm_eval_python  the interpreter that has lm-eval; none is this one
    """
    storage = store.storage
    holdout = tasks_of([sources], "holdout", "holdout", recipe, storage, leave_out)
    known = tasks_of([sources], "known", "train", recipe, storage, leave_out)
    wanted = tasks_of(feedback, "target", "holdout", recipe, storage, leave_out)
    if not holdout or (feedback and not wanted):
        which = "sources" if not holdout else "feedback"
        raise EmptyCorpusError(
            f"expected tasks in the holdout of the {which}, found none long enough; add data, raise the holdout's share, "
            "or lower evaluate.prompt_bytes and evaluate.answer_bytes."
        )
    examples = holdout + known + wanted
    chunks = [examples[i : i + _CHUNK_TASKS] for i in range(0, len(examples), _CHUNK_TASKS)]
    # Only people can pair an answer with a prompt that it does not belong to; sources are cut into pairs here.
    of_batches = [beginnings(wanted), beginnings_after_others(wanted)] if wanted else []

    (parity_error,) = run(_parity, [(store, candidate)])
    jobs = [(store, candidate, [e.task for e in chunk], chat_fallback) for chunk in chunks]
    if champion is not None:
        jobs += [(store, champion, [e.task for e in chunk if e.set != "known"], chat_fallback) for chunk in chunks]
    jobs += [(store, candidate, tasks, chat_fallback) for tasks in of_batches]
    fixed_chunks = [[e.task for e in chunk if e.set == "holdout"] for chunk in chunks] if best is not None else []
    jobs += [(store, best[1], tasks, chat_fallback) for tasks in fixed_chunks if best is not None]
    scored = run(_score_answers, jobs)
    by_best = _flat(scored[len(jobs) - len(fixed_chunks) :])
    scored = scored[: len(jobs) - len(fixed_chunks)]
    found_by_candidate = _flat(scored[: len(chunks)])
    found_by_champion = iter(_flat(scored[len(chunks) : 2 * len(chunks)])) if champion is not None else None
    own_beginnings, other_beginnings = (iter(found) for found in (scored[-2:] if wanted else ([], [])))
    judged = None
    if recipe.judge is not None and champion is not None:
        judged = _judged(recipe, (candidate, champion), wanted or holdout, store, run, chat_fallback)
    broken = None
    if recipe.guards is not None and check is not None:
        some = (wanted or holdout)[: recipe.guards.answers]
        broken = _guarded(recipe.guards, (candidate, champion), some, store, run, chat_fallback, check)
    tasks_by_lm_eval = None
    if recipe.lm_eval is not None:
        asked = [model for model in (candidate, champion) if model is not None]
        tasks_by_lm_eval = run(run_lm_eval, [(store, model, recipe.lm_eval, lm_eval_python) for model in asked])
    (baselines,) = run(_baselines, [(store, candidate, sources, [e.task for e in examples])])

    rows = []
    for e, (bits, is_exact), (unigram, gzip) in zip(examples, found_by_candidate, baselines, strict=True):
        by_champion = next(found_by_champion) if found_by_champion is not None and e.set != "known" else None
        rows.append(
            {
                "set": e.set,
                "corpus": e.corpus,
                "row": e.row,
                "number": e.number,
                "cluster": e.cluster,
                "bytes": e.num_bytes,
                "candidate": bits,
                "champion": None if by_champion is None else by_champion[0],
                "unigram": unigram,
                "gzip": gzip,
                "candidate_exact": is_exact if e.is_reference else None,
                "champion_exact": by_champion[1] if by_champion is not None and e.is_reference else None,
                "beginning_bytes": len(beginning(e.task.answer).encode()),
                "beginning": next(own_beginnings)[0] if e.set == "target" else None,
                "beginning_mispaired": next(other_beginnings)[0] if e.set == "target" else None,
            }
        )
    table = pa.Table.from_pylist(rows, schema=EXAMPLES_SCHEMA)
    if best is not None:
        rest = [None] * (len(examples) - len(by_best))  # the holdout comes first
        table = table.append_column("best", pa.array([bits for bits, _ in by_best] + rest, pa.float64()))
        exact = [is_exact if e.is_reference else None for e, (_, is_exact) in zip(examples, by_best, strict=False)]
        table = table.append_column("best_exact", pa.array(exact + rest, pa.bool_()))
    if judged is not None:
        for column in ("forward", "backward"):
            said = [getattr(judged.by_example.get(_key(e)), column, None) for e in examples]
            table = table.append_column(f"judge_{column}", pa.array(said, pa.float64()))
    if broken is not None:
        for side, by_example in broken.by_side.items():
            said = [by_example.get(_key(e)) for e in examples]
            table = table.append_column(f"guards_{side}", pa.array(said, pa.string()))
    comparisons = {name: compared(table, name, recipe) for name in ("holdout", "known", "target")}
    fixed, reference = comparisons["holdout"], comparisons["known"]
    assert fixed is not None
    found = None if judged is None else judged.judgement
    batches = integrity(table, new_batches or {}, recipe)
    evidence = Evidence(
        fixed=fixed, target=comparisons["target"], parity_error=parity_error, judge=found, new_batches=batches
    )
    if broken is not None:
        evidence = replace(evidence, guards=broken.figures)
    if best is not None:
        evidence = replace(evidence, best=over_best(table, best[0], recipe))
    figures = {
        "holdout": asdict(fixed),
        "known": None if reference is None else asdict(reference),
        "target": None if comparisons["target"] is None else asdict(comparisons["target"]),
        "new_batches": [asdict(batch) for batch in batches],
        "parity_error": parity_error,
        "gzip_bits_per_byte": bits_per_byte(table, "holdout", "gzip"),
        "unigram_bits_per_byte": bits_per_byte(table, "holdout", "unigram"),
        **({} if found is None else {"judge": found.to_json()}),
        **({} if evidence.best is None else {"best": asdict(evidence.best)}),
        **({} if broken is None else {"guards": [each.to_json() for each in broken.figures]}),
    }
    extra_files: dict[str, bytes] = {}
    if tasks_by_lm_eval is not None and recipe.lm_eval is not None:
        mine, theirs = tasks_by_lm_eval[0], tasks_by_lm_eval[1] if champion is not None else None
        by_doc = lm_eval_table(mine, theirs)
        found_tasks = lm_eval_figures(
            by_doc,
            {each.task: each.version for each in mine},
            margin=recipe.lm_eval.margin,
            confidence=recipe.confidence,
            samples=recipe.bootstrap_samples,
        )
        evidence = replace(evidence, lm_eval=found_tasks)
        figures["lm_eval"] = [asdict(each) for each in found_tasks]
        extra_files[LM_EVAL_FILE] = _parquet(by_doc)
    files = [
        storage.write_bytes(_parquet(table), *target, EXAMPLES_FILE),
        *(storage.write_bytes(data, *target, name) for name, data in extra_files.items()),
        storage.write_bytes(json.dumps(figures, indent=1).encode(), *target, "evidence.json"),
    ]
    return Evaluated(files=files, evidence=evidence, figures=figures)


def score_tasks(store: ArtifactStore, model: Model, tasks: Sequence[Task], chat_fallback: str) -> list[float]:
    """Bits of each answer under a model; the model stays loaded for the next call."""
    from aifactory.evaluate.scoring import answer_bits

    loaded, tokenizer = _loaded(store.storage, model.id, model.digest)
    return answer_bits(loaded, tokenizer, tasks, fallback=chat_fallback)


def _score_answers(store: ArtifactStore, model: Model, tasks: Sequence[Task], chat_fallback: str) -> list[Scored]:
    """The same, and of each whether the model would give just this answer."""
    from aifactory.evaluate.scoring import answer_scores

    loaded, tokenizer = _loaded(store.storage, model.id, model.digest)
    scores = answer_scores(loaded, tokenizer, tasks, fallback=chat_fallback)
    return [(score.bits, score.is_exact) for score in scores]


# ── the judge ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _JudgedExamples:
    by_example: dict[tuple[str, str, int], Judged]
    judgement: Judgement


def _judged(
    recipe: Evaluate,
    models: tuple[Model, Model],
    examples: Sequence[Example],
    store: ArtifactStore,
    run: RunTasks,
    chat_fallback: str,
) -> _JudgedExamples | None:
    """What the judge says of what the candidate and the champion answer to some examples; None where they answer nothing."""
    judge = recipe.judge
    assert judge is not None
    some = examples[: judge.max_pairs]
    tasks = [example.task for example in some]
    mine, theirs = run(
        greedy_answers, [(store, model, tasks, judge.max_answer_tokens, chat_fallback) for model in models]
    )
    client = JudgeClient(judge)
    agreed = None
    if judge.labelled is not None:
        labelled = read_labelled(judge.read_labelled(), origin=judge.labelled)
        agreed = agreement(labelled, client.judge(labelled))
    asked = [
        (example, Pair(prompt=example.task.asked, first=one, second=other))
        for example, one, other in zip(some, mine, theirs, strict=True)
        if one is not None and other is not None
    ]
    if not asked:
        return None
    said = client.judge([pair for _, pair in asked])
    return _JudgedExamples(
        {_key(example): each for (example, _), each in zip(asked, said, strict=True)},
        judgement(
            judge,
            said,
            [example.cluster for example, _ in asked],
            agreed,
            confidence=recipe.confidence,
            samples=recipe.bootstrap_samples,
        ),
    )


# ── guards ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Guarded:
    figures: tuple[GuardFigures, ...]
    by_side: dict[str, dict[tuple[str, str, int], str]]
    """By candidate and champion, and by example: the guards that the answer breaks, joined by commas."""


def _guarded(
    policy: AnswerGuards,
    models: tuple[Model, Model | None],
    examples: Sequence[Example],
    store: ArtifactStore,
    run: RunTasks,
    chat_fallback: str,
    check: Check,
) -> _Guarded:
    """What the answers of the candidate, and of the champion, to some examples break. No answer breaks nothing."""
    tasks = [example.task for example in examples]
    asked = [model for model in models if model is not None]
    answers = run(greedy_answers, [(store, model, tasks, policy.max_answer_tokens, chat_fallback) for model in asked])
    found = [check(model, [text or "" for text in texts]) for model, texts in zip(asked, answers, strict=True)]
    mine, theirs = found[0], found[1] if len(found) > 1 else None
    sides = zip(("candidate", "champion"), found, strict=False)
    return _Guarded(
        tuple(counted(guard, mine, theirs, tolerated=policy.tolerated(guard)) for guard in GUARDS),
        {
            side: {_key(example): ",".join(sorted(each)) for example, each in zip(examples, of_side, strict=True)}
            for side, of_side in sides
        },
    )


def _key(example: Example) -> tuple[str, str, int]:
    return example.set, example.row, example.number


# ── tasks on the cluster ──────────────────────────────────────────────────────────────────────────────────────────────


@lru_cache(maxsize=2)
def _loaded(storage: Storage, model_id: str, digest: str) -> tuple[Any, Any]:
    del digest  # in the cache's key: another rebuild of the same model is another one
    import torch

    from aifactory.engine.load import load_model
    from aifactory.text.tokenizer import load_tokenizer

    store = ArtifactStore(storage)
    folder = store.fetch(store.get(Model, model_id))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(folder, device=device, dtype=torch.float32), load_tokenizer(folder)


def _parity(store: ArtifactStore, model: Model) -> float:
    from aifactory.engine.golden import check_golden_answers

    loaded, tokenizer = _loaded(store.storage, model.id, model.digest)
    # The gate judges the size of the difference; a token that differs is an error at once.
    return check_golden_answers(store.fetch(model), loaded, tokenizer, tolerance=float("inf"))


def _baselines(store: ArtifactStore, model: Model, corpus: Corpus, tasks: Sequence[Task]) -> list[tuple[float, float]]:
    from aifactory.evaluate.scoring import Unigram, deflate_bits
    from aifactory.text.tokenizer import load_tokenizer

    texts = (
        row["text"]
        for _, table in read_corpus(store.storage, corpus, columns=["side", "text"])
        for row in table.to_pylist()
        if row["side"] == "train"
    )
    unigram = Unigram(load_tokenizer(store.fetch(model)), texts)
    return [(unigram.bits(task), deflate_bits(task)) for task in tasks]


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _flat(lists: Sequence[Sequence[Scored]]) -> list[Scored]:
    return [value for values in lists for value in values]
