"""Laws of HAProxy before replicas on Ray: the same answers, one port on loopback, and whoever loses his replica is told."""

from __future__ import annotations

import threading

import httpx
import openai
import psutil
import pytest
from endpoint_on_ray import PROMPT, TOKENS, Served, kill, processes, replicas

pytestmark = pytest.mark.slow


@pytest.fixture
def served(ray_session, module_factory, tmp_path, wait_until):
    """The model of seed 1 behind HAProxy, by a Serve that nothing else has started."""
    import ray.serve

    from aifactory.serve.app import start, stop

    ray.serve.shutdown()
    factory = module_factory(tmp_path, port=0, poll_s=0.2, ingress="haproxy", replicas=1, slots=4)
    factory.promote(factory.publish(1))
    served = Served(factory, start(factory.books).url)
    wait_until(lambda: served.ask(max_tokens=1) is not None, timeout_s=60)
    yield served
    stop(factory.books.config.name, drain_timeout_s=0.0)
    factory.books.close()
    ray.serve.shutdown()


def test_answers_are_the_same_and_whoever_loses_his_replica_is_told(served, says, wait_until):
    from aifactory.serve.app import is_running, stop

    expected = says(1, PROMPT, TOKENS)
    port = httpx.URL(served.url).port
    bound = {
        (connection.laddr.ip, connection.laddr.port)
        for pid in processes("haproxy.cfg")
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert bound == {("127.0.0.1", port)}
    assert served.ask().choices[0].text == expected
    assert "".join(chunk.choices[0].text for chunk in served.ask(stream=True)) == expected
    with pytest.raises(openai.BadRequestError) as found:
        served.ask(max_tokens=-1)
    assert found.value.param == "max_tokens"

    requests = [{"stream": number % 2 == 0} for number in range(24)]
    (replica,) = replicas()
    answers = served.ask_many(requests, when_begun=lambda: kill(replica))

    assert {text for text, error in answers if error is None} <= {expected}
    lost = [(text, error) for text, error in answers if error is not None]
    told = [error for _, error in lost if isinstance(error, openai.APIStatusError)]
    cut = [text for text, error in lost if isinstance(error, openai.APIConnectionError)]
    assert {(error.status_code, error.code) for error in told} <= {(502, "replica_lost"), (503, None)}
    assert {error.code for error in told} >= {"replica_lost"}
    assert any(cut), "a stream was broken off"
    assert all(expected.startswith(text) for text in cut)
    assert len(told) + len(cut) == len(lost)
    # Another replica takes its place.
    wait_until(lambda: replicas() not in ([], [replica]), timeout_s=120)

    def answers_again():
        try:
            return served.ask().choices[0].text == expected
        except openai.APIError:
            return False

    wait_until(answers_again, timeout_s=60)

    # At the end what has begun is answered.
    ending = threading.Thread(target=stop, args=("alpha",), kwargs={"drain_timeout_s": 60.0})
    answers = served.ask_many([{"stream": number % 2 == 0} for number in range(8)], when_begun=ending.start)
    ending.join(120)
    assert answers == [(expected, None)] * 8
    assert not is_running("alpha")
