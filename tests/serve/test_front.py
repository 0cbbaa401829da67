"""Laws of the front: whichever replica is lost at whichever moment, the client gets what it would have got."""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
import threading
import time
from contextlib import aclosing

import httpx
import pytest
from chat_templates import RESPONSES, TEMPLATE
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

from aifactory.engine.answer import Answer
from aifactory.serve.front import Front
from aifactory.serve.gateway import Gateway
from aifactory.serve.relay import relay
from aifactory.serve.releases import Releases
from aifactory.text.tokenizer import TextTokenizer, load_tokenizer

PROMPT = "the quick "


class LostError(Exception):
    """A replica is gone."""


class Replicas:
    """Gateways that are lost when a test says so."""

    def __init__(self, *gateways):
        self.gateways = gateways
        self.cuts = []
        """Of each call in turn, after how many parts its replica is lost; None: not at all. Those beyond are not lost."""
        self.calls = []

    async def ask(self, call):
        # Over a wire, as between processes.
        call = pickle.loads(pickle.dumps(call))
        self.calls.append(call)
        number = len(self.calls) - 1
        cut = self.cuts[number] if number < len(self.cuts) else None
        seen = 0
        async with aclosing(relay(self.gateways[number % len(self.gateways)], call)) as parts:
            if cut == 0:
                raise LostError
            async for part in parts:
                yield pickle.loads(pickle.dumps(part))
                seen += 1
                if seen == cut:
                    raise LostError
        if cut is not None and cut > seen:
            raise LostError


class Client:
    """Asks a front, with the replicas behind it lost as it says."""

    def __init__(self, front, replicas):
        self.front, self.replicas = front, replicas
        app = Starlette(routes=[Route("/{path:path}", front.handle, methods=["GET", "POST"])])
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front", timeout=60)

    async def post(self, path, body, *cuts):
        self.replicas.cuts, self.replicas.calls = list(cuts), []
        Paced.loop = asyncio.get_running_loop()
        return await self.http.post(path, json={"model": "alpha", **body})

    async def events(self, path, body, *cuts):
        response = await self.post(path, {**body, "stream": True}, *cuts)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return [each.removeprefix("data: ") for each in response.text.split("\n\n") if each]


def shape(events):
    """What the events of a stream come to, whichever deltas came together."""
    assert events[-1] == "[DONE]"
    heads, choices, used = set(), {}, []
    for each in map(json.loads, events[:-1]):
        heads.add((each["id"], each["created"], each["model"], each["system_fingerprint"], each["object"]))
        used += [each["usage"]] if each.get("usage") else []
        for choice in each["choices"]:
            mine = choices.setdefault(
                choice["index"], {"roles": 0, "text": "", "reasons": [], "scores": [], "calls": []}
            )
            delta = choice.get("delta", {})
            mine["roles"] += "role" in delta
            mine["text"] += choice.get("text") or delta.get("content") or ""
            mine["reasons"] += [choice["finish_reason"]] if choice["finish_reason"] else []
            mine["calls"] += [(call["index"], call["function"]) for call in delta.get("tool_calls", [])]
            scores = choice["logprobs"]
            if scores:
                mine["scores"] += scores.get("content") or list(
                    zip(scores["tokens"], scores["token_logprobs"], scores["text_offset"], strict=True)
                )
    (head,) = heads
    return head[2:], choices, used


class Paced:
    """An engine whose every delta is read before the next is drawn, so that a cut falls where a test says, under any load."""

    loop = None
    """Of the test that runs."""

    def __init__(self, engine):
        self.engine = engine

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def submit(self, request, on_delta):
        def hand_over(delta):
            on_delta(delta)
            read = threading.Event()

            # The loop takes the delta in, wakes who reads it, and lets them read.
            def wait(turns):
                if turns:
                    self.loop.call_soon(wait, turns - 1)
                else:
                    read.set()

            self.loop.call_soon_threadsafe(wait, 5)
            read.wait(10.0)

        self.engine.submit(request, hand_over)


@pytest.fixture
def behind(factory, load):
    """Two replicas of the model of seed 1, and their books."""
    factory.promote(factory.publish(1))
    held = []

    def load_paced(folder):
        engine, tokenizer = load(folder)
        return Paced(engine), tokenizer

    def make():
        releases = Releases(factory.books, load_paced)
        releases.load_first()
        held.append(releases)
        return Gateway(factory.books, releases, factory.books.config.serve)

    replicas = Replicas(make(), make())
    client = Client(Front(factory.books.config, replicas.ask, lost=(LostError,)), replicas)
    client.books, client.releases, client.factory = factory.books, held, factory
    yield client
    for releases in held:
        releases.close(0.0)
    factory.books.close()


SEEDED = {"temperature": 1.2, "seed": 5}
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "quick"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "stream_options": {"include_usage": True}}),
        (COMPLETIONS, {"prompt": PROMPT, "max_tokens": 12, "logprobs": 2, "echo": True, **SEEDED}),
        (COMPLETIONS, {"prompt": [PROMPT, "dog"], "max_tokens": 6, "n": 2, "stop": ["x"], **SEEDED}),
        (COMPLETIONS, {"prompt": PROMPT, "max_tokens": 0, "echo": True}),
        (CHAT, {"messages": MESSAGES, "max_tokens": 10, "logprobs": True, "top_logprobs": 1, **SEEDED}),
        (CHAT, {"messages": MESSAGES, "n": 2, "max_tokens": 8, "presence_penalty": 0.6, "stream_options": {"include_usage": True}, **SEEDED}),
        (CHAT, {"messages": MESSAGES, "max_tokens": 20, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["quick", "brown"]}}}, **SEEDED}),
    ],
    ids=["greedy", "echo", "prompts", "only echo", "chat scores", "chat n", "schema"],
)  # fmt: skip
def test_a_stream_whose_replica_is_lost_after_any_part_ends_as_if_it_had_not_been(behind, path, body):
    async def check():
        whole = shape(await behind.events(path, body))
        for cut in range(1_000):
            events = await behind.events(path, body, cut)
            if len(behind.replicas.calls) == 1:
                break
            assert shape(events) == whole, cut
            ids = {json.loads(each)["id"] for each in events[:-1]}
            assert len(ids) == 1
        # The head, each event, and what comes after the last one.
        assert cut > 3

    asyncio.run(check())


class Scripted:
    """An engine that always draws the same tokens."""

    def __init__(self, tokenizer, text):
        self.context_length, self.num_unfinished, self.failure = 1_000, 0, None
        self._tokenizer, self._ids = tokenizer, [*tokenizer.encode(text), tokenizer.eos_id]

    def submit(self, request, on_delta):
        answer = Answer(request, on_delta, self._tokenizer, {self._tokenizer.eos_id})

        def draw():
            if answer.ended_before is not None:
                on_delta(answer.end(answer.ended_before))
            for token_id in self._ids[len(answer.begun) :]:
                delta = answer.push(token_id)
                if delta is not None:
                    on_delta(delta)
                time.sleep(0.001)  # so that deltas come one by one

        threading.Thread(target=draw, daemon=True).start()

    def cancel(self, request_id):
        pass

    def close(self, drain_timeout_s):
        pass


def test_a_tool_call_that_the_cut_goes_through_is_told_once_and_whole(factory, exported):
    plain = load_tokenizer(exported(1))
    tokenizer = TextTokenizer(plain.tokenizer_json, chat_template=TEMPLATE, response_template=RESPONSES)
    said = 'I look. <call>{"name": "weather", "arguments": {"city": "Bern 🙂"}}</call> Well.'
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    factory.promote(factory.publish(1))
    releases = Releases(factory.books, lambda folder: (Scripted(tokenizer, said), tokenizer))
    releases.load_first()
    replicas = Replicas(*[Gateway(factory.books, releases, factory.books.config.serve) for _ in range(2)])
    client = Client(Front(factory.books.config, replicas.ask, lost=(LostError,)), replicas)
    body = {"messages": MESSAGES, "tools": [tool], "max_tokens": 100}

    async def check():
        whole = shape(await client.events(CHAT, body))
        assert whole[1][0]["reasons"] == ["tool_calls"]
        assert len(whole[1][0]["calls"]) == 1
        for cut in range(1_000):
            events = await client.events(CHAT, body, cut)
            if len(replicas.calls) == 1:
                break
            assert shape(events) == whole, cut
        assert cut > 15

    asyncio.run(check())
    factory.books.close()


def test_two_replicas_may_be_lost_one_after_the_other(behind):
    body = {"prompt": PROMPT, "max_tokens": 30, "logprobs": 0, **SEEDED}

    async def check():
        whole = shape(await behind.events(COMPLETIONS, body))
        assert shape(await behind.events(COMPLETIONS, body, 4, 5)) == whole
        assert [call.progress.attempt for call in behind.replicas.calls] == [0, 1, 2]

    asyncio.run(check())


def test_what_was_not_seeded_goes_on_by_its_own_draws_and_says_nothing_of_a_seed(behind):
    body = {"prompt": PROMPT, "max_tokens": 30, "temperature": 1.5}

    async def check():
        events = await behind.events(COMPLETIONS, body, 5)
        _, choices, _ = shape(events)
        seed = behind.replicas.calls[0].progress.seed
        again = await behind.events(COMPLETIONS, {**body, "seed": seed})
        assert shape(again)[1] == choices
        kept = behind.books.feedback.completion(json.loads(events[0])["id"])
        assert json.loads(kept.request)["seed"] is None

    asyncio.run(check())


def test_an_answer_is_kept_once_as_a_whole_whenever_its_replica_is_lost(behind):
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}

    async def check():
        for cut in range(1, 30):
            events = await behind.events(COMPLETIONS, body, cut)
            completion = behind.books.feedback.completion(json.loads(events[0])["id"])
            assert (completion.answer, completion.answer_tokens) == (shape(events)[1][0]["text"], 8)
        plain = [(await behind.post(COMPLETIONS, body, cut)).json() for cut in range(3)]
        texts = [each["choices"][0]["text"] for each in plain]
        assert [behind.books.feedback.completion(each["id"]).answer for each in plain] == texts
        assert behind.books.feedback.counts()["completions"] == 29 + 3

    asyncio.run(check())


def test_a_request_that_was_told_nothing_succeeds_elsewhere(behind):
    async def check():
        for path, body in (
            (COMPLETIONS, {"prompt": PROMPT, "max_tokens": 5, "n": 2, **SEEDED}),
            (CHAT, {"messages": MESSAGES, "max_tokens": 5, "temperature": 0}),
            ("/v1/embeddings", {"input": PROMPT}),
            ("/tokenize", {"prompt": PROMPT}),
        ):
            whole = (await behind.post(path, body)).json()
            for cut in (0, 1, 2):
                answer = await behind.post(path, body, cut)
                assert len(behind.replicas.calls) == 2
                assert without_names(answer.json()) == without_names(whole)

    asyncio.run(check())


def without_names(answer):
    return {name: value for name, value in answer.items() if name not in ("id", "created")}


def test_a_request_that_three_replicas_died_of_is_asked_of_no_other(behind):
    async def check():
        answer = await behind.post(COMPLETIONS, {"prompt": PROMPT}, 0, 1, 0, None)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "replica_lost")
        assert "3 replicas" in answer.json()["error"]["message"]
        assert len(behind.replicas.calls) == 3
        events = await behind.events(COMPLETIONS, {"prompt": PROMPT, "max_tokens": 20}, 3, 3, 3, None)
        assert json.loads(events[-1])["error"]["code"] == "replica_lost"
        assert behind.front.num_open == 0

    asyncio.run(check())


def test_what_would_be_done_twice_is_asked_once(behind):
    async def check():
        answer = await behind.post("/v1/batches", {"input_file_id": "f", "endpoint": COMPLETIONS}, 0, None)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "replica_lost")
        assert len(behind.replicas.calls) == 1

    asyncio.run(check())


def test_a_stream_goes_on_by_its_own_release_while_that_is_warm_and_else_says_that_it_is_gone(behind, says):
    body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0}

    async def check():
        # The replica that goes on has taken up the next release, and another answer still holds the first.
        first, second = behind.releases
        behind.factory.promote(behind.factory.publish(2))
        with second.hold():
            await second.look(20.0)
            assert second.current.release.name == "alpha-r2"
            events = await behind.events(COMPLETIONS, body, 6)
            assert shape(events)[1][0]["text"] == says(1, PROMPT, 40)
        while second._draining:
            await asyncio.sleep(0.01)
        events = await behind.events(COMPLETIONS, body, 6)
        error = json.loads(events[-1])["error"]
        assert error["code"] == "replica_lost"
        assert "release 1" in error["message"]
        # What was told nothing is answered by whatever is there.
        events = await behind.events(COMPLETIONS, body, 1)
        assert shape(events)[1][0]["text"] == says(2, PROMPT, 40)
        assert first.current.release.name == "alpha-r1"

    asyncio.run(check())


def test_a_replica_that_is_behind_catches_up_with_the_release_of_the_stream(behind, says):
    body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0}

    async def check():
        first, second = behind.releases
        behind.factory.promote(behind.factory.publish(2))
        await first.look(20.0)

        async def later():
            await asyncio.sleep(0.5)
            await second.look(20.0)

        task = asyncio.create_task(later())
        events = await behind.events(COMPLETIONS, body, 6)
        await task
        assert shape(events)[1][0]["text"] == says(2, PROMPT, 40)

    asyncio.run(check())


def test_errors_are_those_of_the_gateway(behind):
    async def check():
        wrong = await behind.post(COMPLETIONS, {"prompt": PROMPT, "top_p": 7})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "top_p")
        large = await behind.post(COMPLETIONS, {"prompt": "x" * 30_000})
        assert (large.status_code, large.json()["error"]["type"]) == (413, "invalid_request_error")
        unknown = await behind.http.get("/v1/nothing")
        assert unknown.status_code == 404
        assert (await behind.http.get("/readyz")).json() == {"status": "ok", "model": "alpha-r1"}
        behind.front.is_draining = True
        told = await behind.http.get("/v1/models")
        assert (told.status_code, told.json()["error"]["code"]) == (503, "shutting_down")
        assert told.headers["Retry-After"] == "1"
        assert (await behind.http.get("/readyz")).status_code == 503
        assert (await behind.http.get("/healthz")).status_code == 200

    asyncio.run(check())


def test_a_client_that_goes_away_ends_the_work_at_the_replica(behind):
    async def check():
        body = {"prompt": PROMPT, "max_tokens": 100, "model": "alpha", "stream": True, "logit_bias": {"0": -100}}
        data = [json.dumps(body).encode()]
        gone = asyncio.Event()

        async def receive():
            if data:
                return {"type": "http.request", "body": data.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        sent = []

        async def send(message):
            sent.append(message)
            if message.get("body"):
                gone.set()

        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": [], "query_string": b""}
        response = await behind.front.handle(Request(scope, receive))
        await response(scope, receive, send)
        (engine,) = {releases.current.engine for releases in behind.releases[:1]}
        for _ in range(500):
            if not engine.num_unfinished and not behind.front.num_open:
                break
            await asyncio.sleep(0.01)
        assert (engine.num_unfinished, behind.front.num_open) == (0, 0)
        assert b"[DONE]" not in sent[-2]["body"]

    asyncio.run(check())


def test_what_is_cancelled_behind_the_front_before_it_said_anything_leaves_nothing_open(factory):
    # Serve cancels what a request has asked of others beside the request itself, in either order.
    async def cancelled(call):
        raise asyncio.CancelledError
        yield call

    async def check():
        body = [json.dumps({"model": "alpha", "prompt": PROMPT}).encode()]

        async def receive():
            if body:
                return {"type": "http.request", "body": body.pop(), "more_body": False}
            # Of a request that was cancelled Serve tells nothing more.
            await asyncio.Event().wait()

        front = Front(factory.books.config, cancelled, lost=(LostError,))
        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": [], "query_string": b""}
        response = await front.handle(Request(scope, receive))
        assert (response.status_code, front.num_open) == (499, 0)

    asyncio.run(check())
    factory.books.close()


def test_the_front_loads_neither_torch_nor_ray():
    found = "import sys, aifactory.serve.front; print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
