"""Laws of what is done in threads of this process in the place of tasks: the same answers, with the threads of a task."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from here_loops import TINY, here, tiny_config
from small_models import write_small_model

from aifactory.cluster.tasks import ledger, run_here, threads_here
from aifactory.engine.load import load_model
from aifactory.records.artifacts import Model, Record
from aifactory.records.storage import StoredFile
from aifactory.workshop.bench import Bench


def test_results_come_in_order_and_so_many_run_at_once_with_so_many_threads_each() -> None:
    before = torch.get_num_threads()
    together = threading.Barrier(2, timeout=20)
    seen: list[int] = []

    def square(number: int) -> int:
        together.wait()
        seen.append(torch.get_num_threads())
        return number * number

    run, spent = threads_here(concurrency=2, threads_each=1), ledger.spent

    assert run(square, [(number,) for number in range(6)]) == [0, 1, 4, 9, 16, 25]
    assert seen == [1] * 6
    assert (ledger.spent - spent).tasks == 6, "what it took is in the books as of tasks elsewhere"
    assert torch.get_num_threads() == before
    assert run(square, []) == run_here(square, [])


def test_an_error_is_the_functions_own_and_the_threads_are_given_back() -> None:
    before = torch.get_num_threads()

    def refuse(number: int) -> None:
        raise ValueError(f"not {number}")

    with pytest.raises(ValueError, match="not 3"):
        threads_here(concurrency=1, threads_each=1)(refuse, [(3,), (4,)])
    assert torch.get_num_threads() == before


def test_models_that_are_loaded_at_once_leave_torchs_initialisers_in_place(tmp_path: Path) -> None:
    folder = write_small_model(tmp_path / "model")
    initialisers = {name: getattr(torch.nn.init, name) for name in ("normal_", "zeros_", "ones_", "uniform_")}

    def load(_: int) -> float:
        model = load_model(folder, device="cpu", dtype=torch.float32)
        return float(sum(weights.detach().double().sum() for weights in model.parameters()))

    sums = threads_here(concurrency=4, threads_each=1)(load, [(number,) for number in range(12)])

    assert len(set(sums)) == 1
    assert {name: getattr(torch.nn.init, name) for name in initialisers} == initialisers
    assert float(torch.nn.Linear(8, 8).weight.abs().sum()) > 0


def test_small_models_are_asked_here_and_larger_ones_where_there_is_room(tmp_path: Path) -> None:
    limit = TINY["runtime"]["inline_bytes"]
    with here(tiny_config(tmp_path)) as factory:
        asked: list[str] = []
        bench = Bench(factory.books, run_tasks=lambda: asked.append("cluster") or run_here)  # type: ignore[func-returns-value]

        def model(size: int) -> Model:
            files = [StoredFile(name="weights", num_bytes=size, sha256="")]
            told = {"kind": "model", "fingerprint": "", "digest": "", "code_version": 1, "recipe": {}, "inputs": []}
            return Model(record=Record(**told, files=files, figures={}), uri="")

        bench.run_with_models(model(limit), None, model(limit))
        assert asked == []
        bench.run_with_models(model(limit + 1), model(1))
        assert asked == ["cluster"]
