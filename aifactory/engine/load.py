"""Load: a Hugging Face folder -> the model and how many tokens it can read, running no code of the folder.

Reads    config.json, generation_config.json, *.safetensors
Raises   UnsafeModelError, ConfigError.
"""

from __future__ import annotations

import threading
from fnmatch import fnmatch
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from aifactory.errors import ConfigError, UnsafeModelError

_LOADING = threading.Lock()
"""transformers 5 takes torch's initialisers away while it loads: of two threads the second would give back nothing."""
_CAN_RUN_CODE = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib", "pytorch_model*")


def require_safe_folder(folder: Path) -> None:
    """Refuse a model folder with a file that could run code when loaded, whether or not anything would load it.

    Raises  UnsafeModelError naming the file; ConfigError if there is no model.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"Expected a Hugging Face model folder with a config.json, found none in {folder}. Check the path."
        )
    require_no_code(folder)
    if (folder / "adapter_config.json").exists():
        # transformers would then load another model, named in that file.
        raise UnsafeModelError(
            f"Expected a whole model, found an adapter in {folder}. Merge it into its base model and save that."
        )
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"Expected *.safetensors in {folder}, found none. Save the model with `save_pretrained`.")


def require_no_code(folder: Path) -> None:
    """Refuse a folder with a file that could run code when loaded.

    Raises  UnsafeModelError naming the file.
    """
    for path in sorted(folder.rglob("*")):
        name = path.name.lower()
        if any(fnmatch(name, pattern) for pattern in _CAN_RUN_CODE):
            raise UnsafeModelError(
                f"Expected weights as safetensors only, found {path}, a format that can run code when it is loaded. "
                "Convert it to safetensors, or remove it if it isn't needed."
            )


def load_model(folder: Path, *, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of a folder, in eval mode on `device`, without network.

    Raises  UnsafeModelError, ConfigError.
    """
    folder = Path(folder)
    require_safe_folder(folder)
    try:
        with _LOADING:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=dtype,
                attn_implementation="sdpa",
            )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"Expected a causal language model in {folder}, found one that can't be loaded: {error}"
        ) from error
    loaded: PreTrainedModel = model.to(torch.device(device)).eval()  # type: ignore[arg-type]
    return loaded


def read_context_length(config: PretrainedConfig, limit: int | None = None) -> int:
    """Most tokens of a prompt and its answer: the model's own limit, or `limit` if that is less.

    Raises  ConfigError if the model names none and `limit` is None, or `limit` is below 2.
    """
    config = config.get_text_config(decoder=True)
    limits = [limit, getattr(config, "max_position_embeddings", None), _constant_rope_length(config)]
    known = [length for length in limits if length is not None]
    if not known or min(known) < 2:
        raise ConfigError(
            f"Expected a context length of at least 2 tokens, found {min(known, default=None)} for a "
            f"{config.model_type} model. Set the context length."
        )
    return min(known)


def read_eos_ids(model: PreTrainedModel) -> frozenset[int]:
    """The tokens at which the model's own generation settings end an answer; chat models have several."""
    settings = model.generation_config if model.generation_config is not None else model.config
    ids = getattr(settings, "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def _constant_rope_length(config: PretrainedConfig) -> int | None:
    # These two scale all rows of a batch by its longest one: beyond this length an answer would depend on its
    # neighbours.
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") not in ("dynamic", "longrope"):
        return None
    length = parameters.get("original_max_position_embeddings")
    length = length or getattr(config, "original_max_position_embeddings", None)
    return int(length or config.max_position_embeddings)
