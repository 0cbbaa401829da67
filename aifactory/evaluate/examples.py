"""Examples: the tasks on which releases are compared, chosen of the rows by the hash of their ids."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

import pyarrow as pa
import pyarrow.compute

from aifactory.config import Evaluate
from aifactory.records.artifacts import Corpus
from aifactory.records.identity import share_of
from aifactory.records.rows import read_corpus
from aifactory.records.storage import Storage
from aifactory.text.tasks import Task, cut_tasks

_BEGINNING_BYTES = 32
"""Measured on the quickstart's target: 0.087 [0.059, 0.122] bits per byte at 32, 0.008 [0.005, 0.012] on whole answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One task and where it came from."""

    set: str
    corpus: str
    row: str
    number: int
    """Which task of its row."""
    cluster: str
    task: Task
    is_reference: bool = True
    """Whether its answer is the one to its prompt; else both were cut from a text, which might as well go on otherwise."""

    @property
    def num_bytes(self) -> int:
        return len(self.task.answer.encode())


def tasks_of(
    corpora: Sequence[Corpus], name: str, side: str, recipe: Evaluate, storage: Storage, leave_out: frozenset[str]
) -> list[Example]:
    """At most `max_tasks` tasks of the rows on one side, those with the lowest hash of their ids."""
    chosen: list[tuple[float, int, Example]] = []  # a heap; the highest hash, negated, comes first
    order = count()
    columns = ["id", "cluster", "side", "prompt", "text", "messages", *(["label"] if leave_out else [])]
    for corpus in corpora:
        for _, table in read_corpus(storage, corpus, columns=columns):
            rows = table.filter(pa.compute.equal(table["side"], side))
            if leave_out:
                labels = pa.compute.utf8_lower(rows["label"])
                rows = rows.filter(pa.compute.invert(pa.compute.is_in(labels, pa.array(sorted(leave_out)))))
            for i, row in enumerate(rows["id"].to_pylist()):
                hashes = [share_of(f"{row}/{n}", salt=name) for n in range(recipe.max_tasks_per_row)]
                if len(chosen) == recipe.max_tasks and min(hashes) >= -chosen[0][0]:
                    continue  # none of its tasks would be among the lowest: it need not be cut
                prompt, text, messages = (rows[name][i].as_py() for name in ("prompt", "text", "messages"))
                for number, task in enumerate(_cut(prompt, text, messages, recipe)):
                    cluster = rows["cluster"][i].as_py()
                    example = Example(
                        set=name,
                        corpus=corpus.id,
                        row=row,
                        number=number,
                        cluster=cluster,
                        task=task,
                        is_reference=bool(prompt or messages),
                    )
                    heapq.heappush(chosen, (-hashes[number], next(order), example))
                    if len(chosen) > recipe.max_tasks:
                        heapq.heappop(chosen)
    return [example for _, _, example in sorted(chosen, key=lambda entry: (-entry[0], entry[1]))]


def _cut(prompt: str, text: str, messages: str, recipe: Evaluate) -> list[Task]:
    if prompt or messages:
        return [Task(prompt, text, messages)]
    return cut_tasks(
        text,
        prompt_bytes=recipe.prompt_bytes,
        answer_bytes=recipe.answer_bytes,
        max_tasks=recipe.max_tasks_per_row,
    )


def beginning(answer: str) -> str:
    """The first bytes of an answer, where its prompt tells the most about it; farther on, chance hides that."""
    return answer.encode()[:_BEGINNING_BYTES].decode("utf-8", "ignore") or answer[:1]


def beginnings(examples: Sequence[Example]) -> list[Task]:
    """The beginning of each answer after its own prompt."""
    return [replace(example.task, answer=beginning(example.task.answer)) for example in examples]


def beginnings_after_others(examples: Sequence[Example]) -> list[Task]:
    """The beginning of each answer after the prompt of a task of another cluster, as far as there is one."""
    number = len(examples)
    tasks = []
    for i, example in enumerate(examples):
        others = (examples[(i + step) % number] for step in range(1, number))
        other = next((o for o in others if o.cluster != example.cluster), examples[(i + 1) % number])
        tasks.append(replace(other.task, answer=beginning(example.task.answer)))
    return tasks
