"""Laws of metering over HTTP: answers are counted when they are kept, by who gave them and for whom; what is refused is not."""

from __future__ import annotations

from functools import partial

import openai
import pytest

from aifactory.energy_ledger import IDLE, UNTOLD, read_energy
from aifactory.observe.energy import Meter
from aifactory.serve.metering import EVENT, ServingMeter
from aifactory.serve.releases import Releases


@pytest.fixture
def metered(factory, load, answer_on):
    """An endpoint on a real model, and its meter."""
    factory.promote(factory.publish(1))
    meter = ServingMeter(
        factory.books.journal,
        partial(Meter, num_cpus=2.0, watts_per_cpu=10.0),
        replica="a",
        every_s=3600.0,
        is_busy=lambda: endpoint.gateway.num_open > 0,
    )
    releases = Releases(factory.books, load)
    releases.load_first()
    with answer_on(factory, releases, count=meter.count) as endpoint:
        yield endpoint, meter, factory.books


def test_answers_are_on_the_ledger_with_their_tokens_and_nothing_else_is(metered):
    endpoint, meter, books = metered
    ask = partial(endpoint.client.completions.create, model="alpha", prompt="hello", max_tokens=4)

    said = [ask(), ask(n=2)]
    said += list(ask(stream=True, stream_options={"include_usage": True}))
    with pytest.raises(openai.BadRequestError):
        ask(max_tokens=100_000)
    meter.tell()

    used = [answer.usage for answer in said if answer.usage is not None]
    (event,) = books.journal.events(event=EVENT)
    (given,) = event.detail["answers"]
    assert (given["release"], given["requests"]) == (1, 4)
    assert given["answer_tokens"] == sum(each.completion_tokens for each in used)
    # An answer of several counts the prompt that it was given, each for itself.
    assert given["prompt_tokens"] == used[0].prompt_tokens * 4
    ledger = read_energy(books)
    assert {line.name for line in ledger.by_release} == {"alpha-r1", IDLE}
    assert sum(line.millijoules for line in ledger.by_key) == ledger.total.millijoules


def test_embeddings_are_work_without_an_answer_that_is_kept(metered):
    endpoint, meter, books = metered
    endpoint.client.embeddings.create(model="alpha", input="hello")
    meter.look()
    meter.tell()

    assert {line.name for line in read_energy(books).by_key} <= {UNTOLD, IDLE}
