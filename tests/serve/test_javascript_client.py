"""Laws of OpenAI's client for JavaScript, as it comes from its registry: it works unchanged, and sees what Python's sees."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from chat_templates import RESPONSES, TEMPLATE

from aifactory.serve.releases import Releases
from aifactory.text.tokenizer import TextTokenizer

HERE = Path(__file__).with_name("javascript")
missing = [name for name in ("node", "npm") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"expected node and npm, found no {' and no '.join(missing)}"),
]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory, module_factory, module_answering, load):
    """An endpoint whose model has a chat template that knows tools, and that works at batches."""

    def with_tools(folder):
        engine, plain = load(folder)
        return engine, TextTokenizer(plain.tokenizer_json, chat_template=TEMPLATE, response_template=RESPONSES)

    factory = module_factory(tmp_path_factory.mktemp("served"))
    factory.promote(factory.publish(1))
    releases = Releases(factory.books, with_tools)
    releases.load_first()
    with module_answering(factory, releases, batches=True) as one:
        yield one


@pytest.fixture(scope="module")
def seen(endpoint, tmp_path_factory):
    """What the client saw of it."""
    folder = tmp_path_factory.mktemp("javascript")
    for name in ("package.json", "client.mjs"):
        shutil.copy(HERE / name, folder)
    quiet = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
    try:
        run(["npm", "install", *quiet], folder)
    except AssertionError as error:
        if "AIFACTORY_REQUIRE_NPM" in os.environ:
            raise
        pytest.skip(f"expected npm to install OpenAI's client, found: {str(error)[-500:]}")
    return json.loads(run(["node", "client.mjs", f"{endpoint.url}/v1", "alpha"], folder))


def run(command, folder):
    # Nothing of the user's own settings of OpenAI's client.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-4_000:]
    return done.stdout


def test_it_sees_the_models(seen):
    assert seen["models"] == ["alpha", "alpha-r1"]
    assert seen["model"] == "alpha"


def test_its_completions_are_those_of_the_python_client(endpoint, seen):
    greedy = {"model": "alpha", "prompt": "the quick ", "max_tokens": 12, "temperature": 0}
    expected = endpoint.client.completions.create(**greedy, logprobs=2, n=2)
    echoed = endpoint.client.completions.create(
        **{**greedy, "prompt": [5, 6, 7], "max_tokens": 1}, echo=True, logprobs=0
    )

    assert seen["completion"]["choices"] == expected.to_dict()["choices"]
    assert seen["completion"]["usage"] == expected.to_dict()["usage"]
    assert seen["echo"]["choices"] == echoed.to_dict()["choices"]
    chunks = seen["streamed"]
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == expected.choices[0].text
    assert chunks[-1]["usage"]["completion_tokens"] == len(expected.choices[0].logprobs.tokens)
    assert seen["after"] == expected.choices[0].text


def test_its_chats_are_those_of_the_python_client(endpoint, seen):
    expected = endpoint.client.chat.completions.create(
        model="alpha", messages=[{"role": "user", "content": "hello"}], max_tokens=12, temperature=0
    )
    text = expected.choices[0].message.content

    assert seen["chat"]["choices"][0]["message"]["content"] == text
    assert len(seen["chat"]["choices"][0]["logprobs"]["content"]) == expected.usage.completion_tokens
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in seen["chatStreamed"]) == text
    assert seen["chatFinal"] == text
    assert seen["tools"]["choices"][0]["message"]["role"] == "assistant"
    assert seen["tools"]["usage"]["prompt_tokens"] > expected.usage.prompt_tokens
    assert set(json.loads(seen["schema"]["choices"][0]["message"]["content"])) == {"a"}


def test_its_embeddings_are_vectors_of_length_one(endpoint, seen):
    # The client asks for base64 and decodes it itself, unless it is told otherwise.
    expected = endpoint.client.embeddings.create(model="alpha", input="the hand", encoding_format="base64")
    vector = np.frombuffer(base64.b64decode(expected.data[0].embedding), "<f4")

    first, second = (np.float32(each["embedding"]) for each in seen["embeddings"]["data"])
    assert first.tolist() == vector.tolist()
    assert np.float32(seen["floats"]["data"][0]["embedding"]).tolist() == vector.tolist()
    assert np.linalg.norm(second) == pytest.approx(1.0, abs=1e-6)


def test_its_files_and_batches_are_answered(seen):
    assert seen["file"]["filename"] == "requests.jsonl"
    assert json.loads(seen["fileText"])["custom_id"] == "1"
    assert True in seen["files"]
    assert seen["batch"]["status"] == "completed"
    (choice,) = seen["batchLine"]["response"]["body"]["choices"]
    assert choice["text"] == seen["after"]


def test_its_error_classes_are_the_ones_that_are_meant(seen):
    refused = seen["refused"]

    def short(name):
        return tuple(refused[name][key] for key in ("class", "status", "param"))

    assert short("field") == ("BadRequestError", 400, "n")
    assert short("unsupported") == ("BadRequestError", 400, "audio")
    assert short("unknown") == ("NotFoundError", 404, "model")
    assert refused["unknown"]["code"] == "model_not_found"
    assert refused["long"]["code"] == "context_length_exceeded"
    assert (refused["late"]["class"], refused["late"]["status"]) == ("InternalServerError", 504)
    assert short("image") == ("NotFoundError", 404, None)
