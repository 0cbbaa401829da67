"""A byte-level tokenizer trained here, and one in the manner of SentencePiece."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from aifactory.text.tokenizer import TextTokenizer

LINES = [
    "the quick brown fox jumps over the lazy dog",
    "señor Müller trinkt süßen Kaffee",
    "日本語のテキスト",
    "😀 emoji 👩‍👩‍👧",
] * 4


def byte_level(specials: list[str]) -> Tokenizer:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(LINES, trainer)
    return trained


@pytest.fixture(scope="session")
def library_tokenizer() -> Tokenizer:
    return byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


@pytest.fixture(scope="session")
def tokenizer(library_tokenizer: Tokenizer) -> TextTokenizer:
    return TextTokenizer(library_tokenizer.to_str().encode())


@pytest.fixture(scope="session")
def with_template(library_tokenizer: Tokenizer) -> Callable[[str], TextTokenizer]:
    return lambda template: TextTokenizer(library_tokenizer.to_str().encode(), chat_template=template)


@pytest.fixture(scope="session")
def piece_tokenizer() -> TextTokenizer:
    """As Llama 2: a space before the text, unknown characters as bytes."""
    words = ["▁", "▁the", "▁dog", "t", "h", "e", "d", "o", "g", "s"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:3]])
    return TextTokenizer(tokenizer.to_str().encode(), bos_token="<s>", eos_token="</s>")
