"""A peer: the same work by datatrove, in a process and an environment of its own (`make peers`).

Reads    --data FOLDER of Parquet files with the columns `id` and `text`; --tokenizer FOLDER with a tokenizer.json
Writes   --out FOLDER; one JSON object on standard output: seconds, documents, tokens, texts_digest, versions
Clock    from the first executor's `run` to the end of the last; imports are before it.

It is tuned as its documentation allows: as many tasks as there are files, processes that are forked and so import nothing,
words split by `str.split` and sentences by a regular expression in place of spaCy (`language` takes a `WordTokenizer`),
xxhash, a plain Parquet between its two passes, no shuffling of the documents that were tokenized.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
import unicodedata
from importlib.metadata import version
from pathlib import Path

import pyarrow.parquet as pq
from datatrove.data import Document, DocumentsPipeline
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers.parquet import ParquetWriter
from datatrove.utils.word_tokenizers import WordTokenizer

_END_OF_SENTENCE = re.compile(r"[.?!][\"')\]}’”»›]*(?=\s|\Z)")
_VERSIONS = ("datatrove", "tokenizers", "pyarrow", "numpy")


class PlainWords(WordTokenizer):
    """Words and sentences as the project has them: a word is a run without white space; a sentence ends with . ? or !
    and the closing marks behind it, before white space or the end."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[start:end] for start, end in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        ends = [match.end() for match in _END_OF_SENTENCE.finditer(text)]
        if not ends or text[ends[-1] :].strip():
            ends.append(len(text))
        return list(zip([0, *ends[:-1]], ends, strict=True))


class Normalise(PipelineStep):
    """Unicode NFC."""

    name = "NFC"

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in data:
            document.text = unicodedata.normalize("NFC", document.text)
            yield document


def text_of(document: Document) -> str:
    return document.text


def id_and_text(writer: ParquetWriter, document: Document) -> dict[str, str]:
    return {"id": document.id, "text": document.text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, required=True)
    arguments = parser.parse_args()
    out = {name: str(arguments.out / name) for name in ("filtered", "signatures", "duplicates", "tokens", "logs")}
    tasks = len(list(arguments.data.glob("*.parquet")))
    words, dedup = PlainWords(), ExactDedupConfig(content_getter=text_of)
    stages = [
        (
            tasks,
            [
                ParquetReader(str(arguments.data), read_metadata=False),
                Normalise(),
                GopherQualityFilter(language=words),
                GopherRepetitionFilter(language=words),
                C4QualityFilter(language=words),
                ParquetWriter(
                    out["filtered"],
                    adapter=id_and_text,
                    compression=None,
                    use_content_defined_chunking=False,
                    write_page_index=False,
                ),
                ExactDedupSignature(out["signatures"], config=dedup, finder_workers=arguments.workers),
            ],
        ),
        (
            arguments.workers,
            [ExactFindDedups(out["signatures"], out["duplicates"], config=dedup, lines_to_buffer=1000)],
        ),
        (
            tasks,
            [
                ParquetReader(out["filtered"], read_metadata=False),
                ExactDedupFilter(out["duplicates"], config=dedup),
                DocumentTokenizer(
                    out["tokens"],
                    tokenizer_name_or_path=str(arguments.tokenizer / "tokenizer.json"),
                    eos_token="<|endoftext|>",
                    shuffle_documents=False,
                ),
            ],
        ),
    ]
    start = time.perf_counter()
    seconds = []
    for number, (count, pipeline) in enumerate(stages):
        LocalPipelineExecutor(
            pipeline,
            tasks=count,
            workers=min(count, arguments.workers),
            logging_dir=f"{out['logs']}/{number}",
            start_method="fork",
        ).run()
        seconds.append(time.perf_counter() - start - sum(seconds))
    documents = sum(file.stat().st_size // 8 for file in Path(out["tokens"]).glob("*.index"))
    tokens = sum(file.stat().st_size // 2 for file in Path(out["tokens"]).glob("*.ds"))
    found = {
        "seconds": sum(seconds),
        "seconds_of_stages": seconds,
        "documents": documents,
        "tokens": tokens - documents,  # without the one that ends each document
        "texts_digest": texts_digest(Path(out["filtered"])),
        "versions": {name: version(name) for name in _VERSIONS},
    }
    json.dump(found, sys.stdout)


def texts_digest(folder: Path) -> str:
    """What tells two sets of different texts apart."""
    digests = {
        hashlib.sha256(text.encode()).digest()
        for file in folder.glob("*.parquet")
        for text in pq.read_table(file, columns=["text"])["text"].to_pylist()
    }
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


if __name__ == "__main__":
    main()
