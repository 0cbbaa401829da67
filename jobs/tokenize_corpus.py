"""`aifactory tokenize` as the entry point of a Ray job: ray job submit --working-dir . -- python jobs/tokenize_corpus.py CONFIG.

Not `tokenize.py`: the folder of a script is searched first, and the standard library has a module of that name.
"""

import sys

from aifactory.cli import main

if __name__ == "__main__":
    sys.exit(main(["tokenize", *sys.argv[1:]]))
