"""Quality: the published rules of Gopher, FineWeb and C4, to the letter, on the bytes of Arrow's texts.

Gopher    Rae et al. 2021, Scaling language models: methods, analysis & insights from training Gopher (arXiv:2112.11446), A.1.1:
          `gopher_quality`, and by table A1 `gopher_repetition`.
FineWeb   Penedo et al. 2024, The FineWeb datasets (arXiv:2406.17557), 3.6: `fineweb_quality`.
C4        Raffel et al. 2020, Exploring the limits of transfer learning (JMLR 21), 2.2: `c4_quality`.
Law       Rules, their order, comparisons and names are those of the filters of datatrove 0.10 (Penedo et al. 2024, a
          library) with the definitions below, whatever else is in the block. There is one difference: a text without
          words, by whose number of words that divides, breaks `short_doc`.
Word      A run without white space (`str.isspace`), as `str.split` has it. The papers do not say.
Sentence  Ends after each . ? ! that is followed, behind any number of the closing marks " ' ) ] } ’ ” » ›, by white
          space or by the line's end. What is left of the line after the last end is one more, unless it is blank.
Length    In characters, that is code points. What is a letter or white space is what Python's tables of Unicode say.
Off       A threshold of 0 switches its rule off, unless it says otherwise.
Exact     Cheap bounds settle most texts: hashed into a table too coarse to tell all of them apart, n-grams seem to occur more
          often than they do, never less. Where a bound does not keep the rule they are compared byte by byte, so no
          verdict rests on a hash.

Import this module where it is needed: numba takes its time.

Legend   N texts, B bytes of all of them, W words of a text, L lines; so in all files of this room.
"""

from __future__ import annotations

from aifactory.ingest.quality.c4 import C4_QUALITY_RULES, C4Quality, c4_quality
from aifactory.ingest.quality.characters import PUNCTUATION, TERMINAL_PUNCTUATION
from aifactory.ingest.quality.fineweb import FINEWEB_QUALITY_RULES, FineWebQuality, fineweb_quality
from aifactory.ingest.quality.gopher import GOPHER_QUALITY_RULES, STOP_WORDS, GopherQuality, gopher_quality
from aifactory.ingest.quality.repetition import GopherRepetition, gopher_repetition, gopher_repetition_rules

__all__ = [
    "C4_QUALITY_RULES",
    "FINEWEB_QUALITY_RULES",
    "GOPHER_QUALITY_RULES",
    "PUNCTUATION",
    "STOP_WORDS",
    "TERMINAL_PUNCTUATION",
    "C4Quality",
    "FineWebQuality",
    "GopherQuality",
    "GopherRepetition",
    "c4_quality",
    "fineweb_quality",
    "gopher_quality",
    "gopher_repetition",
    "gopher_repetition_rules",
]
