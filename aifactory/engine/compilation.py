"""Compilation: `@kernel` compiles a function with numba, without Python's lock, and keeps it until a file of kernels changes.

By itself numba asks only whether the file of a function has changed: what it had compiled into it from another file would go stale
unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba

_FILES = ("compilation.py", "kernels.py", "matrix_unit.py", "products.py", "tiles.py", "vectors.py", "worksharing.py")


@cache
def _stamp() -> str:
    folder = Path(__file__).parent
    return sha256(b"".join((folder / name).read_bytes() for name in _FILES)).hexdigest()


def kernel(function: Callable[..., Any]) -> Any:
    """`numba.njit(cache=True, nogil=True)`, whose cache belongs to the present text of all files of kernels."""
    from numba.core.caching import IndexDataCacheFile

    dispatcher = numba.njit(cache=True, nogil=True)(function)
    kept = dispatcher._cache
    kept._cache_file = IndexDataCacheFile(
        cache_path=kept._cache_path, filename_base=kept._impl.filename_base, source_stamp=_stamp()
    )
    return dispatcher
