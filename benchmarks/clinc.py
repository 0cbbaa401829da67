"""CLINC150 as the loop's benchmark uses it: 150 intents of short English queries, of which 50 are kept from the factory.

Larson et al. 2019, "An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction", D19-1131; CC BY 3.0. Nobody
copies it into the project: the file is named by whoever runs the benchmark.

    train of the old intents   what the first release is taught
    val of the old, train and val of the new intents   what users ask
    test of all   sealed: no part of the factory and no user ever sees it
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ABOUT = (
    "clinc150 with its full number of queries, one JSON file (data_full.json of the repository clinc/oos-eval; Larson et al. "
    "2019, D19-1131): train, val and test, each of [query, intent]"
)
_NUM_NEW = 50


@dataclass(frozen=True, slots=True)
class Clinc:
    """Queries and their intents by part, and which intents are new to the factory."""

    parts: Mapping[str, Sequence[tuple[str, str]]]
    old: tuple[str, ...]
    new: tuple[str, ...]

    @classmethod
    def read(cls, file: Path) -> Clinc:
        """Raises   SystemExit where there is no such file, or another one."""
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            parts = {
                name: [(prompt_of(query), name_of(intent)) for query, intent in found[name]]
                for name in ("train", "val", "test")
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"loop.py: expected {ABOUT}, found in {file}: {type(error).__name__}: {error}") from error
        intents = sorted({intent for _, intent in parts["train"]})
        new = set(random.Random(0).sample(intents, _NUM_NEW))
        return cls(parts, tuple(i for i in intents if i not in new), tuple(i for i in intents if i in new))

    def taught(self) -> list[tuple[str, str]]:
        """What the first release is taught."""
        return self._of(["train"], self.old)

    def asked(self) -> list[tuple[str, str]]:
        """What users ask."""
        return self._of(["val"], self.old) + self._of(["train", "val"], self.new)

    def sealed(self, intents: Iterable[str]) -> list[tuple[str, str]]:
        """The test; a query that is also among what is taught or asked is left out."""
        known = {query for query, _ in self.taught() + self.asked()}
        return [(query, intent) for query, intent in self._of(["test"], intents) if query not in known]

    def _of(self, names: Sequence[str], intents: Iterable[str]) -> list[tuple[str, str]]:
        wanted = set(intents)
        return [(query, intent) for name in names for query, intent in self.parts[name] if intent in wanted]


def prompt_of(query: str) -> str:
    """What is asked: the end of the line is where the answer begins."""
    return f"{query}\n"


def name_of(intent: str) -> str:
    """What is to be answered."""
    return intent.replace("_", " ")


def write_lines(pairs: Sequence[tuple[str, str]], file: Path, *, answer: str) -> None:
    """JSON lines of prompt and answer; the answer's column is called `answer`."""
    lines = [json.dumps({"prompt": prompt, answer: intent}) for prompt, intent in pairs]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
