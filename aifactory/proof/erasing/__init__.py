"""The places that hold rows: what of them is meant by an erasure, and how each loses it.

    log       completions, feedback, choices, scores, files and batch jobs             rows deleted
    batch     sealed feedback                                                          published anew from the log
    corpus    rows on both sides, the ledger, the index, the page                      written anew without them
    scorecard scores by row                                                            written anew without them
    tokens    packed rows, their index from text, the tokenizer if it was trained on them    deleted, made anew where needed
    parts     what was made from pieces of data, n-grams of holdouts                   deleted, made anew where needed
    runs      checkpoints and packed holdouts of runs; files without a record          deleted
    journal   examples of rejected rows, errors that quote                             the quotation is taken out

Identity   What is left of an artifact is another artifact: its recipe names the one that it was made from (`erased_from`) and a
           digest of the keyed hashes of what it lacks. Of the old one a note stays (`erased.json`), without text.
Law        Each thing is found by what it holds, or by tombstones where names are gone; it is noted before it is deleted, and
           doing it again changes nothing. So whoever was killed does all of it again.
"""

from __future__ import annotations

from aifactory.proof.erasing.corpora import CorpusRows
from aifactory.proof.erasing.eraser import Eraser
from aifactory.proof.erasing.files import Files
from aifactory.proof.erasing.learnt import Learnt
from aifactory.proof.erasing.log import Log
from aifactory.proof.erasing.search import Found
from aifactory.proof.erasing.seen import models_that_saw

__all__ = ["Eraser", "Found", "go_through", "models_that_saw"]


def go_through(eraser: Eraser) -> Found:
    """All places once."""
    log, rows, learnt, files = Log(eraser), CorpusRows(eraser), Learnt(eraser), Files(eraser)
    log.erase(log.meant())
    meant = rows.find()
    more = log.said_in(meant)
    if more:
        log.erase(more)
    eraser.bury(meant)
    learnt.erase_batches()
    rows.erase()
    learnt.erase_scorecards()
    learnt.erase_token_sets()
    files.erase_parts()
    files.erase_uploaded()
    log.unquote()
    files.erase_loose()
    return eraser.found
