"""The project's engine in a process of its own, for `serve.py`: `engine_process.py FOLDER OPTIONS`.

OPTIONS is JSON: kind (plain: the model's own forward by torch; or what the kernels keep weights as), slots, threads. Asked with
prompts it answers what its closed loop saw; asked for the bandwidth that reading so many bytes reaches, GB/s.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from closed_loop import bandwidth_gb_s, closed_loop
from contenders import serve_lines

from aifactory.engine.engine import TorchEngine


def main(folder: Path, *, kind: Any, slots: int, threads: int) -> None:
    torch.set_num_threads(threads)
    engine = TorchEngine.from_folder(
        folder,
        num_slots=slots,
        num_threads=threads,
        # Every prompt is another: nothing would be found, and nothing is kept.
        prefix_tokens=0,
        compiled=kind != "plain",
        weights=None if kind == "plain" else kind,
    )

    def answer(*, bandwidth: int | None = None, prompts: Any = (), **options: int) -> Any:
        if bandwidth is not None:
            return bandwidth_gb_s(bandwidth, "cpu", rounds=8)
        return closed_loop(engine, prompts, **options).as_json()

    serve_lines(answer, ready={"weights": engine.weight_bytes, "a_token": engine.cache_use.bytes_per_token})
    engine.close(0.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
