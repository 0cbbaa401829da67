"""Laws of loading: nothing that can run code, and only architectures that the cache describes."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from aifactory.engine.engine import TorchEngine
from aifactory.engine.load import load_model, read_context_length
from aifactory.errors import ConfigError, ParityError, UnsafeModelError

SMALL = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


@pytest.fixture
def folder(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "training_args.BIN", "optimizer.pt", "a.pkl", "deep/b.pickle", "c.ckpt", "pytorch_model.x"],
)
def test_a_folder_with_a_file_that_can_run_code_is_refused_by_name(folder, name):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")

    with pytest.raises(UnsafeModelError, match=name.split("/")[-1]):
        load_model(folder, device="cpu", dtype=torch.float32)


def test_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")

    with pytest.raises(UnsafeModelError, match="Merge"):
        load_model(folder, device="cpu", dtype=torch.float32)


def test_a_folder_without_a_model_is_a_configuration_error(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_model(tmp_path / "nowhere", device="cpu", dtype=torch.float32)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ConfigError, match="safetensors"):
        load_model(folder, device="cpu", dtype=torch.float32)


def test_code_of_the_folder_is_not_run(folder):
    config = (folder / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "own"')
    own = '{"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},'
    (folder / "config.json").write_text(config.replace("{", own, 1))
    (folder / "evil.py").write_text("raise SystemExit('code of the folder ran')")

    with pytest.raises(ConfigError):
        load_model(folder, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_engine_from_a_folder_answers(folder, dtype, make_request, collected):
    engine = TorchEngine.from_folder(folder, dtype=dtype, num_slots=2, context_length=100)
    answer = collected()
    engine.submit(make_request("a", [1, 2, 3], max_tokens=5, temperature=0.0), answer)

    assert 1 <= len(answer.wait().ids) <= 5
    assert engine.context_length == 100
    engine.close(5.0)


def test_a_sliding_window_is_refused(tokenizer):
    model = MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=16))

    with pytest.raises(ConfigError, match="sliding_attention"):
        TorchEngine(model, tokenizer)


def test_an_architecture_that_misreads_the_cache_is_refused(tokenizer, monkeypatch):
    model = LlamaForCausalLM(LlamaConfig(**SMALL, initializer_range=0.3))
    forward = model.forward

    def forgetful(input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **options):
        # As a model would that counts positions by itself.
        options["attention_mask"] = attention_mask
        positions = None if position_ids is None else torch.zeros_like(position_ids)
        return forward(input_ids=input_ids, position_ids=positions, past_key_values=past_key_values, **options)

    monkeypatch.setattr(model, "forward", forgetful)
    with pytest.raises(ParityError, match="llama"):
        TorchEngine(model, tokenizer)


def test_a_rope_that_depends_on_the_longest_row_ends_where_it_begins_to():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 32}
    config = LlamaConfig(**SMALL, rope_parameters=rope)

    assert read_context_length(config) == 32
    assert read_context_length(LlamaConfig(**SMALL)) == 64
    assert read_context_length(LlamaConfig(**SMALL), 10) == 10


def test_the_rooms_import_without_ray_pydantic_and_sqlalchemy():
    blocked = ("ray", "pydantic", "sqlalchemy")
    program = (
        "import sys, pkgutil, importlib\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "import aifactory.engine.protocol, aifactory.errors\n"
        "assert 'torch' not in sys.modules, 'the protocol loads torch'\n"
        "import aifactory.engine, aifactory.text\n"
        "import aifactory.engine.engine\n"
        # But for what needs Triton, which comes with torch for CUDA.
        "for module in pkgutil.iter_modules(aifactory.engine.__path__):\n"
        "    if module.name != 'triton_kernels': importlib.import_module(f'aifactory.engine.{module.name}')\n"
        "for name in ('tokenizer', 'chat', 'documents'): importlib.import_module(f'aifactory.text.{name}')\n"
        "others = {name.split('.')[1] for name in sys.modules if name.startswith('aifactory.')}\n"
        "assert others == {'engine', 'text', 'observe', 'errors'}, others\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr
