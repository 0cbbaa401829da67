"""Laws of the vocabulary: it is the one that the tokenizers library trains, whoever counted the words."""

from __future__ import annotations

import json
import random
from collections import Counter

import pyarrow as pa
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from aifactory.tokens.vocabulary import add_counts, count_words, learn_vocabulary, train_vocabulary

POOLS = [
    [
        "the ",
        "quick ",
        "brown ",
        "fox ",
        "doesn't ",
        "stop, ",
        "it's ",
        "late: ",
        "we'll ",
        "see ",
        "1234 ",
        "56.7 ",
        " ",
    ],
    list("ab"),
    list("abc' \n"),
    list("'stremvld xS1!\n "),
    [
        "don't ",
        "I'LL ",
        "größe",
        "日本語",
        "👩‍👩‍👧",
        "<|endoftext|>",
        "\r\n",
        "\u3000",
        "\xa0",
        "٣٤",
        "Ⅻ",
        "²",
        "e\u0301",
        " ",
        "\t",
    ],
]


def random_texts(rng, number=40):
    characters = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    pool = rng.choice([*POOLS, [*(chr(rng.choice(characters)) for _ in range(40)), *" a1'!\n"]])
    return ["".join(rng.choices(pool, k=rng.randrange(80))) for _ in range(rng.randrange(1, number))]


def reference_vocabulary(texts, vocab_size):
    """tokenizer.json as the library trains it."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return library.to_str().encode()


@pytest.mark.parametrize("seed", range(120))
def test_the_file_is_the_one_that_the_library_writes(seed):
    rng = random.Random(seed)
    texts, vocab_size = random_texts(rng), rng.choice([257, 258, 300, 600, 2000])

    assert train_vocabulary(texts, vocab_size=vocab_size)["tokenizer.json"] == reference_vocabulary(texts, vocab_size)


@pytest.mark.parametrize("seed", range(40))
def test_words_are_those_that_the_library_splits(seed):
    texts = random_texts(random.Random(seed))
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    expected = Counter(
        text[start:end].encode() for text in texts for _, (start, end) in splitter.pre_tokenize_str(text)
    )

    counts = count_words(pa.array(texts))

    assert dict(zip(counts["word"].to_pylist(), counts["count"].to_pylist(), strict=True)) == expected


def test_long_and_many_words_are_counted_exactly():
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdef", k=rng.choice([3, 7, 8, 9, 300]))) for _ in range(30_000)]
    texts = [" ".join(words[i : i + 100]) for i in range(0, len(words), 50)]
    expected = Counter(
        f" {word}".encode() if i else word.encode() for t in texts for i, word in enumerate(t.split(" "))
    )

    counts = count_words(pa.array(texts))

    assert dict(zip(counts["word"].to_pylist(), counts["count"].to_pylist(), strict=True)) == expected


@pytest.mark.parametrize("seed", range(5))
def test_how_the_texts_are_divided_among_tasks_changes_nothing(seed):
    rng = random.Random(seed)
    texts = [text for _ in range(5) for text in random_texts(rng)]
    whole = train_vocabulary(texts, vocab_size=400)
    rng.shuffle(texts)
    cuts = sorted(rng.choices(range(len(texts) + 1), k=4))
    column = pa.array(texts, pa.string())
    parts = [column.slice(start, end - start) for start, end in zip([0, *cuts], [*cuts, len(texts)], strict=True)]

    assert learn_vocabulary(add_counts([count_words(part) for part in parts]), vocab_size=400) == whole


def test_a_vocabulary_depends_on_the_texts_and_the_size_alone():
    texts = ["the quick brown fox " * 9, "größe 日本語 😀"] * 5

    one = train_vocabulary(iter(texts), vocab_size=300)

    assert train_vocabulary(texts, vocab_size=300) == one
    assert train_vocabulary(texts, vocab_size=290) != one
    assert train_vocabulary(texts[::2], vocab_size=300) != one


def test_no_texts_give_the_bytes_alone():
    files = train_vocabulary([], vocab_size=300)

    model = json.loads(files["tokenizer.json"])["model"]
    assert len(model["vocab"]) == 257
    assert model["merges"] == []
