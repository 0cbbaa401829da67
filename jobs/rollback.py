"""`aifactory rollback` as the entry point of a Ray job: ray job submit --working-dir . -- python jobs/rollback.py CONFIG."""

import sys

from aifactory.cli import main

if __name__ == "__main__":
    sys.exit(main(["rollback", *sys.argv[1:]]))
