"""Law of feedback on chats: a correction trains, and is scored, after the very tokens that the model was asked by."""

from __future__ import annotations

import json

import httpx
import pyarrow as pa
import pytest

from aifactory.config.sources import Columns, FeedbackSource, ParquetSource
from aifactory.engine.protocol import Delta
from aifactory.evaluate.scoring import _asked
from aifactory.ingest.listing import list_pieces
from aifactory.ingest.readers import read_piece
from aifactory.serve.releases import Releases
from aifactory.text.documents import encode_documents
from aifactory.text.encoder import TokenizersEncoder
from aifactory.text.tasks import Task
from aifactory.text.tokenizer import TextTokenizer, load_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "what is <|endoftext|>, Größe?"}]},
]


@pytest.fixture(scope="module")
def tokenizer(exported):
    return TextTokenizer(load_tokenizer(exported(1)).tokenizer_json, chat_template=TEMPLATE)


class AnswersAtOnce:
    """An engine that says the same to everybody."""

    def __init__(self):
        self.context_length, self.requests, self.num_unfinished, self.failure = 500, [], 0, None

    def submit(self, request, on_delta):
        self.requests.append(request)
        on_delta(Delta(text="no", token_ids=(5,), finish_reason="stop"))

    def close(self, drain_timeout_s):
        pass


@pytest.fixture
def asked(factory, answer_on, tokenizer):
    engine = AnswersAtOnce()
    factory.promote(factory.publish(1))
    releases = Releases(factory.books, lambda folder: (engine, tokenizer))
    releases.load_first()
    with answer_on(factory, releases) as endpoint:
        yield endpoint, engine


def correct(endpoint, completion, to):
    said = httpx.post(f"{endpoint.url}/v1/feedback", json={"completion": completion, "correction": to, "user": to})
    assert said.status_code == 200


def rows_of(factory, batch):
    """The rows that a retrain reads of a batch, as the workshop has them read."""
    columns = Columns(text="text", prompt="prompt", user="user", origin="completion")
    path = str(factory.books.artifacts.fetch(batch))
    source = ParquetSource(name="feedback", kind="parquet", path=path, include=("*.parquet",), columns=columns)
    return read_rows(source)


def read_rows(source):
    blocks = [block for piece in list_pieces([source]).pieces for block in read_piece(piece)]
    assert not [line for block in blocks for line in block.malformed]
    return {row["user"]: row for block in blocks for row in block.rows.to_pylist()}


def test_what_was_corrected_trains_and_is_scored_after_the_tokens_that_were_served(asked, factory, tokenizer):
    endpoint, engine = asked
    create = endpoint.client.chat.completions.create
    correct(endpoint, create(model="alpha", messages=CHAT).id, "chat")
    correct(endpoint, endpoint.client.completions.create(model="alpha", prompt="plain").id, "plain")
    served = dict(zip(("chat", "plain"), (request.prompt_ids for request in engine.requests), strict=True))
    log = factory.books.feedback
    batch = log.publish(log.seal(batch_rows=2, batch_after_s=None), factory.books.artifacts)

    rows = rows_of(factory, batch)

    assert set(rows) == {"chat", "plain"}
    columns = (pa.array([row[name] for row in rows.values()]) for name in ("prompt", "text", "messages"))
    prompts, texts, messages = columns
    found = encode_documents(tokenizer, TokenizersEncoder(tokenizer), prompts=prompts, texts=texts, messages=messages)
    for i, (name, row) in enumerate(rows.items()):
        begin, length = found.offsets_D1[i], found.prompt_lengths_D[i]
        assert tuple(found.ids_N[begin : begin + length].tolist()) == served[name]
        assert tuple(_asked(tokenizer, Task(row["prompt"], row["text"], row["messages"]), "none")) == served[name]
    # A control token of the template is one, the same text in a message is not.
    assert served["chat"].count(tokenizer.eos_id) == 1 + len(CHAT)
    waiting = {each.user: each.messages for each in log.corrections()}
    assert waiting["plain"] == "" and json.loads(waiting["chat"])[1]["content"].startswith("what is <|endoftext|>")


def test_the_log_of_a_factory_as_a_source_has_the_turns_too(asked, factory):
    endpoint, _ = asked
    correct(endpoint, endpoint.client.chat.completions.create(model="alpha", messages=CHAT).id, "chat")
    correct(endpoint, endpoint.client.completions.create(model="alpha", prompt="plain").id, "plain")
    url = factory.books.database.url.render_as_string(hide_password=False)
    source = FeedbackSource(name="log", kind="feedback", of="corrections").belonging_to("alpha", url)

    rows = read_rows(source)

    assert [turn["role"] for turn in json.loads(rows["chat"]["messages"])] == ["system", "user"]
    assert (rows["chat"]["prompt"], rows["plain"]["prompt"], rows["plain"]["messages"]) == ("", "plain", "")


def test_a_chat_that_rows_have_no_place_for_keeps_its_prompt_as_text(asked, factory):
    endpoint, _ = asked
    named = [{"role": "user", "content": "hi", "name": "ann"}]
    correct(endpoint, endpoint.client.chat.completions.create(model="alpha", messages=named).id, "named")

    (kept,) = factory.books.feedback.corrections()

    assert kept.messages == ""
    assert kept.prompt == "user: hi<|endoftext|>assistant: "
