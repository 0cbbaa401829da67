"""Laws of who is let in: a good key that may do what it asks for, and nobody else; and each answer knows whose it is."""

from __future__ import annotations

import asyncio
import io
import json
import time

import httpx
import openai
import pytest

from aifactory.config import Gateway as GatewayOptions
from aifactory.errors import ConfigError, StateError
from aifactory.records.keys import Keys
from aifactory.records.limits import Limits
from aifactory.serve.access import Access
from aifactory.serve.app import _require_guarded
from aifactory.serve.loopback import is_loopback
from aifactory.serve.wire import StatusError

COMPLETE = {"model": "alpha", "prompt": "hello", "max_tokens": 4}
REFRESH_S = 0.2


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, module_factory, module_answering, load):
    """An endpoint that requires keys, on a real engine."""
    from aifactory.serve.releases import Releases

    gateway = {"keys": "required", "keys_refresh_s": REFRESH_S}
    factory = module_factory(tmp_path_factory.mktemp("guarded"), gateway=gateway)
    factory.promote(factory.publish(1))
    releases = Releases(factory.books, load)
    releases.load_first()
    with module_answering(factory, releases, batches=True) as endpoint:
        endpoint.keys = factory.books.keys
        endpoint.books = factory.books
        yield endpoint


def ask(endpoint, token=None, path="/v1/completions", body=COMPLETE, method="POST"):
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return httpx.request(method, f"{endpoint.url}{path}", json=body, headers=headers, timeout=30)


def refused(response, status, code):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    if status == 401:
        assert response.headers["www-authenticate"] == "Bearer"
    return error


def test_without_a_good_key_nothing_is_answered(guarded):
    key = guarded.keys.create("app")
    other = guarded.keys.create("other").token
    wrong = key.token[:-64] + other[-64:]  # the id of one, the secret of another

    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/v1/feedback"):
        refused(ask(guarded, path=path), 401, "missing_api_key")
        refused(ask(guarded, "none", path=path), 401, "missing_api_key")
        refused(ask(guarded, key.token[:-1], path=path), 401, "invalid_api_key")
        refused(ask(guarded, wrong, path=path), 401, "invalid_api_key")
    for path in ("/v1/models", "/v1/models/alpha", "/v1/files", "/v1/batches"):
        refused(ask(guarded, path=path, method="GET", body=None), 401, "missing_api_key")
    assert wrong not in ask(guarded, wrong).text
    for path in ("/healthz", "/readyz", "/openapi.json", "/docs"):
        assert ask(guarded, path=path, method="GET", body=None).status_code == 200
    assert ask(guarded, key.token).status_code == 200


def test_the_description_says_what_wants_which_key(guarded, endpoint):
    def wanted(url):
        paths = httpx.get(f"{url}/openapi.json").json()["paths"]
        return {path: next(iter(methods.values())).get("security") for path, methods in paths.items()}

    required, optional = wanted(guarded.url), wanted(endpoint.url)
    assert required["/v1/completions"] == [{"key": ["infer"]}]
    assert optional["/v1/completions"] == [{}, {"key": ["infer"]}]
    assert required["/v1/feedback"] == [{"key": ["feedback"]}]
    assert {path for path, security in required.items() if security is None} == {
        "/healthz",
        "/readyz",
        "/openapi.json",
        "/docs",
    }
    # And so it is.
    for path, security in required.items():
        if security is not None and "{" not in path and path.startswith("/v1/models"):
            assert ask(guarded, path=path, method="GET", body=None).status_code == 401


def test_clients_of_openai_send_keys_as_they_are_and_read_what_is_refused(guarded):
    token = guarded.keys.create("sdk").token
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=token, max_retries=0)

    assert client.completions.create(**COMPLETE).choices
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**COMPLETE, stream=True))
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="nothing").completions.create(**COMPLETE)
    with pytest.raises(openai.PermissionDeniedError):
        client.with_options(api_key=guarded.keys.create("x", scopes=["operate"]).token).models.list()


def test_a_key_does_what_its_scopes_say(guarded):
    tokens = {scope: guarded.keys.create(scope, scopes=[scope]).token for scope in ("infer", "feedback", "operate")}
    answer = ask(guarded, tokens["infer"]).json()
    said = {"completion": answer["id"], "score": 1.0}

    error = refused(ask(guarded, tokens["infer"], path="/v1/feedback", body=said), 403, "insufficient_scope")
    assert "'feedback'" in error["message"]
    assert ask(guarded, tokens["feedback"], path="/v1/feedback", body=said).status_code == 200
    for scope in ("feedback", "operate"):
        refused(ask(guarded, tokens[scope]), 403, "insufficient_scope")
    refused(ask(guarded, tokens["operate"], path="/v1/feedback", body=said), 403, "insufficient_scope")


def test_each_answer_and_each_feedback_says_by_which_key_it_came(guarded):
    asker, critic = guarded.keys.create("asker"), guarded.keys.create("critic", scopes=["feedback"])
    answer = ask(guarded, asker.token).json()
    stream = ask(guarded, asker.token, body=COMPLETE | {"stream": True}).text
    streamed = json.loads(stream.split("\n")[0].removeprefix("data: "))
    for given in (answer, streamed):
        assert guarded.books.feedback.completion(given["id"]).key_id == asker.key.id

    said = {"completion": answer["id"], "correction": "better"}
    assert ask(guarded, critic.token, path="/v1/feedback", body=said).json()["counted"]

    found = [each for each in guarded.books.feedback.corrections() if each.completion == answer["id"]]
    assert [each.key for each in found] == [critic.key.id]


def test_a_retrain_is_asked_for_by_who_may_operate_and_the_audit_says_who_it_was(guarded):
    infer, operate = (guarded.keys.create(scope, scopes=[scope]) for scope in ("infer", "operate"))
    wanted = {"reason": "new products"}

    error = refused(ask(guarded, infer.token, path="/v1/retrains", body=wanted), 403, "insufficient_scope")
    assert "'operate'" in error["message"]
    told = ask(guarded, operate.token, path="/v1/retrains", body=wanted)
    assert told.status_code == 202
    name = told.json()["id"]
    refused(ask(guarded, infer.token, path=f"/v1/retrains/{name}", method="GET", body=None), 403, "insufficient_scope")
    chain = guarded.books.journal.audited()
    assert [line.key_id for line in chain.lines if line.subject == name] == [operate.key.id]
    assert chain.faults == []


def test_a_key_that_is_revoked_or_replaced_is_good_for_nothing_after_the_stated_time(guarded):
    key, other = guarded.keys.create("leaked"), guarded.keys.create("turned")
    assert ask(guarded, key.token).status_code == ask(guarded, other.token).status_code == 200

    guarded.keys.revoke("leaked")
    new = guarded.keys.rotate("turned")
    time.sleep(REFRESH_S)

    refused(ask(guarded, key.token), 401, "revoked_api_key")
    refused(ask(guarded, other.token), 401, "invalid_api_key")
    assert ask(guarded, new.token).status_code == 200
    refused(ask(guarded, guarded.keys.create("short", expires_in_s=0.001).token), 401, "expired_api_key")


def test_files_and_batches_are_their_keys_and_their_teams(guarded, wait_until):
    made = {
        name: openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key.token, max_retries=0)
        for name, key in {
            "mine": guarded.keys.create("mine"),
            "stranger": guarded.keys.create("stranger"),
            "red": guarded.keys.create("red", team="red"),
            "also red": guarded.keys.create("also red", team="red"),
            "blue": guarded.keys.create("blue", team="blue"),
            "operator": guarded.keys.create("operator", scopes=["infer", "operate"]),
        }.items()
    }
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": COMPLETE}
    seen = {"mine": {"mine", "operator"}, "red": {"red", "also red", "operator"}}
    for owner, may in seen.items():
        file = made[owner].files.create(file=("in.jsonl", io.BytesIO(json.dumps(line).encode())), purpose="batch")
        batch = made[owner].batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        wait_until(lambda owner=owner, batch=batch: made[owner].batches.retrieve(batch.id).status == "completed")
        output = made[owner].batches.retrieve(batch.id).output_file_id
        answer = json.loads(made[owner].files.content(output).text)["response"]["body"]
        assert guarded.books.feedback.completion(answer["id"]).key_id == guarded.keys.named(owner).id
        for name, client in made.items():
            listed = {each.id for each in client.files.list()} | {each.id for each in client.batches.list()}
            assert ({file.id, output, batch.id} <= listed) == (name in may)
            for look in (client.files.retrieve, client.files.content, client.files.delete):
                if name not in may:
                    with pytest.raises(openai.NotFoundError):
                        look(file.id)
            if name not in may:
                with pytest.raises(openai.NotFoundError):
                    client.batches.cancel(batch.id)
                with pytest.raises(openai.BadRequestError, match="uploaded file"):
                    client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")


def test_where_keys_are_optional_whoever_sends_none_is_anonymous_and_a_bad_one_is_refused(endpoint, lasting_factory):
    keys = lasting_factory.books.keys
    key = keys.create("app")

    for token, who in ((None, "anonymous"), ("none", "anonymous"), ("sk-other", "anonymous"), (key.token, key.key.id)):
        answer = ask(endpoint, token)
        assert lasting_factory.books.feedback.completion(answer.json()["id"]).key_id == who
    refused(ask(endpoint, key.token[:-1]), 401, "invalid_api_key")


def test_a_batch_of_a_key_that_was_revoked_meanwhile_is_answered_401(guarded):
    key = guarded.keys.create("batcher")
    body = json.dumps(COMPLETE).encode()

    def behind():
        asked = guarded.gateway.ask_behind("/v1/completions", body, "a" * 24, key.key.id)
        return asyncio.run_coroutine_threadsafe(asked, guarded.loop).result(30)

    assert behind()[0] == 200
    guarded.keys.revoke("batcher")
    time.sleep(REFRESH_S)
    status, answer = behind()
    assert (status, answer["error"]["code"]) == (401, "revoked_api_key")


# ── what is read, and how often ───────────────────────────────────────────────────────────────────────────────────────


class Counted:
    """Keys that count how often they are read, and can be away."""

    def __init__(self, keys: Keys) -> None:
        self._keys, self.journal = keys, keys.journal
        self.reads = 0
        self.away = False

    def known(self, key_id):
        self.reads += 1
        if self.away:
            raise StateError("away")
        return self._keys.known(key_id)


@pytest.fixture
def counted(factory):
    yield Counted(factory.books.keys)
    factory.books.close()


def test_many_requests_of_a_key_read_it_once_and_one_that_is_too_old_is_read_before_it_is_believed(counted, factory):
    now = [100.0]
    token = factory.books.keys.create("app").token
    headers = {"authorization": f"Bearer {token}"}

    async def run():
        access = Access(counted, GatewayOptions(keys="required", keys_refresh_s=10), clock=lambda: now[0])
        await asyncio.gather(*(access.caller(headers, "infer") for _ in range(50)))
        assert counted.reads == 1
        now[0] += 4.9
        await access.caller(headers, "infer")
        assert counted.reads == 1
        now[0] += 0.2  # beside the request
        await access.caller(headers, "infer")
        while access._reading:
            await asyncio.sleep(0.001)
        assert counted.reads == 2
        counted.away = True
        now[0] += 9.9
        assert (await access.caller(headers, "infer")).key_id.startswith("key-")
        now[0] += 0.2
        with pytest.raises(StatusError) as error:
            await access.caller(headers, "infer")
        assert (error.value.status, error.value.code) == (503, "keys_unavailable")
        counted.away = False
        await access.caller(headers, "infer")
        access.close()

    asyncio.run(run())


def test_limits_on_those_without_a_key_are_known(counted, factory):
    async def caller():
        return await Access(counted, GatewayOptions(), clock=time.monotonic).caller({}, "infer")

    assert not asyncio.run(caller()).is_limited
    factory.books.keys.limit("key", "anonymous", Limits(concurrent=1))
    assert asyncio.run(caller()).is_limited


def test_what_other_machines_reach_is_served_with_keys_alone(factory):
    for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9", "[::1]"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        assert not is_loopback(host)
    open_config = factory.books.config
    runtime = open_config.runtime.model_copy(update={"gateway": GatewayOptions(keys="required")})
    closed_config = open_config.model_copy(update={"runtime": runtime})

    _require_guarded(open_config, "127.0.0.1")
    _require_guarded(closed_config, "0.0.0.0")
    for host in ("0.0.0.0", None, "192.168.0.4"):
        with pytest.raises(ConfigError, match=r"expected runtime.gateway.keys: required .*aifactory keys create"):
            _require_guarded(open_config, host)


def test_the_times_of_good_ids_and_of_unknown_ones_do_the_same_work(counted, factory, monkeypatch):
    """Not timed: counted. An id that there is not is hashed and compared as one that there is."""
    from aifactory.records import keys as module

    hashed = []
    real = module.hash_secret
    monkeypatch.setattr(module, "hash_secret", lambda salt, secret: hashed.append(salt) or real(salt, secret))
    token = factory.books.keys.create("app").token
    hashed.clear()

    async def code(sent):
        access = Access(counted, GatewayOptions(keys="required"), clock=time.monotonic)
        try:
            await access.caller({"authorization": f"bearer {sent}"}, "infer")
        except StatusError as error:
            return error.code
        return None

    unknown = "aif_" + "0" * 16 + token[-65:]
    assert [asyncio.run(code(sent)) for sent in (token, unknown)] == [None, "invalid_api_key"]
    assert len(hashed) == 2
