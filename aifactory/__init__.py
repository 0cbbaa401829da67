"""AI Factory: data in, models out that get better with use, on Ray.

`from aifactory import Factory` is the whole Python API; everything heavy loads when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aifactory.config import Config
    from aifactory.factory import Factory

__all__ = ["Config", "Factory", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazy (PEP 562), so that `import aifactory` loads neither torch nor ray nor pydantic: the engine and the step run
    # on machines that have none of the latter two.
    if name == "Factory":
        from aifactory.factory import Factory

        return Factory
    if name == "Config":
        from aifactory.config import Config

        return Config
    raise AttributeError(f"module 'aifactory' has no attribute {name!r}")
