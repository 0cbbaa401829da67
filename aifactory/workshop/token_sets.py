"""Token sets: what identifies a tokenized corpus, and what tokenizing is handed to make it."""

from __future__ import annotations

from pathlib import Path

from aifactory.records.artifacts import Corpus, Model, TokenSet
from aifactory.records.identity import hash_parts
from aifactory.records.journal import Cycle
from aifactory.workshop.bench import Bench, Folder, Identity, Made


class TokenSets:
    """Makes the token sets of one factory."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def of(self, cycle: Cycle, corpus: Corpus, *, tokenizer: Model | Path | None) -> TokenSet:
        """The token set of a corpus, with the tokenizer of a model or a folder, or one that is trained on the corpus."""
        from aifactory.tokens.pipeline import CODE_VERSION, read_tokenizer, tokenize_corpus

        config, books = self._bench.config, self._bench.books
        recipe = config.recipe("tokenize")["tokenize"]
        contents: list[str] = []
        folder = books.artifacts.fetch(tokenizer) if isinstance(tokenizer, Model) else tokenizer
        if folder is not None:
            # Which tokenizer it is counts, not which model or folder it came from.
            contents = [hash_parts(*(f"{name}:{data!r}" for name, data in sorted(read_tokenizer(folder).items())))]
            recipe = {"row_len": recipe["row_len"]}
        recipe["chat_fallback"] = config.serve.chat_fallback
        if config.train.is_preference:
            recipe["objective"] = config.train.objective

        def write(target: Folder) -> Made:
            tokenized = tokenize_corpus(
                corpus,
                recipe=config.tokenize,
                tokenizer_folder=folder,
                storage=books.storage,
                target=target,
                run=self._bench.run_for(corpus.figures["bytes_kept"]),
                chat_fallback=config.serve.chat_fallback,
                objective=config.train.objective,
            )
            return Made(files=tokenized.files, figures=tokenized.figures)

        identity = Identity(noun=TokenSet, code_version=CODE_VERSION, recipe=recipe, contents=contents, inputs=[corpus])
        return self._bench.make(cycle, identity, write, event="tokenized", num_cpus=self._bench.data_cpus)
