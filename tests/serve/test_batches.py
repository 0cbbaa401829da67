"""Laws of files and batches: every line is answered once, whoever is killed, and behind those who wait for an answer."""

from __future__ import annotations

import asyncio
import io
import json

import httpx
import openai
import pytest

from aifactory.errors import FencedError
from aifactory.records.batch_jobs import LEASE_S
from aifactory.serve.batches import Batches
from aifactory.serve.releases import Releases
from aifactory.text.tokenizer import load_tokenizer

PATH = "/v1/completions"


def line(number, *, path=PATH, **body):
    asked = {"model": "alpha", "prompt": f"line {number} ", "max_tokens": 4, "temperature": 0, **body}
    return {"custom_id": f"id-{number}", "method": "POST", "url": path, "body": asked}


def jsonl(lines):
    return "".join(json.dumps(each) + "\n" for each in lines).encode()


def rows_of(text):
    return [json.loads(each) for each in text.splitlines()]


@pytest.fixture(scope="module")
def batching(tmp_path_factory, exported, load, module_answering, module_factory):
    """An endpoint on a real engine that also works at batches."""
    factory = module_factory(tmp_path_factory.mktemp("batching"))
    factory.promote(factory.publish(1))
    releases = Releases(factory.books, load)
    releases.load_first()
    with module_answering(factory, releases, batches=True) as endpoint:
        yield endpoint, factory


def upload(endpoint, lines):
    file = ("requests.jsonl", io.BytesIO(lines if isinstance(lines, bytes) else jsonl(lines)))
    return endpoint.client.files.create(file=file, purpose="batch")


def batch_of(endpoint, lines, *, path=PATH):
    file = upload(endpoint, lines)
    return endpoint.client.batches.create(input_file_id=file.id, endpoint=path, completion_window="24h")


def ended(endpoint, batch, wait_until):
    states = ("completed", "failed", "cancelled", "expired")
    wait_until(lambda: endpoint.client.batches.retrieve(batch.id).status in states, timeout_s=60)
    return endpoint.client.batches.retrieve(batch.id)


def test_a_file_comes_back_as_it_was_until_it_is_deleted(batching):
    endpoint, factory = batching
    client = endpoint.client

    file = upload(endpoint, b"\x00\xff any bytes\r\n")

    assert (file.bytes, file.filename, file.purpose) == (14, "requests.jsonl", "batch")
    assert client.files.content(file.id).read() == b"\x00\xff any bytes\r\n"
    assert client.files.retrieve(file.id).id == file.id
    assert file.id in [each.id for each in client.files.list()]
    assert client.files.delete(file.id).deleted is True
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    assert factory.books.storage.read_bytes("files", file.id) is None


def test_lists_come_in_pages_that_hold_each_once(batching):
    endpoint, _ = batching
    for number in range(5):
        upload(endpoint, [line(number)])
    files = endpoint.client.files
    every = [each.id for each in files.list()]
    first = files.list(limit=2)

    assert [each.id for each in first.data] == every[:2]
    assert first.has_more
    assert [each.id for each in files.list(limit=2, after=every[1]).data] == every[2:4]
    # The client asks for the next page by itself.
    assert [each.id for each in files.list(limit=2)] == every
    assert [each.id for each in files.list(order="asc")] == every[::-1]
    assert not files.list(purpose="fine-tune").data
    assert not files.list(after=every[-1]).has_more
    assert endpoint.client.batches.list(limit=1).has_more in (True, False)


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/files?limit=0", "limit"),
        ("/v1/files?limit=many", "limit"),
        ("/v1/files?after=nobody", "after"),
        ("/v1/files?order=up", "order"),
        ("/v1/batches?limit=101", "limit"),
        ("/v1/batches?order=asc", "order"),
        ("/v1/batches?limit=1&limit=2", "limit"),
        ("/v1/models?limit=3", "limit"),
    ],
)
def test_a_parameter_that_is_wrong_or_unknown_is_named_and_never_ignored(batching, path, field):
    answer = httpx.get(f"{batching[0].url}{path}")

    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field


def test_each_line_gets_what_the_same_request_gets(batching, wait_until):
    endpoint, factory = batching
    lines = [
        line(0),
        line(1, n=2, temperature=1, seed=5),
        line(2, temperature=-1),
        line(3, stream=True),
        line(4, model="beta"),
    ]

    batch = ended(endpoint, batch_of(endpoint, lines), wait_until)

    assert batch.status == "completed"
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (5, 2, 3)
    answers = rows_of(endpoint.client.files.content(batch.output_file_id).text)
    errors = rows_of(endpoint.client.files.content(batch.error_file_id).text)
    assert [row["custom_id"] for row in answers] == ["id-0", "id-1"]
    for row, asked in zip(answers, lines, strict=False):
        direct = endpoint.client.completions.create(**asked["body"])
        assert [c["text"] for c in row["response"]["body"]["choices"]] == [c.text for c in direct.choices]
        kept = row["response"]["body"]["id"] if asked["body"].get("n", 1) == 1 else row["response"]["body"]["id"] + "-0"
        assert factory.books.feedback.completion(kept) is not None
    assert [row["response"]["status_code"] for row in errors] == [400, 400, 404]
    assert [row["response"]["body"]["error"]["param"] for row in errors] == ["temperature", "stream", "model"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings"])
def test_chats_and_embeddings_come_in_batches_too(batching, wait_until, path):
    endpoint, _ = batching
    body = (
        {"model": "alpha", "input": "x"}
        if path == "/v1/embeddings"
        else {"model": "alpha", "max_tokens": 2, "messages": [{"role": "user", "content": "x"}]}
    )

    batch = ended(endpoint, batch_of(endpoint, [line(0, path=path) | {"body": body}], path=path), wait_until)

    (row,) = rows_of(endpoint.client.files.content(batch.output_file_id).text)
    assert row["response"]["status_code"] == 200
    assert row["error"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"{\n", "JSON"),
        (jsonl([line(1), line(1)]), "custom_id of its own"),
        (jsonl([line(1, path="/v1/chat/completions")]), "/v1/completions"),
        (jsonl([line(1) | {"body": 5}]), "an object as the body"),
        (jsonl([line(1) | {"more": 5}]), "an object of custom_id"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_fails_with_the_reason(batching, wait_until, content, message):
    endpoint, _ = batching

    batch = ended(endpoint, batch_of(endpoint, content), wait_until)

    assert batch.status == "failed"
    assert message in batch.errors.data[0].message
    assert batch.output_file_id is None


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"endpoint": PATH, "completion_window": "24h"}, "input_file_id"),
        ({"input_file_id": "file-x", "endpoint": PATH, "completion_window": "24h"}, "input_file_id"),
        ({"input_file_id": "file-x", "endpoint": "/v1/images", "completion_window": "24h"}, "endpoint"),
        ({"input_file_id": "file-x", "endpoint": PATH, "completion_window": "1h"}, "completion_window"),
    ],
)
def test_a_wrong_batch_is_named(batching, body, field):
    endpoint, _ = batching
    error = httpx.post(f"{endpoint.url}/v1/batches", json=body).json()["error"]

    assert error["param"] == field


@pytest.mark.parametrize(
    "hostile",
    [
        json.dumps({**line(1), "custom_id": "\ud800"}).encode(),
        json.dumps(line(1, prompt="\ud800\0", user="\0")).encode(),
        json.dumps(line(1, structured_outputs={"regex": "a{1000}{1000}"})).encode(),
        *(json.dumps(line(1, user="@")).replace('"@"', "[" * n + "]" * n).encode() for n in (500, 900, 950, 970, 985)),
        *(json.dumps(line(1, logit_bias={"5": number})).encode() for number in (float("nan"), 10**400)),
    ],
)
def test_a_hostile_line_ends_its_batch_and_holds_up_no_other(batching, wait_until, hostile):
    endpoint, _ = batching

    asked = batch_of(endpoint, hostile + b"\n" + jsonl([line(2)]))
    after = batch_of(endpoint, [line(3)])

    assert ended(endpoint, after, wait_until).request_counts.completed == 1
    batch = ended(endpoint, asked, wait_until)
    assert (batch.status, batch.request_counts.completed) in {("failed", 0), ("completed", 1), ("completed", 2)}


def test_a_wrong_upload_is_named(batching):
    endpoint, _ = batching
    url = f"{endpoint.url}/v1/files"
    file = {"file": ("x.jsonl", b"{}")}

    assert httpx.post(url, files=file, data={"purpose": "fine-tune"}).json()["error"]["param"] == "purpose"
    assert httpx.post(url, files={"other": ("x", b"")}, data={"purpose": "batch"}).json()["error"]["param"] == "file"
    assert httpx.post(url, json={}).json()["error"]["param"] == "file"
    with pytest.raises(openai.NotFoundError):
        endpoint.client.batches.retrieve("batch-none")


# ── who is killed ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Clock:
    def __init__(self):
        self.now = 1.7e9

    def __call__(self):
        return self.now


@pytest.fixture
def queue(factory):
    factory.books.journal.clock = Clock()
    return factory.books.batches


def opened(queue, count):
    file = queue.add_file(jsonl([line(number) for number in range(count)]), filename="x", purpose="batch")
    return queue.open_job(endpoint=PATH, input_file=file.id, note={})


def output_of(queue, job):
    return [json.loads(row) for row in queue.read_file(queue.job(job.id).output_file).splitlines()]


def test_after_each_kill_another_goes_on_and_no_line_is_lost_or_there_twice(queue):
    job = opened(queue, 12)
    answered, kill_at = [], iter([3, 4, 1])

    async def attempt():
        left = next(kill_at, 100)

        async def ask(path, body, identity, key_id):
            nonlocal left
            left -= 1
            if left < 0:
                await asyncio.Event().wait()  # where it is when it is killed
            answered.append(identity)
            return 200, {"prompt": json.loads(body)["prompt"]}

        worker = Batches(queue, ask, concurrency=2)
        task = asyncio.create_task(worker.work())
        while not task.done() and left >= 0:
            await asyncio.sleep(0.005)
        if not task.done():
            await asyncio.sleep(0.1)
            # Killed: its hold stays until it runs out.
            holding = queue.let_go
            queue.let_go = lambda *_: None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            queue.let_go = holding

    for _ in range(4):
        asyncio.run(attempt())
        queue.journal.clock.now += LEASE_S + 1

    assert queue.job(job.id).state == "completed"
    rows = output_of(queue, job)
    assert [row["custom_id"] for row in rows] == [f"id-{number}" for number in range(12)]
    assert [row["response"]["body"]["prompt"] for row in rows] == [f"line {number} " for number in range(12)]
    assert len(set(answered)) == 12


def test_whoever_was_thought_dead_keeps_nothing_more(queue):
    job = opened(queue, 2)
    assert queue.claim("one").id == job.id
    queue.begin(job.id, "one", total=2)
    assert queue.claim("two") is None
    queue.journal.clock.now += LEASE_S + 1
    assert queue.claim("two").id == job.id

    with pytest.raises(FencedError):
        queue.add_line(job.id, "one", 1, status=200, result="{}")
    with pytest.raises(FencedError):
        queue.finish(job.id, "one", state="completed", output=["{}"], errors=[])

    queue.add_line(job.id, "two", 1, status=200, result="{}")
    assert queue.counts(queue.job(job.id)) == (1, 0)


@pytest.mark.parametrize("end", ["cancelled", "expired"])
def test_a_batch_that_ends_early_says_what_was_not_answered(queue, end):
    job = opened(queue, 5)

    async def run():
        async def ask(path, body, identity, key_id):
            if json.loads(body)["prompt"] == "line 2 ":
                if end == "cancelled":
                    queue.cancel(job.id)
                else:
                    queue.journal.clock.now += 100_000
                await asyncio.Event().wait()
            return 200, {}

        await Batches(queue, ask, concurrency=1).work()

    asyncio.run(run())

    done = queue.job(job.id)
    assert done.state == end
    assert len(output_of(queue, job)) == 2
    errors = [json.loads(row) for row in queue.read_file(done.error_file).splitlines()]
    assert [row["custom_id"] for row in errors] == ["id-2", "id-3", "id-4"]
    assert {row["error"]["code"] for row in errors} == {f"batch_{end}"}
    assert queue.claim("other") is None


def test_a_line_that_found_no_room_is_asked_again(queue, monkeypatch):
    monkeypatch.setattr("aifactory.serve.batches._PAUSE_S", 0.01)
    job, statuses = opened(queue, 1), iter([429, 503, 200])

    async def ask(path, body, identity, key_id):
        return next(statuses), {}

    asyncio.run(Batches(queue, ask, concurrency=1).work())

    assert queue.counts(queue.job(job.id)) == (1, 0)


def test_an_answer_that_is_made_again_is_in_the_log_once(factory, fake_engine, answer_on, wait_until):
    engine = fake_engine()
    factory.promote(factory.publish(1))
    releases = Releases(factory.books, lambda folder: (engine, load_tokenizer(folder)))
    releases.load_first()
    body = json.dumps(line(0)["body"]).encode()
    with answer_on(factory, releases) as endpoint:
        for number in range(2):
            asked = asyncio.run_coroutine_threadsafe(endpoint.gateway.ask_behind(PATH, body, "0" * 24), endpoint.loop)
            engine.say(f"try {number}", "stop", to=number)
            assert asked.result(20)[0] == 200

    assert factory.books.feedback.counts()["completions"] == 1
    assert factory.books.feedback.completion("cmpl-" + "0" * 24).answer == "try 1"
