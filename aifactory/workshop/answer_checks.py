"""Answer checks: which guards the answers of a model break. What it trained on is looked up in the index of its token sets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from aifactory.config import AnswerGuards
from aifactory.evaluate.guards import PERSONAL, REFUSAL, VERBATIM, refuses
from aifactory.records.artifacts import Model, TokenSet
from aifactory.records.books import Books


class AnswerChecks:
    """Looks answers through. Cheap to pickle."""

    def __init__(self, books: Books, policy: AnswerGuards) -> None:
        self._books = books
        self._policy = policy

    def __call__(self, model: Model, answers: Sequence[str]) -> list[frozenset[str]]:
        """The guards that each answer breaks."""
        from aifactory.ingest.personal import find_personal

        token_sets = self._trained_on(model)
        found = []
        for answer in answers:
            broken = {PERSONAL} if find_personal(answer) else set()
            broken |= {REFUSAL} if refuses(answer) else set()
            broken |= {VERBATIM} if any(self._is_passage(answer, tokens) for tokens in token_sets) else set()
            found.append(frozenset(broken))
        return found

    def _is_passage(self, answer: str, tokens: TokenSet) -> bool:
        from aifactory.tokens.pipeline import shard_names
        from aifactory.tokens.spans import find_rows
        from aifactory.trace import tokenizer_of

        ids = tokenizer_of(self._books, tokens).encode(answer)
        if len(ids) < self._policy.verbatim_tokens:
            return False
        names = {file.name for file in tokens.record.files}
        fetch = partial(self._books.artifacts.fetch, tokens)
        rows = find_rows(ids, shard_names(tokens.record.files), names, fetch, limit=1).rows
        return bool(rows) and rows[0].length >= self._policy.verbatim_tokens

    def _trained_on(self, model: Model) -> list[TokenSet]:
        """The token sets of the model and of its ancestors; what was erased of them is in nothing that is left."""
        artifacts = self._books.artifacts
        found: dict[str, None] = {}
        models = [model]
        for each in models:
            for name in each.record.inputs:
                if artifacts.erased(name) is not None:
                    continue
                if name.startswith("tokens/"):
                    found[name] = None
                elif name.startswith("model/") and name not in {known.id for known in models}:
                    models.append(artifacts.get(Model, name))  # is walked too, since the list is still being read
        return [artifacts.get(TokenSet, name) for name in found]
