"""Tokenizer: text <-> token ids, exactly the same for the trainer and the server.

Reads    <folder>/tokenizer.json (required), tokenizer_config.json, chat_template.jinja
Laws     text is text: a special-token string inside it never becomes the control token;
         decoding is exact to the byte: a token is a byte string, and an answer is their concatenation.
Raises   ConfigError.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from aifactory.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
"""The one control token of tokenizers trained here: it begins a document and ends it."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextTokenizer:
    """A fast tokenizer with text and control tokens kept apart. Immutable, thread-safe, picklable (by its JSON)."""

    def __init__(
        self,
        tokenizer_json: bytes,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        chat_template: str | None = None,
        response_template: dict[str, Any] | None = None,
    ) -> None:
        """Build from the bytes of a tokenizer.json.

        bos_token          None: `<|endoftext|>` where the vocabulary has it, else eos_token.
        eos_token          None: `<|endoftext|>`, which the vocabulary then must have.
        response_template  how an answer is read back into a message (transformers' form); None where nobody said.
        Raises     ConfigError if a named token isn't in the vocabulary or the decoder is of an unknown kind.
        """
        self._json = tokenizer_json
        self._tokens = (bos_token, eos_token, chat_template, response_template)
        self._text = _open(tokenizer_json)
        # Special strings in text are then split like any other text.
        self._text.encode_special_tokens = True

        added = self._text.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        # Longest first, so that of two strings that begin alike the longer one is found.
        self.special_tokens: tuple[str, ...] = tuple(
            sorted((added[token_id].content for token_id in self._special_ids), key=len, reverse=True)
        )
        """The control tokens as strings, longest first."""

        # The unknown token is special by name, but plain text may well encode to it.
        unknown = json.loads(tokenizer_json)["model"].get("unk_token")
        self._control_ids = frozenset(self._special_ids - {self._text.token_to_id(unknown) if unknown else None})

        fallback = END_OF_TEXT if self._text.token_to_id(END_OF_TEXT) is not None else None
        eos_token = eos_token if eos_token is not None else fallback
        if eos_token is None:
            raise ConfigError(
                "Expected an end-of-text token, found neither `eos_token` in tokenizer_config.json nor "
                f"{END_OF_TEXT} in the vocabulary. Name it in tokenizer_config.json."
            )
        bos_token = bos_token if bos_token is not None else (fallback or eos_token)
        self.bos_token, self.eos_token = bos_token, eos_token
        self.bos_id, self.eos_id = self._id_of(bos_token), self._id_of(eos_token)
        self.chat_template = chat_template
        self.response_template = response_template

        decoder = json.loads(tokenizer_json).get("decoder")
        self._bytes_of, self._strips_space = _token_bytes(self._text, decoder, self._special_ids)

    @property
    def vocab_size(self) -> int:
        """Number of ids: each id is in [0, vocab_size)."""
        return len(self._bytes_of)

    def digest(self) -> str:
        """SHA-256 of the bytes of tokenizer.json, as hex."""
        return hashlib.sha256(self._json).hexdigest()

    @property
    def tokenizer_json(self) -> bytes:
        """The bytes of tokenizer.json, for another library that reads them."""
        return self._json

    @property
    def control_ids(self) -> frozenset[int]:
        """The ids that no text may encode to."""
        return self._control_ids

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text: none added, and none of them a control token."""
        ids: list[int] = self._text.encode(text, add_special_tokens=False).ids
        return ids if self._control_ids.isdisjoint(ids) else self._encode_broken_up(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in their order, on all threads of the tokenizers library."""
        rows = [encoding.ids for encoding in self._text.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [
            row if self._control_ids.isdisjoint(row) else self._encode_broken_up(text)
            for row, text in zip(rows, texts, strict=True)
        ]

    def encode_template(self, text: str) -> list[int]:
        """Token ids of a trusted template's output: special-token strings become control tokens.

        Never for text of users; `aifactory.text.chat.chat_tokens` keeps the two apart.
        """
        ids: list[int] = self._template.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the tokens; control tokens have none, broken UTF-8 gives U+FFFD as `bytes.decode` does."""
        decoder = IncrementalDecoder(self)
        return "".join([decoder.feed(token_id) for token_id in ids]) + decoder.flush()

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token stands for: b"" for control tokens and for ids that a padded model vocabulary adds."""
        return self._bytes_of[token_id] if 0 <= token_id < len(self._bytes_of) else b""

    def name_of(self, token_id: int) -> str:
        """A token in print: its text, its bytes as `bytes:\\xe4` where they are no whole characters, or its name."""
        data = self.bytes_of(token_id)
        if not data:
            return str(self._text.id_to_token(token_id) or "")
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    @property
    def strips_first_space(self) -> bool:
        """Whether encoding puts a space before a text that decoding must take away again (SentencePiece's habit)."""
        return self._strips_space

    @cached_property
    def _template(self) -> Tokenizer:
        return _open(self._json)

    def _id_of(self, token: str) -> int:
        token_id = self._text.token_to_id(token)
        if token_id is None:
            raise ConfigError(
                f"Expected the token {token!r} of tokenizer_config.json in the vocabulary, found it in neither the "
                "model's vocabulary nor added_tokens of tokenizer.json. The two files belong to different tokenizers."
            )
        return int(token_id)

    def _encode_broken_up(self, text: str) -> list[int]:
        # Only vocabularies that hold the control string as an ordinary piece too (Unigram) come here. Its first
        # character is encoded apart, and so the string can't be matched as a whole.
        pattern = "|".join(map(re.escape, self.special_tokens))
        pieces: list[str] = []
        begin = 0
        for match in re.finditer(pattern, text):
            pieces.append(text[begin : match.start() + 1])
            begin = match.start() + 1
        pieces.append(text[begin:])
        ids = [token_id for piece in pieces for token_id in self._text.encode(piece, add_special_tokens=False).ids]
        return [token_id for token_id in ids if token_id not in self._control_ids]

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._json, *self._tokens)


class IncrementalDecoder:
    """Text of an answer while its tokens arrive: what `feed` and `flush` return adds up to `decode` of all.

    A character of several bytes is held back until its last byte is there, so every piece is whole UTF-8. Each token
    costs its own bytes only; nothing is decoded twice.

    continues   the tokens go on from a prompt, so the space before a SentencePiece word is text and stays.
    """

    def __init__(self, tokenizer: TextTokenizer, *, continues: bool = False) -> None:
        self._bytes_of = tokenizer.bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_next = tokenizer.strips_first_space and not continues

    def feed(self, token_id: int) -> str:
        """The text that is complete with this token; "" while a character is not."""
        piece = self._bytes_of(token_id)
        if self._strip_next and piece:
            self._strip_next = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """What was held back, U+FFFD for a character that never became complete."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(folder: Path) -> TextTokenizer:
    """Load the tokenizer of a Hugging Face folder, without running any code of it.

    Raises  ConfigError if tokenizer.json is missing or unreadable, or doesn't fit tokenizer_config.json.
    """
    folder = Path(folder)
    tokenizer_file = folder / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise ConfigError(
            f"Expected a tokenizer.json in {folder}, found none. Save the tokenizer in the fast format "
            "(`AutoTokenizer.from_pretrained(...).save_pretrained(folder)` writes it)."
        )
    config = _read_json(folder / "tokenizer_config.json")
    template_file = folder / "chat_template.jinja"
    template = template_file.read_text("utf-8") if template_file.is_file() else _template_of(config)
    return TextTokenizer(
        tokenizer_file.read_bytes(),
        bos_token=_content(config.get("bos_token")),
        eos_token=_content(config.get("eos_token")),
        chat_template=template,
        response_template=_response_template_of(config, folder),
    )


def _rebuild(
    tokenizer_json: bytes,
    bos_token: str | None,
    eos_token: str | None,
    chat_template: str | None,
    response_template: dict[str, Any] | None,
) -> TextTokenizer:
    return TextTokenizer(
        tokenizer_json,
        bos_token=bos_token,
        eos_token=eos_token,
        chat_template=chat_template,
        response_template=response_template,
    )


def _open(tokenizer_json: bytes) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json.decode("utf-8"))
    except Exception as error:  # the library raises a bare Exception
        raise ConfigError(
            f"Expected a tokenizer.json of the tokenizers library, found one that it can't read: {error}. "
            "Save the tokenizer again with the installed version."
        ) from error
    # A file may carry the padding and truncation of the last call; a document must lose nothing.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"Expected JSON in {path}, found: {error}. Mend or remove the file.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"Expected a JSON object in {path}, found a {type(value).__name__}. Mend or remove the file.")
    return value


def _content(token: object) -> str | None:
    # Either the string itself, or a serialised AddedToken.
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _template_of(config: dict[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones; "default" is the one for chat
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _response_template_of(config: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    template = config.get("response_template")
    if template is None or isinstance(template, dict):
        return template
    raise ConfigError(
        f"Expected an object at response_template of {folder / 'tokenizer_config.json'}, found a "
        f"{type(template).__name__}. Mend or remove it."
    )


def _token_bytes(
    tokenizer: Tokenizer, decoder: dict[str, Any] | None, special_ids: frozenset[int]
) -> tuple[list[bytes], bool]:
    """Bytes of each id, and whether decoding takes away the first space."""
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        byte_of = _byte_of_character()

        def to_bytes(token: str) -> bytes:
            return bytes([byte_of[character] for character in token])

        strips_space = False
    elif "Metaspace" in kinds or "ByteFallback" in kinds:

        def to_bytes(token: str) -> bytes:
            byte = _BYTE_TOKEN.fullmatch(token)
            return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()

        strips_space = "Strip" in kinds or any(
            step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps
        )
    else:
        raise ConfigError(
            f"Expected a byte-level or SentencePiece-like decoder in tokenizer.json, found {sorted(kinds) or 'none'}. "
            "Use a model whose tokenizer can decode every byte."
        )
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    bytes_of = [b""] * (max(vocabulary.values()) + 1)
    for token, token_id in vocabulary.items():
        if token_id in special_ids:
            continue
        if token_id in added:
            bytes_of[token_id] = added[token_id].content.encode()
            continue
        try:
            bytes_of[token_id] = to_bytes(token)
        except KeyError:  # a token outside the byte alphabet stands for itself, as in the library
            bytes_of[token_id] = token.encode()
    return bytes_of, strips_space


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for each of the 256 bytes (openai/gpt-2, encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}
