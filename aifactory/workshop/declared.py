"""The endpoint as a declarative deployment names it: `serve deploy`, KubeRay's RayService."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aifactory.config import Config
from aifactory.records.books import Books
from aifactory.serve.app import application, require_declarable
from aifactory.workshop.masking import mask_of


def application_of(args: Mapping[str, str]) -> Any:
    """The application, by the import path `aifactory.workshop.declared:application_of`.

    args     config: the configuration file, the same on every machine
    Raises   StateError without a release; ConfigError where other machines could ask without a key.
    """
    books = Books(Config.from_yaml(args["config"]))
    require_declarable(books)
    return application(books, mask_of(books.config))
