"""python -m pytest tests/records/test_lineage.py"""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from aifactory.records.artifacts import Artifact, Corpus, FeedbackBatch, Model, Record, TokenSet
from aifactory.records.identity import hash_text
from aifactory.records.journal import Journal
from aifactory.records.lineage import Lineage


def made(noun: type[Artifact], name: str, inputs: Sequence[Artifact | str] = ()) -> Artifact:
    record = Record(
        kind=noun.kind,
        fingerprint=hash_text(name),
        digest=hash_text("bytes of " + name),
        code_version=1,
        recipe={},
        inputs=[i if isinstance(i, str) else i.id for i in inputs],
        files=[],
        figures={},
        created_at=1_000.0,
    )
    return noun(record=record, uri=f"/root/{name}")


@pytest.fixture
def lineage(journal: Journal) -> Lineage:
    return Lineage(journal)


def test_the_tree_reaches_from_a_model_to_the_feedback(lineage: Lineage) -> None:
    batch = made(FeedbackBatch, "batch")
    corpus = made(Corpus, "corpus", [batch])
    tokens = made(TokenSet, "tokens", [corpus])
    parent = made(Model, "parent", ["hub:tiny"])
    model = made(Model, "model", [tokens, parent, parent])
    for artifact in (batch, corpus, tokens, parent, model):
        assert lineage.add(artifact) is True

    tree = lineage.tree(model.id)

    assert tree is not None
    assert (tree.id, tree.kind, tree.digest, tree.uri) == (model.id, "model", model.digest, "/root/model")
    assert {node.id for node in tree.parents} == {tokens.id, parent.id}
    assert tree.lines() == [
        f"{model.id}  sha256 {model.digest[:12]}",
        f"  {parent.id}  sha256 {parent.digest[:12]}",
        "    hub:tiny",
        f"  {tokens.id}  sha256 {tokens.digest[:12]}",
        f"    {corpus.id}  sha256 {corpus.digest[:12]}",
        f"      {batch.id}  sha256 {batch.digest[:12]}",
    ]
    plain = json.loads(json.dumps(tree.to_json()))
    assert plain["parents"][1]["parents"][0]["parents"][0]["id"] == batch.id
    assert plain["parents"][0]["parents"] == [
        {"id": "hub:tiny", "kind": "hub:tiny", "digest": None, "uri": None, "parents": []}
    ]


def test_an_artifact_is_indexed_once(lineage: Lineage) -> None:
    corpus = made(Corpus, "corpus")

    assert lineage.add(corpus) is True
    assert lineage.add(corpus) is False

    assert lineage.tree("corpus/unknown") is None


def test_factories_in_one_database_do_not_see_one_another(lineage: Lineage) -> None:
    beta = Lineage(Journal(lineage.database, "beta"))
    corpus, model = made(Corpus, "corpus"), made(Model, "model", ["corpus/" + hash_text("corpus")[:16]])
    lineage.add(corpus)
    beta.add(model)

    theirs = beta.tree(model.id)

    assert beta.tree(corpus.id) is None
    assert lineage.tree(model.id) is None
    assert theirs is not None
    assert [node.digest for node in theirs.parents] == [None]


def test_the_tree_of_many_cycles_is_as_long_as_they_are(lineage: Lineage) -> None:
    model, artifacts = made(Model, "model-0"), []
    for cycle in range(1, 40):
        tokens = made(TokenSet, f"tokens-{cycle}", [model])
        model = made(Model, f"model-{cycle}", [tokens, model])
        artifacts += [tokens, model]
    for artifact in artifacts:
        lineage.add(artifact)

    tree = lineage.tree(model.id)

    assert tree is not None
    assert len(tree.lines()) < 150
    assert sum(line.endswith("(above)") for line in tree.lines()) == 38
    assert len(json.dumps(tree.to_json())) < 100_000
