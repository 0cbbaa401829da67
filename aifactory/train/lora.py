"""LoRA: low-rank matrices beside the weights of a model, which stay as they are. peft makes them; it is imported when asked for.

Writes   adapter/{adapter_config.json, adapter_model.safetensors}, in peft's form, beside the merged model
Source   Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from aifactory.errors import ConfigError

if TYPE_CHECKING:
    from aifactory.config import Lora

ADAPTER_FOLDER = "adapter"


def with_adapters(model: PreTrainedModel, recipe: Lora, *, seed: int) -> nn.Module:
    """The model with adapters, which alone are trained. They depend on the model's shape, the recipe and the seed, and
    change nothing before they have been trained.

    Raises   ConfigError where peft is not installed or the model has no such modules.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("expected peft for train.lora, found none; install aifactory[lora].") from error

    modules = recipe.target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]
        lora_dropout=recipe.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
    )
    torch.manual_seed(seed)
    try:
        adapted: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(
            f"expected names of linear modules of the model at model.base in train.lora.target_modules, found {modules!r}: "
            f"{error}"
        ) from error
    return adapted


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before its adapters were put in."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tuner: Any = model.base_model
    tuner.disable_adapter_layers()
    # peft freezes what it switches off; FSDP2 would take the first state it sees for that of the whole run.
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        tuner.enable_adapter_layers()


def merged(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What adapters with these trained weights make of the model they stand beside: whole; and the files of the adapter, as
    `write_adapter` takes them."""
    from peft import get_peft_model_state_dict

    _, unexpected = model.load_state_dict(dict(weights), strict=False)
    assert not unexpected, unexpected
    adapter = {
        name: value.detach().clone().contiguous()
        for name, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    (config,) = model.peft_config.values()  # type: ignore[operator]
    # A set has no order, and where the base lay is no part of what was made.
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    plain |= {"base_model_name_or_path": None, "inference_mode": True}
    whole: PreTrainedModel = model.merge_and_unload()  # type: ignore[operator]
    return whole, {"config": plain, "weights": adapter}


def write_adapter(adapter: Mapping[str, Any], folder: Path) -> None:
    """Write an adapter so that `peft.PeftModel.from_pretrained` puts it beside its base."""
    folder.mkdir()
    text = json.dumps(adapter["config"], indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    save_file(adapter["weights"], folder / "adapter_model.safetensors")
