"""Engines under test, each with what it promises in its own measure; and what collects their answers."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from aifactory.engine.protocol import Delta, Engine, TokenScore
from aifactory.text.tokenizer import TextTokenizer

CONTEXT = 2048
KINDS = {
    "torch": ("torch-plain", "torch-kernels", "torch-steps"),
    "cuda": ("cuda-plain", "cuda-graphs"),
    "vllm": ("vllm",),
}
"""What is tested by AIFACTORY_ENGINE."""
TIMEOUT_S = 120.0


class Collected:
    """The deltas of one request, and a way to wait for the last."""

    def __init__(self, on_each: Callable[[Delta], None] | None = None) -> None:
        self.deltas: list[Delta] = []
        self.begun = threading.Event()
        self._on_each = on_each
        self._done = threading.Event()

    def __call__(self, delta: Delta) -> None:
        assert self.reason is None, "a delta after the last"
        self.deltas.append(delta)
        self.begun.set()
        if self._on_each is not None:
            self._on_each(delta)
        if delta.finish_reason is not None:
            self._done.set()

    def wait(self) -> Collected:
        assert self._done.wait(TIMEOUT_S), f"no last delta, only {self.deltas}"
        return self

    @property
    def ids(self) -> list[int]:
        return [token_id for delta in self.deltas for token_id in delta.token_ids]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def scores(self) -> list[TokenScore]:
        return [score for delta in self.deltas for score in delta.scores]

    @property
    def reason(self) -> str | None:
        return self.deltas[-1].finish_reason if self.deltas else None


class Indexed:
    """The tokens of a request's answers, each by its index."""

    def __init__(self, n: int) -> None:
        self.ids: list[list[int]] = [[] for _ in range(n)]
        self.reasons: list[str | None] = [None] * n
        self._done = threading.Event()

    def __call__(self, delta: Delta) -> None:
        assert self.reasons[delta.index] is None
        self.ids[delta.index] += delta.token_ids
        self.reasons[delta.index] = delta.finish_reason
        if all(self.reasons):
            self._done.set()

    def wait(self) -> list[list[int]]:
        assert self._done.wait(TIMEOUT_S)
        return self.ids


class Many:
    """Several of them."""

    def __init__(self, answers: Sequence[Collected]) -> None:
        self.answers = answers

    def __iter__(self) -> Iterator[Collected]:
        return iter(self.answers)

    def __len__(self) -> int:
        return len(self.answers)

    def wait_until_begun(self, count: int) -> None:
        """Until so many of them have had a delta."""
        deadline = time.monotonic() + TIMEOUT_S
        while sum(each.begun.is_set() for each in self.answers) < count:
            assert time.monotonic() < deadline, "none has begun"
            time.sleep(0.005)


def held_until(let: threading.Event) -> Callable[[Delta], None]:
    """A callback that holds its engine until it is let go."""

    def hold(delta: Delta) -> None:
        del delta
        assert let.wait(TIMEOUT_S)

    return hold


@torch.inference_mode()
def plain_logits(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """(T, V), by the model's own forward."""
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def teacher_forced(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Log-probabilities (T, V)."""
    return plain_logits(model, ids).double().log_softmax(-1)


class Conforming:
    """One kind of engine: how it is started, and what it promises in its own measure."""

    num_slots = 8
    max_queued = 60

    def __init__(self, kind: str, tokenizer: TextTokenizer, scratch: Path) -> None:
        self.kind = kind
        self.folder = scratch
        self.model = make_model(tokenizer.vocab_size)
        self._tokenizer = tokenizer
        self._engines: list[Engine] = []
        self._shared: Engine | None = None
        # The project's own engine in fp32: token for token what `generate` gives, scores to rounding. vLLM in fp32: each
        # greedy token within a thousandth of a nat of the model's best for what came before it.
        self.greedy_nats, self.score_nats = (1e-3, 1e-3) if kind == "vllm" else (0.0, 1e-4)

    @property
    def shared(self) -> Engine:
        """One engine on `model` for all tests."""
        if self._shared is None:
            self._shared = self.start(self.model)
        return self._shared

    def start(self, model: PreTrainedModel) -> Engine:
        """An engine on a model; it is closed when all tests have been."""
        if self.kind == "vllm":
            from aifactory.engine.vllm_engine import VllmEngine

            folder = self.folder / f"model-{len(list(self.folder.iterdir()))}"
            model.save_pretrained(folder)
            (folder / "tokenizer.json").write_bytes(self._tokenizer.tokenizer_json)
            engine: Engine = VllmEngine(
                folder,
                self._tokenizer,
                num_slots=self.num_slots,
                max_queued=self.max_queued,
                num_threads=1,
                max_adapters=2,
                max_adapter_rank=8,
                eager=True,
            )
        else:
            from aifactory.engine.engine import TorchEngine

            engine = TorchEngine(
                copy.deepcopy(model),
                self._tokenizer,
                num_slots=self.num_slots,
                max_queued=self.max_queued,
                prefill_chunk=16,
                device="cuda" if self.kind.startswith("cuda") else "cpu",
                compiled=self.kind == "torch-kernels",
                graphs=self.kind in ("torch-steps", "cuda-graphs"),
            )
        self._engines.append(engine)
        return engine

    def close(self) -> None:
        """End all that was started."""
        for engine in self._engines:
            engine.close(0.0)

    def make_model(self, **options: Any) -> PreTrainedModel:
        """Another model for the same tokenizer."""
        return make_model(**{"vocab_size": self._tokenizer.vocab_size, **options})

    def logits(self, ids: Sequence[int]) -> Tensor:
        """(T, V), of `model`."""
        return plain_logits(self.model, ids)

    def check_greedy(
        self,
        model: PreTrainedModel,
        prompt: Sequence[int],
        ids: Sequence[int],
        max_tokens: int,
        *,
        bias: Mapping[int, float] | None = None,
    ) -> None:
        """The answer is the model's own, as near as is promised."""
        eos = model.config.eos_token_id
        assert len(ids) == max_tokens or (ids and ids[-1] == eos and len(ids) < max_tokens)
        assert eos not in ids[:-1]
        if not ids:
            return
        if self.greedy_nats == 0.0 and bias is None:
            assert list(ids) == generate(model, prompt, max_tokens)
            return
        log_probs = teacher_forced(model, [*prompt, *ids])[len(prompt) - 1 : -1]
        for token_id, value in (bias or {}).items():
            log_probs[:, token_id] += value
        chosen = log_probs.gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert float((log_probs.max(-1).values - chosen).max()) <= max(self.greedy_nats, 1e-4)

    def check_score(self, found: float | None, expected: Tensor) -> None:
        """A log-probability is the model's own, as near as is promised."""
        assert found is not None and abs(found - float(expected)) <= self.score_nats, (found, float(expected))


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """What transformers answers, greedily."""
    if max_tokens == 0:
        return []
    output = model.generate(
        torch.tensor([list(prompt)]), do_sample=False, max_new_tokens=max_tokens, pad_token_id=0, eos_token_id=0
    )
    return output[0, len(prompt) :].tolist()


def make_model(vocab_size: int, *, seed: int = 7) -> PreTrainedModel:
    """A small Llama, with heads of a size that both engines' kernels have."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=128,
        vocab_size=vocab_size,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
        # Wide, so that the logits are apart and no tie hides behind the order of summation.
        initializer_range=0.25,
    )
    return LlamaForCausalLM(config).eval()
