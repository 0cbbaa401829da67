"""Proofs are of a loop of two cycles that is turned once."""

from __future__ import annotations

from chromium import chromium  # noqa: F401
from turned_loops import copied, loop, turned_folder  # noqa: F401
