"""`aifactory retrain` as the entry point of a Ray job: ray job submit --working-dir . -- python jobs/retrain.py CONFIG."""

import sys

from aifactory.cli import main

if __name__ == "__main__":
    sys.exit(main(["retrain", *sys.argv[1:]]))
