"""The exceptions of the factory.

    AIFactoryError
    ├── ConfigError            the configuration or the arguments are wrong        (exit status 2)
    ├── BadRequestError        a request that can't be served as it is             (HTTP 400)
    ├── CapacityError          no room now; the same call may succeed later        (HTTP 429)
    ├── PlacementError         the cluster can't hold what the configuration asks for
    ├── TaskError              a task did not end: its worker died again and again
    ├── StorageError           the storage root or an artifact in it is not as expected
    │   └── ErasedError        what was asked for was erased because somebody asked to be forgotten
    ├── StateError             the SQL database is not as expected
    │   └── FencedError        a newer attempt at the same cycle has taken over
    ├── EmptyCorpusError       no row was left to train or to evaluate on
    ├── TokenizerMismatchError token ids and tokenizer do not belong together
    ├── UnsafeModelError       a model folder that holds files which can run code
    ├── TrainingError          training stopped, what was committed is intact
    ├── LmEvalError            lm-eval fails, or has no such metric
    ├── JudgeError             a judge can't be asked, or is another one than the one that is pinned
    └── ParityError            what would be served is not what was trained

Each message says what was expected, what was found, where, and what to do.
"""

from __future__ import annotations


class AIFactoryError(Exception):
    """The root of all errors that the factory raises on purpose."""


class ConfigError(AIFactoryError):
    """The configuration, an override or an argument is wrong."""


class BadRequestError(AIFactoryError):
    """A request that can't be served as it is; `field` names the part of it that is wrong."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class CapacityError(AIFactoryError):
    """There is no room now; the same call may succeed later."""


class PlacementError(AIFactoryError):
    """The cluster can't place the workers, replicas and actors beside one another."""


class TaskError(AIFactoryError):
    """A task did not end: the worker that it ran on died, again and again."""


class StorageError(AIFactoryError):
    """The storage root, or an artifact in it, is not as expected."""


class ErasedError(StorageError):
    """What was asked for was erased (`aifactory forget`); what is left of it has another name."""


class StateError(AIFactoryError):
    """The SQL database is not as expected."""


class FencedError(StateError):
    """A newer attempt at the same cycle has taken over; this one must publish nothing more."""


class EmptyCorpusError(AIFactoryError):
    """No row was left to train or to evaluate on."""


class TokenizerMismatchError(AIFactoryError):
    """Token ids and a tokenizer do not belong together."""


class UnsafeModelError(AIFactoryError):
    """A model folder holds files that can run code when they are loaded."""


class TrainingError(AIFactoryError):
    """Training stopped; what was committed is intact."""


class ParityError(AIFactoryError):
    """What would be served is not what was trained."""


class LmEvalError(AIFactoryError):
    """lm-eval fails, or gives no such metric by example."""


class JudgeError(AIFactoryError):
    """A judge can't be asked, or is another one than the one that the configuration pins."""
