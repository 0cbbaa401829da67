"""llama.cpp in a process of its own, for `serve.py`: `llamacpp_engine.py FOLDER SCRATCH OPTIONS`. Run by .peers/llamacpp's Python.

FOLDER is a Llama in Hugging Face's form, which is written to SCRATCH as GGUF of the `kind` that OPTIONS say (JSON: kind, one of
f32, bf16, q8_0; slots, threads, context). Asked with prompts it answers what its closed loop saw, in the form of moments.py.

The loop is that of llama.cpp's own server over the same batch interface: a step takes the next token of every answer under
way, and as much of the waiting prompts as fits into n_batch. The cache is f16 and everything else too as its server has it.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from safetensors.numpy import load_file

_KINDS = {
    "f32": gguf.GGMLQuantizationType.F32,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_N_BATCH = 2048


def write_gguf(folder: Path, file: Path, kind: str) -> None:
    """A Llama with tied embeddings as GGUF, without its tokenizer. Norms stay float32."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads, heads_kv = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads_kv)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _interleaved(tensor, heads if "q_proj" in name else heads_kv)
        kept = _KINDS[kind] if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(_gguf_name(name), gguf.quants.quantize(tensor, kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        return f"blk.{layer}.{_NAMES[rest.removesuffix('.weight')]}.weight"
    return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]


def _interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a projection in the order in which this architecture rotates: pairs are neighbours, not halves."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


class Engine:
    """A model with a context of so many sequences."""

    def __init__(self, file: Path, *, slots: int, threads: int, context: int) -> None:
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch = slots * context, slots, _N_BATCH
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self.model, params)
        if not self._context:
            raise RuntimeError(f"expected llama.cpp to load {file}; its log says why not")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._num_tokens = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self._batch = llama_cpp.llama_batch_init(_N_BATCH, 0, 1)

    def closed_loop(self, prompts: list[list[int]], *, concurrency: int, answer_tokens: int) -> dict[str, Any]:
        """Answer all prompts, so many at once; greedy."""
        first, between, answers = [], [], {}
        waiting, free = deque(enumerate(prompts)), list(range(concurrency))
        # By sequence: number, prompt, tokens read, moment of the last token.
        open_: dict[int, list[Any]] = {}
        started = time.perf_counter()
        while waiting or open_:
            while waiting and free:
                number, prompt = waiting.popleft()
                open_[free.pop()] = [number, prompt, 0, time.perf_counter()]
                answers[number] = []
            count, last_of = 0, {}
            for sequence, (number, prompt, read, _) in open_.items():
                if read >= len(prompt):
                    count = self._put(count, answers[number][-1:], read, sequence)
                    last_of[sequence] = count - 1
            for sequence, state in open_.items():
                _, prompt, read, _ = state
                if read < len(prompt) and count < _N_BATCH:
                    piece = prompt[read : read + _N_BATCH - count]
                    count, state[2] = self._put(count, piece, read, sequence), read + len(piece)
                    if state[2] == len(prompt):
                        last_of[sequence] = count - 1
            for place in last_of.values():
                self._batch.logits[place] = 1
            self._batch.n_tokens = count
            if llama_cpp.llama_decode(self._context, self._batch) != 0:
                raise RuntimeError("llama_decode failed")
            for sequence, place in last_of.items():
                number, prompt, read, last = state = open_[sequence]
                logits = llama_cpp.llama_get_logits_ith(self._context, place)
                token = int(np.ctypeslib.as_array(logits, (self._num_tokens,)).argmax())
                now = time.perf_counter()
                answer = answers[number]
                (between if answer else first).append(now - last)
                answer.append(token)
                state[3] = now
                if len(answer) > 1:
                    state[2] = read + 1
                if len(answer) == answer_tokens:
                    llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)
                    del open_[sequence]
                    free.append(sequence)
        seconds = time.perf_counter() - started
        num_tokens = sum(map(len, answers.values()))
        return {"first": first, "between": between, "answers": answers, "num_tokens": num_tokens, "seconds": seconds}

    def _put(self, count: int, tokens: list[int], position: int, sequence: int) -> int:
        batch = self._batch
        for offset, token in enumerate(tokens):
            place = count + offset
            batch.token[place], batch.pos[place], batch.logits[place] = token, position + offset, 0
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
        return count + len(tokens)


_quiet = llama_cpp.llama_log_callback(lambda level, text, data: None if level < 4 else sys.stderr.write(text.decode()))


def main(folder: Path, scratch: Path, options: dict[str, Any]) -> None:
    llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    kind = options.pop("kind")
    file = scratch / f"{kind}.gguf"
    write_gguf(folder, file, kind)
    engine = Engine(file, **options)
    print(json.dumps({"answer": {"weights": llama_cpp.llama_model_size(engine.model)}}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps({"answer": engine.closed_loop(asked.pop("prompts"), **asked)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
