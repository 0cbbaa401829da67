"""The tables of the state database: cycles, journal, audit, artifacts, releases and their trials, completions, feedback,
scores, files, batch jobs, erasures, API keys and what they may use.

Every row carries the factory's name: two factories share a database without meeting. Times are seconds since 1970, UTC.
Documents (recipes, decisions, requests) are JSON text, so that SQLite and PostgreSQL keep the very same bytes.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData()

# SQLite counts rows up only in a column that is its INTEGER primary key.
_sequence = BigInteger().with_variant(Integer, "sqlite")

cycles = Table(
    "cycles",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("trigger", String(64), nullable=False, doc="What asked for the cycle; its identity."),
    Column("number", Integer, nullable=False),
    Column("attempt", Integer, nullable=False, doc="Raised by whoever takes the cycle up; older attempts are fenced."),
    Column("state", String(16), nullable=False, doc="running, trial, promoted, rejected, failed"),
    Column("recipe", Text, nullable=False),
    Column("bound", Text, nullable=False, doc="What the cycle reads: fixed when it begins."),
    Column("decision", Text),
    Column("opened_at", Float, nullable=False),
    Column("closed_at", Float),
    PrimaryKeyConstraint("factory", "trigger"),
    UniqueConstraint("factory", "number", name="cycles_number"),
)

journal = Table(
    "journal",
    metadata,
    Column("seq", _sequence, primary_key=True, autoincrement=True),
    Column("factory", String(64), nullable=False),
    Column("at", Float, nullable=False),
    Column("event", String(32), nullable=False, doc="A verb of the loop in its past tense."),
    Column("trigger", String(64), doc="The cycle, where there is one."),
    Column("attempt", Integer),
    Column("subject", String(128), doc="The artifact, release or batch that it is about."),
    Column("detail", Text, nullable=False),
    Column("seconds", Float),
    Column("joules", Float),
    Column("joules_source", String(16), doc="rapl, nvml, estimate"),
    Column("key_id", String(64), nullable=False),
    Index("journal_by_factory", "factory", "event"),
)

audit = Table(
    "audit",
    metadata,
    Column("seq", _sequence, primary_key=True, autoincrement=True),
    Column("factory", String(64), nullable=False),
    Column("at", Float, nullable=False),
    Column("key_id", String(64), nullable=False, doc="The key that asked; `anonymous` where there are none."),
    Column("action", String(32), nullable=False),
    Column("subject", String(128), nullable=False),
    Column("detail", Text, nullable=False),
    Column("number", Integer, nullable=False, server_default="0", doc="Place in the factory's chain, from 1."),
    Column("previous", String(64), nullable=False, server_default="", doc="Hash of the line before it."),
    Column("hash", String(64), nullable=False, server_default="", doc="Of that and all the rest of the line."),
    Index("audit_number", "factory", "number", unique=True),
)

artifacts = Table(
    "artifacts",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("id", String(128), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("uri", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    PrimaryKeyConstraint("factory", "id"),
)

lineage = Table(
    "lineage",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("child", String(128), nullable=False),
    Column("parent", String(128), nullable=False),
    PrimaryKeyConstraint("factory", "child", "parent"),
    ForeignKeyConstraint(["factory", "child"], ["artifacts.factory", "artifacts.id"]),
)

releases = Table(
    "releases",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("number", Integer, nullable=False),
    Column("model", String(128), nullable=False),
    Column("scorecard", String(128), nullable=False),
    Column("trigger", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("withdrawn", String(64), doc="The erasure by which it may not be served any more; empty where it may."),
    PrimaryKeyConstraint("factory", "number"),
    UniqueConstraint("factory", "trigger", name="releases_one_per_cycle"),
)

promotions = Table(
    "promotions",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("channel", String(32), nullable=False),
    Column("number", Integer, nullable=False, doc="Monotonic; the highest is what holds. A rollback is a new entry."),
    Column("release", Integer, nullable=False),
    Column("previous", Integer),
    Column("action", String(16), nullable=False, doc="promote, rollback"),
    Column("reason", Text, nullable=False),
    Column("at", Float, nullable=False),
    Column("key_id", String(64), nullable=False),
    PrimaryKeyConstraint("factory", "channel", "number"),
    ForeignKeyConstraint(["factory", "release"], ["releases.factory", "releases.number"]),
)

trials = Table(
    "trials",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("number", Integer, nullable=False, doc="Monotonic; the highest that begins or ends a trial is what holds."),
    Column("release", Integer, nullable=False),
    Column("action", String(16), nullable=False, doc="shadow, canary; withdraw, promote; quarantine, lift"),
    Column("share", Float, nullable=False, doc="Of keys or requests; 0 where no trial is on."),
    Column("by", String(16), nullable=False, doc="key, request"),
    Column("begun", Integer, nullable=False, doc="Number of the entry with which the trial began."),
    Column("quarantined", Integer, nullable=False, doc="1: the release is, from here on."),
    Column("reason", Text, nullable=False),
    Column("at", Float, nullable=False),
    Column("key_id", String(64), nullable=False),
    PrimaryKeyConstraint("factory", "number"),
    ForeignKeyConstraint(["factory", "release"], ["releases.factory", "releases.number"]),
)

completions = Table(
    "completions",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("id", String(64), nullable=False),
    Column("at", Float, nullable=False),
    Column("release", Integer, nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("user", String(256)),
    Column("prompt", Text, nullable=False, doc="As the model saw it: a chat is rendered."),
    Column(
        "messages", Text, nullable=False, server_default="", doc="The turns of a chat, JSON; empty where it was none."
    ),
    Column("answer", Text, nullable=False),
    Column("request", Text, nullable=False, doc="Sampling and the rest of the request, JSON."),
    Column("finish_reason", String(16), nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("answer_tokens", Integer, nullable=False),
    PrimaryKeyConstraint("factory", "id"),
    Index("completions_in_order", "factory", "release", "at", "id"),
)

# Never among the completions, which people see and say something of. Whoever erases one erases its shadows with it.
shadow_answers = Table(
    "shadow_answers",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("completion", String(64), nullable=False, doc="The answer that was given to the same request."),
    Column("release", Integer, nullable=False),
    Column("at", Float, nullable=False),
    Column("answer", Text, nullable=False),
    Column("finish_reason", String(16), nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("answer_tokens", Integer, nullable=False),
    PrimaryKeyConstraint("factory", "completion", "release"),
    ForeignKeyConstraint(
        ["factory", "completion"], ["completions.factory", "completions.id"], ondelete="CASCADE", onupdate="CASCADE"
    ),
)

outcomes = Table(
    "outcomes",
    metadata,
    Column("seq", _sequence, primary_key=True, autoincrement=True),
    Column("factory", String(64), nullable=False),
    Column("trial", Integer, nullable=False, doc="The entry of the trial that held."),
    Column("release", Integer, nullable=False, doc="Who was asked: the one on trial, or the one in production."),
    Column("failed", Integer, nullable=False, doc="1: there was no answer, by no fault of the client's."),
    Column("first_s", Float, doc="From its turn to the first token, seconds."),
    Column("seconds", Float, nullable=False, doc="To the last one."),
    Column("tokens", Integer, nullable=False),
    Column("at", Float, nullable=False),
    Index("outcomes_by_trial", "factory", "trial", "seq"),
)

batches = Table(
    "batches",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("number", Integer, nullable=False),
    Column("rows", Integer, nullable=False),
    Column("sealed_at", Float, nullable=False),
    PrimaryKeyConstraint("factory", "number"),
)

# Scores without a correction, the most of all feedback, never enter a batch.
_corrected = text("correction IS NOT NULL")

feedback = Table(
    "feedback",
    metadata,
    Column("seq", _sequence, primary_key=True, autoincrement=True),
    Column("factory", String(64), nullable=False),
    Column("idempotency_key", String(128), nullable=False),
    Column("completion", String(64), nullable=False),
    Column("at", Float, nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("user", String(256)),
    Column("score", Float, doc="0 is worst, 1 is best."),
    Column("correction", Text, doc="The answer as it should have been."),
    Column("comment", Text),
    Column("batch", Integer, doc="The sealed batch that holds it; none yet where empty; 0: an adapter's."),
    UniqueConstraint("factory", "idempotency_key", name="feedback_once"),
    ForeignKeyConstraint(["factory", "completion"], ["completions.factory", "completions.id"]),
    Index("feedback_by_batch", "factory", "batch", "seq", postgresql_where=_corrected, sqlite_where=_corrected),
)

choices = Table(
    "choices",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("feedback", _sequence, nullable=False, doc="The feedback whose answer was preferred."),
    Column("rejected", String(64), nullable=False, doc="Another answer to the same prompt, which was not."),
    PrimaryKeyConstraint("factory", "feedback", "rejected"),
    ForeignKeyConstraint(["factory", "rejected"], ["completions.factory", "completions.id"]),
)

scores = Table(
    "scores",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("feedback", _sequence, nullable=False, doc="The feedback that says what the answer should have been."),
    Column("metric", String(32), nullable=False),
    Column("release", Integer, nullable=False),
    Column("value", Float, nullable=False),
    Column("weight", Float, nullable=False, doc="Bytes of the reference; what the value is averaged by."),
    Column("at", Float, nullable=False),
    PrimaryKeyConstraint("factory", "feedback", "metric", "release"),
)

# What a judge says of answers that were given.
verdicts = Table(
    "verdicts",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("completion", String(64), nullable=False),
    Column("release", Integer, nullable=False),
    Column("judge", String(64), nullable=False, doc="What it is: a hash of its version and its rubric."),
    Column("bad", Integer, doc="1: bad, 0: good, none: it says neither."),
    Column("at", Float, nullable=False),
    PrimaryKeyConstraint("factory", "completion"),
    ForeignKeyConstraint(
        ["factory", "completion"], ["completions.factory", "completions.id"], ondelete="CASCADE", onupdate="CASCADE"
    ),
    Index("verdicts_by_release", "factory", "release"),
    Index("verdicts_by_time", "factory", "at"),
)

files = Table(
    "files",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("id", String(64), nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("key_id", String(64), nullable=False, server_default="anonymous", doc="Whose it is."),
    Column("team", String(64), doc="Whose it is beside; nobody else's where empty."),
    PrimaryKeyConstraint("factory", "id"),
)

batch_jobs = Table(
    "batch_jobs",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("id", String(64), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("input_file", String(64), nullable=False),
    Column("state", String(16), nullable=False, doc="validating, in_progress, cancelling; completed, failed, ..."),
    Column("note", Text, nullable=False, doc="What the client wanted to remember, JSON."),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("started_at", Float),
    Column("cancelling_at", Float),
    Column("ended_at", Float),
    Column("total", Integer, nullable=False, doc="Lines of the input file, once it was read."),
    Column("num_answered", Integer, nullable=False, doc="Lines with an answer, once the job has ended."),
    Column("num_failed", Integer, nullable=False, doc="Lines without one."),
    Column("output_file", String(64)),
    Column("error_file", String(64)),
    Column("problems", Text, nullable=False, doc="What is wrong with the input file, JSON."),
    Column("holder", String(64), doc="Who answers it now; nobody where empty."),
    Column("held_until", Float, doc="When somebody else may take it up."),
    Column("key_id", String(64), nullable=False, server_default="anonymous", doc="Who asked for it, and pays for it."),
    Column("team", String(64), doc="Whose it is beside; nobody else's where empty."),
    PrimaryKeyConstraint("factory", "id"),
)

batch_lines = Table(
    "batch_lines",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("job", String(64), nullable=False),
    Column("line", Integer, nullable=False),
    Column("status", Integer, nullable=False),
    Column("result", Text, nullable=False, doc="The line of the output file."),
    PrimaryKeyConstraint("factory", "job", "line"),
    ForeignKeyConstraint(["factory", "job"], ["batch_jobs.factory", "batch_jobs.id"]),
)

erasures = Table(
    "erasures",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("id", String(64), nullable=False),
    Column("where_hash", String(64), nullable=False, doc="Keyed hash of what was asked for: no name is kept."),
    Column("state", String(16), nullable=False, doc="erasing, retraining, ended"),
    Column("found", Text, nullable=False, doc="What was erased so far, JSON."),
    Column("begun_at", Float, nullable=False),
    Column("ended_at", Float),
    PrimaryKeyConstraint("factory", "id"),
)

tombstones = Table(
    "tombstones",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("hash", String(64), nullable=False, doc="Keyed hash of the id of what was erased, or of a row's key."),
    Column("kind", String(16), nullable=False, doc="row, key, completion"),
    Column("source", Text, nullable=False, doc="Of a row: its source. It may not come back from there."),
    Column("erasure", String(64), nullable=False),
    PrimaryKeyConstraint("factory", "hash"),
    Index("tombstones_by_erasure", "factory", "erasure"),
)

erasure_keys = Table(
    "erasure_keys",
    metadata,
    Column("factory", String(64), nullable=False),
    Column(
        "secret", String(64), nullable=False, doc="Of the keyed hashes, 256 bits as hex digits. It is nowhere else."
    ),
    Column("made_at", Float, nullable=False),
    PrimaryKeyConstraint("factory"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("id", String(64), nullable=False, doc="Stands in completions, feedback, journal and audit; no secret."),
    Column("name", String(64), nullable=False),
    Column("team", String(64)),
    Column("scopes", Text, nullable=False, doc="infer, feedback, operate, with commas."),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
    PrimaryKeyConstraint("factory", "id"),
)

# A secret has 256 random bits: nobody finds it by trying, however fast its hash is made.
api_key_secrets = Table(
    "api_key_secrets",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("number", Integer, nullable=False, doc="From 1; the highest is the newest."),
    Column("salt", String(64), nullable=False, doc="32 hex digits."),
    Column("hash", String(64), nullable=False, doc="SHA-256 of the salt's digits and the secret's, hex digits."),
    Column("created_at", Float, nullable=False),
    Column("ends_at", Float, doc="Of one that another has taken the place of: when it is good for nothing more."),
    PrimaryKeyConstraint("factory", "key_id", "number"),
    ForeignKeyConstraint(["factory", "key_id"], ["api_keys.factory", "api_keys.id"]),
)

limits = Table(
    "limits",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("kind", String(8), nullable=False, doc="key, team"),
    Column("name", String(64), nullable=False, doc="Id of the key, or name of the team."),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("concurrent", Integer),
    Column("budget_tokens", BigInteger),
    Column("budget_money", Float),
    Column("budget_joules", Float),
    Column("budget_window", String(8), nullable=False, doc="day, month, total"),
    PrimaryKeyConstraint("factory", "kind", "name"),
)

request_rates = Table(
    "request_rates",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("kind", String(8), nullable=False),
    Column("name", String(64), nullable=False),
    Column("slot", BigInteger, nullable=False, doc="The second, since 1970, in which these were let in."),
    Column("requests", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False, doc="Used, or reserved by those that are open."),
    PrimaryKeyConstraint("factory", "kind", "name", "slot"),
)

open_requests = Table(
    "open_requests",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("id", String(64), nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("team", String(64)),
    Column("holder", String(64), nullable=False, doc="The replica that answers it."),
    Column(
        "until", Float, nullable=False, doc="When it counts no more, unless the replica says that it still answers."
    ),
    Column("slot", BigInteger, nullable=False),
    Column("rated", Integer, nullable=False, doc="1: it counts in rates, too; 0: work in the background."),
    Column("tokens", BigInteger, nullable=False, doc="Reserved: the prompt's, and the most that the answer may have."),
    Column("money", Float, nullable=False, doc="What those would cost."),
    PrimaryKeyConstraint("factory", "id"),
    Index("open_requests_by_key", "factory", "key_id"),
    Index("open_requests_by_team", "factory", "team"),
)

spending = Table(
    "spending",
    metadata,
    Column("factory", String(64), nullable=False),
    Column("kind", String(8), nullable=False),
    Column("name", String(64), nullable=False),
    Column("day", String(10), nullable=False, doc="2026-11-26, UTC"),
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("answer_tokens", BigInteger, nullable=False),
    Column("money", Float, nullable=False),
    Column("joules", Float, nullable=False),
    PrimaryKeyConstraint("factory", "kind", "name", "day"),
)
