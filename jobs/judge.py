"""`aifactory judge` as the entry point of a Ray job: ray job submit --working-dir . -- python jobs/judge.py measure FILE CONFIG."""

import sys

from aifactory.cli import main

if __name__ == "__main__":
    sys.exit(main(["judge", *sys.argv[1:]]))
