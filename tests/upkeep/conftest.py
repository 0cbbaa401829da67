"""What is kept is a loop of two cycles that is turned once."""

from __future__ import annotations

from postgres import postgres_server, postgres_url  # noqa: F401
from turned_loops import copied, loop, turned_folder  # noqa: F401
