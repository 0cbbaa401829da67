"""Laws of parity: an export that another process does not find to be what was trained leaves no model."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from aifactory.errors import ParityError
from aifactory.train.parity import PROBE, prove_export
from aifactory.train.work import EXPORTED, exported

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def other_process():
    """A process that has never seen a trainer."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:

        def prove(task, tolerance=TOLERANCE):
            return pool.apply(prove_export, (task, tolerance))

        yield prove


def test_what_was_exported_is_found_to_be_what_was_trained(runs, uninterrupted, other_process):
    found = other_process(uninterrupted)

    # Eight documents of each set of rows; the second set has prompts as well.
    assert found["documents"] == 16
    assert found["tokens"] > 100
    assert found["largest_difference"] <= 1e-5
    assert exported(runs.storage, uninterrupted.run_folder) is not None


def test_the_documents_are_those_that_the_model_was_trained_on(runs, uninterrupted):
    probe = json.loads(Path(runs.storage.path(*uninterrupted.run_folder, PROBE)).read_text())

    documents = probe["documents"]
    assert {document["prompt"] for document in documents} == {"", "say it: "}
    assert all(
        document["text"].split()[0] in "the quick brown fox jumps over größe 日本語 return x" for document in documents
    )
    assert all(document["ids"][0] == document["ids"][-1] == runs.tokenizer.eos_id for document in documents)
    assert all(len(document["log_probs"]) == min(len(document["ids"]), 64) - 1 for document in documents)


def test_the_process_that_trained_can_not_prove_it(uninterrupted):
    with pytest.raises(AssertionError, match="prove nothing"):
        prove_export(uninterrupted, TOLERANCE)


def test_no_text_of_the_training_data_is_in_the_exported_folder(runs, uninterrupted):
    assert PROBE not in runs.files(uninterrupted)
    files = [data.decode(errors="replace") for data in runs.files(uninterrupted).values()]
    assert not any("say it:" in text for text in files)


def scale_one_row(folder):
    """The embedding, and with tied weights the logit, of one token."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "embed_tokens" in name)
    weights[name] = weights[name].clone()
    weights[name][300 - 7] *= 3
    save_file(weights, file, metadata={"format": "pt"})


def one_layer_is_not_a_number(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "layers.1.mlp.down_proj" in name)
    weights[name] = torch.full_like(weights[name], float("nan"))
    save_file(weights, file, metadata={"format": "pt"})


def fewer_heads(folder):
    config = json.loads((folder / "config.json").read_text())
    config["num_attention_heads"] = config["num_key_value_heads"] = 1
    config["head_dim"] = 32
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (scale_one_row, r"log-probabilities within 0\.001 nats"),
        (one_layer_is_not_a_number, r"log-probabilities within 0\.001 nats.*found a difference of nan"),
        (fewer_heads, r"log-probabilities within 0\.001 nats"),
    ],
)
def test_an_export_with_other_weights_than_the_trainers_is_refused(runs, other_process, monkeypatch, damage, said):
    # The damage is done while the folder is written, so its hashes are those of the damaged files.
    save = PreTrainedModel.save_pretrained

    def save_and_damage(self, folder, *rest, **options):
        save(self, folder, *rest, **options)
        damage(Path(folder))

    with monkeypatch.context() as changed:
        changed.setattr(PreTrainedModel, "save_pretrained", save_and_damage)
        task = runs.work(f"damaged-{damage.__name__}", max_steps=4)
        runs.run(task)

    with pytest.raises(ParityError, match=said) as refused:
        other_process(task)
    assert "exports it again from its last checkpoint" in str(refused.value)
    assert exported(runs.storage, task.run_folder) is None
    runs.run(task)
    assert runs.figures(task)["resumed_from"] == 4
    assert other_process(task)["largest_difference"] <= 1e-5


def drop_merges(data):
    values = json.loads(data)
    values["model"]["merges"] = values["model"]["merges"][:-30]
    return json.dumps(values).encode()


def test_an_export_with_another_tokenizer_is_refused(runs, other_process):
    task = runs.work("damaged-tokenizer", max_steps=4)
    runs.run(task)
    damage_exported(runs, task, "tokenizer.json", drop_merges)

    with pytest.raises(ParityError, match=r"[Ee]xpected the tokens \[.*found \["):
        other_process(task)
    assert exported(runs.storage, task.run_folder) is None


def test_an_export_with_another_chat_template_is_refused(runs, other_process):
    task = runs.work("damaged-template", max_steps=4)
    runs.run(task)
    template = json.dumps({"chat_template": "{{ messages[0].content }}!"})
    damage_exported(
        runs, task, "tokenizer_config.json", lambda data: json.dumps(json.loads(data) | json.loads(template)).encode()
    )

    with pytest.raises(ParityError, match="expected the chat template with which the model was trained"):
        other_process(task)


def damage_exported(runs, task, name, change):
    """As if the trainer itself had exported it so: the list of its files says it."""
    import hashlib

    file = runs.folder(task) / name
    file.write_bytes(change(file.read_bytes()))
    listed = exported(runs.storage, task.run_folder)
    for each in listed["files"]:
        if each["name"] == name:
            each["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    runs.storage.write_bytes(json.dumps(listed).encode(), *task.run_folder, EXPORTED)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_that_is_not_as_it_was_written_is_refused(runs, other_process, name):
    task = runs.work(f"changed-{name}", max_steps=2)
    runs.run(task)
    file = runs.folder(task) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)

    with pytest.raises(ParityError, match=rf"{name} as it was exported, found other bytes"):
        other_process(task)


def test_a_stricter_tolerance_than_the_arithmetic_allows_is_judged_by_it(runs, uninterrupted, other_process):
    task = runs.work("strict", max_steps=2)
    runs.run(task)
    probe = Path(runs.storage.path(*task.run_folder, PROBE))
    told = json.loads(probe.read_text())
    told["documents"][0]["log_probs"][2] += 0.01
    probe.write_text(json.dumps(told))

    assert other_process(task, 0.02)["largest_difference"] == pytest.approx(0.01, rel=1e-2)
    with pytest.raises(
        ParityError, match=r"within 0\.005 nats of the trainer's, found a difference of 0\.01 at token 3"
    ):
        other_process(task, 0.005)
