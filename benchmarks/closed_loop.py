"""ClosedLoop: a client that keeps so many requests going in an engine of its own process. Needs no Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import torch
from moments import FIRST_LETTER, FIRST_OF_MANY, MOST_LETTERS, Seen
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from aifactory.engine.engine import TorchEngine
from aifactory.engine.protocol import Delta, GenerationRequest, Sampling
from aifactory.text.tokenizer import END_OF_TEXT, TextTokenizer


def closed_loop(engine: TorchEngine, prompts: Sequence[Sequence[int]], *, concurrency: int, answer_tokens: int) -> Seen:
    """Send the next prompt when a request ends, `concurrency` of them at once; greedy.

    Raises  RuntimeError if an answer ends by anything but its length or the model's end token.
    """
    seen, done = Seen(), threading.Event()
    lock, failures, num_requests = threading.Lock(), [], len(prompts)
    sampling = Sampling(max_tokens=answer_tokens, temperature=0.0, logprobs=None)
    started, sent, ended = time.perf_counter(), 0, 0

    def send() -> None:
        nonlocal sent
        with lock:
            if sent == num_requests:
                return
            index, sent = sent, sent + 1
        last = [time.perf_counter(), 0]

        def on_delta(delta: Delta) -> None:
            nonlocal ended
            now = time.perf_counter()
            count = len(delta.token_ids)
            if count:
                seen.add(count, seconds=now - last[0], first=last[1] == 0)
                seen.answers.setdefault(index, []).extend(delta.token_ids)
                last[:] = now, last[1] + count
            if delta.finish_reason is not None:
                if delta.finish_reason not in ("length", "stop"):
                    failures.append(delta.error or delta.finish_reason)
                ended += 1
                if ended == num_requests:
                    done.set()
                else:
                    send()

        request = GenerationRequest(id=f"{started}-{index}", prompt_ids=tuple(prompts[index]), sampling=sampling)
        engine.submit(request, on_delta)

    for _ in range(concurrency):
        send()
    done.wait()
    seen.seconds = time.perf_counter() - started
    if failures:
        raise RuntimeError(f"expected answers, found {failures[:3]}")
    return seen


def random_llama(config: LlamaConfig, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """A model of such a size with seeded random weights, made where it will be."""
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


def byte_tokenizer(num_tokens: int) -> TextTokenizer:
    """A tokenizer in which every id of the model has a text, so that each token is told at once."""
    first = FIRST_LETTER if num_tokens <= MOST_LETTERS else FIRST_OF_MANY
    names = [END_OF_TEXT, *(chr(first + index) for index in range(num_tokens - 1))]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return TextTokenizer(tokenizer.to_str().encode())


def bandwidth_gb_s(num_bytes: int, device: str, rounds: int = 3) -> float:
    """What reading so many bytes reaches, with torch's threads or the device: the best of some sums."""
    data = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    best = 0.0
    for _ in range(rounds):
        _wait(device)
        started = time.perf_counter()
        data.sum()
        _wait(device)
        best = max(best, data.nbytes / (time.perf_counter() - started) / 1e9)
    return best


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
