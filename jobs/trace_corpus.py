"""`aifactory trace` as the entry point of a Ray job: ray job submit --working-dir . -- python jobs/trace_corpus.py CONFIG.

Not `trace.py`, for the reason that `tokenize_corpus.py` gives.
"""

import sys

from aifactory.cli import main

if __name__ == "__main__":
    sys.exit(main(["trace", *sys.argv[1:]]))
