"""Laws of tasks: whoever cuts a text gets the same ones, and no byte of it is in two."""

from __future__ import annotations

import random

import pytest

from aifactory.text.tasks import Task, cut_tasks

ALPHABET = "abc é中😀\n\t \u2028x"


@pytest.mark.parametrize("seed", range(10))
def test_tasks_are_consecutive_and_share_no_byte(seed):
    rng = random.Random(seed)
    text = "".join(rng.choice(ALPHABET) for _ in range(rng.randrange(0, 4000)))
    tasks = cut_tasks(text, prompt_bytes=60, answer_bytes=100, max_tasks=10**6)

    joined = "".join(task.prompt + task.answer for task in tasks)
    assert text.startswith(joined)
    assert len(text[len(joined) :].encode()) < 60 + 100 + 2 * 4 * 120
    for task in tasks[:-1]:
        assert len(task.prompt.encode()) >= 60
        assert len(task.answer.encode()) >= 100
    assert all(len(task.answer.encode()) >= 50 for task in tasks)


def test_prompts_and_answers_are_whole_lines():
    lines = [f"line {i:03d}\n" for i in range(100)]
    tasks = cut_tasks("".join(lines), prompt_bytes=25, answer_bytes=40, max_tasks=100)

    assert tasks[0] == Task("".join(lines[:3]), "".join(lines[3:8]))
    assert all((task.prompt + task.answer).endswith("\n") for task in tasks)


def test_a_line_that_is_far_too_long_is_cut():
    tasks = cut_tasks("x" * 1000, prompt_bytes=50, answer_bytes=100, max_tasks=100)

    assert [(len(task.prompt), len(task.answer)) for task in tasks] == [(50, 100)] * 6 + [(50, 50)]


def test_of_too_many_tasks_some_are_taken_evenly():
    text = "".join(f"{i:09d}\n" for i in range(200))
    everything = cut_tasks(text, prompt_bytes=10, answer_bytes=10, max_tasks=100)

    assert len(everything) == 100
    assert cut_tasks(text, prompt_bytes=10, answer_bytes=10, max_tasks=4) == everything[::25]


@pytest.mark.parametrize("text", ["", "\n", "short", "a" * 10 + "\n" + "b" * 4])
def test_what_is_too_short_is_no_task(text):
    assert cut_tasks(text, prompt_bytes=10, answer_bytes=10, max_tasks=4) == []
