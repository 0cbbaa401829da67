"""The vocabulary: every event that the log and the journal know, and what it says. A name means one thing in both.

A test holds the code to it: what is logged or entered under another name fails there.
"""

from __future__ import annotations

EVENTS = {
    # ── a cycle ──
    "cycle_begun": "a cycle was bound to what it reads",
    "turning": "an attempt at a cycle has begun",
    "ingested": "a corpus was made",
    "tokenized": "a token set was made",
    "trained": "a model was made",
    "evaluated": "a scorecard was made",
    "chosen": "the best of several candidates was chosen",
    "promoted": "a release came into production",
    "rejected": "the gate let no release through",
    "cycle_on_trial": "the model of a cycle went on trial",
    "cycle_ended": "a cycle ended",
    "attempt_failed": "an attempt at a cycle ended without a result",
    "failed": "a cycle was given up",
    "submitted": "a cycle was handed to Ray as a job",
    # ── data ──
    "encoded_slowly": "texts are encoded by the slower library",
    "refused": "rows could not be tokenized",
    "restored": "rows of a ledger come back in the next cycle",
    # ── training ──
    "training": "a run, or several candidates, began",
    "execution": "a step is computed otherwise than was asked for",
    "halved": "a micro-batch did not fit into memory",
    "skipped": "a batch was left out",
    "freed": "the place of workers whose cycle was killed was given back",
    "not_validated": "a checkpoint was not measured on held-out rows",
    # ── releases and trials ──
    "on_trial": "a release of a cycle went on trial",
    "tried": "somebody put a release on trial",
    "shadowed": "a release answers in the shadow",
    "trial_loaded": "a replica has loaded the release on trial",
    "trial_decided": "what becomes of a trial was decided",
    "withdrawn": "a trial was withdrawn",
    "quarantined": "a release is neither tried nor served again",
    "rolled_back": "an older release serves again",
    "passed_trial": "a release on trial was put into production",
    "quarantine_lifted": "a release may be tried and served again",
    "retired": "a release has seen what was erased",
    # ── serving ──
    "served": "the endpoint answers",
    "acted": "somebody acted on the factory's page",
    "page_served": "the factory's page answers",
    "loaded": "a replica has loaded a release on trial",
    "swapped": "a replica serves another release",
    "load_failed": "a replica could not load a release",
    "looked": "a replica could not look for a new release",
    "adapter_refused": "an adapter does not fit its release",
    "shadow_failed": "a copy of a request was not answered",
    "metered": "a replica told what it had used",
    "batch_failed": "a batch of requests could not go on",
    "batch_taken_over": "a replica goes on with another one's batch",
    # ── improvement ──
    "sealed": "feedback was sealed into a batch",
    "unscored": "answers could not be scored",
    "decided": "the evaluation actor decided something else than before",
    "drifted": "users ask something else than at first",
    "guard_broken": "answers hold what they may not",
    "judged_bad": "a judge finds too many answers bad",
    "unjudged": "a judge could not be asked",
    "judge_measured": "how far a judge agrees with people",
    "retrain_request_withdrawn": "a request for a retrain was withdrawn",
    "retrain_requested": "somebody asked for a retrain",
    "triggered": "a retrain has begun",
    "tick_failed": "the evaluation actor could not look",
    # ── rehearsals ──
    "rehearsal_begun": "simulated users began to ask",
    "rehearsed": "simulated users have closed the loop",
    "asked": "simulated users have asked so much",
    "waiting": "simulated users wait for the loop",
    # ── proofs ──
    "rebuilding": "an artifact is made again",
    "forget_begun": "an erasure began",
    "forgetting": "an erasure goes on",
    "erased": "an artifact is gone, or a pass of an erasure is done",
    "forgotten": "an erasure is done",
    # ── it stays up ──
    "up": "a supervisor keeps a factory up from now on",
    "down": "a factory has come down",
    "part_lost": "a part of what is kept up has died",
    "part_back": "it is there again",
    "part_restarted": "the supervisor itself starts a part again",
    "part_unwell": "something is wrong with a part",
    "restarting": "what serves or watches is started again",
    "stopped": "what was kept up has ended",
    "collected": "what nothing needs any more was deleted",
    "backed_up": "a snapshot was written",
    "recovered": "a factory was put back from a snapshot",
    # ── the process ──
    "connected": "a cluster was joined",
    "starting": "a cluster is started",
    "stopping": "the command ends",
    "warned": "something should be looked at",
}
"""By name."""
