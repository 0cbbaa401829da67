"""Parity: before a model leaves this stage, another process loads what was exported, as a server would, and finds the same.

Writes   <run folder>/probe.json   by the trainer, of some documents that it was trained on: the tokens, their text, and the
                                   log-probability of each token by the trainer's own model, in fp32
Compares the files by their hashes; of each text the tokens one by one; of each token the log-probability, in nats; and the
         golden answers, which stay with the model for whoever serves it
Law      Texts of the training data are in the run's folder alone, which is cleared when the model has its record.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from aifactory.engine.golden import check_golden_answers
from aifactory.engine.load import load_model, read_context_length
from aifactory.errors import AIFactoryError, BadRequestError, ParityError
from aifactory.text.documents import chat_prompt_tokens, document_tokens
from aifactory.text.shards import TokenRows
from aifactory.text.tokenizer import TextTokenizer, load_tokenizer
from aifactory.train.work import EXPORTED, Work, exported

PROBE = "probe.json"
_DOCUMENTS = 8
"""Of each set of rows."""
_ROWS = 512
"""Rows of a set in which they are looked for."""
_TOKENS = 256
"""Of a document whose log-probabilities are compared."""
_CHAT = ({"role": "user", "content": "Größe <|endoftext|> 日本語?"},)
"""A chat whose tokens are compared: it must be told apart from control tokens."""


def write_probe(task: Work, model: PreTrainedModel, tokenizer: TextTokenizer, rows: Sequence[TokenRows]) -> None:
    """Note what the trainer's model says of documents that it was trained on; `model` is what is exported, in fp32."""
    documents = [found for each in rows for found in _documents(each, tokenizer)]
    probe = {
        "process": _process(),
        "chat": _chat(tokenizer),
        "documents": [
            document | {"log_probs": _log_probs(model, document["ids"]).tolist()}
            for document in documents
            if len(document["ids"]) > 1
        ],
    }
    task.storage.write_bytes(json.dumps(probe).encode(), *task.run_folder, PROBE, durable=False)


def prove_export(task: Work, tolerance: float) -> dict[str, Any]:
    """Load the exported folder and compare it with what the trainer noted; runs in another process than the trainer's.

    tolerance   largest difference of a log-probability, nats
    Returns     how many tokens were compared, and the largest difference.
    Raises      ParityError; the run's export is then forgotten, so that the same command makes it again from the last
                checkpoint.
    """
    found, data = exported(task.storage, task.run_folder), task.storage.read_bytes(*task.run_folder, PROBE)
    try:
        if found is None or data is None:
            raise ParityError(
                f"expected {EXPORTED} and {PROBE} in {task.storage.path(*task.run_folder)}, found one of them missing."
            )
        return _compare(task, found["files"], json.loads(data), tolerance)
    except ParityError as error:
        task.storage.delete_file(*task.run_folder, EXPORTED)
        raise ParityError(
            f"{error} The model is not published; the same command exports it again from its last checkpoint."
        ) from error


def _compare(
    task: Work, files: Sequence[Mapping[str, Any]], probe: Mapping[str, Any], tolerance: float
) -> dict[str, Any]:
    assert probe["process"] != _process(), "a process that trained would prove nothing of what it exported"
    folder = task.storage.fetch([file["name"] for file in files], *task.model_folder, version=files[0]["sha256"])
    for file in files:
        with open(folder / file["name"], "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != file["sha256"]:
            raise ParityError(f"expected {folder / file['name']} as it was exported, found other bytes in it.")
    try:
        model = load_model(folder, device="cpu", dtype=torch.float32)
        tokenizer = load_tokenizer(folder)
    except AIFactoryError as error:
        raise ParityError(f"expected an export that can be loaded, found: {error}") from error
    largest = check_golden_answers(folder, model, tokenizer, tolerance=tolerance)
    if _chat(tokenizer) != probe["chat"]:
        raise ParityError(
            f"expected the chat template with which the model was trained, found another one in {folder}."
        )
    num_tokens = 0
    for document in probe["documents"]:
        served, trained = _tokens(tokenizer, document), document["ids"]
        if served != trained:
            at = next(
                (i for i, pair in enumerate(zip(served, trained, strict=False)) if pair[0] != pair[1]), len(served)
            )
            raise ParityError(
                f"expected the tokens {trained[at : at + 8]} that the model was trained on for "
                f"{document['text'][:80]!r} from token {at} on, found {served[at : at + 8]} by the tokenizer in {folder}."
            )
        difference = np.abs(_log_probs(model, document["ids"]).numpy() - np.asarray(document["log_probs"], np.float32))
        if not difference.max() <= tolerance:
            raise ParityError(
                f"expected log-probabilities within {tolerance:g} nats of the trainer's, found a difference of "
                f"{difference.max():.3g} at token {int(difference.argmax()) + 1} of {document['text'][:80]!r} by the weights in "
                f"{folder}."
            )
        largest = max(largest, float(difference.max()))
        num_tokens += len(document["ids"])
    return {
        "documents": len(probe["documents"]),
        "tokens": num_tokens,
        "largest_difference": largest,
        "tolerance": tolerance,
    }


def _documents(rows: TokenRows, tokenizer: TextTokenizer) -> list[dict[str, Any]]:
    """The first documents of a set: ids, prompt (none for a chat, whose text is not in its tokens) and text."""
    pieces: dict[str, dict[int, list[int]]] = {}
    prompts: dict[str, int] = {}
    found: list[dict[str, Any]] = []
    for index in range(min(len(rows), _ROWS)):
        ids = rows.read(np.array([index]))[0][0]
        for piece in rows.documents(index):
            name, start, offset, length, prompt = (piece[k] for k in ("row", "start", "offset", "length", "prompt"))
            assert isinstance(name, str) and isinstance(start, int) and isinstance(offset, int)
            assert isinstance(length, int) and isinstance(prompt, int)
            pieces.setdefault(name, {})[offset] = ids[start : start + length].tolist()
            prompts[name] = prompt
            whole = _joined(pieces[name])
            if whole[-1:] == [tokenizer.eos_id] and len(whole) > 1:
                del pieces[name]
                document = _told(tokenizer, whole, prompts[name])
                # What a tokenizer does not give back as it was (an unknown character) tells nothing of another one.
                if document is not None:
                    found.append(document)
                if len(found) == _DOCUMENTS:
                    return found
    return found


def _joined(pieces: Mapping[int, list[int]]) -> list[int]:
    """The beginning of a document, as far as its pieces lie without a gap."""
    ids: list[int] = []
    while len(ids) in pieces and pieces[len(ids)]:
        ids += pieces[len(ids)]
    return ids


def _told(tokenizer: TextTokenizer, ids: list[int], prompt: int) -> dict[str, Any] | None:
    """A document by its text; none where the text does not give the same tokens, by the trainer's own tokenizer."""
    is_chat = not tokenizer.control_ids.isdisjoint(ids[1:prompt])
    document = {
        "ids": ids,
        "prompt_tokens": prompt,
        "prompt": None if is_chat else tokenizer.decode(ids[1:prompt]),
        "text": tokenizer.decode(ids[max(1, prompt) : -1]),
    }
    return document if _tokens(tokenizer, document) == ids else None


def _tokens(tokenizer: TextTokenizer, document: Mapping[str, Any]) -> list[int]:
    """The tokens of a document as a tokenizer gives them; the prompt of a chat is taken as it is."""
    if document["prompt"] is not None:
        return document_tokens(tokenizer, prompt=document["prompt"], text=document["text"])[0]
    text = tokenizer.encode(document["text"])
    return [*document["ids"][: document["prompt_tokens"]], *text, tokenizer.eos_id]


def _chat(tokenizer: TextTokenizer) -> list[int]:
    """The tokens of a chat; empty where the model's own template refuses it."""
    try:
        return chat_prompt_tokens(tokenizer, _CHAT, fallback="plain")
    except BadRequestError:
        return []


@torch.inference_mode()
def _log_probs(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """log p of each token after those before it, nats, fp32: of the first _TOKENS at most, and of what the model can read."""
    ids_1T = torch.tensor([list(ids)[: min(_TOKENS, read_context_length(model.config))]], device=model.device)
    logits_TV: torch.Tensor = model(input_ids=ids_1T, use_cache=False).logits[0, :-1]
    return logits_TV.float().log_softmax(-1).gather(1, ids_1T[0, 1:, None])[:, 0].cpu()


def _process() -> str:
    return f"{socket.gethostname()}/{os.getpid()}"
