"""Laws of the pure rooms: the trainer and the engine run on any machine with torch, without the factory around them."""

from __future__ import annotations

import subprocess
import sys

BLOCKED = ["ray", "pydantic", "sqlalchemy", "alembic"]
PURE = [
    "aifactory.train.base",
    "aifactory.train.checkpoint",
    "aifactory.train.guard",
    "aifactory.train.loop",
    "aifactory.train.lora",
    "aifactory.train.objectives",
    "aifactory.train.parallel",
    "aifactory.train.room",
    "aifactory.train.sampler",
    "aifactory.train.schedule",
    "aifactory.train.step",
    "aifactory.train.worker",
    "aifactory.evaluate.gate",
    "aifactory.evaluate.scoring",
    "aifactory.evaluate.statistics",
]
SCRIPT = """
import importlib, pkgutil, sys
for name in {blocked}:
    sys.modules[name] = None
import aifactory.engine, aifactory.text
pure = {pure}
for room in (aifactory.engine, aifactory.text):
    pure += [room.__name__ + "." + module.name for module in pkgutil.iter_modules(room.__path__)]
for name in pure:
    importlib.import_module(name)
print(len(pure))
"""


def test_the_step_and_the_engine_are_imported_without_ray_pydantic_and_sqlalchemy():
    script = SCRIPT.format(blocked=BLOCKED, pure=PURE)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > len(PURE) + 10
