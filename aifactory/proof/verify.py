"""A release made again from its record, in a clean place, and compared with what it was, artifact by artifact.

What is rebuilt   all that the release's own cycle made: corpora, token sets, model, scorecard. With `from_scratch` also all that
                  earlier cycles made and it was made of.
What is taken     what earlier cycles made, after its files were found to be what its record and the books say; sealed feedback,
                  which is made by nobody; and what an erasure left of a corpus, if it is what the proof of that names.
How               by the recipes in the records, bound as the cycles were, under the recorded execution. An identity that comes
                  out as another one (another version of a stage, a function or a model that was changed) ends it before any work.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from aifactory.cluster.tasks import RunTasks
from aifactory.errors import AIFactoryError
from aifactory.observe.events import Timer
from aifactory.proof.rebuild import ArtifactCheck, DiffersError, Rebuild, shown
from aifactory.proof.recorded import NotRebuildableError
from aifactory.records.books import Books
from aifactory.workshop.models import TrainWork, train_and_prove


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What came of it."""

    release: str
    verdict: Literal["equal", "differs", "not rebuildable"]
    reason: str
    """Which artifact differs first, or why it can't be rebuilt; empty if all are equal."""
    from_scratch: bool
    checks: Sequence[ArtifactCheck]
    """In the order in which they were made, up to the first that differs."""
    seconds: float

    @property
    def holds(self) -> bool:
        return self.verdict == "equal"

    def to_json(self) -> dict[str, Any]:
        checks = [asdict(check) | {"is_equal": check.is_equal} for check in self.checks]
        return asdict(self) | {"holds": self.holds, "checks": checks}

    def lines(self) -> list[str]:
        """The report as text."""
        lines = [f"{self.release}: {self.verdict}" + (f": {self.reason}" if self.reason else "")]
        for check in self.checks:
            found = "equal" if check.is_equal else f"differs: {check.found[:16]}"
            lines.append(
                f"  {check.how:<8} {check.id:<36} sha256 {check.recorded[:16]}  {found}  {check.seconds:,.1f} s"
            )
            lines += [f"           {name}" for name in check.files]
        different = {name: pair for check in self.checks for name, pair in check.execution.items()}
        lines += [f"  here     {name}: {shown(now)}, recorded {shown(then)}" for name, (then, now) in different.items()]
        left = [check for check in self.checks if check.left_by is not None and not check.id.startswith("tokenizer of")]
        lines += [
            f"  left     {check.id}: {check.left_by} erased rows of what it was made from; nobody can make it again"
            for check in left
        ]
        taken = sum(check.how == "taken" and check.left_by is None for check in self.checks)
        if taken:
            lines.append(
                f"  {taken} artifacts were taken as they are"
                + (
                    ": feedback is made by nobody."
                    if self.from_scratch
                    else "; --from-scratch makes those of earlier cycles too."
                )
            )
        return [*lines, f"  {self.seconds:,.0f} s in all"]


def verify_release(
    books: Books,
    name: str,
    *,
    run_tasks: Callable[[], RunTasks],
    from_scratch: bool = False,
    train_work: TrainWork = train_and_prove,
) -> Verification:
    """Rebuild a release in a temporary storage root with books of its own, and compare.

    Raises   StateError if there is no such release.
    """
    release = books.registry.named(name)
    timer = Timer()
    with tempfile.TemporaryDirectory(prefix="aifactory-verify-") as scratch:
        place = {"storage": scratch, "state_url": f"sqlite:///{scratch}/state.db", "trackers": ()}
        config = books.config.model_copy(update={"runtime": books.config.runtime.model_copy(update=place)})
        clean = Books(config)
        rebuild = Rebuild(
            books, clean, run_tasks=run_tasks, train_work=train_work, from_scratch=from_scratch, trigger=release.trigger
        )
        verdict: Literal["equal", "differs", "not rebuildable"] = "equal"
        reason = ""
        try:
            rebuild.of(release.model, is_own=True)
            rebuild.of(release.scorecard, is_own=True)
        except NotRebuildableError as error:
            verdict, reason = "not rebuildable", str(error)
        except DiffersError as error:
            verdict, reason = "differs", str(error)
        except AIFactoryError as error:
            # What the stages say of sources, models or places that are not as they were.
            verdict, reason = "not rebuildable", str(error)
        finally:
            clean.close()
    return Verification(
        release=release.name,
        verdict=verdict,
        reason=reason,
        from_scratch=from_scratch,
        checks=rebuild.checks,
        seconds=timer.seconds,
    )
