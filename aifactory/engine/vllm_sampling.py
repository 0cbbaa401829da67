"""VllmSampling: what a request asks for, in vLLM's words, and what vLLM found, in ours.

    Sampling ─require_possible─▶ refused by name, where vLLM would mean something else
             ─sampling_params──▶ vllm.SamplingParams       vLLM's log-probabilities ─score──▶ TokenScore

vLLM chooses tokens and scores them; text, stop strings and ends are `Answer`'s, from the same tokenizer as everywhere. Where vLLM
would compute something else than `Sampling` says, the request is refused:

pooling                             an engine that answers gives no embeddings
begun                               a generator of random numbers is made anew there for each request: it does not go on where
                                    another one's was; nor do penalties count what was drawn before as drawn
0 < temperature < 0.01, or above 2  raised to 0.01 there, and refused
min_p with top_p                    min_p is applied first there, and top_p to what it leaves
repetition_penalty with logit_bias  the bias is added first there, and the penalty applied to the sum
grammar with logprobs               the scores there are those of what the grammar leaves

Source   vllm 0.32, `SamplingParams` and `v1/sample/sampler.py`. vLLM is imported where it is needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from aifactory.engine.protocol import GenerationRequest, Sampling, TokenScore
from aifactory.errors import BadRequestError

if TYPE_CHECKING:
    from vllm import SamplingParams

LEAST_TEMPERATURE = 0.01
"""vLLM raises a lower one to it."""
MOST_TEMPERATURE = 2.0
"""vLLM takes no higher one."""


def require_possible(request: GenerationRequest) -> None:
    """Raises BadRequestError naming the field, if vLLM would do something else than what is asked."""
    asked = request.sampling
    if request.pooling is not None:
        raise _refused("pooling", "a request for an answer", f"pooling {request.pooling!r}")
    if any(request.begun):
        raise _refused("begun", "answers that have not begun", f"{sum(map(len, request.begun))} tokens")
    if asked.temperature and not LEAST_TEMPERATURE <= asked.temperature <= MOST_TEMPERATURE:
        expected = f"a temperature of 0 or from {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}"
        raise _refused("temperature", expected, f"{asked.temperature:g}")
    if asked.min_p > 0.0 and asked.top_p < 1.0:
        raise _refused("min_p", "min_p or top_p", "both")
    if asked.repetition_penalty != 1.0 and asked.logit_bias:
        raise _refused("logit_bias", "repetition_penalty or logit_bias", "both")
    if asked.grammar is not None and asked.logprobs is not None:
        raise _refused("logprobs", "no logprobs beside a grammar", str(asked.logprobs))


def sampling_params(asked: Sampling, index: int, end_ids: Collection[int]) -> SamplingParams:
    """What vLLM is asked for, for one of the answers."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    grammar = None
    if asked.grammar is not None:
        text = asked.grammar.text
        grammar = StructuredOutputsParams(
            **({"regex": text} if asked.grammar.kind == "regex" else {"json": json.loads(text)})
        )
    return SamplingParams(
        # Where the prompt alone is wanted, one token is drawn all the same, and dropped.
        max_tokens=max(asked.max_tokens, 1),
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        repetition_penalty=asked.repetition_penalty,
        frequency_penalty=asked.frequency_penalty,
        presence_penalty=asked.presence_penalty,
        logit_bias={token_id: float(bias) for token_id, bias in asked.logit_bias.items()} or None,
        seed=_seed(asked.seed, index),
        logprobs=asked.logprobs,
        prompt_logprobs=asked.logprobs if asked.echo else None,
        structured_outputs=grammar,
        # All ends are named here; vLLM is told nothing of text.
        ignore_eos=True,
        stop_token_ids=sorted({*end_ids, *asked.stop_token_ids}),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def score(token_id: int, found: Mapping[int, Any], num_top: int) -> TokenScore:
    """The score of a token from vLLM's log-probabilities of its place, which hold it and the likeliest."""
    top = sorted((each.rank, other, each.logprob) for other, each in found.items())
    return TokenScore(
        token_id=token_id,
        logprob=found[token_id].logprob,
        top=tuple((other, logprob) for rank, other, logprob in top if rank <= num_top),
    )


def _seed(seed: int | None, index: int) -> int | None:
    """A seed of its own for each answer, within what vLLM takes: it adds to seeds, and reads -1 as none."""
    if seed is None or index == 0:
        return None if seed is None else seed % 2**63
    digest = hashlib.sha256(f"{seed % 2**64}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 2**63


def _refused(field: str, expected: str, found: str) -> BadRequestError:
    return BadRequestError(
        f"Expected {expected} in {field}, found {found}: the engine vllm would compute something else. Leave it out, or "
        "serve with the engine torch.",
        field=field,
    )
