"""The laws on imports: down only, stages apart, Ray at the rims, nothing heavy before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "aifactory"
STAGES = {"ingest", "tokens", "train", "evaluate", "serve", "improve", "traffic"}
CORES = {"text", "engine"}
# From the top down; what stands in one set is on one level.
LEVELS: list[set[str]] = [
    {"cli", "__main__", "kernels"},
    {"supervisor"},
    {"completion"},
    {"factory"},
    {"page"},
    {
        *("workshop", "report", "ledger", "trace", "model_card", "proof", "plan", "energy_ledger", "keys"),
        *("upkeep", "doctor", "bottleneck"),
    },
    STAGES,
    CORES,
    {"cluster"},
    {"records", "observe"},
    {"config"},
    {"errors"},
]
# A stage may use the pure part of another where it is the same law: the evaluation actor watches by the statistics that the
# gate judges by.
PURE = {("improve", "aifactory.evaluate.statistics"), ("improve", "aifactory.evaluate.sequential")}
PURE |= {("improve", "aifactory.evaluate.guards")}
RIMS = {"train/trainer.py", "serve/app.py", "improve/evaluator.py"}


def modules() -> Iterator[tuple[Path, str, list[tuple[str, bool]]]]:
    """Each file, its room, and what it imports with whether that happens when it is loaded."""
    for file in sorted(PACKAGE.rglob("*.py")):
        if "migrations" in file.parts:
            continue
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        tree = ast.parse(file.read_text(encoding="utf-8"))
        lazy = {
            id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
        }
        typing_only = {
            id(n)
            for i in ast.walk(tree)
            if isinstance(i, ast.If) and ast.unparse(i.test) == "TYPE_CHECKING"
            for n in ast.walk(i)
        }
        found = []
        for node in ast.walk(tree):
            if id(node) in typing_only:
                continue
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            found += [(name, id(node) not in lazy) for name in names]
        yield file, room, found


def level(room: str) -> int:
    return next(i for i, rooms in enumerate(LEVELS) if room in rooms)


def test_every_room_has_a_level() -> None:
    rooms = {room for _, room, _ in modules()} - {"__init__"}
    assert rooms == set().union(*LEVELS)


def test_imports_go_down_only() -> None:
    wrong = []
    for file, room, found in modules():
        if room == "__init__":
            continue
        for name, _ in found:
            parts = name.split(".")
            if parts[0] != "aifactory" or len(parts) < 2 or parts[1] == room or (room, name) in PURE:
                continue
            if level(parts[1]) < level(room) or (parts[1] in STAGES and room in STAGES):
                wrong.append(f"{file.relative_to(PACKAGE)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_ray_is_known_at_the_rims_and_in_the_cluster_room_alone() -> None:
    wrong = [
        f"{file.relative_to(PACKAGE)} imports {name}"
        for file, room, found in modules()
        for name, _ in found
        if name.split(".")[0] == "ray" and room != "cluster" and file.relative_to(PACKAGE).as_posix() not in RIMS
    ]
    assert not wrong, "\n".join(wrong)


def test_each_stage_has_at_most_one_rim() -> None:
    rooms = [rim.split("/")[0] for rim in RIMS]
    assert len(rooms) == len(set(rooms))


def test_decisions_are_pure() -> None:
    allowed = {"__future__", "collections", "dataclasses", "math", "typing", "aifactory.evaluate.statistics"}
    allowed |= {"aifactory.evaluate.sequential", "aifactory.improve.budget", "aifactory.evaluate.guards"}
    for name in ("evaluate/gate.py", "improve/decision.py", "improve/budget.py", "improve/trial_decision.py"):
        found = next(found for file, _, found in modules() if file == PACKAGE / name)
        used = {n if n.startswith("aifactory") else n.split(".")[0] for n, _ in found}
        assert used <= allowed, (name, used - allowed)


def test_importing_aifactory_loads_neither_torch_nor_ray() -> None:
    code = "import aifactory, aifactory.cli, sys; print(sorted({'torch', 'ray', 'pydantic', 'sqlalchemy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_who_places_workers_waits_for_no_model_code() -> None:
    code = (
        "import aifactory.factory, aifactory.train.trainer, aifactory.train.work, aifactory.evaluate.pipeline, "
        "aifactory.serve.app, aifactory.improve.evaluator, sys; "
        "print(sorted({'transformers.modeling_utils', 'accelerate', 'peft', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_who_controls_the_workers_of_a_run_does_not_wait_for_torch() -> None:
    code = (
        "import aifactory.cluster.process_group, aifactory.train.trainer, sys; "
        "import ray.train.v2._internal.execution.controller.controller; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"


def test_the_step_and_the_engine_import_without_ray_pydantic_and_sqlalchemy() -> None:
    blocked = ("ray", "pydantic", "sqlalchemy", "alembic")
    names = [
        # But for what needs Triton, which comes with torch for CUDA.
        *(f"aifactory.engine.{f.stem}" for f in (PACKAGE / "engine").glob("[a-z]*.py") if f.stem != "triton_kernels"),
        *(f"aifactory.text.{f.stem}" for f in (PACKAGE / "text").glob("[a-z]*.py")),
        *(f"aifactory.train.{f.stem}" for f in (PACKAGE / "train").glob("[a-z]*.py")),
        *(f"aifactory.evaluate.{name}" for name in ("gate", "scoring", "statistics")),
    ]
    code = f"import sys\nfor b in {blocked!r}: sys.modules[b] = None\nimport " + ", ".join(names)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_there_is_no_drawer_without_a_name() -> None:
    banned = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert not [f for f in PACKAGE.rglob("*.py") if f.stem in banned]
    text = "\n".join(f.read_text(encoding="utf-8") for f in PACKAGE.rglob("*.py"))
    classes = [
        n.name
        for n in ast.walk(ast.parse(text.replace("from __future__ import annotations", "")))
        if isinstance(n, ast.ClassDef)
    ]
    assert not [name for name in classes if name.endswith(("Manager", "Helper"))]


def test_no_module_that_tests_import_hides_another():
    """tests/ and benchmarks/ are both on pytest's path (pyproject.toml): one name, one file, whatever is collected first."""
    root = PACKAGE.parent
    tests = {file.stem for file in (root / "tests").glob("*.py")}
    benchmarks = {file.stem for file in (root / "benchmarks").glob("*.py")}

    assert not tests & benchmarks
    imported = {
        name
        for file in (root / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module
        for name in [node.module.split(".")[0]]
    }
    folders = {folder.name for folder in (root / "tests").iterdir() if folder.is_dir()}
    assert not imported & folders, "a folder of tests is no package: what several tests use lies in tests/ itself"
