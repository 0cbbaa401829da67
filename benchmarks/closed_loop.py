"""ClosedLoop: a client that keeps so many requests going in an engine, and what it saw of their tokens. Needs no Ray.

Legend   c requests at once.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from aifactory.engine.engine import TorchEngine
from aifactory.engine.protocol import Delta, GenerationRequest, Sampling
from aifactory.text.tokenizer import END_OF_TEXT, TextTokenizer


@dataclass(slots=True)
class Seen:
    """The moments, in seconds, of one run."""

    first: list[float] = field(default_factory=list)
    """From sending a request to its first token."""
    between: list[float] = field(default_factory=list)
    """From each token of an answer to its next."""
    num_tokens: int = 0
    seconds: float = 0.0
    """From the first request to the last token."""

    @property
    def tokens_per_s(self) -> float:
        """Of answers, all requests together."""
        return self.num_tokens / self.seconds


def closed_loop(
    engine: TorchEngine, *, concurrency: int, num_requests: int, prompt_tokens: int, answer_tokens: int, seed: int
) -> Seen:
    """Send the next request when one ends, `concurrency` of them at once; greedy, all prompts different.

    Raises  RuntimeError if an answer ends by anything but its length or the model's end token.
    """
    rng, seen, done = random.Random(seed), Seen(), threading.Event()
    lock, failures = threading.Lock(), []
    # Token ids that the tokenizer has no text for answer without text, and a delta comes only with text: these have some.
    prompts = [tuple(rng.randrange(1, 256) for _ in range(prompt_tokens)) for _ in range(num_requests)]
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
                (seen.first if last[1] == 0 else seen.between).append(now - last[0])
                # What was held back came with this one: no time passed between them that a client could see.
                seen.between.extend([0.0] * (count - 1))
                last[:] = now, last[1] + count
                seen.num_tokens += count
            if delta.finish_reason is not None:
                if delta.finish_reason not in ("length", "stop"):
                    failures.append(delta.error or delta.finish_reason)
                ended += 1
                if ended == num_requests:
                    done.set()
                else:
                    send()

        engine.submit(GenerationRequest(id=f"{seed}-{index}", prompt_ids=prompts[index], sampling=sampling), on_delta)

    for _ in range(concurrency):
        send()
    done.wait()
    seen.seconds = time.perf_counter() - started
    if failures:
        raise RuntimeError(f"expected answers, found {failures[:3]}")
    return seen


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them don't exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 100) * len(ordered) // 100) - 1)]


def random_llama(config: LlamaConfig, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """A model of such a size with seeded random weights, made where it will be."""
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


def byte_tokenizer(num_tokens: int) -> TextTokenizer:
    """A tokenizer in which every id of the model has a text, so that each token is told at once."""
    names = [END_OF_TEXT, *(chr(0x4E00 + index) for index in range(num_tokens - 1))]
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
