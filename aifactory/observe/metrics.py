"""The list of metrics: all that the factory measures of itself, room by room. Dashboards and alerts are made from it.

A process that Ray has started shows them on Ray's metrics port, where each has `ray_` before its name and Ray's own labels
beside these; every one has the label `factory`. A metric is added here, reported where it happens, and shown by a panel
(`dashboards.py`); tests hold that each is in a panel, and that Prometheus finds what a panel asks for.
"""

from __future__ import annotations

from aifactory.observe.meter import Meters

meters = Meters()
"""Those of this process."""

PREFIX = "ray_"
"""What Ray puts before each name."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_LONG_SECONDS = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3_600.0, 14_400.0, 43_200.0, 172_800.0)
_STEP_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)

# ── what a cycle makes ────────────────────────────────────────────────────────────────────────────────────────────────
STAGE_SECONDS = meters.histogram(
    "aifactory_stage_duration_seconds", "Wall time of the making of an artifact", "stage", bounds=_LONG_SECONDS
)
STAGE_FAILURES = meters.counter("aifactory_stage_failures_total", "Makings of an artifact that an error ended", "stage")
STAGE_CPU_SECONDS = meters.counter(
    "aifactory_stage_cpu_seconds_total", "CPU time that the making of artifacts took", "stage"
)
INGEST_ROWS = meters.counter(
    "aifactory_ingest_rows_total",
    "Rows that came in, by what became of them: kept, holdout, rejected, erased",
    "outcome",
)
INGEST_REJECTED_ROWS = meters.counter("aifactory_ingest_rejected_rows_total", "Rows that a rule rejected", "rule")
INGEST_BYTES = meters.counter("aifactory_ingest_kept_bytes_total", "Bytes of text of the rows that were kept")
TOKENIZE_TOKENS = meters.counter("aifactory_tokenize_tokens_total", "Tokens that were packed for training")
TOKENIZE_ROWS = meters.counter("aifactory_tokenize_packed_rows_total", "Packed rows that were written")
TRAIN_STEPS = meters.counter("aifactory_train_steps_total", "Optimiser steps that were taken, by rank 0")
TRAIN_TOKENS = meters.counter("aifactory_train_tokens_total", "Tokens of the batches of these steps, of all workers")
TRAIN_LOSS = meters.gauge("aifactory_train_loss_nats", "Loss of the last step, nats a token")
TRAIN_RATE = meters.gauge("aifactory_train_throughput_tokens_per_second", "Tokens a second since the start of the run")
TRAIN_MFU = meters.gauge("aifactory_train_mfu_ratio", "Model FLOPs utilisation since the start of the run")
TRAIN_NORM = meters.gauge("aifactory_train_gradient_norm_number", "Norm of the gradient before it was clipped")
TRAIN_WAIT = meters.counter("aifactory_train_data_wait_seconds_total", "Time in which steps waited for data, of rank 0")
TRAIN_STALL = meters.counter(
    "aifactory_train_checkpoint_stall_seconds_total", "Time in which steps waited for checkpoints, of rank 0"
)
TRAIN_SKIPPED = meters.counter("aifactory_train_skipped_batches_total", "Batches that were left out")
EVALUATE_BITS = meters.gauge(
    "aifactory_evaluate_score_bits_per_byte", "Of the last scorecard, by set of tasks and by model", "set", "model"
)
PROMOTE_DECISIONS = meters.counter("aifactory_promote_decisions_total", "Verdicts of the gate", "decision")

# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────
SERVE_REQUESTS = meters.counter(
    "aifactory_serve_requests_total", "Requests by route, HTTP status and release", "route", "status", "release"
)
SERVE_REFUSED = meters.counter(
    "aifactory_serve_refused_requests_total", "Requests that were refused, by the code of their error", "code"
)
SERVE_REQUEST_SECONDS = meters.histogram(
    "aifactory_serve_request_duration_seconds",
    "From a request's head to the head of its answer; of an answer that is not streamed, to all of it",
    "route",
    bounds=_SECONDS,
)
SERVE_ANSWERS = meters.counter(
    "aifactory_serve_answers_total", "Answers by release and by how they ended", "release", "end"
)
SERVE_PROMPT_TOKENS = meters.counter(
    "aifactory_serve_prompt_tokens_total", "Tokens of prompts that were asked", "release"
)
SERVE_ANSWER_TOKENS = meters.counter("aifactory_serve_answer_tokens_total", "Tokens of answers", "release")
SERVE_FIRST_TOKEN = meters.histogram(
    "aifactory_serve_time_to_first_token_seconds",
    "From a request to the first token of an answer",
    "release",
    bounds=_SECONDS,
)
SERVE_BETWEEN_TOKENS = meters.histogram(
    "aifactory_serve_time_between_tokens_seconds", "Between two tokens of an answer", "release", bounds=_STEP_SECONDS
)
SERVE_QUEUE_SECONDS = meters.histogram(
    "aifactory_serve_queue_wait_seconds", "How long answers waited to be let into the engine", bounds=_SECONDS
)
SERVE_WAITING = meters.gauge("aifactory_serve_waiting_answers_count", "Answers that wait to be let into the engine")
SERVE_RUNNING = meters.gauge("aifactory_serve_running_answers_count", "Answers in the engine")
SERVE_OPEN = meters.gauge(
    "aifactory_serve_open_requests_count", "Requests whose answers have not been sent to their ends"
)
SERVE_SLOTS = meters.gauge("aifactory_serve_slots_count", "Answers that the replica decodes at once")
SERVE_RELEASE = meters.gauge(
    "aifactory_serve_release_number", "The release that takes requests here; 0 before the first"
)
SERVE_CACHE = meters.gauge(
    "aifactory_serve_cache_tokens", "Keys and values in memory: used, reserved, kept for later, and the most", "state"
)
SERVE_REUSED = meters.gauge(
    "aifactory_serve_prefix_reused_tokens", "Prompt tokens that engines here did not have to read, since they started"
)
SERVE_SWAPS = meters.counter("aifactory_serve_swaps_total", "Releases taken up, or that did not load", "outcome")
SERVE_SWAP_SECONDS = meters.histogram(
    "aifactory_serve_swap_duration_seconds",
    "Loading and checking of a release that was swapped to",
    bounds=_LONG_SECONDS,
)
SERVE_LOST = meters.counter(
    "aifactory_serve_replicas_lost_total", "Replicas that were lost with a request, as fronts saw it"
)
FEEDBACK = meters.counter("aifactory_feedback_entries_total", "Entries of feedback: counted, or repeated", "outcome")

ENGINE_STEP_SECONDS = meters.histogram(
    "aifactory_engine_step_duration_seconds",
    "A chunk of prompts, or one token of every row",
    "phase",
    bounds=_STEP_SECONDS,
)
ENGINE_TOKENS = meters.counter("aifactory_engine_tokens_total", "Tokens read (prefill) and made (decode)", "phase")

# ── improvement ───────────────────────────────────────────────────────────────────────────────────────────────────────
IMPROVE_TICKS = meters.counter(
    "aifactory_improve_ticks_total", "Looks of the evaluation actor: done, or failed", "outcome"
)
IMPROVE_DECISIONS = meters.counter(
    "aifactory_improve_decisions_total", "Decisions of the evaluation actor, as often as it looked", "decision"
)
IMPROVE_LIVE = meters.gauge(
    "aifactory_improve_live_bits_per_byte", "What live answers of the release in production need, over what was scored"
)
IMPROVE_STANDARD = meters.gauge("aifactory_improve_standard_bits_per_byte", "The standard for them")
IMPROVE_SCORED = meters.gauge("aifactory_improve_scored_answers_count", "Live answers that were scored for that")
IMPROVE_BATCHES = meters.gauge("aifactory_improve_new_batches_count", "Sealed feedback batches that no cycle has read")
IMPROVE_DRIFT = meters.gauge(
    "aifactory_improve_drift_count", "1 where it is established that users ask something else than at first"
)
IMPROVE_WAITING = meters.gauge(
    "aifactory_improve_waiting_feedback_count", "Feedback that is not sealed into a batch yet"
)
IMPROVE_RUNNING = meters.gauge("aifactory_improve_running_cycles_count", "Cycles that have begun and not ended")

# ── energy and money ──────────────────────────────────────────────────────────────────────────────────────────────────
ENERGY = meters.counter(
    "aifactory_energy_joules_total",
    "Joules of stages and of serving, as the books have them; source: nvml, rapl, estimate; state: busy, idle",
    "stage",
    "source",
    "state",
)
MONEY = meters.counter(
    "aifactory_energy_money_total", "What these cost by runtime.site.price_per_kwh and pue", "stage", "currency"
)
