"""Documents that were preferred or not: alone, padded as other libraries want them, and packed as training reads them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from aifactory.train.objectives import MarkedRows


@dataclass(frozen=True)
class Answer:
    """A prompt with an answer."""

    prompt: list[int]
    answer: list[int]
    mark: int

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.answer


def random_answers(seed: int, number: int, vocab_size: int, *, pairs: bool = False) -> list[Answer]:
    """Answers of 1 to 9 tokens to prompts of 1 to 7; in pairs, each two have one prompt, the first preferred."""
    generator = torch.Generator().manual_seed(seed)

    def some(most: int) -> list[int]:
        length = int(torch.randint(1, most, (), generator=generator))
        return torch.randint(1, vocab_size, (length,), generator=generator).tolist()

    answers = []
    for i in range(number):
        prompt = answers[-1].prompt if pairs and i % 2 else some(8)
        mark = (-1 if i % 2 else 1) if pairs else int(torch.randint(0, 2, (), generator=generator)) * 2 - 1
        answers.append(Answer(prompt, some(10), mark))
    return answers


def packed(rows: list[list[Answer]], *, padding: int = 3) -> MarkedRows:
    """Rows of these documents, filled up to one length."""
    width = max(sum(len(each.ids) for each in row) for row in rows) + padding
    made = torch.zeros(4, len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ends = [0]
        for each in row:
            ends.append(ends[-1] + len(each.ids))
        for each, (start, end) in zip(row, pairwise(ends), strict=True):
            made[0, i, start:end] = torch.tensor(each.ids)
            made[1, i, start:end] = torch.arange(end - start)
            made[2, i, start + len(each.prompt) : end] = 1
            made[3, i, start:end] = each.mark
        made[1, i, ends[-1] :] = torch.arange(width - ends[-1])
    return MarkedRows(ids_BT=made[0], positions_BT=made[1], loss_mask_BT=made[2], marks_BT=made[3])


def padded(answers: list[Answer]) -> dict[str, torch.Tensor]:
    """One document a row."""
    width = max(len(each.ids) for each in answers)
    ids, mask, completion = torch.zeros(3, len(answers), width, dtype=torch.long)
    for i, each in enumerate(answers):
        ids[i, : len(each.ids)] = torch.tensor(each.ids)
        mask[i, : len(each.ids)] = 1
        completion[i, len(each.prompt) : len(each.ids)] = 1
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}
