"""Shapes against the models that the trainer makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aifactory.config import Architecture, Lora
from aifactory.errors import ConfigError
from aifactory.plan.accelerators import ACCELERATORS
from aifactory.plan.decoding import Replica
from aifactory.plan.needs import adapter_weights
from aifactory.plan.shapes import PUBLISHED, shape_named, shape_of_architecture

ARCHITECTURE = Architecture(hidden_size=48, num_layers=3, num_heads=4, num_kv_heads=2)


def hugging_face(**changes: object) -> dict[str, object]:
    values: dict[str, object] = {
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "tie_word_embeddings": True,
    }
    return {**values, **changes}


def folder_with(folder: Path, values: object) -> str:
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return str(folder)


def test_weights_and_operations_are_those_of_the_model_that_the_trainer_makes() -> None:
    from aifactory.train.base import model_from_scratch
    from aifactory.train.flops import flops_per_token

    model = model_from_scratch(ARCHITECTURE, vocab_size=300, end_id=0, row_len=32, seed=1)
    shape = shape_of_architecture(ARCHITECTURE, 300)
    matrices = sum(weight.numel() for weight in model.parameters() if weight.dim() > 1)

    assert shape.parameters == matrices
    assert shape.flops_per_token(32) == flops_per_token(model, model.config, attended_tokens=32)


def test_a_token_in_a_cache_takes_what_plans_say() -> None:
    import torch

    from aifactory.train.base import model_from_scratch

    model = model_from_scratch(ARCHITECTURE, vocab_size=300, end_id=0, row_len=32, seed=1).eval()
    with torch.no_grad():
        cache = model(torch.arange(7)[None], use_cache=True).past_key_values
    taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    replica = Replica(shape=shape_of_architecture(ARCHITECTURE, 300), accelerator=ACCELERATORS["cpu"], bytes_per_kv=4)

    assert replica.kv_bytes_per_token * 7 == taken


def test_a_folder_in_hugging_face_form_is_read(tmp_path: Path) -> None:
    shape = shape_named(folder_with(tmp_path, hugging_face()))

    assert shape == shape_of_architecture(ARCHITECTURE, 300)


def test_a_model_with_experts_holds_all_and_multiplies_with_some(tmp_path: Path) -> None:
    changes = {"num_local_experts": 8, "num_experts_per_tok": 2}
    shape = shape_named(folder_with(tmp_path, hugging_face(**changes)))

    assert shape.block_weights - shape.active_block_weights == 3 * 6 * shape.mlp_weights


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1], "a JSON object"),
        ({"n_embd": 768}, "hidden_size"),
        (hugging_face(hidden_size="48"), "hidden_size"),
        (hugging_face(vocab_size=0), "vocab_size"),
    ],
)
def test_a_config_that_is_not_known_says_what_is_missing(tmp_path: Path, values: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        shape_named(folder_with(tmp_path, values))


@pytest.mark.parametrize("name", ["llama-3.1-8b", "meta-llama/Llama-3.1-8B", "Meta-Llama-3.1-8B"])
def test_published_models_are_known_by_their_names(name: str) -> None:
    assert shape_named(name) == PUBLISHED["llama-3.1-8b"]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-2-7b", 6.74),
        ("llama-2-13b", 13.02),
        ("llama-2-70b", 68.98),
        ("llama-3.2-1b", 1.236),
        ("llama-3.2-3b", 3.21),
        ("llama-3.1-8b", 8.03),
        ("llama-3.1-70b", 70.55),
        ("llama-3.1-405b", 405.85),
        ("gpt-3-175b", 174.6),
    ],
)
def test_published_models_have_as_many_weights_as_their_makers_say(name: str, billions: float) -> None:
    """Of the checkpoints' files, and of arXiv:2005.14165, table D.1."""
    assert PUBLISHED[name].parameters / 1e9 == pytest.approx(billions, rel=1e-3)


def test_adapters_have_as_many_numbers_as_peft_gives_them() -> None:
    peft = pytest.importorskip("peft")
    from aifactory.train.base import model_from_scratch
    from aifactory.train.lora import with_adapters

    assert peft
    model = model_from_scratch(ARCHITECTURE, vocab_size=300, end_id=0, row_len=32, seed=1)
    adapted = with_adapters(model, Lora(rank=4), seed=1)
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    shape = shape_of_architecture(ARCHITECTURE, 300)

    assert adapter_weights(shape, Lora(rank=4)) == trained
    assert adapter_weights(shape, Lora(rank=4, target_modules=("q_proj",))) == 3 * 4 * (48 + 48)
    with pytest.raises(ConfigError, match="nonsense"):
        adapter_weights(shape, Lora(target_modules=("nonsense",)))
