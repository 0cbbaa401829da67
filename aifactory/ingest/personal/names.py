"""Names of persons, by a spaCy pipeline that is installed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.metadata import entry_points

from aifactory.errors import ConfigError
from aifactory.ingest.personal.finds import Find

Persons = Callable[[str], list[Find]]
"""From a text to the names in it."""
# What pipelines of different languages call a person.
_PERSON_LABELS = {"PERSON", "PER", "PERS", "PRS", "PS", "persName", "Person"}
_NAME = re.compile(r"[^\W\d_](?:[^\W\d_]|[ .'’-])*")
_LONGEST_READ = 100_000


@lru_cache(maxsize=4)
def names_in(names_model: str) -> Persons:
    """A function from a text to the names in it."""
    advice = "install aifactory[names] and a pipeline of spaCy's with a recogniser of names, such as en_core_web_sm"
    try:
        import spacy
    except ImportError as error:
        raise ConfigError(f"expected spaCy for the step personal with kind name, found none; {advice}.") from error
    installed = sorted({point.name for point in entry_points(group="spacy_models")})
    if names_model not in installed if names_model else len(installed) != 1:
        wanted = f"the spaCy pipeline {names_model!r}" if names_model else "one installed spaCy pipeline"
        found = ", ".join(installed) or "none"
        raise ConfigError(
            f"expected {wanted} for the step personal with kind name, found {found}; {advice}, "
            f"and name it in names_model where there are several."
        )
    pipeline = spacy.load(names_model or installed[0])
    labels = {label for labels in pipeline.pipe_labels.values() for label in labels}
    if not labels & _PERSON_LABELS:
        raise ConfigError(
            f"expected a spaCy pipeline that names persons, found {names_model or installed[0]!r} "
            f"with the labels {sorted(labels)}; {advice}."
        )

    def persons(read: str) -> list[Find]:
        finds = []
        for start, piece in _pieces(read):
            # One by one: in a batch the rounding of one text's scores depends on the others.
            for entity in pipeline(piece).ents:
                name = entity.text
                first = start + entity.start_char
                is_key = read.startswith('":', first + len(name))
                if entity.label_ in _PERSON_LABELS and _NAME.fullmatch(name) and not name[0].islower() and not is_key:
                    finds.append(Find(first, first + len(name), "name"))
        return finds

    return persons


def _pieces(read: str) -> Iterator[tuple[int, str]]:
    """A text in pieces that a pipeline takes, cut at lines or spaces."""
    start = 0
    while start < len(read):
        end = min(len(read), start + _LONGEST_READ)
        if end < len(read):
            cut = max(read.rfind("\n", start, end), read.rfind(" ", start, end))
            end = cut + 1 if cut > start else end
        yield start, read[start:end]
        start = end
