"""Prompts: what a client sent (texts, token ids, messages) as the tokens that the model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aifactory.errors import BadRequestError
from aifactory.serve.bodies import TokenizeBody
from aifactory.serve.questions import Prompt
from aifactory.serve.releases import Served
from aifactory.text.chat import chat_tokens, render_chat, turns_of
from aifactory.text.documents import chat_prompt_tokens, prompt_tokens


def tokens_of(served: Served, body: TokenizeBody, *, fallback: str) -> list[int]:
    """What /tokenize finds. Raises BadRequestError for messages that the template refuses."""
    tokenizer = served.tokenizer
    bos = [tokenizer.bos_id] if body.add_special_tokens else []
    if body.prompt is not None:
        return [*bos, *tokenizer.encode(body.prompt)]
    assert body.messages is not None
    ids = chat_tokens(
        tokenizer,
        body.messages,
        fallback=fallback,
        tools=body.tools or (),
        add_generation_prompt=body.add_generation_prompt,
    )
    return [*bos, *ids]


def require_known(served: Served, ids: Sequence[int], where: str) -> None:
    """Raises BadRequestError, naming `where`, for token ids that the model has not."""
    size = served.tokenizer.vocab_size
    unknown = next((token for token in ids if not 0 <= token < size), None)
    if unknown is not None:
        raise BadRequestError(f"Expected token ids below {size} in {where}, found {unknown}.", field=where)


def read_prompts(served: Served, prompts: Sequence[str | Sequence[int]], *, field: str = "prompt") -> list[Prompt]:
    """Texts as their tokens behind a bos, tokens as they are. Raises BadRequestError naming the prompt."""
    tokenizer, read = served.tokenizer, []
    for index, prompt in enumerate(prompts):
        where = field if len(prompts) == 1 else f"{field}[{index}]"
        if isinstance(prompt, str):
            read.append(Prompt(text=prompt, ids=tuple(prompt_tokens(tokenizer, prompt))))
            continue
        if not prompt:
            raise BadRequestError(f"Expected a prompt of at least one token in {where}, found none.", field=where)
        require_known(served, prompt, where)
        read.append(Prompt(text=tokenizer.decode(prompt), ids=tuple(prompt)))
    return read


def read_messages(
    served: Served,
    messages: Sequence[Mapping[str, Any]],
    *,
    fallback: str,
    tools: Sequence[Mapping[str, Any]],
) -> Prompt:
    """A chat as the template renders it, with its turns. Raises BadRequestError naming the message."""
    tokenizer = served.tokenizer
    ids = chat_prompt_tokens(tokenizer, messages, fallback=fallback, tools=tools)
    text = render_chat(
        messages,
        template=tokenizer.chat_template,
        fallback=fallback,
        eos_token=tokenizer.eos_token,
        tools=tools,
    )
    # A correction becomes a row, and rows know of no tools.
    return Prompt(text=text, ids=tuple(ids), messages="" if tools else turns_of(messages))
