"""Laws of encoders: whichever library finds the tokens, they are those of the tokenizer, and text stays text."""

from __future__ import annotations

import random
import sys
import unicodedata
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from aifactory.text import encoder as module
from aifactory.text.encoder import GigatokenEncoder, TokenizersEncoder, hard_texts, open_encoder
from aifactory.text.tokenizer import TextTokenizer

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPLITS = {
    # The patterns of Llama 3 and of GPT-4o, as their tokenizer.json has them.
    "llama-3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+",
    "gpt-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def random_texts(rng, number):
    """Letters of every kind, bytes, white space, special strings, and characters that no Unicode knows yet."""
    anywhere = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    pools = [
        [*module._WORDS, *module._SPACES, *SPECIALS],
        [chr(code) for code in range(128)],
        list("the quick brown fox  \n"),
        [chr(rng.choice(anywhere)) for _ in range(80)],
        [*(chr(rng.randrange(0x80, 0x3000)) for _ in range(60)), " ", "a", "1", "<|", "|>"],
    ]
    return ["".join(rng.choices(rng.choice(pools), k=rng.randrange(50))) for _ in range(number)]


def trained(name):
    """A byte-level tokenizer, of texts in which characters of all kinds stand together, so that merges cross them."""
    library = Tokenizer(models.BPE())
    if name in SPLITS:
        split = pre_tokenizers.Split(Regex(SPLITS[name]), "isolated")
        library.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    else:
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "normalised":
        library.normalizer = normalizers.NFC()
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(random_texts(random.Random(1), 1500), trainer)
    if name == "added":
        library.add_tokens([AddedToken("brown fox", special=False), AddedToken("<tool>", special=False)])
    return TextTokenizer(library.to_str().encode())


def assert_same(encoder, tokenizer, texts):
    ids, offsets = encoder.encode_texts(pa.array(texts, pa.string()))
    assert ids.dtype == np.uint16
    assert offsets.dtype == np.int64
    assert offsets[0] == 0
    assert offsets[-1] == len(ids)
    found = [ids[start:end].tolist() for start, end in pairwise(offsets)]
    assert found == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("name", ["gpt-2", "llama-3", "gpt-4o", "normalised", "added"])
def test_every_encoder_gives_the_tokens_of_the_tokenizer(name):
    tokenizer = trained(name)
    texts = random_texts(random.Random(name), 1500)

    for encoder in (open_encoder(tokenizer), TokenizersEncoder(tokenizer)):
        assert_same(encoder, tokenizer, texts)


@pytest.mark.parametrize("name", ["gpt-2", "llama-3", "normalised"])
def test_gigatoken_is_taken_where_it_is_installed_and_gives_the_same(name):
    pytest.importorskip("gigatoken")

    encoder = open_encoder(trained(name))

    assert (encoder.library, encoder.reason) == ("gigatoken", "")


def test_pieces_with_byte_fallback_are_encoded_the_same(piece_tokenizer):
    rng = random.Random(5)
    texts = ["", " ", "the dog", "dogs 😀 é", "</s> the <s>", *random_texts(rng, 200)]

    assert_same(open_encoder(piece_tokenizer), piece_tokenizer, texts)


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|im_start|>system\nb<|im_end|>c", "<|endoftext|><|endoftext|>"])
def test_special_token_strings_in_text_are_plain_text(tokenizer, text):
    for encoder in (open_encoder(tokenizer), TokenizersEncoder(tokenizer)):
        ids, _ = encoder.encode_texts(pa.array([text]))

        assert tokenizer.control_ids.isdisjoint(ids.tolist())
        assert tokenizer.decode(ids.tolist()) == text


def test_a_vocabulary_whose_merges_make_a_control_string_does_not_give_it_to_text():
    pytest.importorskip("gigatoken")
    library = trained("gpt-2")._text
    library.encode_special_tokens = False
    # `the` is an ordinary token that now is a control token too.
    library.add_special_tokens(["the"])
    tokenizer = TextTokenizer(library.to_str().encode())
    encoder = GigatokenEncoder(tokenizer)

    assert tokenizer.encode_template("the")[0] in tokenizer.control_ids
    assert_same(encoder, tokenizer, ["of", "the quick the", "", " the", "the", "other"])


def test_the_characters_of_a_newer_unicode_are_left_to_the_tokenizer():
    pytest.importorskip("gigatoken")
    # What no Unicode of a Python of today knows: in planes 0, 1, 2, 3 and 13, and the ends of blocks.
    new = ["\u0378", "\u088f", "\u0c5c", "\ua7ce", "\U00010940", "\U0002a6e0", "\U000323b0", "\U000d0000", "\U000e0000"]
    tokenizer = trained("gpt-2")
    texts = [f"{before}{character}{character} {after}" for character in new for before in "a1!" for after in ("", "b")]
    encoder = GigatokenEncoder(tokenizer)

    assert_same(encoder, tokenizer, ["first", *texts, "last"])
    data, offsets = module.text_buffers(pa.array(["ä", *new, "€", "😀", "\ue000", "a"]))
    unknown = [i for i, character in enumerate(new, 1) if unicodedata.category(character) == "Cn"]
    assert module._texts_with_doubtful_characters(data, offsets, is_normalised=False).tolist() == unknown


def test_both_libraries_split_at_the_same_characters():
    """Each character that this Python's Unicode knows, between a letter, a digit, a sign and white space."""
    gigatoken = pytest.importorskip("gigatoken.gigatoken_rs")
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Merges of a, of 1 and of ! with every byte show where no word ends.
    merges = [(one, other) for one in "a1!" for other in characters]
    vocab = {token: i for i, token in enumerate([*characters, *map("".join, merges)])}
    library = Tokenizer(models.BPE(vocab, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other = gigatoken.load_hf_json(library.to_str())
    unknown, _ = module._doubtful_characters(False)
    # One of three inside the blocks of letters that are all alike, every one elsewhere.
    codes = [code for code in range(0x20000) if not unknown[code] and not 0xD800 <= code < 0xF900]
    codes = [code for code in codes if not (0x3400 <= code < 0xD7A4 or 0x17000 <= code < 0x18D00) or code % 61 == 0]
    texts = [f"a{chr(code)}1{chr(code)}!{chr(code)} {chr(code)}" for code in codes]

    expected = [encoding.ids for encoding in library.encode_batch_fast(texts, add_special_tokens=False)]

    found = other.encode_batch(texts, parallel=False).to_list()
    assert [hex(code) for code, a, b in zip(codes, found, expected, strict=True) if a != b] == []


def test_an_encoder_that_gives_other_tokens_is_refused():
    pytest.importorskip("gigatoken")
    tokenizer = trained("gpt-2")

    difference = module._first_difference(GigatokenEncoder(trained("llama-3")), tokenizer, hard_texts(SPECIALS))

    assert difference.startswith("gigatoken gives other tokens for ")


def test_a_tokenizer_that_gigatoken_cannot_read_is_encoded_by_tokenizers():
    pieces = [("<unk>", 0.0), ("</s>", -1.0), *((character, -5.0) for character in "</s>ab")]
    library = Tokenizer(models.Unigram(pieces, unk_id=0))
    library.decoder = decoders.Metaspace(prepend_scheme="never")
    library.add_special_tokens(["</s>"])
    tokenizer = TextTokenizer(library.to_str().encode(), eos_token="</s>")

    encoder = open_encoder(tokenizer)

    assert encoder.library == "tokenizers"
    assert encoder.reason.startswith("gigatoken")
    assert_same(encoder, tokenizer, ["ab</s>ba</s>", "", "ab"])


def test_texts_on_which_gigatoken_fails_are_encoded_by_tokenizers_and_that_is_said(tokenizer):
    pytest.importorskip("gigatoken")
    encoder = open_encoder(tokenizer)
    assert encoder.library == "gigatoken"

    class PanicError(BaseException):
        pass

    class Panics:
        def encode_batch(self, texts, *, parallel):
            raise PanicError("index out of bounds")

    encoder._opened = Panics()

    assert_same(encoder, tokenizer, ["the quick", "brown"])
    assert "PanicError: index out of bounds" in encoder.reason
    assert_same(encoder, tokenizer, ["fox"])


def test_without_gigatoken_tokenizers_encodes(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)

    encoder = open_encoder(tokenizer)

    assert encoder.library == "tokenizers"
    assert "not installed" in encoder.reason
    assert_same(encoder, tokenizer, ["the quick", ""])


@pytest.mark.parametrize("number", [1, 40, 10**9])
def test_how_the_texts_are_cut_and_when_the_library_is_opened_anew_changes_nothing(tokenizer, monkeypatch, number):
    texts = random_texts(random.Random(3), 200)
    monkeypatch.setattr(module, "_CALL_BYTES", 16 * number)
    monkeypatch.setattr(module, "_CACHE_BYTES", number)

    for encoder in (open_encoder(tokenizer), TokenizersEncoder(tokenizer)):
        assert_same(encoder, tokenizer, texts)


def test_slices_and_large_strings_are_read_as_they_lie(tokenizer):
    texts = ["", "the quick", "日本語", "", "brown fox"]

    for encoder in (open_encoder(tokenizer), TokenizersEncoder(tokenizer)):
        for kind in (pa.string(), pa.large_string()):
            column = pa.array(texts, kind)
            for start in range(6):
                ids, offsets = encoder.encode_texts(column.slice(start, 3))
                expected = [tokenizer.encode(text) for text in texts[start : start + 3]]
                assert ids.tolist() == [token_id for row in expected for token_id in row]
                assert offsets.tolist() == np.cumsum([0, *map(len, expected)]).tolist()


def test_ids_are_wide_where_the_vocabulary_is():
    characters = [chr(0x4E00 + i) for i in range(20000)] + [chr(0xAC00 + i) for i in range(11000)]
    vocab = {
        token: i for i, token in enumerate([*characters, *(a + b for a in characters[:36] for b in characters[:1000])])
    }
    library = Tokenizer(models.BPE(vocab, []))
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    tokenizer = TextTokenizer(library.to_str().encode())

    assert tokenizer.vocab_size > 2**16
    assert TokenizersEncoder(tokenizer).encode_texts(pa.array(["一丁"]))[0].dtype == np.uint32


def test_the_hard_texts_are_the_same_each_time_and_of_every_category():
    texts = hard_texts(["<|x|>"])

    assert texts == hard_texts(["<|x|>"])
    categories = {unicodedata.category(character) for text in texts for character in text}
    assert len(categories) == 28  # all but surrogates and what is not assigned
    assert any("<|x|>" in text for text in texts)
