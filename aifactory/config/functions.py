"""Functions that a configuration names as `package.module:name`: found on the import path, or in the working directory."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import StringConstraints

from aifactory.errors import ConfigError

FunctionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]


def load_named(name: str, *, where: str) -> Callable[..., Any]:
    """The function of this name.

    where    the option that names it
    Raises   ConfigError where it can't be imported, or can't be called.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_named(module), attribute)
    except Exception as error:  # whatever a module does when it is imported
        raise ConfigError(
            f"expected a function at {where}: {name}, found {type(error).__name__}: {error}; it must be importable where it is used "
            "(with Ray jobs it lies in the job's working directory)."
        ) from error
    if not callable(found):
        raise ConfigError(f"expected a function at {where}: {name}, found a {type(found).__name__}; name a function.")
    loaded: Callable[..., Any] = found
    return loaded


def import_named(name: str) -> Any:
    """The module of this name; the working directory is looked at too. Raises whatever its import raises."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        here = os.getcwd()
        if error.name is None or not f"{name}.".startswith(f"{error.name}.") or here in sys.path:
            raise
        # A console script has no working directory on its path, a script of `python` or a worker of a job has.
        sys.path.append(here)
        importlib.invalidate_caches()
        return importlib.import_module(name)
