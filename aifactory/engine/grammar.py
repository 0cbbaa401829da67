"""Grammar: answers that must match a JSON schema or a regular expression, by masks over the tokens that may come next.

    Grammar ─Grammars.compile─▶ Matcher ─allow──▶ which tokens keep the answer within the grammar
                                        ◀─take──  the token that was drawn

What is written is matched byte by byte, so no answer depends on how a text is cut into tokens. Source: llguidance, which the
serving engines in use share; it gives up on a grammar that takes too much memory or time, and the request is told.
Import this module where it is needed: the library is loaded with it.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from aifactory.engine.protocol import Grammar
from aifactory.errors import BadRequestError
from aifactory.text.tokenizer import TextTokenizer

_NUM_KEPT = 64
"""Compiled grammars that are kept: requests tend to come with the same."""
_MOST_LEXER_FUEL = 200_000
"""Bound on the expressions that a grammar is unfolded into. Schemas and expressions as long as a grammar may be (65,536
characters) were seen to take up to 50,000; `a{1000}{1000}` takes 4 s and 160 MB by the library's own bound, 0.6 s by this."""


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._bits = np.zeros((vocab_size + 31) // 32, np.int32)

    def copy(self) -> Matcher:
        """One that stands at the same place."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size)

    def allow(self) -> Tensor:
        """Which tokens may come next, (V,) bool."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little", count=self._vocab_size)
        return torch.from_numpy(bits.view(np.bool_))

    def take(self, token_id: int) -> str | None:
        """Go on by a token; what went wrong, None if nothing did."""
        return None if self._matcher.consume_token(token_id) else self.error

    @property
    def error(self) -> str | None:
        """Why the grammar can't be followed from here; None while it can."""
        if not self._matcher.is_error():
            return None
        return f"the grammar can't be followed: {self._matcher.get_error()}"[:500]

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())


class Grammars:
    """The grammars of one tokenizer. May be used from any thread."""

    def __init__(self, tokenizer: TextTokenizer, *, vocab_size: int, eos_ids: Collection[int]) -> None:
        """`vocab_size` is the model's, which may have rows for more tokens than there are."""
        self._vocab_size = vocab_size
        self._tokenizer = LLTokenizer(
            _Tokens(tokenizer, vocab_size),  # type: ignore[arg-type]  # by its attributes, as the library asks for
            n_vocab=vocab_size,
            eos_token=sorted(eos_ids),
        )
        self._lock = threading.Lock()
        self._kept: OrderedDict[Grammar, Matcher] = OrderedDict()

    def compile(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of an answer.

        Raises  BadRequestError, with what is wrong with the grammar.
        """
        with self._lock:
            known = self._kept.get(grammar)
            if known is not None:
                self._kept.move_to_end(grammar)
                return known.copy()
        matcher = self._compile(grammar)
        with self._lock:
            self._kept[grammar] = matcher
            while len(self._kept) > _NUM_KEPT:
                self._kept.popitem(last=False)
        return matcher.copy()

    def _compile(self, grammar: Grammar) -> Matcher:
        if grammar.kind == "regex":
            text = LLMatcher.grammar_from_regex(grammar.text)
        else:
            try:
                schema = json.loads(grammar.text)
                if not isinstance(schema, dict):
                    raise ValueError(f"a {type(schema).__name__}, no object")
                # White space of one form: where any may stand, a model can go on with it until max_tokens.
                text = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
            except (ValueError, RecursionError) as error:
                raise BadRequestError(f"Expected a JSON schema in grammar, found: {error}.", field="grammar") from error
        limits = LLParserLimits(initial_lexer_fuel=_MOST_LEXER_FUEL, verbose_errors=False)
        found = LLMatcher(self._tokenizer, text, log_level=0, limits=limits)
        matcher = Matcher(found, self._vocab_size)
        problem = found.get_error() if found.is_error() else _try_first_token(matcher.copy())
        if problem:
            raise BadRequestError(
                f"Expected a {grammar.kind.replace('_', ' ')} that can be followed token by token, found: "
                f"{problem[:1000]}. Simplify it.",
                field="grammar",
            )
        return matcher


def _try_first_token(matcher: Matcher) -> str | None:
    """What is wrong with the beginning. Much of a grammar is worked out there, and nothing that all others wait for."""
    token_ids = matcher.allow().nonzero()
    if matcher.error is None and len(token_ids):
        return matcher.take(int(token_ids[0]))
    return matcher.error or "nothing matches it"


class _Tokens:
    """A vocabulary as the library reads it."""

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.is_tokenizer_wrapper = True
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        pieces = [tokenizer.bytes_of(token_id) for token_id in range(vocab_size)]
        # Tokens without text are in no answer; each gets a name of its own.
        self.special_token_ids = [token_id for token_id, piece in enumerate(pieces) if not piece]
        self.tokens = [piece or f"<|control {token_id}|>".encode() for token_id, piece in enumerate(pieces)]

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            raise TypeError("expected text, found bytes")
        return self._tokenizer.encode(text)
