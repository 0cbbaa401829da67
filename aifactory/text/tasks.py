"""Tasks: a prompt and the answer that should follow, cut from a text.

Whoever evaluates a text and whoever asks about it as a user does cut it the same way.
"""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked and what should be answered."""

    prompt: str
    answer: str
    messages: str = ""
    """The turns before the answer as JSON, where it is a chat: then they are asked, as the model's template renders them."""

    @property
    def asked(self) -> str:
        """What was asked as plain text: of a chat what was said."""
        if not self.messages:
            return self.prompt
        return "\n".join(turn["content"] for turn in json.loads(self.messages))


def cut_tasks(text: str, *, prompt_bytes: int, answer_bytes: int, max_tasks: int) -> list[Task]:
    """Cut a text into consecutive tasks that share no byte, then take at most `max_tasks`, evenly spaced.

    Prompts and answers are whole lines of about the given sizes (bytes of UTF-8); a line that is longer than a part
    is cut. What is left at the end is no task unless its answer has at least half its size.
    """
    tasks: list[Task] = []
    lines = [part for line in text.splitlines(keepends=True) for part in _short(line, min(prompt_bytes, answer_bytes))]
    at = 0
    while at < len(lines):
        prompt, at = _take(lines, at, prompt_bytes)
        answer, at = _take(lines, at, answer_bytes)
        if len(answer.encode()) * 2 >= answer_bytes:
            tasks.append(Task(prompt, answer))
    if len(tasks) <= max_tasks:
        return tasks
    return [tasks[i * len(tasks) // max_tasks] for i in range(max_tasks)]


def _take(lines: list[str], at: int, num_bytes: int) -> tuple[str, int]:
    taken: list[str] = []
    size = 0
    while at < len(lines) and size < num_bytes:
        taken.append(lines[at])
        size += len(lines[at].encode())
        at += 1
    return "".join(taken), at


def _short(line: str, num_chars: int) -> list[str]:
    return [line[i : i + num_chars] for i in range(0, len(line), num_chars)] if len(line) > 2 * num_chars else [line]
