"""Factories that die with a write to their books."""

from __future__ import annotations

from typing import Any

from aifactory import Factory


class Death(BaseException):
    """The process is gone: nothing catches it."""


def mortal(factory: Factory, dies_at: int, *, after_commit: bool) -> Factory:
    """Dies with its n-th transaction that writes: before it, or after it is on disk."""
    database, number = factory.books.database, 0
    write = database.write

    def counted(*, serialize: bool = False) -> Any:
        nonlocal number
        number += 1
        if number == dies_at and not after_commit:
            raise Death
        transaction = write(serialize=serialize)
        return _Dying(transaction) if number == dies_at else transaction

    database.write = counted  # type: ignore[method-assign]
    return factory


class _Dying:
    def __init__(self, transaction: Any) -> None:
        self._transaction = transaction

    def __enter__(self) -> Any:
        return self._transaction.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._transaction.__exit__(*error)
        raise Death
