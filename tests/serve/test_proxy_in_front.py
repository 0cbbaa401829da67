"""Laws of the proxy in front (configs/gateway/haproxy.cfg), with a real HAProxy: TLS, keys by their hashes, floods, lost endpoints."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import httpx
import openai
import pytest

from aifactory.keys.proxy_maps import NAMES, write_maps
from aifactory.serve.haproxy import programs
from aifactory.serve.releases import Releases
from aifactory.text.tokenizer import load_tokenizer

GATEWAY = Path(__file__).parents[2] / "configs" / "gateway"
BODY = {"model": "alpha", "prompt": "hello", "max_tokens": 5}


def haproxy() -> str:
    found = shutil.which("haproxy") or (str(programs()[1]) if programs() else None)
    if found is None or shutil.which("openssl") is None:
        pytest.skip("expected haproxy and openssl, found not both; apt-get install haproxy openssl")
    return found


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of 127.0.0.1 with its key, and the certificate alone."""
    haproxy()
    folder = tmp_path_factory.mktemp("certificate")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1"
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command.split(), *names, *files], check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_text((folder / "cert.pem").read_text() + (folder / "key.pem").read_text())
    return both, folder / "cert.pem"


@pytest.fixture
def fronted(tmp_path, certificate, answer_on, quick, make_small, wait_until):
    """Two gateways over one database behind HAProxy; more of its environment by name."""
    with contextlib.ExitStack() as stack:

        def start(**environment):
            endpoints, contexts = [], []
            for number in range(2):
                factory = make_small(tmp_path, gateway={"keys": "required", "keys_refresh_s": 0.05})
                if not number:
                    factory.promote(factory.publish(1))
                engine = quick("abcdef")
                releases = Releases(factory.books, lambda path, engine=engine: (engine, load_tokenizer(path)))
                releases.load_first()
                contexts.append(stack.enter_context(contextlib.ExitStack()))
                endpoints.append(contexts[-1].enter_context(answer_on(factory, releases)))
                endpoints[-1].books, endpoints[-1].quick = factory.books, engine
            keys = endpoints[0].books.keys
            made = [keys.create("one"), keys.create("two"), keys.rotate("two", overlap_s=1_000)]
            folder = tmp_path / "maps"
            assert write_maps(keys, str(folder)) == 2
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            values = {
                "AIFACTORY_BIND": f"127.0.0.1:{port}",
                "AIFACTORY_CERT": str(certificate[0]),
                "AIFACTORY_KEYS": str(folder),
                "AIFACTORY_ERRORS": str(GATEWAY),
                "AIFACTORY_FIRST": endpoints[0].url.removeprefix("http://"),
                "AIFACTORY_SECOND": endpoints[1].url.removeprefix("http://"),
                "AIFACTORY_REQUESTS_PER_MINUTE": "1000",
                "AIFACTORY_BYTES_PER_MINUTE": "1000000",
            }
            command = [haproxy(), "-db", "-f", str(GATEWAY / "haproxy.cfg")]
            log = tmp_path / "haproxy.log"
            with log.open("w") as out:
                process = subprocess.Popen(
                    command, env=os.environ | values | environment, stdout=out, stderr=subprocess.STDOUT
                )
            stack.callback(process.wait, 20)
            stack.callback(process.kill)
            context = ssl.create_default_context(cafile=str(certificate[1]))
            client = stack.enter_context(httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=context, timeout=30))

            client.context = context

            def is_up():
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(httpx.TransportError):
                    return client.get("/healthz").status_code == 200
                return False

            wait_until(is_up)
            return client, endpoints, contexts, made, log

        yield start


def ask(client, token=None, **more):
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return client.post("/v1/completions", json=BODY | more, headers=headers)


def test_the_configuration_is_right_by_haproxy_itself(fronted, tmp_path, certificate):
    client, *_ = fronted()
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/healthz").headers["strict-transport-security"]


def test_good_keys_pass_over_tls_and_no_other_reaches_the_factory(fronted):
    client, endpoints, _, (one, two, turned), log = fronted()
    token = one.token
    for good in (one, two, turned):
        assert ask(client, good.token).json()["choices"][0]["text"] == "abcdef"
    http = openai.DefaultHttpxClient(verify=client.context)
    sdk = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key=token, http_client=http, max_retries=0)
    assert "".join(chunk.choices[0].text for chunk in sdk.completions.create(**BODY, stream=True)) == "abcdef"
    seen = sum(len(endpoint.quick.asked) for endpoint in endpoints)

    other = endpoints[0].books.keys.create("not exported yet").token
    for bad in (
        None,
        "none",
        token[:-1],
        token[:-64] + two.token[-64:],
        "aif_" + "0" * 16 + token[-65:],
        token + "x",
        other,
    ):
        answer = ask(client, bad)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), bad
        assert answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/v1/models").status_code == 401
    assert sum(len(endpoint.quick.asked) for endpoint in endpoints) == seen
    with pytest.raises(httpx.TransportError), httpx.Client() as plain:
        plain.get(str(client.base_url).replace("https", "http")).raise_for_status()
    assert token[-64:] not in log.read_text()


def test_a_key_that_is_revoked_is_no_good_though_the_proxy_knows_it_still(fronted, wait_until):
    client, endpoints, _, (one, *_), _ = fronted()
    endpoints[0].books.keys.revoke("one")

    wait_until(lambda: ask(client, one.token).status_code == 401)
    assert ask(client, one.token).json()["error"]["code"] == "revoked_api_key"


def test_what_is_exported_is_of_good_keys_and_secrets_alone_and_nobody_else_may_read_it(factory, tmp_path):
    keys = factory.books.keys
    for name in ("plain", "turned", "revoked", "replaced"):
        keys.create(name)
    keys.create("over", expires_in_s=0.001)
    keys.rotate("turned", overlap_s=1_000)
    keys.rotate("replaced")
    keys.revoke("revoked")

    assert write_maps(keys, str(tmp_path / "maps")) == 3
    lines = {name: (tmp_path / "maps" / name).read_text().splitlines() for name in NAMES}
    assert [len(lines[name]) for name in NAMES] == [3, 3, 1, 1]
    assert all((tmp_path / "maps" / name).stat().st_mode & 0o077 == 0 for name in NAMES)
    assert not [file for file in (tmp_path / "maps").iterdir() if file.name not in NAMES]
    factory.books.close()


def test_a_flood_of_one_key_is_429_and_another_key_is_answered(fronted):
    client, _, _, (one, two, _), _ = fronted(AIFACTORY_REQUESTS_PER_MINUTE="5")

    answers = [ask(client, one.token) for _ in range(8)]

    assert [each.status_code for each in answers] == [200] * 5 + [429] * 3
    assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"
    assert int(answers[-1].headers["retry-after"]) >= 1
    assert ask(client, two.token).status_code == 200


def test_prompts_are_limited_by_their_bytes(fronted):
    client, _, _, (one, *_), _ = fronted(AIFACTORY_BYTES_PER_MINUTE="6000")

    statuses = [ask(client, one.token, prompt="x" * 100, user="u" * 200).status_code for _ in range(40)]

    assert statuses[0] == 200
    assert statuses[-1] == 429


def test_an_endpoint_that_is_lost_costs_no_request_and_without_any_it_is_said_so(fronted, wait_until):
    client, _, contexts, (one, *_), _ = fronted()
    contexts[0].close()

    assert [ask(client, one.token).status_code for _ in range(10)] == [200] * 10
    contexts[1].close()
    wait_until(lambda: ask(client, one.token).status_code == 503)
    answer = ask(client, one.token)
    assert answer.json()["error"]["type"] == "server_error"
    assert answer.headers["retry-after"] == "1"
