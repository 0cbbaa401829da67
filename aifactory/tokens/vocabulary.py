"""The vocabulary: a byte-level BPE trained on a corpus, in Hugging Face form.

Words are counted part by part, and the merges are learnt from the sums: what is trained depends on the words and how often
each occurs, never on the order of the texts or on how many tasks counted them. The merges, and the file, are those that the
tokenizers library learns from the same texts.

Legend   B bytes of UTF-8, D texts, W words, S symbols of all words, P pairs of symbols.
Sources  Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", section 3.2; over bytes
         as in Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2.

Imports numba, which takes a while: import this where a vocabulary is trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aifactory.text.buffers import text_buffers

END_OF_TEXT = "<|endoftext|>"
_BATCH_TEXTS = 10_000

# Classes of characters, as the pattern that splits texts into words has them.
_UNSEEN, _LETTER, _NUMBER, _OTHER, _SPACE = range(5)


def train_vocabulary(texts: Iterable[str], *, vocab_size: int) -> dict[str, bytes]:
    """Train byte-level BPE; return the files of a tokenizer folder by name.

    One special token, `<|endoftext|>`, begins and ends every document. The result depends on the texts and the size
    alone.
    """
    return learn_vocabulary(add_counts([count_words(some) for some in _batches(texts)]), vocab_size=vocab_size)


def count_words(texts: pa.Array) -> pa.Table:
    """The words of texts (string, without nulls): `word` (binary, each once) and `count`."""
    data, offsets = text_buffers(texts)
    classes = _classes_of(data[offsets[0] : offsets[-1]])
    table = _count_words(data, offsets, classes)
    table = table[table[:, 3] > 0].astype(np.int64)
    _, begin_W, length_W, count_W = np.ascontiguousarray(table[np.argsort(table[:, 1])].T)
    words = np.concatenate([[0], np.cumsum(length_W)])
    gathered = np.empty(words[-1], np.uint8)
    _gather(data, begin_W, length_W, gathered)
    return _to_table(gathered, words, count_W)


def add_counts(tables: Iterable[pa.Table]) -> pa.Table:
    """The sums of counts of words, in the form of `count_words`."""
    every = pa.concat_tables(tables)
    summed = every.group_by("word", use_threads=False).aggregate([("count", "sum")])
    return pa.table({"word": summed["word"], "count": summed["count_sum"]})


def learn_vocabulary(counts: pa.Table, *, vocab_size: int) -> dict[str, bytes]:
    """The files of a tokenizer folder by name, from the words of `count_words` and their counts."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # Ids as the library gives them: the control token, then the characters that stand for bytes, in the order of Unicode.
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [END_OF_TEXT, *characters]
    # A printable byte is written as itself; the others follow from U+0100 on.
    own = [ord(character) for character in characters if ord(character) < 256]
    id_of_byte = np.zeros(256, np.int32)
    id_of_byte[[*own, *sorted(set(range(256)) - set(own))]] = np.arange(1, 257)

    words, count = counts["word"].combine_chunks(), counts["count"].to_numpy()
    data, offsets = text_buffers(words)
    symbols = id_of_byte[data[offsets[0] : offsets[-1]]]
    left, right, made = _learn_merges(symbols, offsets - offsets[0], count.astype(np.int64), len(tokens), vocab_size)
    merges = []
    for one, other, token_id in zip(left.tolist(), right.tolist(), made.tolist(), strict=True):
        merges.append((tokens[one], tokens[other]))
        if token_id == len(tokens):
            tokens.append(tokens[one] + tokens[other])

    model = models.BPE({token: token_id for token_id, token in enumerate(tokens)}, merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**12,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=False).encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=1) + "\n").encode(),
    }


def _batches(texts: Iterable[str]) -> Iterator[pa.Array]:
    rest = iter(texts)
    yield pa.array(list(islice(rest, _BATCH_TEXTS)), pa.string())
    while some := list(islice(rest, _BATCH_TEXTS)):
        yield pa.array(some, pa.string())


def _to_table(data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], count: npt.NDArray[np.int64]) -> pa.Table:
    buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(data)]
    return pa.table({"word": pa.Array.from_buffers(pa.binary(), len(count), buffers), "count": pa.array(count)})


# ── words ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@lru_cache(maxsize=1)
def _class_table() -> npt.NDArray[np.uint8]:
    """The class of each code point that was met so far."""
    return np.full(0x110000, _UNSEEN, np.uint8)


def _classes_of(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The class of each code point of a text. The library is asked for it, since its Unicode is what counts."""
    from tokenizers import pre_tokenizers

    def is_joined(text: str) -> bool:
        return len(splitter.pre_tokenize_str(text)) == 1

    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    table = _class_table()
    for code in np.flatnonzero(_mark_unseen(data, table)).tolist():
        character = chr(code)
        if is_joined("a" + character):
            table[code] = _LETTER
        elif is_joined("1" + character):
            table[code] = _NUMBER
        elif is_joined("!" + character):
            table[code] = _OTHER
        else:
            table[code] = _SPACE
    return table


@numba.njit(cache=True, nogil=True)
def _character(data: npt.NDArray[np.uint8], at: Any) -> tuple[Any, int]:
    """The code point of the character that begins at a byte, and how many bytes it has."""
    lead = np.int64(data[at])
    if lead < 0x80:
        return lead, 1
    if lead < 0xE0:
        return (lead & 0x1F) << 6 | (data[at + 1] & 0x3F), 2
    if lead < 0xF0:
        return (lead & 0x0F) << 12 | np.int64(data[at + 1] & 0x3F) << 6 | (data[at + 2] & 0x3F), 3
    high = (lead & 0x07) << 18 | np.int64(data[at + 1] & 0x3F) << 12
    return high | np.int64(data[at + 2] & 0x3F) << 6 | (data[at + 3] & 0x3F), 4


@numba.njit(cache=True, nogil=True)
def _mark_unseen(data: npt.NDArray[np.uint8], classes: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """For each code point whether it is in a text and has no class yet."""
    marks = np.zeros(len(classes), np.bool_)
    at = 0
    while at < len(data):
        code, width = _character(data, at)
        if classes[code] == _UNSEEN:
            marks[code] = True
        at += width
    return marks


@numba.njit(cache=True, nogil=True)
def _end_of_run(data: npt.NDArray[np.uint8], at: int, end: int, kind: int, classes: npt.NDArray[np.uint8]) -> int:
    """Where the characters of one class end that begin at a byte."""
    while at < end:
        if data[at] < 0x80:  # most are; no need to put them together
            if classes[data[at]] != kind:
                break
            at += 1
            continue
        code, width = _character(data, at)
        if classes[code] != kind:
            break
        at += width
    return at


@numba.njit(cache=True, nogil=True)
def _end_of_word(data: npt.NDArray[np.uint8], at: int, end: int, classes: npt.NDArray[np.uint8]) -> int:
    """Where the word ends that begins at a byte: GPT-2's pattern, openai/gpt-2, encoder.py.

    A contraction ('s 't 're 've 'm 'll 'd); or letters, or digits, or other signs, with one space before them; or white
    space, whose last character is left for what follows.
    """
    if data[at] == 0x27 and at + 1 < end:
        one = data[at + 1]
        if one == ord("s") or one == ord("t") or one == ord("m") or one == ord("d"):
            return at + 2
        if at + 2 < end:
            two = data[at + 2]
            if ((one == ord("r") or one == ord("v")) and two == ord("e")) or (one == ord("l") and two == ord("l")):
                return at + 3
    code, width = _character(data, at)
    kind = classes[code]
    if kind != _SPACE:
        return _end_of_run(data, at, end, kind, classes)
    if code == 0x20 and at + 1 < end:
        following, _ = _character(data, at + 1)
        if classes[following] != _SPACE:
            return _end_of_run(data, at + 1, end, classes[following], classes)
    last = at
    after = at + width
    while after < end:
        code, width = _character(data, after)
        if classes[code] != _SPACE:
            return last if last > at else after
        last = after
        after += width
    return end


@numba.njit(cache=True, nogil=True)
def _count_words(
    data: npt.NDArray[np.uint8], offsets_D1: npt.NDArray[np.int64], classes: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint64]:
    """A table with a line for each word, and empty ones: its key, where it is met first, its bytes, how often it is met."""
    # Open addressing, at most half full. A word of up to seven bytes is its own key; a longer one has a hash, and is compared.
    table = np.zeros((1 << 15, 4), np.uint64)
    num_words = 0
    for d in range(len(offsets_D1) - 1):
        at, end = offsets_D1[d], offsets_D1[d + 1]
        while at < end:
            after = _end_of_word(data, at, end, classes)
            length = after - at
            key = np.uint64(0)
            if length < 8:
                for i in range(at, after):
                    key = key << np.uint64(8) | np.uint64(data[i])
                key |= np.uint64(length) << np.uint64(56)
            else:
                for i in range(at, after):
                    key = (key ^ np.uint64(data[i])) * np.uint64(0x9E3779B97F4A7C15)
                    key ^= key >> np.uint64(29)
                key |= np.uint64(1) << np.uint64(63)
            slot = _slot(key, len(table))
            while table[slot, 3] and (
                table[slot, 0] != key
                or (length >= 8 and not _is_same(data, np.int64(table[slot, 1]), np.int64(table[slot, 2]), at, length))
            ):
                slot = (slot + 1) & (len(table) - 1)
            if not table[slot, 3]:
                table[slot, 0], table[slot, 1], table[slot, 2] = key, np.uint64(at), np.uint64(length)
                num_words += 1
            table[slot, 3] += np.uint64(1)
            at = after
            if 2 * num_words == len(table):
                smaller = table
                table = np.zeros((2 * len(smaller), 4), np.uint64)
                for other in range(len(smaller)):
                    if smaller[other, 3]:
                        slot = _slot(smaller[other, 0], len(table))
                        while table[slot, 3]:
                            slot = (slot + 1) & (len(table) - 1)
                        for i in range(4):
                            table[slot, i] = smaller[other, i]
    return table


@numba.njit(cache=True, nogil=True)
def _slot(key: Any, num_slots: int) -> Any:
    """Where a key is looked for first in a table of 2^n slots."""
    mixed = (key ^ (key >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64((mixed >> np.uint64(20)) & np.uint64(num_slots - 1))


@numba.njit(cache=True, nogil=True)
def _is_same(data: npt.NDArray[np.uint8], one: Any, one_length: Any, other: int, other_length: int) -> bool:
    if one_length != other_length:
        return False
    i = 0
    while i < one_length and data[one + i] == data[other + i]:
        i += 1
    return bool(i == one_length)


@numba.njit(cache=True, nogil=True)
def _longer(values: Any) -> Any:
    """The same values with as much room again behind them."""
    longer = np.empty(2 * len(values), values.dtype)
    longer[: len(values)] = values
    return longer


@numba.njit(cache=True, nogil=True)
def _gather(
    data: npt.NDArray[np.uint8],
    begin_W: npt.NDArray[np.int64],
    length_W: npt.NDArray[np.int64],
    target: npt.NDArray[np.uint8],
) -> None:
    at = 0
    for w in range(len(begin_W)):
        for i in range(begin_W[w], begin_W[w] + length_W[w]):
            target[at] = data[i]
            at += 1


# ── merges ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@numba.njit(cache=True, nogil=True)
def _learn_merges(
    symbols_S: npt.NDArray[np.int32],
    offsets_W1: npt.NDArray[np.int64],
    count_W: npt.NDArray[np.int64],
    num_tokens: int,
    vocab_size: int,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The left and the right symbol of each merge, and the symbol that it makes.

    The most frequent pair is merged everywhere, and so on until there are vocab_size symbols; of pairs of one frequency
    that with the smaller ids comes first. The symbols of the words, which are overwritten, are from 1 to num_tokens - 1;
    new ones go on from there.
    """
    end_W = offsets_W1[1:].copy()
    # The pairs, found by a table of open addressing, at most half full.
    key_P, count_P = np.empty(1 << 16, np.int64), np.empty(1 << 16, np.int64)
    first_P, step_P = np.empty(1 << 16, np.int64), np.empty(1 << 16, np.int64)
    slots = np.full(1 << 17, -1, np.int64)
    num_pairs = 0
    # The words in which a pair is: lists in one array. A merge takes one symbol away and makes at most two pairs.
    list_word, list_next = np.empty(3 * len(symbols_S) + 1, np.int64), np.empty(3 * len(symbols_S) + 1, np.int64)
    num_listed = 0
    # The pairs in the order of their merging; a count in it may be out of date, but never too low.
    heap_count, heap_pair = np.empty(1 << 16, np.int64), np.empty(1 << 16, np.int64)
    num_heap = 0
    # The text of a symbol is known by a hash, that of two in a row is had from theirs: a merge may make one that is there.
    hash_T, power_T = np.zeros(max(vocab_size, num_tokens), np.uint64), np.ones(max(vocab_size, num_tokens), np.uint64)
    for token in range(1, num_tokens):
        hash_T[token], power_T[token] = np.uint64(token), np.uint64(0x9E3779B97F4A7C15)
    made = np.full(1 << (int(np.log2(max(vocab_size, num_tokens))) + 2), -1, np.int64)
    left_M, right_M = np.empty(1 << 10, np.int32), np.empty(1 << 10, np.int32)
    made_M = np.empty(1 << 10, np.int32)
    num_merges = 0

    # What a step changes of which pair in which word: at first every pair comes into being.
    changed_key, changed_by = np.empty(len(symbols_S) + 8, np.int64), np.empty(len(symbols_S) + 8, np.int64)
    changed_word = np.empty(len(symbols_S) + 8, np.int64)
    num_changed = 0
    for w in range(len(end_W)):
        for i in range(offsets_W1[w], end_W[w] - 1):
            changed_key[num_changed] = np.int64(symbols_S[i]) << 32 | symbols_S[i + 1]
            changed_by[num_changed], changed_word[num_changed] = count_W[w], w
            num_changed += 1
    touched = np.empty(1 << 10, np.int64)
    step = 0
    while True:
        num_touched = 0
        for c in range(num_changed):
            pair, slot = _find(changed_key[c], key_P, slots)
            if pair < 0:
                if num_pairs == len(key_P):
                    key_P, count_P = _longer(key_P), _longer(count_P)
                    first_P, step_P = _longer(first_P), _longer(step_P)
                    slots = np.full(2 * len(key_P), -1, np.int64)
                    for other in range(num_pairs):
                        _, slot = _find(key_P[other], key_P, slots)
                        slots[slot] = other
                    _, slot = _find(changed_key[c], key_P, slots)
                pair = num_pairs
                num_pairs += 1
                slots[slot] = pair
                key_P[pair], count_P[pair], first_P[pair], step_P[pair] = changed_key[c], 0, -1, -1
            count_P[pair] += changed_by[c]
            if changed_by[c] <= 0:
                continue
            if first_P[pair] < 0 or list_word[first_P[pair]] != changed_word[c]:
                list_word[num_listed], list_next[num_listed] = changed_word[c], first_P[pair]
                first_P[pair] = num_listed
                num_listed += 1
            if step_P[pair] != step:
                step_P[pair] = step
                if num_touched == len(touched):
                    touched = _longer(touched)
                touched[num_touched] = pair
                num_touched += 1
        for t in range(num_touched):
            if count_P[touched[t]] > 0:
                if num_heap == len(heap_count):
                    heap_count, heap_pair = _longer(heap_count), _longer(heap_pair)
                _push(count_P[touched[t]], touched[t], heap_count, heap_pair, num_heap, key_P)
                num_heap += 1
        step += 1
        if num_tokens >= vocab_size:
            break

        pair = -1
        while num_heap > 0 and pair < 0:
            count, pair = heap_count[0], heap_pair[0]
            num_heap -= 1
            _drop_top(heap_count, heap_pair, num_heap, key_P)
            if count_P[pair] != count:
                if count_P[pair] > 0:
                    _push(count_P[pair], pair, heap_count, heap_pair, num_heap, key_P)
                    num_heap += 1
                pair = -1
        if pair < 0:
            break
        left, right = key_P[pair] >> 32, key_P[pair] & 0xFFFFFFFF
        key = hash_T[left] * power_T[right] + hash_T[right]
        slot = _slot(key, len(made))
        while made[slot] >= 0 and hash_T[made[slot]] != key:
            slot = (slot + 1) & (len(made) - 1)
        if made[slot] < 0:
            made[slot] = num_tokens
            hash_T[num_tokens], power_T[num_tokens] = key, power_T[left] * power_T[right]
            num_tokens += 1
        token = made[slot]
        if num_merges == len(left_M):
            left_M, right_M, made_M = _longer(left_M), _longer(right_M), _longer(made_M)
        left_M[num_merges], right_M[num_merges], made_M[num_merges] = left, right, token
        num_merges += 1

        num_changed = 0
        listed = first_P[pair]
        count_P[pair], first_P[pair] = 0, -1
        while listed >= 0:
            w = list_word[listed]
            listed = list_next[listed]
            by = count_W[w]
            begin, end = offsets_W1[w], end_W[w]
            after = begin  # where the next symbol of the shortened word goes
            i = begin
            while i < end:
                if symbols_S[i] != left or i + 1 == end or symbols_S[i + 1] != right:
                    symbols_S[after] = symbols_S[i]
                    after += 1
                    i += 1
                    continue
                if num_changed + 4 > len(changed_key):
                    changed_key, changed_by = _longer(changed_key), _longer(changed_by)
                    changed_word = _longer(changed_word)
                i += 2
                if after > begin:
                    before = np.int64(symbols_S[after - 1]) << 32
                    changed_key[num_changed], changed_by[num_changed] = before | left, -by
                    changed_key[num_changed + 1], changed_by[num_changed + 1] = before | token, by
                    changed_word[num_changed + 1] = w
                    num_changed += 2
                if i < end:
                    changed_key[num_changed], changed_by[num_changed] = right << 32 | symbols_S[i], -by
                    changed_key[num_changed + 1], changed_by[num_changed + 1] = token << 32 | symbols_S[i], by
                    changed_word[num_changed + 1] = w
                    num_changed += 2
                symbols_S[after] = token
                after += 1
            end_W[w] = after
    return left_M[:num_merges], right_M[:num_merges], made_M[:num_merges]


@numba.njit(cache=True, nogil=True)
def _find(key: int, key_P: npt.NDArray[np.int64], slots: npt.NDArray[np.int64]) -> tuple[int, int]:
    """The pair of a key, -1 where there is none, and its slot or the one where it belongs."""
    slot = _slot(np.uint64(key), len(slots))
    while slots[slot] >= 0 and key_P[slots[slot]] != key:
        slot = (slot + 1) & (len(slots) - 1)
    return slots[slot], slot


@numba.njit(cache=True, nogil=True)
def _push(
    count: int,
    pair: int,
    heap_count: npt.NDArray[np.int64],
    heap_pair: npt.NDArray[np.int64],
    num_heap: int,
    key_P: npt.NDArray[np.int64],
) -> None:
    at = num_heap
    while at > 0:
        above = (at - 1) // 2
        if heap_count[above] > count or (heap_count[above] == count and key_P[heap_pair[above]] <= key_P[pair]):
            break
        heap_count[at], heap_pair[at] = heap_count[above], heap_pair[above]
        at = above
    heap_count[at], heap_pair[at] = count, pair


@numba.njit(cache=True, nogil=True)
def _drop_top(
    heap_count: npt.NDArray[np.int64], heap_pair: npt.NDArray[np.int64], num_heap: int, key_P: npt.NDArray[np.int64]
) -> None:
    """Take the top of a heap away; num_heap is how many then are left."""
    count, pair = heap_count[num_heap], heap_pair[num_heap]
    at = 0
    while 2 * at + 1 < num_heap:
        below = 2 * at + 1
        if below + 1 < num_heap:
            one, other = heap_count[below], heap_count[below + 1]
            if other > one or (other == one and key_P[heap_pair[below + 1]] < key_P[heap_pair[below]]):
                below += 1
        if count > heap_count[below] or (count == heap_count[below] and key_P[pair] <= key_P[heap_pair[below]]):
            break
        heap_count[at], heap_pair[at] = heap_count[below], heap_pair[below]
        at = below
    heap_count[at], heap_pair[at] = count, pair
