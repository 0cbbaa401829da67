"""What comes of the raw numbers of `serve.py`: the figures by the keys of its docstring."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

ENGINES = ("float32", "bfloat16", "int8", "plain")
_SAME_TYPE = {"float32": "llamacpp_f32", "bfloat16": "llamacpp_bf16"}


def figures(
    raw: defaultdict[str, list[float]],
    said: Mapping[str, Mapping[str, float]],
    loads: Mapping[int, Iterable[int]],
    answer_tokens: int,
) -> dict[str, float | None]:
    """By the keys that are promised; None where something was not measured. Ratios of single rounds are added to `raw`.

    said   of each engine, how many bytes of weights a step reads, and of the cache for each token
    loads  by tokens of a prompt how many requests went at once
    """
    found: dict[str, float | None] = {}

    def ratio(key: str, ours: str, theirs: str, load: str) -> float | None:
        pairs = zip(raw[f"{key}_{ours}_{load}"], raw[f"{key}_{theirs}_{load}"], strict=False)
        ratios = [a / b for a, b in pairs]
        if not ratios:
            return None
        raw[f"over_{theirs}_{key}_{load}"] = ratios
        return statistics.median(ratios)

    def worst(choose: Callable[[Sequence[float]], float], values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return choose(known) if known else None

    for c in next(iter(loads.values())):
        at_c = [f"{length}_c{c}" for length in loads]
        for kind in ("", "_bfloat16"):
            ours, theirs = f"endpoint{kind}", f"vllm_cpu{kind}"
            found[f"over_{theirs}_c{c}"] = worst(min, [ratio("tokens_per_s", ours, theirs, at) for at in at_c])
            found[f"ttft_over_{theirs}_c{c}"] = worst(max, [ratio("ttft_ms_p50", ours, theirs, at) for at in at_c])
        over = [ratio("tokens_per_s", *pair, at) for pair in _SAME_TYPE.items() for at in at_c]
        found[f"over_llamacpp_c{c}"] = worst(min, over)
    found["bandwidth_share_c1"] = _bandwidth_share(raw, said, min(loads), answer_tokens)
    length = min(loads)
    for name in ("endpoint", "endpoint_serve"):
        ours, alone = (raw[f"tokens_per_s_{who}_{length}_c8"] for who in (name, "float32"))
        if ours and alone:
            # One has two turns a round and the other one: each turn is beside that of its round.
            turns = len(ours) // len(alone)
            beside = [speed for speed in alone for _ in range(turns)]
            pairs = zip(ours, beside, strict=False)
            raw[f"http_ms_per_token_{name}_c8"] = [1e3 / http - 1e3 / speed for http, speed in pairs]
    pairs = zip(raw["tokens_per_s_endpoint_small_c8"], raw["tokens_per_s_float32_small_c8"], strict=False)
    raw["http_ms_per_token_c8"] = [1e3 / ours - 1e3 / alone for ours, alone in pairs]
    raw["noop_rps_c32"] = raw["noop_rps_endpoint_c32"]
    for key in ("http_ms_per_token_c8", "noop_rps_c32", "swap_failed", "swap_p99_ratio", "swap_beyond_load_s"):
        # A failure counts in whatever round it was.
        choose = sum if key == "swap_failed" else statistics.median
        found[key] = choose(raw[key]) if raw[key] else None
    return {key: None if value is None else round(value, 3) for key, value in found.items()}


def _bandwidth_share(
    raw: defaultdict[str, list[float]], said: Mapping[str, Mapping[str, float]], length: int, answer_tokens: int
) -> float | None:
    speeds = {}
    for kind in ENGINES:
        moments = raw[f"between_ms_p50_{kind}_{length}_c1"]
        if not moments:
            continue
        # Weights, and keys and values of half an answer on the average.
        size = said[kind]
        step_bytes = size["weights"] + size["a_token"] * (length + answer_tokens / 2)
        raw[f"step_mb_{kind}_c1"] = [step_bytes / 1e6]
        raw[f"step_gb_s_{kind}_c1"] = [step_bytes / 1e6 / moment for moment in moments]
        shares = [
            speed / limit
            for speed, limit in zip(raw[f"step_gb_s_{kind}_c1"], raw[f"bandwidth_gb_s_{kind}"], strict=True)
        ]
        raw[f"bandwidth_share_{kind}_c1"] = shares
        speeds[statistics.median(raw[f"tokens_per_s_{kind}_{length}_c1"])] = statistics.median(shares)
    return speeds[max(speeds)] if speeds else None


def gaps_of(requests: Iterable[Sequence[tuple[str, int, float]]]) -> list[tuple[float, float]]:
    """From each token to the next of its answer, and when that was."""
    gaps = []
    for told in requests:
        last = None
        for _, count, at in told:
            if last is not None:
                gaps.append((at - last, at))
            gaps += [(0.0, at)] * (count - 1)
            last = at
    return gaps
