"""Tiny models and a tokenizer, made in the test run, seeded."""

from __future__ import annotations

import copy
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from conformance import KINDS, TIMEOUT_S, Collected, Conforming
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from aifactory.engine.engine import TorchEngine
from aifactory.engine.protocol import Engine, GenerationRequest, OnDelta, Sampling
from aifactory.text.tokenizer import TextTokenizer

LINES = ["the quick brown fox jumps over the lazy dog", "a bird in the hand is worth two in the bush"] * 4
CONTEXT = 160


def request(name: str, prompt_ids: list[int], **sampling: object) -> GenerationRequest:
    return GenerationRequest(id=name, prompt_ids=tuple(prompt_ids), sampling=Sampling(**sampling))  # type: ignore[arg-type]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(LINES, trainer)
    return TextTokenizer(trained.to_str().encode())


def make_model(kind: str, vocab_size: int) -> PreTrainedModel:
    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    # A wide initialisation keeps the logits apart, so that no tie hides behind the order of summation.
    ids = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}
    if kind == "llama":
        config = LlamaConfig(**sizes, **ids, num_key_value_heads=2, max_position_embeddings=CONTEXT)
        return LlamaForCausalLM(config).eval()
    if kind == "qwen2":
        config = Qwen2Config(**sizes, **ids, num_key_value_heads=1, max_position_embeddings=CONTEXT)
        return Qwen2ForCausalLM(config).eval()
    if kind == "qwen3":
        config = Qwen3Config(
            **sizes,
            **ids,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=True,
            max_position_embeddings=CONTEXT,
        )
        return Qwen3ForCausalLM(config).eval()
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, **ids)).eval()


@pytest.fixture(scope="session")
def make_model_of(tokenizer: TextTokenizer) -> Callable[[str], PreTrainedModel]:
    return lambda kind: make_model(kind, tokenizer.vocab_size)


@pytest.fixture(scope="session", params=["llama", "gpt2", "qwen2"])
def any_model(request: pytest.FixtureRequest, tokenizer: TextTokenizer) -> PreTrainedModel:
    return make_model(request.param, tokenizer.vocab_size)


@pytest.fixture(scope="session", params=["llama", "qwen2", "qwen3"])
def kernel_model(request: pytest.FixtureRequest, tokenizer: TextTokenizer) -> PreTrainedModel:
    """Those that the kernels compute, with norms and biases that show when they are forgotten."""
    made = make_model(request.param, tokenizer.vocab_size)
    torch.manual_seed(3)
    for name, parameter in made.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return made


@pytest.fixture(scope="session")
def model(tokenizer: TextTokenizer) -> PreTrainedModel:
    return make_model("llama", tokenizer.vocab_size)


@pytest.fixture(scope="session")
def make_request() -> Callable[..., GenerationRequest]:
    return request


@pytest.fixture(scope="session")
def collected() -> type[Collected]:
    return Collected


@pytest.fixture
def start(tokenizer: TextTokenizer) -> Iterator[Callable[..., TorchEngine]]:
    """Start engines that the test's end closes: over the model's own forward, unless the kernels are asked for."""
    engines: list[TorchEngine] = []

    def start_engine(model: PreTrainedModel, **options: object) -> TorchEngine:
        options = {"num_slots": 4, "prefill_chunk": 16, "compiled": False, **options}
        if options["compiled"]:
            # The kernels lay the weights out anew, in place.
            model = copy.deepcopy(model)
        engine = TorchEngine(model, tokenizer, **options)  # type: ignore[arg-type]
        engines.append(engine)
        return engine

    yield start_engine
    for engine in engines:
        engine.close(0.0)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, model: PreTrainedModel, tokenizer: TextTokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer.__reduce__()[1][0])
    return folder


@pytest.fixture(scope="session", params=KINDS[os.environ.get("AIFACTORY_ENGINE", "torch")])
def conforming(
    request: pytest.FixtureRequest, tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Conforming]:
    """The engines that are tested for what every engine promises."""
    made = Conforming(request.param, tokenizer, tmp_path_factory.mktemp(request.param))
    yield made
    made.close()


@pytest.fixture(scope="session")
def submit() -> Callable[..., None]:
    """Send a request with these options, under an id of its own unless one is given."""
    numbers = itertools.count()

    def send(
        engine: Engine,
        on_delta: OnDelta,
        prompt: Sequence[int],
        *,
        name: str | None = None,
        adapter: str | None = None,
        **sampling: object,
    ) -> None:
        asked = GenerationRequest(
            id=f"t{next(numbers)}" if name is None else name,
            prompt_ids=tuple(prompt),
            sampling=Sampling(**sampling),  # type: ignore[arg-type]
            adapter=adapter,
        )
        engine.submit(asked, on_delta)

    return send


@pytest.fixture(scope="session")
def ask(submit: Callable[..., None]) -> Callable[..., Collected]:
    """The same with an answer to wait for."""

    def send(engine: Engine, prompt: Sequence[int], **options: object) -> Collected:
        answer = Collected()
        submit(engine, answer, prompt, **options)
        return answer

    return send


@pytest.fixture(scope="session")
def wait_until() -> Callable[[Callable[[], bool]], None]:
    """Wait for what another thread does."""

    def wait(happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not happened():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.005)

    return wait
