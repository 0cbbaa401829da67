"""The benchmarks of serving: their clients and their arithmetic are right, and --quick proves that all of it runs."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import http_load
import lengths
import pytest
import serve
import serve_faults
from fault_load import FaultLoad
from fault_load import Seen as Endured
from http_load import Arrival, Target
from moments import FIRST_LETTER, Seen, percentile, random_prompts, token_of
from serve_figures import figures, gaps_of

ROOT = Path(__file__).parent.parent.parent

LOADS = serve.FULL.loads


def run(name: str, *, without_ray: bool) -> dict[str, float | None]:
    program = f"import sys, runpy; sys.argv = ['{name}.py', '--quick']; sys.path.insert(0, 'benchmarks'); "
    program += "sys.modules['ray'] = None; " if without_ray else ""
    program += f"runpy.run_path('benchmarks/{name}.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float | None] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_gpu_benchmark_runs_without_ray_and_gives_every_key_of_its_docstring():
    figures = run("serve_gpu", without_ray=True)
    documented = (ROOT / "benchmarks" / "serve_gpu.py").read_text(encoding="utf-8").split('"""')[1]
    assert all(value is not None and value > 0 for value in figures.values())
    assert {figure for figure in figures if figure.endswith("_graphs")}
    for figure in (each.removesuffix("_graphs") for each in figures):
        assert figure.replace("_b1", "_bB").replace("_b4", "_bB").replace("_p99", "_p50") in documented, figure


@pytest.mark.slow
def test_serving_is_measured_from_end_to_end_without_a_peer():
    figures = run("serve", without_ray=False)
    assert all(
        f" {key}" in serve.__doc__.replace("_cC", "_c1") for key in figures if "_c8" not in key and "_c32" not in key
    )
    assert figures["swap_failed"] == 0
    assert figures["noop_rps_c32"] > 0 and figures["bandwidth_share_c1"] > 0 and figures["swap_p99_ratio"] > 0
    assert figures["over_vllm_cpu_c1"] is None


@pytest.mark.slow
def test_faults_are_endured_from_end_to_end_and_resilient_loses_no_answer_with_a_replica():
    figures = run("serve_faults", without_ray=False)
    documented = serve_faults.__doc__
    assert all(f"MODE_FAULT_{key.split('_', 2)[2]}" in documented for key in figures if "failed: " not in key)
    assert {key: value for key, value in figures.items() if key.endswith(("_failed", "_differs", "_held"))} == {
        f"resilient_{fault}_{key}": 0
        for fault in ("replica", "promotion", "disconnects")
        for key in ("failed", "differs", "held")
    }
    assert all(value > 0 for key, value in figures.items() if key.endswith(("_sent", "_good_s", "_whole_s")))


def test_percentiles_and_rates_are_what_they_are_called():
    values = [float(value) for value in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values[:3], 0.99)) == (50, 99, 3)
    assert Seen(num_tokens=30, seconds=2.0).tokens_per_s == 15


class Server:
    """Streams as many letters as it is asked for, two to an event, over HTTP/1.1; refuses whom it is told to."""

    def __init__(self, refuse: int = 0, pause_s: float = 0.0) -> None:
        self.refuse, self.pause_s, self.connections, self.asked = refuse, pause_s, 0, []

    async def serve(self, reader, writer):
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await self.answer(head, reader, writer)
        except (EOFError, ConnectionError):
            writer.close()

    async def answer(self, head, reader, writer):
        if head.startswith(b"GET"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            return
        length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        self.asked.append(body)
        if self.refuse:
            self.refuse -= 1
            writer.write(b"HTTP/1.1 429 Too Many\r\ncontent-length: 4\r\n\r\nfull")
            return
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        await asyncio.sleep(self.pause_s)
        text = "".join(chr(FIRST_LETTER + index) for index in range(body["max_tokens"]))
        events = [{"model": "m", "choices": [{"text": text[at : at + 2]}]} for at in range(0, len(text), 2)]
        data = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"
        # The sender's chunks need not be events.
        for part in (data[:7], data[7:40], data[40:]):
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            await writer.drain()
        writer.write(b"0\r\n\r\n")


def asking(server, client):
    """What a client of such a server gives."""

    async def both():
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        async with listening:
            port = listening.sockets[0].getsockname()[1]
            return await client(Target(url=f"http://127.0.0.1:{port}", model="m", extra={"ignore_eos": True}))

    return asyncio.run(both())


def test_a_closed_loop_sends_every_prompt_once_and_keeps_its_connections():
    server, prompts = Server(), random_prompts(7, 5, seed=1)
    seen = asking(server, lambda target: http_load.closed_loop(target, prompts, concurrency=2, answer_tokens=6))

    assert sorted(asked["prompt"] for asked in server.asked) == sorted(prompts)
    assert all(
        (asked["max_tokens"], asked["ignore_eos"], asked["temperature"]) == (6, True, 0) for asked in server.asked
    )
    assert (server.connections, seen.num_tokens, len(seen.first), len(seen.between)) == (2, 42, 7, 35)
    assert seen.answers == {number: [1, 2, 3, 4, 5, 6] for number in range(7)} and not seen.failed
    # Two tokens of one event came at the same moment.
    assert seen.between.count(0.0) >= 21


def test_connections_of_a_closed_loop_begin_apart_where_they_are_told_to():
    prompts, options = random_prompts(3, 5, seed=1), {"concurrency": 3, "answer_tokens": 6, "apart_s": 0.2}
    seen = asking(Server(), lambda target: http_load.closed_loop(target, prompts, **options))

    assert seen.num_tokens == 18 and seen.seconds >= 0.4


def test_a_request_that_is_refused_is_counted_and_the_others_go_on():
    server = Server(refuse=2)
    seen = asking(
        server,
        lambda target: http_load.closed_loop(target, random_prompts(5, 3, seed=1), concurrency=1, answer_tokens=4),
    )
    assert (len(seen.failed), len(seen.answers)) == (2, 3)
    assert "429" in seen.failed[0]


def test_an_answer_that_is_too_short_is_no_answer():
    server = Server()
    told = []

    async def client(target):
        arrival = [Arrival(at_s=0.0, prompt=[1], answer_tokens=3)]
        answered = server.answer

        async def shortened(head, reader, writer):
            await answered(head, reader, writer)
            told.append(server.asked[-1]["max_tokens"])

        server.answer = shortened
        target.extra["max_tokens"] = 2
        return await http_load.open_loop(target, arrival)

    seen = asking(server, client)
    assert told == [2]
    assert "expected an answer of 3 tokens, found 2" in seen.failed[0]


def test_an_open_loop_counts_from_when_a_request_was_due():
    arrivals = [Arrival(at_s=at, prompt=[1, 2], answer_tokens=2) for at in (0.0, 0.01, 0.02)]
    server = Server(pause_s=0.05)
    seen = asking(server, lambda target: http_load.open_loop(target, arrivals))
    assert all(moment >= 0.05 for moment in seen.first) and seen.num_tokens == 6
    assert server.connections == 3  # all were under way at once


@pytest.mark.parametrize("num_tokens", [512, 32_000])
def test_a_letter_tells_its_token_however_many_there_are(num_tokens):
    from closed_loop import byte_tokenizer

    tokenizer = byte_tokenizer(num_tokens)
    assert [token_of(tokenizer.decode([token])) for token in (1, 2, num_tokens - 1)] == [1, 2, num_tokens - 1]


def test_no_ops_count_answers():
    rps, cpu = asking(Server(), lambda target: http_load.no_ops(target, "/healthz", concurrency=3, seconds=0.1))
    assert rps > 10 and cpu > 0


def test_lengths_come_from_functions_that_people_wrote_and_are_the_same_for_a_seed():
    found = list(
        lengths._functions('def f(a):\n    """Say what."""\n    b = a\n    return b\n\ndef g():\n    """No body."""\n')
    )
    assert found == [('def f(a):\n    """Say what."""', "    b = a\n    return b")]
    first, second = (
        [lengths.draw(rng, most_prompt=100, most_answer=50) for _ in range(200)] for rng in map(random.Random, (3, 3))
    )
    assert first == second and len(set(first)) > 50
    assert max(prompt for prompt, _ in first) == 100 and max(answer for _, answer in first) == 50


def test_a_figure_is_the_worst_of_prompts_and_types_and_each_is_the_median_of_its_rounds():
    raw = defaultdict(list)
    for load, ours, theirs in (("128_c8", [4, 9, 6], [2, 3, 3]), ("512_c8", [3], [2])):
        raw[f"tokens_per_s_endpoint_{load}"], raw[f"tokens_per_s_vllm_cpu_{load}"] = ours, theirs
        raw[f"ttft_ms_p50_endpoint_{load}"], raw[f"ttft_ms_p50_vllm_cpu_{load}"] = ours, theirs
    for kind, values in (
        ("float32", [8, 8, 8]),
        ("llamacpp_f32", [4, 4, 4]),
        ("bfloat16", [9]),
        ("llamacpp_bf16", [10]),
    ):
        raw[f"tokens_per_s_{kind}_128_c8"] = values
    raw["tokens_per_s_endpoint_small_c8"], raw["tokens_per_s_float32_small_c8"] = [600, 500], [800, 1000]
    raw["swap_failed"] = [0, 2, 0]
    found = figures(raw, {}, LOADS, 64)

    assert (found["over_vllm_cpu_c8"], found["ttft_over_vllm_cpu_c8"]) == (1.5, 2.0)
    assert raw["over_vllm_cpu_tokens_per_s_128_c8"] == [2, 3, 2]
    assert found["over_llamacpp_c8"] == 0.9
    assert found["http_ms_per_token_c8"] == round((1e3 / 600 - 1e3 / 800 + 1e3 / 500 - 1e3 / 1000) / 2, 3)
    assert raw["http_ms_per_token_endpoint_c8"][0] == 1e3 / 4 - 1e3 / 8
    assert found["swap_failed"] == 2
    assert found["over_vllm_cpu_c1"] is None and found["noop_rps_c32"] is None


def test_the_share_of_the_bandwidth_is_that_of_the_kind_with_the_most_tokens_a_second():
    raw = defaultdict(list, {f"bandwidth_gb_s_{kind}": [10.0, 20.0] for kind in ("float32", "int8")})
    said = {"float32": {"weights": 1e9, "a_token": 0}, "int8": {"weights": 250e6, "a_token": 0}}
    for kind, moments, speeds in (("float32", [200.0, 100.0], [5, 10]), ("int8", [50.0, 50.0], [20, 20])):
        raw[f"between_ms_p50_{kind}_128_c1"], raw[f"tokens_per_s_{kind}_128_c1"] = moments, speeds
    found = figures(raw, said, LOADS, 64)

    assert found["bandwidth_share_c1"] == pytest.approx(0.375, abs=1e-3)
    assert raw["step_gb_s_int8_c1"] == [5.0, 5.0] and raw["bandwidth_share_float32_c1"] == [0.5, 0.5]


def test_gaps_are_within_an_answer_and_end_when_a_token_came():
    requests = [[("r1", 1, 1.0), ("r1", 2, 3.0)], [("r2", 1, 10.0), ("r2", 1, 11.0)]]
    assert gaps_of(requests) == [(2.0, 3.0), (0.0, 3.0), (1.0, 11.0)]


def test_every_key_of_serving_is_told_of_and_quick_takes_less_of_everything():
    found = figures(defaultdict(list), {}, LOADS, 64)
    peers = [f"{what}over_vllm_cpu{kind}" for what in ("", "ttft_") for kind in ("", "_bfloat16")]
    wanted = {f"{name}_c{c}" for name in (*peers, "over_llamacpp") for c in (1, 8, 32)}
    wanted |= {"bandwidth_share_c1", "http_ms_per_token_c8", "noop_rps_c32"}
    assert set(found) == wanted | {"swap_failed", "swap_p99_ratio", "swap_beyond_load_s"}
    for key in found:
        general = key.rsplit("_c", 1)[0] + "_cC"
        assert key in serve.__doc__ or general in serve.__doc__, key
    assert serve.QUICK.before_swap_s < serve.FULL.before_swap_s and not serve.QUICK.vllm


ENVELOPE = json.dumps({"error": {"message": "lost", "type": "server_error", "param": None, "code": "replica_lost"}})


class Faulty(Server):
    """Answers its requests in turn in all the ways in which one can fail, and twice well."""

    async def answer(self, head, reader, writer):
        length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        self.asked.append(body)
        chunk = json.dumps({"model": "m-r1", "choices": [{"text": "ab"}]})
        if body["stream"]:
            ends = {1: ["[DONE]"], 3: [ENVELOPE], 5: []}
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for data in [chunk, *ends.get(len(self.asked), [])]:
                writer.write(f"{len(data) + 8:x}\r\ndata: {data}\n\n\r\n".encode())
            if len(self.asked) != 5:
                writer.write(b"0\r\n\r\n")
        else:
            status, said = {2: (200, chunk), 4: (502, ENVELOPE), 6: (500, "Internal")}.get(
                len(self.asked), (200, chunk)
            )
            writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(said)}\r\n\r\n{said}".encode())
        await writer.drain()
        writer.close()


def test_every_way_in_which_a_request_can_fail_is_told_apart():
    server = Faulty()

    async def client(target):
        load = FaultLoad(target.url, rate=20)
        load.start()
        while len(load.seen) < 6:
            await asyncio.sleep(0.02)
        return await asyncio.to_thread(load.stop)

    seen = sorted(asking(server, client), key=lambda one: one.sent)
    assert [one.failed for one in seen[:6]] == [
        None, None, "event replica_lost", "502 replica_lost", "cut", "500 no envelope",
    ]  # fmt: skip
    assert [(one.model, one.text) for one in seen[:4]] == [("m-r1", "ab")] * 3 + [("", "")]
    assert [one.streamed for one in seen[:6]] == [True, False] * 3
    assert {body.get("seed") is None for body in server.asked} == {True, False}


def test_who_listens_nowhere_refuses():
    load = FaultLoad("http://127.0.0.1:9", rate=50)
    load.start()
    while not load.seen:
        time.sleep(0.01)
    assert {one.failed for one in load.stop()} == {"refused"}


def test_an_answer_differs_that_is_not_its_release_s_and_so_does_the_beginning_of_another():
    known = {"m-r1": {(0, False): "abcd"}}

    def one(text, *, model="m-r1", failed=None):
        return Endured(0, False, True, sent=0.0, ended=1.0, failed=failed, model=model, text=text)

    assert (
        one("abcd").is_as(known)
        and one("ab", failed="cut").is_as(known)
        and one("", model="", failed="cut").is_as(known)
    )
    assert not any(each.is_as(known) for each in (one("abc"), one("b", failed="cut"), one("abcd", model="m-r2")))


def test_the_figures_of_a_fault_are_counted_from_its_moment():
    def one(sent, ended, failed=None):
        return Endured(0, False, True, sent=sent, ended=ended, failed=failed, model="" if failed else "m", text="")

    seen = [one(0, 1), one(2, 9, "cut"), one(4, 5, "refused"), one(5, 5, "refused"), one(6, 8), one(7, 7.5)]
    found = serve_faults.figures_of(seen, 3.0, {"m": {(0, False): ""}})
    assert found == {
        "sent": 6, "failed": 3, "failed: cut": 1, "failed: refused": 2, "differs": 0, "good_s": 4.5, "last_failed_s": 2.0,
        "longest_s": 2,
    }  # fmt: skip
    assert "good_s" not in serve_faults.figures_of(seen[:4], 3.0, {})


def test_the_readme_shows_the_table_of_the_newest_faults():
    newest = max((ROOT / "benchmarks" / "results").glob("serve_faults-*.json"))
    figures = json.loads(newest.read_text(encoding="utf-8"))["figures"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n".join(serve_faults.table(figures)) in readme and newest.name in readme
