"""Answers: what a model says to tasks, greedily, by the engine that serves it."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from functools import partial

from aifactory.errors import BadRequestError
from aifactory.records.artifacts import ArtifactStore, Model
from aifactory.text.tasks import Task

_SLOTS = 8


def greedy_answers(
    store: ArtifactStore, model: Model, tasks: Sequence[Task], max_tokens: int, chat_fallback: str
) -> list[str | None]:
    """The likeliest answer to each task, token by token; None where the model can't be asked it."""
    import torch

    from aifactory.engine.engine import TorchEngine
    from aifactory.engine.protocol import Delta, GenerationRequest, Sampling
    from aifactory.text.documents import chat_prompt_tokens, prompt_tokens
    from aifactory.text.tokenizer import load_tokenizer

    folder = store.fetch(model)
    tokenizer = load_tokenizer(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = TorchEngine.from_folder(folder, device=device, num_slots=_SLOTS, max_queued=max(1, len(tasks)))
    texts: list[list[str]] = [[] for _ in tasks]
    refused: set[int] = set()
    ended = [threading.Event() for _ in tasks]

    def hear(at: int, delta: Delta) -> None:
        texts[at].append(delta.text)
        if delta.error is not None:
            refused.add(at)
        if delta.finish_reason is not None:
            ended[at].set()

    try:
        for at, task in enumerate(tasks):
            try:
                turns = json.loads(task.messages) if task.messages else None
                ids = (
                    prompt_tokens(tokenizer, task.prompt)
                    if turns is None
                    else chat_prompt_tokens(tokenizer, turns, fallback=chat_fallback)
                )
                sampling = Sampling(max_tokens=max_tokens, temperature=0.0)
                engine.submit(
                    GenerationRequest(id=str(at), prompt_ids=tuple(ids), sampling=sampling), partial(hear, at)
                )
            except BadRequestError:
                refused.add(at)
                ended[at].set()
        for each in ended:
            each.wait()
    finally:
        engine.close(0.0)
    return [None if at in refused else "".join(parts) for at, parts in enumerate(texts)]
