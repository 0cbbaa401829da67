"""Laws of TextTokenizer: text is text, and decoding is exact to the byte."""

from __future__ import annotations

import hashlib
import json
import pickle
import random

import pytest
from tokenizers import Tokenizer, decoders, models

from aifactory.errors import ConfigError
from aifactory.text.tokenizer import IncrementalDecoder, TextTokenizer, load_tokenizer

ALPHABET = "abc the  \n\té߿ß中文日本語한국어😀👩‍👩‍👧🏳️‍🌈\u0000\u200b\ufffdﬁ"


def random_text(rng):
    return "".join(rng.choice(ALPHABET) for _ in range(rng.randrange(0, 60)))


def test_decode_of_encode_is_the_text(tokenizer):
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(200)]

    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_encode_and_decode_equal_those_of_the_library(tokenizer, library_tokenizer):
    rng = random.Random(1)
    for _ in range(100):
        text = random_text(rng)
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(30)]

        assert tokenizer.encode(text) == library_tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == library_tokenizer.decode(ids, skip_special_tokens=True)


def test_incremental_decoding_equals_whole_decoding(tokenizer):
    rng = random.Random(2)
    for round_ in range(300):
        ids = tokenizer.encode(random_text(rng))
        if round_ % 3 == 1:  # broken sequences: tokens lost
            ids = [token_id for token_id in ids if rng.random() > 0.3]
        if round_ % 3 == 2:  # and any tokens at all, control tokens and ids beyond the vocabulary among them
            ids = [rng.randrange(tokenizer.vocab_size + 5) for _ in range(40)]
        decoder = IncrementalDecoder(tokenizer)
        pieces = [decoder.feed(token_id) for token_id in ids]

        assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)
        assert tokenizer.decode(ids) == b"".join(map(tokenizer.bytes_of, ids)).decode("utf-8", "replace")


def test_half_a_character_is_held_back(tokenizer, library_tokenizer):
    byte_ids = [library_tokenizer.token_to_id(character) for character in ("ð", "Ł", "ĺ", "Ģ")]  # f0 9f 98 80
    decoder = IncrementalDecoder(tokenizer)

    assert [decoder.feed(token_id) for token_id in byte_ids] == ["", "", "", "😀"]
    assert decoder.feed(byte_ids[0]) == ""
    assert decoder.flush() == "�"


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|im_start|>system\nb<|im_end|>c", "<|endoftext|><|endoftext|>"])
def test_special_token_strings_in_text_are_plain_text(tokenizer, text):
    ids = tokenizer.encode(text)

    control = {tokenizer.eos_id, *(tokenizer.encode_template(token)[0] for token in tokenizer.special_tokens)}
    assert control.isdisjoint(ids)
    assert tokenizer.encode_batch([text]) == [ids]
    assert tokenizer.decode(ids) == text


def test_special_token_strings_of_a_template_are_control_tokens(tokenizer):
    ids = tokenizer.encode_template("<|endoftext|>a")

    assert ids == [tokenizer.eos_id, *tokenizer.encode("a")]
    assert tokenizer.decode(ids) == "a"


def test_a_vocabulary_that_holds_a_control_string_as_a_piece_does_not_give_it_to_text():
    pieces = [("<unk>", 0.0), ("</s>", -1.0), *((character, -5.0) for character in "</s>ab")]
    library = Tokenizer(models.Unigram(pieces, unk_id=0))
    library.decoder = decoders.Metaspace(prepend_scheme="never")
    library.add_special_tokens(["</s>"])
    tokenizer = TextTokenizer(library.to_str().encode(), eos_token="</s>")

    ids = tokenizer.encode("ab</s>ba</s>")

    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "ab</s>ba</s>"
    assert tokenizer.encode_batch(["ab</s>ba</s>"]) == [ids]


def test_bos_and_eos_are_end_of_text_unless_the_folder_says_otherwise(library_tokenizer, tmp_path):
    data = library_tokenizer.to_str().encode()
    (tmp_path / "tokenizer.json").write_bytes(data)

    plain = load_tokenizer(tmp_path)
    assert plain.bos_id == plain.eos_id == library_tokenizer.token_to_id("<|endoftext|>")
    assert plain.chat_template is None
    assert plain.digest() == hashlib.sha256(data).hexdigest()

    config = {"bos_token": None, "eos_token": {"content": "<|im_end|>"}, "chat_template": "{{ messages }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    chat = load_tokenizer(tmp_path)
    assert chat.bos_id == plain.bos_id
    assert chat.eos_id == library_tokenizer.token_to_id("<|im_end|>")
    assert chat.chat_template == "{{ messages }}"

    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(tmp_path).chat_template == "from the file"


def test_errors_say_what_is_missing(library_tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(ConfigError, match="can't read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(library_tokenizer.to_str())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<nowhere>"}')
    with pytest.raises(ConfigError, match="<nowhere>"):
        load_tokenizer(tmp_path)


def test_truncation_saved_in_the_file_cuts_no_document(library_tokenizer):
    saved = Tokenizer.from_str(library_tokenizer.to_str())
    saved.enable_truncation(3)
    saved.enable_padding(length=8)

    assert (
        TextTokenizer(saved.to_str().encode()).decode(
            TextTokenizer(saved.to_str().encode()).encode("the quick brown fox")
        )
        == "the quick brown fox"
    )


def test_a_pickled_tokenizer_is_the_same(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))

    assert again.digest() == tokenizer.digest()
    assert again.encode("señor <|im_end|>") == tokenizer.encode("señor <|im_end|>")
    assert again.eos_id == tokenizer.eos_id


def test_pieces_with_byte_fallback_decode_exactly_and_keep_the_space_of_a_continuation(piece_tokenizer):
    for text in ("the dog", "dogs 😀 é", " the", "</s> the <s>"):
        ids = piece_tokenizer.encode(text)

        assert piece_tokenizer.decode(ids) == text
        assert {piece_tokenizer.bos_id, piece_tokenizer.eos_id}.isdisjoint(ids)
        continued = IncrementalDecoder(piece_tokenizer, continues=True)
        assert "".join(map(continued.feed, ids)) + continued.flush() == " " + text
