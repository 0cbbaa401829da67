"""python small_disk.py TASK: trains alone; prints the error's kind and words, or the steps that are committed in the end."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch

from aifactory.errors import AIFactoryError
from aifactory.train.checkpoint import Checkpoints
from aifactory.train.worker import work

if __name__ == "__main__":
    task = pickle.loads(Path(sys.argv[1]).read_bytes())
    try:
        work(task, device=torch.device("cpu"))
    except AIFactoryError as error:
        print(f"{type(error).__name__}: {error}")
    print("committed", *Checkpoints(task.storage, *task.run_folder).committed())
