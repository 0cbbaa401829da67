"""Laws of the endpoint on Ray Serve: replicas follow together, files go through its proxy, and its end loses no request."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from small_adapters import write_adapter

from aifactory import Factory
from aifactory.energy_ledger import IDLE, read_energy
from aifactory.engine.load import load_model
from aifactory.errors import PlacementError

pytestmark = pytest.mark.slow
PROMPT = "the quick "
PATH = "/v1/completions"
CONFIG = "name: alpha\ningest: {sources: [{name: docs, kind: text, path: /data/docs}]}\n"


class Served:
    """A factory that is served by Ray, and a client of it."""

    def __init__(self, factory, url):
        self.factory = factory
        self.url = url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)

    def ask(self, **options):
        options = {"model": "alpha", "prompt": PROMPT, "max_tokens": 20, "temperature": 0, **options}
        return self.client.completions.create(**options)

    def ready(self):
        """What the replica that this call reaches says of itself."""
        return httpx.get(f"{self.url}/readyz", timeout=60).json()


@pytest.fixture(scope="module")
def serve(ray_session, module_factory, tmp_path_factory):
    """Serve the model of seed 1 on Ray, with these options of the endpoint."""
    from aifactory.serve.app import start, stop

    made = []

    def begin(**options):
        factory = module_factory(tmp_path_factory.mktemp("served"), port=0, poll_s=0.2, **options)
        factory.promote(factory.publish(1))
        made.append(factory)
        return Served(factory, start(factory.books).url)

    yield begin
    for factory in made:
        stop(factory.books.config.name, drain_timeout_s=0.0)
        factory.books.close()


@pytest.fixture(scope="module")
def served(serve, exported, tmp_path_factory):
    """Two replicas with an adapter that answer one request at a time, with twenty that wait at each."""
    folder = tmp_path_factory.mktemp("adapters") / "legal"
    base = load_model(exported(1), device="cpu", dtype=torch.float32)
    write_adapter(folder, base, ("v_proj",), rank=2, alpha=4, seed=9)
    return serve(replicas=2, slots=1, max_queued=20, adapters=json.dumps({"legal": str(folder)}), meter_s=0.5)


def test_two_replicas_answer_and_both_follow_a_promotion(served, says, wait_until):
    replicas = set()
    wait_until(lambda: replicas.add(served.ready()["replica"]) or len(replicas) == 2, timeout_s=120)
    assert served.ask().choices[0].text == says(1, PROMPT, 20)
    assert served.ask(model="legal").model == "alpha-r1:legal"
    assert served.ask(model="legal").choices[0].text != says(1, PROMPT, 20)

    served.factory.promote(served.factory.publish(2))
    swaps = served.factory.books.journal
    wait_until(lambda: len(swaps.events(event="swapped")) == 2, timeout_s=120)

    assert {event.subject for event in swaps.events(event="swapped")} == {"alpha-r2"}
    assert {event.detail["replica"] for event in swaps.events(event="swapped")} == replicas
    assert {served.ask(model="legal").model for _ in range(6)} == {"alpha-r2:legal"}
    answers = [served.ask() for _ in range(12)]
    assert {(answer.model, answer.choices[0].text) for answer in answers} == {("alpha-r2", says(2, PROMPT, 20))}


def test_replicas_enter_what_they_use_and_whose_answers_they_gave(served, wait_until):
    books = served.factory.books
    answer = served.ask()

    def names():
        return {line.name for line in read_energy(books).by_release}

    wait_until(lambda: {answer.model, IDLE} <= names(), timeout_s=60)
    wait_until(lambda: len({e.detail["replica"] for e in books.journal.events(event="metered")}) == 2, timeout_s=60)
    ledger = read_energy(books)
    assert ledger.total.millijoules > 0
    for table in (ledger.by_stage, ledger.by_cycle, ledger.by_release, ledger.by_key):
        assert sum(line.millijoules for line in table) == ledger.total.millijoules


def test_files_come_back_whole_through_the_proxy_and_one_too_large_is_refused(served):
    data = bytes(range(256)) * 40_000

    file = served.client.files.create(file=("large.bin", io.BytesIO(data)), purpose="batch")

    assert file.bytes == len(data)
    assert served.client.files.content(file.id).read() == data
    with httpx.stream("GET", f"{served.url}/v1/files/{file.id}/content", timeout=60) as response:
        assert response.headers["Content-Length"] == str(len(data))
        assert sum(map(len, response.iter_bytes())) == len(data)
    for size in (20_001, 30_000_000):
        body = httpx.post(f"{served.url}/v1/completions", content=b" " * size, timeout=60)
        assert (body.status_code, body.json()["error"]["type"]) == (413, "invalid_request_error")
    assert served.client.files.delete(file.id).deleted


def test_a_batch_over_the_proxy_answers_every_line_once(served, wait_until):
    lines = [
        {
            "custom_id": f"id-{n}",
            "method": "POST",
            "url": PATH,
            "body": {"model": "alpha", "prompt": f"{n} ", "seed": n},
        }
        for n in range(40)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = served.client.files.create(file=("in.jsonl", io.BytesIO(content)), purpose="batch")

    batch = served.client.batches.create(input_file_id=file.id, endpoint=PATH, completion_window="24h")
    wait_until(lambda: served.client.batches.retrieve(batch.id).status == "completed", timeout_s=120)

    done = served.client.batches.retrieve(batch.id)
    rows = [json.loads(row) for row in served.client.files.content(done.output_file_id).text.splitlines()]
    assert [row["custom_id"] for row in rows] == [line["custom_id"] for line in lines]
    direct = served.ask(**lines[7]["body"], temperature=1, max_tokens=16)
    assert rows[7]["response"]["body"]["choices"][0]["text"] == direct.choices[0].text
    assert served.factory.books.feedback.completion(rows[0]["response"]["body"]["id"]) is not None


def test_what_finds_no_room_is_told_so_at_once_and_when_to_come_back(served, wait_until):
    async def ask_all():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            body = {"model": "alpha", "prompt": PROMPT, "max_tokens": 100, "temperature": 0}
            return await asyncio.gather(*[client.post(f"{served.url}{PATH}", json=body) for _ in range(150)])

    answers = asyncio.run(ask_all())

    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert {answer.headers["Retry-After"] for answer in refused} == {"1"}
    assert {answer.json()["error"]["code"] for answer in refused} == {"queue_full"}
    wait_until(lambda: served.ask(max_tokens=1).choices[0].finish_reason == "length", timeout_s=60)


def test_at_the_end_what_has_begun_is_answered_and_what_comes_is_told_why_it_is_not(served, says):
    from aifactory.serve.app import is_running, stop

    told, errors = threading.Event(), []

    def ask_on(stream):
        """The answers of a client that asks until somebody is told; with each, whether that was before it ended."""
        ended = []
        while not told.is_set():
            try:
                answer = served.ask(max_tokens=100, stream=stream)
            except openai.InternalServerError as error:
                errors.append(error)
                told.set()
                break
            chunks = list(answer) if stream else [answer]
            ended.append(("".join(chunk.choices[0].text for chunk in chunks), told.is_set()))
        return ended

    # No more than one replica has room for: how they are shared out among two is Serve's affair.
    with ThreadPoolExecutor(21) as pool:
        asked = [pool.submit(ask_on, number % 2 == 0) for number in range(20)]
        time.sleep(2)
        pool.submit(stop, "alpha", drain_timeout_s=60.0).result()
        answers = [each for one in asked for each in one.result()]

    error = errors[0]
    # Of the release that is served by now, whichever tests ran before.
    (text,) = {text for text, _ in answers}
    assert text in {says(1, PROMPT, 100), says(2, PROMPT, 100)}
    assert any(after for _, after in answers), "some were in flight when others were refused"
    assert (error.status_code, error.code) == (503, "shutting_down")
    assert error.response.headers["Retry-After"] == "1"
    assert not is_running("alpha")


def test_replicas_come_with_what_there_is_to_do_and_go_without_a_failed_request(serve, wait_until):
    from ray import serve as ray_serve

    options = {"target_requests": 1, "scale_up_after_s": 1, "scale_down_after_s": 1}
    served = serve(replicas="[1,2]", slots=2, max_queued=200, **options)
    replicas, ended, failed = set(), threading.Event(), []

    def running():
        states = ray_serve.status().applications["aifactory-alpha"].deployments["replica"].replica_states
        return {str(state): number for state, number in states.items() if number}

    def ask_on():
        while not ended.is_set():
            try:
                served.ask(max_tokens=100)
            except openai.APIError as error:
                failed.append(error)

    assert running() == {"RUNNING": 1}
    with ThreadPoolExecutor(10) as pool:
        for _ in range(10):
            pool.submit(ask_on)
        try:
            wait_until(lambda: replicas.add(served.ready()["replica"]) or len(replicas) == 2, timeout_s=240)
        finally:
            ended.set()
    wait_until(lambda: served.ask(max_tokens=1) is not None and running() == {"RUNNING": 1}, timeout_s=240)

    assert failed == []


def test_replicas_without_a_place_are_refused_at_the_start(ray_session, tmp_path, make_small):
    factory = make_small(tmp_path, replicas="[30,40]", cpus_per_replica=1)
    factory.promote(factory.publish(1))
    with Factory(factory.books.config) as asking, pytest.raises(PlacementError, match=r"30 replicas .*of 1 CPU each"):
        asking.serve()
    factory.books.close()


def test_the_command_that_serves_answers_what_has_begun_before_it_ends(tmp_path, make_small, says, wait_until):
    factory = make_small(tmp_path)
    factory.promote(factory.publish(1))
    options = {"storage": tmp_path, "endpoint.port": 0, "endpoint.slots": 1, "endpoint.drain_timeout_s": 100}
    overrides = [word for name, value in options.items() for word in ("--set", f"runtime.{name}={value}")]
    (tmp_path / "alpha.yaml").write_text(CONFIG, encoding="utf-8")
    command = [sys.executable, "-m", "aifactory", "serve", str(tmp_path / "alpha.yaml"), "--json", *overrides]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, ThreadPoolExecutor(30) as pool:
        try:
            assert process.stdout is not None
            served = Served(factory, json.loads("".join(iter(process.stdout.readline, "}\n")) + "}")["url"])
            asked = [pool.submit(served.ask, max_tokens=100) for _ in range(20)]
            wait_until(lambda: any(one.done() for one in asked), timeout_s=60)
            process.terminate()
            answers = [one.result().choices[0].text for one in asked]
            status = process.wait(120)
        finally:
            process.kill()
    factory.books.close()

    assert answers == [says(1, PROMPT, 100)] * 20
    assert status == 0
