"""Laws of adapters: each answers as its own merged model would, whatever is beside it; what is none is refused by name."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_adapters import write_adapter

from aifactory.engine.adapters import CONFIG_NAME, WEIGHTS_NAME, load_adapter
from aifactory.engine.engine import TorchEngine
from aifactory.errors import BadRequestError, ConfigError, UnsafeModelError

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@torch.inference_mode()
def generate(model, prompt, max_tokens):
    output = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=max_tokens, pad_token_id=0, eos_token_id=0
    )
    return output[0, len(prompt) :].tolist()


@pytest.fixture(params=["plain-llama", "compiled-llama", "compiled-qwen3", "plain-gpt2"])
def case(request, make_model_of, tmp_path):

    how, kind = request.param.split("-")
    base = make_model_of(kind)
    some, all_of_it = (("c_attn",), ("c_attn", "c_fc", "c_proj")) if kind == "gpt2" else (("v_proj", "up_proj"), LLAMA)
    models = {
        None: base,
        "some": write_adapter(tmp_path / "some", base, some, rank=3, alpha=6, seed=1),
        "all": write_adapter(tmp_path / "all", base, all_of_it, rank=8, alpha=4, seed=2, use_rslora=True),
    }
    folders = {name: tmp_path / name for name in ("some", "all")}
    return base, models, folders, how == "compiled"


def test_mixed_adapters_in_a_batch_answer_as_their_merged_models_do(case, tokenizer, start, make_request, collected):
    base, models, folders, compiled = case
    rng = random.Random(4)
    engine = start(copy.deepcopy(base), compiled=compiled, adapters=folders, num_slots=6, num_threads=1)
    # The same prompt under each name: a reused beginning of another adapter's would show.
    shared = [rng.randrange(1, tokenizer.vocab_size) for _ in range(70)]
    asked = []
    for index in range(12):
        name = (None, "some", "all")[index % 3]
        prompt = shared if index < 6 else [rng.randrange(1, tokenizer.vocab_size) for _ in range(3 * index)]
        answer = collected()
        request = make_request(f"r{index}", prompt, max_tokens=12, temperature=0.0)
        engine.submit(
            type(request)(id=request.id, prompt_ids=request.prompt_ids, sampling=request.sampling, adapter=name), answer
        )
        asked.append((name, prompt, answer))

    expected = [generate(models[name], prompt, 12) for name, prompt, _ in asked]
    assert [answer.wait().ids for _, _, answer in asked] == expected
    assert expected[0] != expected[1] != expected[2]


@pytest.mark.parametrize("case", ["compiled-llama", "compiled-qwen3"], indirect=True)
def test_with_weights_of_bfloat16_an_adapter_is_near_the_best_of_its_merged_model(
    case, tokenizer, start, make_request, collected
):
    base, models, folders, _ = case
    rng = random.Random(5)
    engine = start(copy.deepcopy(base), compiled=True, weights="bfloat16", adapters=folders, num_slots=6)
    asked = []
    for index in range(9):
        name, prompt = (None, "some", "all")[index % 3], [rng.randrange(1, tokenizer.vocab_size) for _ in range(70)]
        answer = collected()
        request = make_request(f"r{index}", prompt, max_tokens=12, temperature=0.0)
        engine.submit(request if name is None else with_adapter(request, name), answer)
        asked.append((name, prompt, answer))

    for name, prompt, answer in asked:
        ids = answer.wait().ids
        with torch.inference_mode():
            log_probs = models[name](input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        for place, token_id in enumerate(ids, start=len(prompt) - 1):
            assert float(log_probs[place].max() - log_probs[place, token_id]) < 0.15


def test_an_adapter_joins_while_others_answer(case, start, make_request, collected):
    base, models, folders, compiled = case
    engine = start(copy.deepcopy(base), compiled=compiled, adapters={"some": folders["some"]})
    running = collected()
    engine.submit(make_request("running", [1, 2], max_tokens=100, temperature=0.0), running)
    with pytest.raises(BadRequestError, match="adapter of some") as refused:
        engine.submit(with_adapter(make_request("early", [3], max_tokens=2), "all"), collected())
    assert refused.value.field == "adapter"
    engine.add_adapter("all", folders["all"])
    late = collected()
    engine.submit(with_adapter(make_request("late", [3, 4], max_tokens=8, temperature=0.0), "all"), late)

    assert late.wait().ids == generate(models["all"], [3, 4], 8)
    assert running.wait().ids == generate(base, [1, 2], 100)
    assert engine.adapters == {"some", "all"}
    with pytest.raises(ConfigError, match="in use"):
        engine.add_adapter("all", folders["all"])


def with_adapter(request, name):
    return type(request)(id=request.id, prompt_ids=request.prompt_ids, sampling=request.sampling, adapter=name)


def test_peft_reads_the_same_folder_as_the_same_model(model, tmp_path):
    peft = pytest.importorskip("peft")
    write_adapter(tmp_path / "a", model, LLAMA, rank=4, alpha=8, seed=5)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a").merge_and_unload()
    changes = load_adapter("a", tmp_path / "a", model).changes
    for path, change in changes.items():
        ours = model.get_submodule(path).weight + change.b @ change.a
        assert torch.allclose(ours, theirs.get_submodule(path).weight, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_alpha": None}, "lora_alpha"),
    ],
)
def test_what_an_adapter_asks_beyond_low_rank_is_refused_by_name(model, tmp_path, config, match):
    write_adapter(tmp_path / "a", model, LLAMA, rank=4, alpha=8, seed=5)
    settings = json.loads((tmp_path / "a" / CONFIG_NAME).read_text())
    (tmp_path / "a" / CONFIG_NAME).write_text(json.dumps(settings | config))
    with pytest.raises(ConfigError, match=match):
        load_adapter("a", tmp_path / "a", model)


def test_tensors_of_another_model_or_another_kind_are_refused(model, tmp_path):
    write_adapter(tmp_path / "a", model, ("q_proj",), rank=4, alpha=8, seed=5)
    weights = tmp_path / "a" / WEIGHTS_NAME
    tensors = load_file(weights)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for changed, match in (
        ({**tensors, key: torch.zeros(4, 40)}, "another model"),
        ({**tensors, key.replace("layers.0", "layers.9"): torch.zeros(4, 32)}, "another model"),
        ({**tensors, "base_model.model.lm_head.weight": torch.zeros(4, 4)}, "lm_head"),
        ({}, "no tensor"),
    ):
        save_file(changed, weights)
        with pytest.raises(ConfigError, match=match):
            load_adapter("a", tmp_path / "a", model)
    weights.write_bytes(b"no safetensors")
    with pytest.raises(ConfigError, match="Save the adapter again"):
        load_adapter("a", tmp_path / "a", model)
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UnsafeModelError):
        load_adapter("a", tmp_path / "a", model)


def test_an_adapter_of_the_head_needs_the_models_own_forward(model, tokenizer, tmp_path):
    write_adapter(tmp_path / "a", model, ("lm_head",), rank=4, alpha=8, seed=5)
    with pytest.raises(ConfigError, match="lm_head"):
        TorchEngine(copy.deepcopy(model), tokenizer, adapters={"a": tmp_path / "a"}, compiled=True)
