"""Laws of adapters beside a release: chosen by `model`, each answers as its merged model; what does not fit is not served."""

from __future__ import annotations

import json

import openai
import pytest
import torch
from small_adapters import write_adapter

from aifactory.config import Config
from aifactory.engine.golden import GOLDEN_NAME, golden_answers
from aifactory.engine.load import load_model
from aifactory.errors import ConfigError
from aifactory.records.artifacts import Model
from aifactory.records.feedback import Feedback
from aifactory.report import lineage_of
from aifactory.serve.adapters import ADAPTER_FOLDER
from aifactory.serve.releases import Releases
from aifactory.text.tokenizer import load_tokenizer

PROMPT = "the quick "


@pytest.fixture(scope="module")
def trained(tmp_path_factory, exported):
    """Folders of models into which adapters of the model of seed 1 are merged, as `train.lora` exports them."""
    root = tmp_path_factory.mktemp("trained")
    base, tokenizer = load_model(exported(1), device="cpu", dtype=torch.float32), load_tokenizer(exported(1))
    folders = {}
    for name, seed in (("legal", 5), ("support", 6)):
        folder = folders[name] = root / name
        folder.mkdir()
        merged = write_adapter(folder / ADAPTER_FOLDER, base, ("q_proj", "up_proj"), rank=4, alpha=8, seed=seed)
        merged.save_pretrained(folder)
        (folder / "tokenizer.json").write_bytes((exported(1) / "tokenizer.json").read_bytes())
        (folder / GOLDEN_NAME).write_bytes(golden_answers(merged, tokenizer))
    return folders


@pytest.fixture(scope="module")
def merged_says(trained, generated):
    """`generated` by the merged model of a name."""
    return lambda name, prompt, max_tokens: generated(trained[name], prompt, max_tokens)


@pytest.fixture
def serve(tmp_path, make_small, load, answer_on):
    """Serve the model of seed 1 with these adapters; or what `publish` publishes."""

    def start(adapters, publish=lambda factory: factory.publish(1)):
        factory = make_small(tmp_path, adapters=json.dumps({name: str(place) for name, place in adapters.items()}))
        factory.promote(publish(factory))
        releases = Releases(factory.books, load)
        releases.load_first()
        return factory, answer_on(factory, releases)

    return start


def ask(endpoint, model, **options):
    options = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0, **options}
    return endpoint.client.completions.create(model=model, **options)


def as_released(factory, folder, exported):
    """The folder as a release of the factory, which then takes production back to the one before."""
    import shutil

    def become(target):
        for file in folder.rglob("*"):
            if file.is_file():
                (target / file.relative_to(folder)).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target / file.relative_to(folder))

    return factory.promote(factory.publish(1, become))


def test_each_name_answers_as_its_merged_model_and_says_who_it_is(serve, trained, says, merged_says):
    factory, starting = serve(trained)
    with starting as endpoint:
        listed = {card.id: card for card in endpoint.client.models.list()}
        answers = {name: ask(endpoint, name) for name in ("alpha", *trained)}
        exact = ask(endpoint, "alpha-r1:legal")
        streamed = list(ask(endpoint, "support", stream=True))

        assert set(listed) == {"alpha", "alpha-r1", "legal", "support", "alpha-r1:legal", "alpha-r1:support"}
        assert listed["legal"].parent == "alpha-r1"
        assert endpoint.client.models.retrieve("alpha-r1:legal").id == "alpha-r1:legal"
    expected = {"alpha": says(1, PROMPT, 16), **{name: merged_says(name, PROMPT, 16) for name in trained}}
    assert len(set(expected.values())) == 3
    assert {name: answer.choices[0].text for name, answer in answers.items()} == expected
    assert [answer.model for answer in answers.values()] == ["alpha-r1", "alpha-r1:legal", "alpha-r1:support"]
    assert len({answer.system_fingerprint for answer in answers.values()}) == 3
    assert (exact.choices[0].text, exact.model) == (expected["legal"], "alpha-r1:legal")
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected["support"]
    assert {chunk.model for chunk in streamed} == {"alpha-r1:support"}
    kept = json.loads(factory.books.feedback.completion(answers["legal"].id).request)
    assert kept["adapter"]["name"] == "legal"
    assert "adapter" not in json.loads(factory.books.feedback.completion(answers["alpha"].id).request)


def test_chats_embeddings_and_tokens_take_the_name_too(serve, trained):
    _, starting = serve(trained)
    with starting as endpoint:
        chat = endpoint.client.chat.completions.create(
            model="legal", messages=[{"role": "user", "content": "x"}], max_tokens=4, temperature=0
        )
        vectors = {
            name: endpoint.client.embeddings.create(model=name, input=PROMPT) for name in ("alpha", "legal", "support")
        }
        count = endpoint.client.post("/../tokenize", body={"model": "legal", "prompt": "x"}, cast_to=dict)["count"]

    assert chat.model == "alpha-r1:legal"
    assert vectors["legal"].model == "alpha-r1:legal"
    assert len({tuple(each.data[0].embedding) for each in vectors.values()}) == 3
    assert count == 2


def test_a_name_that_is_none_is_404_and_the_others_are_named(serve, trained):
    _, starting = serve(trained)
    with starting as endpoint:
        for name in ("medical", "alpha-r2:legal", "legal:alpha-r1", ""):
            with pytest.raises(openai.NotFoundError) as refused:
                ask(endpoint, name)
            assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
            assert "'alpha-r1:legal'" in refused.value.message


def test_what_does_not_fit_is_not_served_and_the_journal_says_why(serve, trained, exported, tmp_path):
    narrow = load_model(exported(1), device="cpu", dtype=torch.float32)
    narrow.model.layers = narrow.model.layers[:1]
    narrow.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 48, bias=False)
    write_adapter(tmp_path / "narrow", narrow, ("up_proj",), rank=2, alpha=2, seed=1)
    places = {**trained, "narrow": tmp_path / "narrow", "nowhere": tmp_path / "no", "later": "registry:7"}
    factory, starting = serve(places, lambda factory: factory.publish(2))
    with starting as endpoint:
        assert [card.id for card in endpoint.client.models.list()] == ["alpha", "alpha-r1"]
        for name in places:
            with pytest.raises(openai.NotFoundError, match=f"{name!r} does not; the journal says why") as refused:
                ask(endpoint, name)
            assert str(tmp_path) not in refused.value.message
        assert ask(endpoint, "alpha").model == "alpha-r1"

    reasons = {e.detail["adapter"]: e.detail["reason"] for e in factory.books.journal.events(event="adapter_refused")}
    assert set(reasons) == set(places)
    assert "belongs to other weights" in reasons["legal"]
    assert "A of (rank, 32), B of (64, rank)" in reasons["narrow"]
    assert "adapter_config.json" in reasons["nowhere"]
    assert "registry:7" in reasons["later"]


def test_a_bare_adapter_stays_through_a_swap_and_one_that_is_known_to_fit_no_longer_goes(
    serve, trained, exported, tmp_path, wait_until
):
    bare = tmp_path / "bare"
    base = load_model(exported(1), device="cpu", dtype=torch.float32)
    write_adapter(bare, base, ("v_proj",), rank=2, alpha=4, seed=9)
    factory, starting = serve({"legal": trained["legal"], "bare": bare})
    with starting as endpoint:
        before = {name: ask(endpoint, name) for name in ("legal", "bare")}
        stream = ask(endpoint, "legal", stream=True, max_tokens=80)
        first = next(iter(stream))
        factory.promote(factory.publish(2))
        endpoint.run(endpoint.releases.look(30.0))

        assert {chunk.model for chunk in [first, *stream]} == {"alpha-r1:legal"}
        with pytest.raises(openai.NotFoundError, match="alpha-r2"):
            ask(endpoint, "legal")
        after = ask(endpoint, "bare")
        assert after.model == "alpha-r2:bare"
        assert after.choices[0].text != before["bare"].choices[0].text
        factory.books.registry.rollback(reason="test")
        endpoint.run(endpoint.releases.look(30.0))
        assert ask(endpoint, "legal").choices[0].text == before["legal"].choices[0].text


def test_a_release_that_was_trained_with_an_adapter_lends_it_and_is_itself_where_it_serves(
    serve, trained, exported, merged_says
):
    factory, starting = serve({"legal": "registry:2"})
    with starting as endpoint:
        as_released(factory, trained["legal"], exported)
        endpoint.run(endpoint.releases.look(30.0))
        itself = ask(endpoint, "legal")
        assert itself.model == "alpha-r2"
        factory.books.registry.rollback(reason="test")
        endpoint.run(endpoint.releases.look(30.0))
        lent = ask(endpoint, "legal")
        assert lent.model == "alpha-r1:legal"

    origin = factory.books.registry.release(2).model
    factory.books.lineage.add(factory.books.artifacts.get(Model, origin))
    (release, adapter) = lineage_of(factory.books, lent.id).parents
    kept = json.loads(factory.books.feedback.completion(lent.id).request)["adapter"]
    assert (release.id, adapter.id) == ("alpha-r1", f"legal {kept['digest'][:16]}")
    assert kept["origin"] == origin == adapter.parents[0].id
    assert itself.choices[0].text == lent.choices[0].text == merged_says("legal", PROMPT, 16)


def test_feedback_on_an_adapters_answers_is_kept_and_neither_measures_nor_trains_the_release(serve, trained):
    factory, starting = serve(trained)
    log = factory.books.feedback
    with starting as endpoint:
        answers = {name: ask(endpoint, name) for name in ("alpha", "legal")}
    for name, answer in answers.items():
        assert log.record(Feedback(completion=answer.id, idempotency_key=name, correction="better"))

    assert [row.completion for row in log.corrections(unscored_by="bits")] == [answers["alpha"].id]
    assert log.counts()["waiting"] == 1
    assert log.seal(batch_rows=1, batch_after_s=None) == 1
    assert log.seal(batch_rows=1, batch_after_s=0.0) is None
    assert [row.completion for row in log.corrections(batch=1)] == [answers["alpha"].id]
    assert {row.completion for row in log.corrections()} == {answer.id for answer in answers.values()}


@pytest.mark.parametrize(
    ("adapters", "match"),
    [
        ({"alpha": "x"}, "neither the factory's nor a release's"),
        ({"alpha-r3": "x"}, "neither the factory's nor a release's"),
        ({"a b": "x"}, "adapters"),
        ({f"a{number}": "x" for number in range(65)}, "64"),
    ],
)
def test_names_are_checked_and_their_number_is_bounded(adapters, match):
    source = {"name": "docs", "kind": "text", "path": "docs"}
    text = json.dumps(
        {"name": "alpha", "ingest": {"sources": [source]}, "runtime": {"endpoint": {"adapters": adapters}}}
    )
    with pytest.raises(ConfigError, match=match):
        Config.from_text(text, origin="test")


def test_a_relative_folder_is_found_from_any_other(serve, trained, monkeypatch):
    monkeypatch.chdir(trained["legal"].parent)
    factory, starting = serve({"legal": "legal"})
    with starting as endpoint:
        assert endpoint.client.models.retrieve("legal").parent == "alpha-r1"
        assert factory.books.resolved_config().runtime.endpoint.adapters == {"legal": str(trained["legal"])}
