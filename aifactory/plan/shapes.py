"""ModelShape: what of a decoder-only transformer decides its arithmetic and its memory.

Read from a configuration's own architecture, a folder in Hugging Face form, or the table of published models. No weights are
read and nothing is fetched.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aifactory.config import Architecture
from aifactory.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Widths and counts. Biases and the scales of norms are left out of all sums: less than a thousandth."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    gated: bool = True
    """Whether the MLP has three matrices (SwiGLU) or two."""
    positions: int = 0
    """Rows of learned positions, where there are any."""
    experts: int = 1
    active_experts: int = 1

    @property
    def width(self) -> int:
        """Numbers of the queries of all heads."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Numbers of the keys of all heads."""
        return self.kv_heads * self.head_dim

    @property
    def attention_weights(self) -> int:
        """Of one layer."""
        return self.hidden * (2 * self.width + 2 * self.kv_width)

    @property
    def mlp_weights(self) -> int:
        """Of one expert of one layer."""
        return self.hidden * self.intermediate * (3 if self.gated else 2)

    @property
    def block_weights(self) -> int:
        """Of all layers: what is held."""
        router = self.hidden * self.experts if self.experts > 1 else 0
        return self.layers * (self.attention_weights + self.experts * self.mlp_weights + router)

    @property
    def active_block_weights(self) -> int:
        """Of all layers: what a token meets."""
        router = self.hidden * self.experts if self.experts > 1 else 0
        return self.layers * (self.attention_weights + self.active_experts * self.mlp_weights + router)

    @property
    def head_weights(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All weights."""
        embeddings = self.head_weights * (1 if self.tied else 2) + self.positions * self.hidden
        return self.block_weights + embeddings

    @property
    def product_weights(self) -> int:
        """What a token is multiplied with: looked-up embeddings are not."""
        return self.active_block_weights + self.head_weights

    @property
    def kv_numbers_per_token(self) -> int:
        """Keys and values of a token in a cache."""
        return 2 * self.layers * self.kv_width

    def flops_per_token(self, attended_tokens: float) -> float:
        """Of a forward and a backward pass, by the convention of `aifactory/train/flops.py`."""
        return 6.0 * self.product_weights + 12.0 * self.layers * self.width * attended_tokens


def shape_of_architecture(architecture: Architecture, vocab_size: int) -> ModelShape:
    """Of a model from scratch, as the trainer makes it."""
    hidden = architecture.hidden_size
    return ModelShape(
        hidden=hidden,
        layers=architecture.num_layers,
        heads=architecture.num_heads,
        kv_heads=architecture.num_kv_heads or architecture.num_heads,
        head_dim=hidden // architecture.num_heads,
        intermediate=architecture.intermediate_size or -(-hidden * 8 // 3 // 64) * 64,
        vocab=vocab_size,
        tied=True,
    )


def shape_named(name: str) -> ModelShape:
    """Of a published model, or of a folder with a config.json.

    Raises   ConfigError where there is neither.
    """
    key = name.lower().rpartition("/")[2].removeprefix("meta-")
    if key in PUBLISHED:
        return PUBLISHED[key]
    file = Path(name) / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"expected a folder with a config.json or one of {', '.join(PUBLISHED)} as the model, found {name!r}; a plan "
            "fetches nothing. Name a folder, or describe the model by --set model.architecture.hidden_size=... and its like."
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"expected JSON in {file}, found: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"expected a JSON object in {file}, found a {type(values).__name__}.")
    return _of_hugging_face(values, str(file))


def _of_hugging_face(values: dict[str, Any], where: str) -> ModelShape:
    text = values.get("text_config")
    values = {**values, **text} if isinstance(text, dict) else values
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    wrong = [key for key in needed if not isinstance(values.get(key), int) or values[key] < 1]
    if wrong:
        raise ConfigError(
            f"expected whole numbers above 0 for {', '.join(needed)} in {where}, found none for {', '.join(wrong)}; a plan knows "
            "models with keys of these names (Llama, Mistral, Qwen, Gemma, Mixtral and their like)."
        )
    experts = int(values.get("num_local_experts") or values.get("num_experts") or 1)
    inner = values.get("moe_intermediate_size") if experts > 1 else None
    heads = values["num_attention_heads"]
    return ModelShape(
        hidden=values["hidden_size"],
        layers=values["num_hidden_layers"],
        heads=heads,
        kv_heads=int(values.get("num_key_value_heads") or heads),
        head_dim=int(values.get("head_dim") or values["hidden_size"] // heads),
        intermediate=int(inner or values["intermediate_size"]),
        vocab=values["vocab_size"],
        tied=bool(values.get("tie_word_embeddings", False)),
        experts=experts,
        active_experts=int(values.get("num_experts_per_tok") or 1) if experts > 1 else 1,
    )


def _llama(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int, tied: bool
) -> ModelShape:
    return ModelShape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate=intermediate,
        vocab=vocab,
        tied=tied,
    )


PUBLISHED = {
    "llama-2-7b": _llama(4096, 32, 32, 32, 11_008, 32_000, False),
    "llama-2-13b": _llama(5120, 40, 40, 40, 13_824, 32_000, False),
    "llama-2-70b": _llama(8192, 80, 64, 8, 28_672, 32_000, False),
    "llama-3.2-1b": _llama(2048, 16, 32, 8, 8192, 128_256, True),
    "llama-3.2-3b": _llama(3072, 28, 24, 8, 8192, 128_256, True),
    "llama-3.1-8b": _llama(4096, 32, 32, 8, 14_336, 128_256, False),
    "llama-3.1-70b": _llama(8192, 80, 64, 8, 28_672, 128_256, False),
    "llama-3.1-405b": _llama(16_384, 126, 128, 8, 53_248, 128_256, False),
    "gpt-3-175b": ModelShape(
        hidden=12_288,
        layers=96,
        heads=96,
        kv_heads=96,
        head_dim=128,
        intermediate=4 * 12_288,
        vocab=50_257,
        tied=True,
        gated=False,
        positions=2048,
    ),
}
"""By the names that their makers gave them: Touvron et al. 2023, arXiv:2307.09288; Llama Team 2024, arXiv:2407.21783, table 3;
Brown et al. 2020, arXiv:2005.14165, table 2.1."""
