"""The books of one factory: everything that survives, opened from its configuration."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from aifactory.config import Config
from aifactory.errors import ConfigError
from aifactory.records.allowances import Allowances
from aifactory.records.artifacts import ArtifactStore
from aifactory.records.batch_jobs import BatchQueue
from aifactory.records.database import Database
from aifactory.records.erasures import Erasures
from aifactory.records.feedback import FeedbackLog
from aifactory.records.journal import ANONYMOUS, Journal
from aifactory.records.keys import Keys
from aifactory.records.lineage import Lineage
from aifactory.records.registry import REFERENCE, Registry
from aifactory.records.retrain_requests import RetrainRequests
from aifactory.records.storage import Storage
from aifactory.records.verdicts import Verdicts

# Ray sets it for the driver of a job, and unpacks the working directory into such a folder of the session.
_JOB_MARK = "RAY_JOB_CONFIG_JSON_ENV_VAR"


class Books:
    """Storage, journal, registry, feedback and lineage. Pickled by its configuration: each process opens its own."""

    def __init__(self, config: Config, *, key_id: str = ANONYMOUS) -> None:
        self.config = config
        self.storage = Storage(storage_root(config))
        self.artifacts = ArtifactStore(self.storage)
        self.database = Database(state_url(config, self.storage))
        self.journal = Journal(self.database, config.name, key_id=key_id)
        self.registry = Registry(self.journal)
        self.feedback = FeedbackLog(self.journal)
        self.batches = BatchQueue(self.journal, self.storage)
        self.lineage = Lineage(self.journal)
        self.verdicts = Verdicts(self.journal)
        self.erasures = Erasures(self.journal)
        self.retrain_requests = RetrainRequests(self.journal)
        self.keys = Keys(self.journal)
        self.allowances = Allowances(self.journal)

    def __reduce__(self) -> tuple[partial[Books], tuple[Config]]:
        return partial(Books, key_id=self.journal.key_id), (self.resolved_config(),)

    def resolved_config(self) -> Config:
        """The configuration with absolute places, for processes that run in other folders."""
        endpoint = self.config.runtime.endpoint
        adapters = {
            name: place if place.startswith(REFERENCE) else str(Path(place).expanduser().absolute())
            for name, place in endpoint.adapters.items()
        }
        runtime = self.config.runtime.model_copy(
            update={
                "endpoint": endpoint.model_copy(update={"adapters": adapters}),
                "storage": self.storage.root.removesuffix("/" + self.config.name),
                "state_url": self.database.url.render_as_string(hide_password=False),
            }
        )
        return self.config.model_copy(update={"runtime": runtime})

    def close(self) -> None:
        """Close the database's connections."""
        self.database.close()


def storage_root(config: Config) -> str:
    """The factory's own part of the storage root, absolute.

    Raises   ConfigError if the root is relative to a job's passing copy of the working directory: what is written there
             is gone with the job.
    """
    asked = config.runtime.storage
    in_job = _JOB_MARK in os.environ
    if asked is None:
        asked = "~/.aifactory" if in_job else ".aifactory"
    if "://" in asked:
        return f"{asked.rstrip('/')}/{config.name}"
    path = Path(asked).expanduser()
    if in_job and not path.is_absolute():
        raise ConfigError(
            f"expected an absolute path or a URI at runtime.storage in a Ray job, found {asked!r}: the job's working "
            f"directory {Path.cwd()} is a copy that is deleted with the job. Add --set runtime.storage=/a/lasting/place."
        )
    return str(path.absolute() / config.name)


def state_url(config: Config, storage: Storage) -> str:
    """The URL of the database. Raises ConfigError where there is no disk to put SQLite's file on."""
    asked = config.runtime.state_url
    if asked is None:
        if not storage.is_local:
            raise ConfigError(
                f"expected runtime.state_url beside a storage root that is no local path, found none with {storage.root}. "
                "Set it to a PostgreSQL URL, or to sqlite:////an/absolute/path/state.db on the head's disk."
            )
        return f"sqlite:///{storage.path('state.db')}"
    prefix, sqlite, path = asked.partition("sqlite:///")
    file = Path(path).expanduser()
    if sqlite and not prefix and path and not file.is_absolute() and path != ":memory:":
        if _JOB_MARK in os.environ:
            raise ConfigError(
                f"expected an absolute path at runtime.state_url in a Ray job, found {asked!r}: the job's working "
                "directory is deleted with it. Write sqlite:////an/absolute/path/state.db."
            )
        return f"sqlite:///{file.absolute()}"
    return asked
