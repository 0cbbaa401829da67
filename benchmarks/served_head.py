"""ServedHead: a Ray head with a small factory served on it, whose parts can be killed and brought back.

The head keeps its state in Ray's embedded store (RocksDB), so that one that is started again on the same folder knows what was
served. This process is not connected to it: whatever is killed, it goes on. What the head says of itself, it is told by
`head_watch.py`.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from closed_loop import random_llama
from contenders import Contender
from fault_load import MODEL
from transformers import LlamaConfig

from aifactory.config import Config
from aifactory.engine.golden import GOLDEN_NAME, golden_answers
from aifactory.records.artifacts import Model, Record, digest_of
from aifactory.records.books import Books
from aifactory.records.journal import Bound
from aifactory.text.tokenizer import load_tokenizer
from aifactory.tokens.vocabulary import train_vocabulary

_WORDS = "the quick brown fox jumps over lazy dogs and a bird in hand is worth two bushes"
_CONFIG = f"""\
name: {MODEL}
ingest: {{sources: [{{name: docs, kind: text, path: /data/docs}}]}}
"""
_WATCH = Path(__file__).with_name("head_watch.py")
_START = "import sys; from aifactory.config import Config; from aifactory.records.books import Books; "
_START += "from aifactory.cluster.session import connect; from aifactory.serve.app import start; "
_START += f"connect('{MODEL}'); print(start(Books(Config.model_validate_json(sys.stdin.read()))).url)"
_TAKEN_OVER = re.compile(rb"replica_lost request=(\w+) told_tokens=(\d+)")
_POLL_S = 0.3
PROCESSES = {
    "replica": f"ServeReplica:aifactory-{MODEL}:replica",
    "front": f"ServeReplica:aifactory-{MODEL}:front",
    "proxy": "ProxyActor",
    "controller": "ServeController",
    "gcs": "gcs_server",
}
"""What the command line of each part holds."""


class ServedHead:
    """A head of its own on this machine, on ports of its own."""

    def __init__(self, folder: Path, *, mode: str, replicas: int = 2) -> None:
        self.folder = folder
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        endpoint = {"port": self.port, "mode": mode, "replicas": replicas, "poll_s": 0.5, "slots": 8}
        overrides = [f"runtime.storage={folder / 'storage'}"]
        overrides += [f"runtime.endpoint.{name}={value}" for name, value in endpoint.items()]
        self.books = Books(Config.from_text(_CONFIG, origin="benchmark", overrides=overrides))
        fronts = self.books.config.runtime.endpoint.fronts
        self._wanted = {"replica": replicas} | ({"front": fronts} if mode == "resilient" else {})
        self._count = 0
        self._ray_port = _free_port()
        names = (
            "dashboard-agent-listen-port",
            "dashboard-agent-grpc-port",
            "metrics-export-port",
            "ray-client-server-port",
        )
        self._other_ports = {name: _free_port() for name in names}
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(folder / "gcs"),
            "GOMP_SPINCOUNT": "0",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self._gcs: tuple[list[str], dict[str, str]] | None = None
        self._watch: Contender | None = None

    # ── releases ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def export(self, seed: int) -> Path:
        """The model of a seed, which nobody serves yet."""
        folder = self.folder / "models" / str(seed)
        _export(folder, seed)
        return folder

    def promote(self, folder: Path) -> str:
        """Put a model into production; the name of the release."""
        self._count += 1
        fingerprint = f"{self._count:064x}"[::-1]
        files = self.books.storage.upload(folder, *self.books.artifacts.folder("model", fingerprint))
        record = Record(
            kind="model",
            fingerprint=fingerprint,
            digest=digest_of(files),
            code_version=1,
            recipe={},
            inputs=[],
            files=files,
            figures={},
        )
        model = self.books.artifacts.publish(Model, record).id
        serving = self.books.registry.production()
        bound = Bound(kind="run", sources_digest="0" * 64, champion=None if serving is None else serving.number)
        journal = self.books.journal
        cycle = journal.claim(journal.open_cycle(f"cycle-{self._count}", recipe={}, bound=bound))
        return self.books.registry.promote(cycle, model=model, scorecard="scorecard/0", decision={}).name

    def rollback(self) -> str:
        """Put the release before into production again; its name."""
        return self.books.registry.rollback(reason="benchmark").name

    # ── the head ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Start the head, and the endpoint where the store knows of none."""
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--num-cpus=4"]
        command += ["--node-ip-address=127.0.0.1", f"--port={self._ray_port}", "--disable-usage-stats"]
        command += ["--include-dashboard=false", f"--temp-dir={self.folder / 'ray'}"]
        # Another head of this machine has Ray's own ports.
        command += [f"--{name}={port}" for name, port in self._other_ports.items()]
        subprocess.run(command, check=True, env=self._environment, stdout=subprocess.DEVNULL, timeout=300)

    def serve(self) -> None:
        """Serve the factory; whoever started it goes away again."""
        environment = {**self._environment, "RAY_ADDRESS": f"127.0.0.1:{self._ray_port}"}
        config = self.books.config.model_dump_json()
        command = [sys.executable, "-c", _START]
        subprocess.run(
            command, input=config, text=True, check=True, env=environment, stdout=subprocess.DEVNULL, timeout=600
        )

    def pids(self, part: str) -> list[int]:
        """The processes of a part."""
        found = []
        for process in self._processes():
            try:
                # Ray's workers are called what they are: the whole command line is one word.
                if PROCESSES[part] in " ".join(process.cmdline()):
                    found.append(process.pid)
            except psutil.Error:
                continue
        return sorted(found)

    def kill(self, part: str) -> int:
        """SIGKILL one process of a part; which it was."""
        pid = self.pids(part)[0]
        if part == "gcs":
            process = psutil.Process(pid)
            self._gcs = (process.cmdline(), process.environ())
        os.kill(pid, signal.SIGKILL)
        return pid

    def restart_gcs(self) -> None:
        """What a supervisor would do: run its command again."""
        assert self._gcs is not None
        command, environment = self._gcs
        log = open(self.folder / "gcs.log", "ab")  # noqa: SIM115  (it is the process's from here on)
        subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def kill_all(self) -> None:
        """SIGKILL the whole head, replicas included."""
        self._unwatch()
        for process in self._processes():
            try:
                process.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(self._processes(), timeout=30)

    # ── what it says of itself ────────────────────────────────────────────────────────────────────────────────────────

    def is_whole(self) -> bool:
        """Whether Serve says that all that is wanted runs and is well."""
        found = self._ask()
        return bool(found) and found["well"] and found["running"] == self._wanted

    def held(self) -> list[dict[str, int]] | None:
        """What requests hold, of each replica and front; None if not all of them answer."""
        found = self._ask(held=True)
        if {name: len(of_replicas) for name, of_replicas in found.items()} != self._wanted:
            return None
        return [held for of_replicas in found.values() for held in of_replicas]

    def taken_over(self) -> dict[str, int]:
        """By the requests that another replica took over, so far: how many tokens had been sent of it. By the fronts' logs."""
        told: dict[str, int] = {}
        for file in (self.folder / "ray").glob("session_2*/logs/**/*"):
            if file.is_file() and not file.is_symlink():
                for found in _TAKEN_OVER.finditer(file.read_bytes()):
                    told[found[1].decode()] = int(found[2])
        return told

    def _ask(self, **question: Any) -> dict[str, Any]:
        """{} where nobody answers."""
        try:
            if self._watch is None:
                environment = {**self._environment, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
                command = [sys.executable, _WATCH, MODEL, f"127.0.0.1:{self._ray_port}"]
                self._watch = Contender(command, environment=environment)
                self._watch.ready()
            return dict(self._watch.ask(**question))
        except (RuntimeError, OSError):
            self._unwatch()
            return {}

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def close(self) -> None:
        """End everything."""
        self.kill_all()
        self.books.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _processes(self) -> list[psutil.Process]:
        """All of this head: what names its folder, and what that has started."""
        mine: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and str(self.folder / "ray") in " ".join(process.cmdline()):
                    mine[process.pid] = process
                    mine.update({child.pid: child for child in process.children(recursive=True)})
            except psutil.Error:
                continue
        return list(mine.values())


def until(happened: Callable[[], bool], *, timeout_s: float) -> bool:
    """Whether it happened in time. Looked at seldom: the head is on the same processors."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _export(folder: Path, seed: int) -> None:
    """The model of a seed, of some 6 million parameters, as the trainer exports one."""
    folder.mkdir(parents=True)
    vocabulary = train_vocabulary([_WORDS] * 50, vocab_size=320)
    for name, data in vocabulary.items():
        (folder / name).write_bytes(data)
    tokenizer = load_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=768,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        # Wide, so that logits lie apart and answers of two releases differ.
        initializer_range=0.1,
    )
    model = random_llama(config, torch.float32, "cpu")
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    model.save_pretrained(folder)
    (folder / GOLDEN_NAME).write_bytes(golden_answers(model, tokenizer))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
