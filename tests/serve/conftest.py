"""Tiny models with golden answers, books with releases in production, and the gateway on a port of its own."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path

import openai
import pytest
import torch
import uvicorn
from endpoint_on_ray import Served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from aifactory.config import Config
from aifactory.engine.engine import TorchEngine
from aifactory.engine.golden import GOLDEN_NAME, check_golden_answers, golden_answers
from aifactory.engine.load import load_model
from aifactory.engine.protocol import Delta, FinishReason, GenerationRequest, OnDelta
from aifactory.errors import CapacityError
from aifactory.records.artifacts import Model, Record, digest_of
from aifactory.records.books import Books
from aifactory.records.journal import Bound
from aifactory.records.registry import Release
from aifactory.serve.answers import Count
from aifactory.serve.gateway import Gateway
from aifactory.serve.releases import Releases
from aifactory.text.tokenizer import TextTokenizer, load_tokenizer

LINES = ["the quick brown fox jumps over the lazy dog", "a bird in the hand is worth two in the bush"] * 4
CONTEXT = 160
CONFIG = """\
name: alpha
ingest:
  sources:
    - {name: docs, kind: text, path: /data/docs}
serve:
  max_answer_tokens: 100
  max_body_bytes: 20_000
"""


def until(happened: Callable[[], bool], *, timeout_s: float = 20.0) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


class FakeEngine:
    """An `Engine` that says what the test tells it to, when it tells it to."""

    def __init__(self, *, capacity: int = 100) -> None:
        self.context_length = CONTEXT
        self.asked: list[str] = []
        self.requests: list[GenerationRequest] = []
        self.cancelled: list[str] = []
        self.closed = False
        self.failure: str | None = None
        self._capacity = capacity
        self._unfinished: dict[str, OnDelta] = {}
        self._open: dict[str, int] = {}
        self._changed = threading.Condition()

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    def submit(self, request: GenerationRequest, on_delta: OnDelta) -> None:
        with self._changed:
            if self.closed or len(self._unfinished) >= self._capacity:
                raise CapacityError("closing" if self.closed else "the queue is full")
            self._unfinished[request.id] = on_delta
            self._open[request.id] = request.sampling.n
            self.requests.append(request)
            self.asked.append(request.id)

    def say(
        self,
        text: str,
        reason: FinishReason | None = None,
        *,
        to: int = 0,
        index: int = 0,
        token_ids: Sequence[int] = (1,),
        error: str | None = None,
        fault: str | None = None,
    ) -> None:
        """The next delta of the request that came as number `to`; waits for it to come."""
        until(lambda: len(self.asked) > to)
        delta = Delta(
            text=text, token_ids=tuple(token_ids), finish_reason=reason, error=error, fault=fault, index=index
        )
        self._deliver(self.asked[to], delta)

    def cancel(self, request_id: str) -> None:
        if request_id in self._unfinished:
            self.cancelled.append(request_id)
            self._deliver(request_id, Delta(text="", token_ids=(), finish_reason="cancelled"))

    def close(self, drain_timeout_s: float) -> None:
        self.closed = True
        for request_id in list(self._unfinished):
            self.cancel(request_id)

    def _deliver(self, request_id: str, delta: Delta) -> None:
        with self._changed:
            on_delta = self._unfinished[request_id]
            self._open[request_id] -= delta.finish_reason is not None
            if not self._open[request_id] or delta.finish_reason == "cancelled":
                del self._unfinished[request_id]
        on_delta(delta)


class QuickEngine(FakeEngine):
    """One that says a text at once, in two parts."""

    def __init__(self, text: str) -> None:
        super().__init__(capacity=1_000)
        self.text = text

    def submit(self, request: GenerationRequest, on_delta: OnDelta) -> None:
        super().submit(request, on_delta)
        to = len(self.asked) - 1
        for index in range(request.sampling.n):
            self.say(self.text[:3], to=to, index=index)
            self.say(self.text[3:], "stop", to=to, index=index)


class Factory:
    """The books of a factory, and how models come into production in it."""

    def __init__(
        self,
        root: Path,
        exported: Callable[[int], Path],
        *,
        state_url: str | None = None,
        gateway: Mapping[str, object] | None = None,
        **endpoint: object,
    ) -> None:
        overrides = [f"runtime.storage={root}"]
        overrides += [] if state_url is None else [f"runtime.state_url={state_url}"]
        overrides += [f"runtime.endpoint.{name}={value}" for name, value in endpoint.items()]
        overrides += [f"runtime.gateway.{name}={value}" for name, value in (gateway or {}).items()]
        self.books = Books(Config.from_text(CONFIG, origin="test", overrides=overrides))
        self.scratch = root / "scratch"
        self._exported = exported
        self._count = 0

    def publish(self, seed: int, damage: Callable[[Path], None] | None = None) -> str:
        """Publish the model of this seed, damaged or not; its id."""
        self._count += 1
        folder = self.scratch / str(self._count)
        shutil.copytree(self._exported(seed), folder)
        if damage is not None:
            damage(folder)
        fingerprint = f"{self._count:064x}"[::-1]
        files = self.books.storage.upload(folder, *self.books.artifacts.folder("model", fingerprint))
        record = Record(
            kind="model",
            fingerprint=fingerprint,
            digest=digest_of(files),
            code_version=1,
            recipe={},
            inputs=[],
            files=files,
            figures={},
        )
        return self.books.artifacts.publish(Model, record).id

    def promote(self, model: str) -> Release:
        """Let production serve the model."""
        self._count += 1
        serving = self.books.registry.production()
        bound = Bound(kind="run", sources_digest="0" * 64, champion=None if serving is None else serving.number)
        journal = self.books.journal
        cycle = journal.claim(journal.open_cycle(f"cycle-{self._count}", recipe={}, bound=bound))
        return self.books.registry.promote(cycle, model=model, scorecard="scorecard/0", decision={"reasons": []})


class Endpoint:
    """A gateway that answers on a port."""

    def __init__(self, url: str, gateway: Gateway, releases: Releases, loop: asyncio.AbstractEventLoop) -> None:
        self.url = url
        self.gateway = gateway
        self.releases = releases
        self.loop = loop
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    @property
    def engine(self) -> TorchEngine:
        assert self.releases.current is not None
        return self.releases.current.engine  # type: ignore[return-value]

    @property
    def waiting(self) -> int:
        """Answers that wait to be admitted."""
        return self.gateway.admission.waiting

    def run(self, coroutine: object) -> None:
        """Run something of the gateway's in its own loop."""
        asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)  # type: ignore[arg-type]


@contextmanager
def answering(
    factory: Factory,
    releases: Releases,
    *,
    prefix: str = "",
    poll_s: float | None = None,
    batches: bool = False,
    count: Count = lambda _: None,
    mask: Callable[[str], str] | None = None,
) -> Iterator[Endpoint]:
    gateway = Gateway(factory.books, releases, factory.books.config.serve, count=count, mask=mask)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        follower = None if poll_s is None else asyncio.create_task(releases.follow(poll_s, 20.0))
        worker = asyncio.create_task(gateway.batches.run(0.02)) if batches else None
        teller = None if poll_s is None else asyncio.create_task(gateway.tell_outcomes(poll_s))
        yield
        for task in (follower, worker, teller):
            if task is not None:
                task.cancel()
        await gateway.close()

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        response = await gateway.handle(Request(scope, receive))
        await response(scope, receive, send)

    app = Starlette(routes=[Mount(prefix, app=answer)] if prefix else [], lifespan=lifespan)
    if not prefix:
        # A route would know no path with a line break in it, which Serve hands on as any other.
        app.router.default = answer
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    endpoint = Endpoint(f"http://127.0.0.1:{port}{prefix}", gateway, releases, loops[0])
    try:
        yield endpoint
    finally:
        endpoint.client.close()
        server.should_exit = True
        thread.join(10)
        releases.close(0.0)
        factory.books.close()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of the model of a seed, as the trainer exports it."""
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
    tokenizer = TextTokenizer(trained.to_str().encode())
    root = tmp_path_factory.mktemp("exported")

    def export(seed: int) -> Path:
        folder = root / str(seed)
        if folder.exists():
            return folder
        torch.manual_seed(seed)
        # A wide initialisation keeps the logits apart, so that no tie hides behind the order of summation.
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=tokenizer.vocab_size,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=64,
                max_position_embeddings=CONTEXT,
                bos_token_id=0,
                eos_token_id=0,
                initializer_range=0.3,
            )
        ).eval()
        model.save_pretrained(folder)
        (folder / "tokenizer.json").write_bytes(tokenizer.__reduce__()[1][0])
        (folder / GOLDEN_NAME).write_bytes(golden_answers(model, tokenizer))
        return folder

    return export


@pytest.fixture(scope="session")
def load() -> Callable[[Path], tuple[TorchEngine, TextTokenizer]]:
    """Load a release as a replica does."""

    def load_one(folder: Path) -> tuple[TorchEngine, TextTokenizer]:
        model, tokenizer = load_model(folder, device="cpu", dtype=torch.float32), load_tokenizer(folder)
        check_golden_answers(folder, model, tokenizer, tolerance=1e-3)
        return TorchEngine(model, tokenizer, num_slots=8, max_queued=64, num_threads=1), tokenizer

    return load_one


@pytest.fixture(scope="session")
def generated() -> Callable[[Path, str, int], str]:
    """What the model of a folder says by `model.generate`, greedily."""

    def generate(folder: Path, prompt: str, max_tokens: int) -> str:
        model, tokenizer = load_model(folder, device="cpu", dtype=torch.float32), load_tokenizer(folder)
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        with torch.inference_mode():
            output = model.generate(
                torch.tensor([ids]), do_sample=False, max_new_tokens=max_tokens, pad_token_id=0, eos_token_id=0
            )
        return tokenizer.decode([token for token in output[0, len(ids) :].tolist() if token != 0])

    return generate


@pytest.fixture(scope="session")
def says(exported: Callable[[int], Path], generated: Callable[[Path, str, int], str]) -> Callable[[int, str, int], str]:
    """`generated` by the model of a seed."""
    return lambda seed, prompt, max_tokens: generated(exported(seed), prompt, max_tokens)


@pytest.fixture
def factory(tmp_path: Path, exported: Callable[[int], Path]) -> Factory:
    """A factory without a release."""
    return Factory(tmp_path, exported)


@pytest.fixture
def make_small(exported: Callable[[int], Path]) -> Callable[..., Factory]:
    """Makes a factory without a release whose endpoint has other options."""
    return lambda root, **endpoint: Factory(root, exported, **endpoint)


@pytest.fixture(scope="module")
def lasting_factory(tmp_path_factory: pytest.TempPathFactory, exported: Callable[[int], Path]) -> Factory:
    """A factory with the model of seed 1 in production, for all tests of a module."""
    factory = Factory(tmp_path_factory.mktemp("lasting"), exported)
    factory.promote(factory.publish(1))
    return factory


@pytest.fixture(scope="module")
def endpoint(lasting_factory: Factory, load: Callable[[Path], tuple[TorchEngine, TextTokenizer]]) -> Iterator[Endpoint]:
    """The endpoint of `lasting_factory`, on a real engine."""
    releases = Releases(lasting_factory.books, load)
    releases.load_first()
    with answering(lasting_factory, releases) as one:
        yield one


@pytest.fixture
def answer_on() -> Callable[..., AbstractContextManager[Endpoint]]:
    """Start the gateway over releases that the test made."""
    return answering


@pytest.fixture(scope="module")
def module_answering() -> Callable[..., AbstractContextManager[Endpoint]]:
    """`answer_on` for all tests of a module."""
    return answering


@pytest.fixture(scope="module")
def module_factory(exported: Callable[[int], Path]) -> Callable[..., Factory]:
    """Makes a factory without a release, with these options of its endpoint, for all tests of a module."""
    return lambda root, **endpoint: Factory(root, exported, **endpoint)


@pytest.fixture
def fake_engine() -> type[FakeEngine]:
    return FakeEngine


@pytest.fixture
def quick() -> type[QuickEngine]:
    return QuickEngine


@pytest.fixture
def fake(factory: Factory, exported: Callable[[int], Path]) -> Iterator[tuple[Endpoint, FakeEngine]]:
    """An endpoint over a fake engine with room for 4 requests."""
    engine = FakeEngine(capacity=4)
    factory.promote(factory.publish(1))
    releases = Releases(factory.books, lambda folder: (engine, load_tokenizer(folder)))
    releases.load_first()
    with answering(factory, releases) as one:
        yield one, engine


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Clients that ask beside the test."""
    with ThreadPoolExecutor(32) as executor:
        yield executor


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    return until


@pytest.fixture
def serve(ray_session: None, module_factory: Callable[..., Factory], tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Serve the model of seed 1 on Ray, with these options of the endpoint."""
    from aifactory.serve.app import start, stop

    made: list[Factory] = []

    def begin(**options: object) -> Served:
        factory = module_factory(tmp_path, port=0, poll_s=0.2, **options)
        factory.promote(factory.publish(1))
        made.append(factory)
        return Served(factory, start(factory.books).url)

    yield begin
    for factory in made:
        stop(factory.books.config.name, drain_timeout_s=0.0)
        factory.books.close()
