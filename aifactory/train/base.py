"""What training starts from: a model from scratch, or one in Hugging Face form (a folder, the hub, the registry)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from aifactory.engine.load import load_model, read_context_length, require_safe_folder
from aifactory.errors import ConfigError, TokenizerMismatchError
from aifactory.records.storage import RECORD_NAME

if TYPE_CHECKING:
    from aifactory.config import Architecture

_SAID = {"README.md", "loss.svg", RECORD_NAME}
"""Files that tell of a model and are no part of it: a card changes when a score is added."""
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def model_from_scratch(
    architecture: Architecture, *, vocab_size: int, end_id: int, row_len: int, seed: int
) -> PreTrainedModel:
    """A Llama with weights that depend on the shape and the seed alone, fp32, with tied embeddings."""
    if row_len > architecture.context_length:
        raise ConfigError(
            f"expected tokenize.row_len of at most model.architecture.context_length, found {row_len} and "
            f"{architecture.context_length}; lower the first or raise the second."
        )
    hidden = architecture.hidden_size
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=architecture.intermediate_size or -(-hidden * 8 // 3 // 64) * 64,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_heads,
        num_key_value_heads=architecture.num_kv_heads or architecture.num_heads,
        max_position_embeddings=architecture.context_length,
        attention_dropout=architecture.dropout,
        tie_word_embeddings=True,
        bos_token_id=end_id,
        eos_token_id=end_id,
        pad_token_id=end_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def model_from_folder(folder: Path) -> PreTrainedModel:
    """The model of a folder, fp32, on the CPU. Raises UnsafeModelError, ConfigError."""
    return load_model(folder, device="cpu", dtype=torch.float32)


def require_fit(model: PreTrainedModel, *, vocab_size: int, row_len: int) -> None:
    """Refuse a model that can't read the rows it is to be trained on.

    Raises   TokenizerMismatchError if it has fewer tokens than the tokenizer; ConfigError if its context is too short.
    """
    known = model.get_input_embeddings().get_parameter("weight").shape[0]
    if known < vocab_size:
        raise TokenizerMismatchError(
            f"expected a model that knows the {vocab_size} tokens of the tokenizer, found {known} at model.base; set "
            "tokenize.tokenizer to the folder of that model."
        )
    context = read_context_length(model.config)
    if row_len > context:
        raise ConfigError(
            f"expected tokenize.row_len of at most the {context} tokens that the model at model.base can read, found "
            f"{row_len}; lower it."
        )


def resolve_base(base: str, *, where: str = "model.base") -> Path:
    """The local folder of a model that `where` names: a folder as it is, anything else as a hub id whose files are fetched.

    Raises   ConfigError, UnsafeModelError.
    """
    folder = Path(base).expanduser()
    if folder.is_dir():
        require_safe_folder(folder)
        return folder
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        fetched = Path(snapshot_download(base, allow_patterns=_HUB_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"expected a model folder, a hub id or registry:production at {where}, found {base!r}: no such folder, "
            f"and the hub says: {error}"
        ) from error
    require_safe_folder(fetched)
    return fetched


def digest_folder(folder: Path) -> str:
    """SHA-256 over the names and contents of a model folder, without what is only said about the model."""
    state = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in _SAID):
        state.update(file.relative_to(folder).as_posix().encode() + b"\0")
        with open(file, "rb") as stream:
            state.update(hashlib.file_digest(stream, "sha256").digest())
    return state.hexdigest()
