"""`aifactory lineage` as the entry point of a Ray job: ray job submit --working-dir . -- python jobs/lineage.py CONFIG."""

import sys

from aifactory.cli import main

if __name__ == "__main__":
    sys.exit(main(["lineage", *sys.argv[1:]]))
