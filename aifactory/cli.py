"""The command: one verb for each method of `Factory`; `up` and `down`, which stand above it; and some that need none, such as `page`.

Results go to standard output, logs to standard error. Exit status: 0 done, 1 the work failed or what was looked
through does not hold, 2 the configuration or the arguments are wrong. Nothing heavy is imported before the arguments are read.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

from aifactory.completion import SHELLS
from aifactory.errors import AIFactoryError, ConfigError

if TYPE_CHECKING:
    from aifactory.config import Config
    from aifactory.factory import Factory

VERBS = {
    "run": "one cycle from the sources to a release; with `traffic`, on until simulated users have closed the loop",
    "ingest": "sources to a corpus of clean rows and a ledger of the rejected",
    "tokenize": "corpus to packed tokens and their tokenizer",
    "train": "tokens to a model",
    "evaluate": "model to a scorecard, beside the release in production",
    "promote": "scorecard to a release, if the gate lets it pass",
    "shadow": "have a release answer a share of the requests a second time, which nobody sees",
    "canary": "have a release answer a share of the keys or of the requests in production's place",
    "withdraw": "end the trial of a shadow or a canary",
    "rollback": "serve an older release again",
    "serve": "serve the release in production over HTTP until interrupted",
    "improve": "serve, watch the answers and retrain by itself until interrupted",
    "retrain": "ask the evaluation actor for a retrain of the release in production",
    "judge": "measure how far a judge agrees with people, before it is used",
    "status": "cycles, releases, feedback, joules",
    "rejected": "what the ledger of the rejected holds: counts by rule, and some rows",
    "restore": "bring rows back in the next cycle that a rule has rejected; or, from a backup, a factory that was lost",
    "trace": "the training rows that share the longest spans with a text or an answer, and those that resemble it by their words",
    "lineage": "what an answer, a release or an artifact was made from",
    "verify": "rebuild a release from its record in a clean place and compare digests",
    "explain": "a cycle: what came in, was rejected, trained, found, decided and spent; also as a page",
    "diff": "two releases side by side: data, recipe, scores, answers",
    "audit": "who or what did what, in a chain of lines in which a changed one is found",
    "energy": "joules by stage, cycle, release and key, with idle ones on a line of their own; money, carbon, water",
    "forget": "erase rows from everything that holds them, retrain without them, and write a proof",
}
KEEPING = {
    "gc": "delete what no release, cycle or proof needs",
    "backup": "copy the database and the artifacts, consistent with one another, to another place",
}
"""Verbs that keep house; methods of the factory."""
STAYING = {
    "up": "start head, endpoint, evaluation actor and page, and start again what dies, until interrupted",
    "down": "end what `up` or a job has left behind: endpoint, actors, the head of our own",
}
"""Verbs above the factory, for what must outlive any one process."""


_PAGE = "serve the factory's page: the loop, cycles, runs, releases, traffic, drift, energy, alerts"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = command_parser()
    arguments = parser.parse_args(argv)
    if arguments.verb == "config":
        from aifactory.config import schema_json

        print(schema_json(), end="")
        return 0
    if arguments.verb == "completion":
        from aifactory.completion import script

        print(script(parser, arguments.shell), end="")
        return 0
    if arguments.verb == "plan":
        return _plan(arguments)
    if arguments.verb == "kubernetes":
        return _kubernetes(arguments)
    if arguments.verb == "metrics":
        return _metrics(arguments)
    if arguments.verb == "doctor":
        return _doctor(arguments)
    from aifactory.observe.events import log_to_stderr

    # Supervisors ask with SIGTERM; what was started here ends as on Ctrl-C.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        log_to_stderr()
        config = _config(arguments)
    except ConfigError as error:
        return _fail(error, 2)
    # Ray prints warnings of its own to standard output, where only the result belongs.
    results = sys.stdout
    try:
        if arguments.verb in STAYING:
            from aifactory.supervisor.command import run as run_staying

            _print(
                run_staying(config, arguments, partial(_print, results=results, as_json=arguments.json)),
                results,
                as_json=arguments.json,
            )
            return 0
        if arguments.verb == "page" or (arguments.verb == "status" and not arguments.json):
            _look(config, arguments, results)
            return 0
        from aifactory.factory import Factory

        with redirect_stdout(sys.stderr), Factory(config) as factory:
            result = _run_verb(factory, arguments, results)
        _print(result, results, as_json=arguments.json)
        return int(getattr(result, "holds", True) is False)
    except ConfigError as error:
        return _fail(error, 2)
    except AIFactoryError as error:
        return _fail(error, 1)
    except BrokenPipeError:
        # Whoever read the result has read enough. Python would complain once more as it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("aifactory: interrupted; the same command goes on from here.", file=sys.stderr)
        return 130


def _look(config: Config, arguments: argparse.Namespace, results: TextIO) -> None:
    """The factory on a page or on a screen, from the books alone: nothing of Ray is loaded."""
    if arguments.verb == "page":
        from aifactory.page.command import serve

        serve(config, lambda address: _print(address, results, as_json=arguments.json))
        return
    from aifactory.page.screen import show
    from aifactory.records.books import Books

    books = Books(config)
    try:
        show(books, results, watch=arguments.watch, every_s=arguments.every)
    finally:
        books.close()


def _plan(arguments: argparse.Namespace) -> int:
    """What a factory would take: no books are opened for it."""
    from aifactory.plan.command import run

    try:
        plan = run(arguments)
    except ConfigError as error:
        return _fail(error, 2)
    _print(plan, sys.stdout, as_json=arguments.json)
    return int(getattr(plan, "holds", True) is False)


def _kubernetes(arguments: argparse.Namespace) -> int:
    """Manifests, from the configuration alone."""
    from aifactory.cluster.kubernetes import Values, as_yaml, manifests

    try:
        values = Values(**{name: getattr(arguments, name) for name in Values.__dataclass_fields__})
        found = manifests(_config(arguments), values)
    except ConfigError as error:
        return _fail(error, 2)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        print(as_yaml(found), end="")
    return 0


def _metrics(arguments: argparse.Namespace) -> int:
    from aifactory.observe.command import run

    try:
        _print(run(arguments), sys.stdout, as_json=arguments.json)
    except AIFactoryError as error:
        return _fail(error, 1)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from aifactory.doctor.command import run

    with redirect_stdout(sys.stderr):  # Ray prints warnings of its own there
        findings = run(arguments)
    _print(findings, sys.stdout, as_json=arguments.json)
    return int(not findings.holds)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def command_parser() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        prog="aifactory",
        description="Data in, models out that get better with use.",
        epilog="Exit status: 0 done, 1 the work failed or a proof does not hold, 2 the configuration or the arguments are wrong.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, description in VERBS.items():
        sub = verbs.add_parser(verb, help=description, description=f"{verb}: {description}.")
        if verb == "lineage":
            sub.add_argument("subject", help="id of an answer or an artifact, or the name of a release")
        if verb in ("shadow", "canary"):
            sub.add_argument("release", metavar="RELEASE", help="name or number of a release that is not in production")
        if verb == "verify":
            sub.add_argument("release", metavar="RELEASE", help="name or number of a release, or production")
        if verb == "explain":
            sub.add_argument(
                "cycle", metavar="CYCLE", help="its number or trigger, or the name of the release that it made"
            )
        if verb == "diff":
            sub.add_argument("first", metavar="RELEASE", help="name or number of a release, or production")
            sub.add_argument("second", metavar="RELEASE", help="the one that it is compared with")
        if verb == "judge":
            sub.add_argument("what", choices=("measure",), help="what is to be done with it")
            sub.add_argument(
                "labelled",
                metavar="FILE",
                help='JSON lines: {"prompt", "answer", "good"}, or {"prompt", "first", "second", "preferred"}',
            )
        _add_config(sub)
        if verb == "run":
            sub.add_argument("--cycle", metavar="TRIGGER", help="turn this cycle, which has begun already")
        if verb == "rollback":
            sub.add_argument("--to", type=int, metavar="N", help="number of the release; the one before by default")
        if verb in ("shadow", "canary"):
            sub.add_argument("--share", type=float, required=True, metavar="SHARE", help="of all, from 0 to 1")
        if verb == "canary":
            sub.add_argument(
                "--by",
                choices=("key", "request"),
                help="of what it takes a share; as the trial goes by already, or keys, by default",
            )
        if verb == "promote":
            sub.add_argument(
                "--trial",
                action="store_true",
                help="put the release that is on trial into production, and nothing else",
            )
        if verb == "retrain":
            sub.add_argument(
                "--despite-cooldown",
                action="store_true",
                help="without the wait for a cool-down; limits and budget hold",
            )
            sub.add_argument("--key", help="who repeats the command with the same key has asked once")
            sub.add_argument("--withdraw", action="store_true", help="withdraw requests that no cycle has taken up yet")
        if verb in ("shadow", "canary", "withdraw", "rollback", "promote", "retrain"):
            sub.add_argument("--reason", default="asked for", help="why, for the audit")
        if verb in ("withdraw", "rollback"):
            sub.add_argument(
                "--quarantine", action="store_true", help="what is taken back is neither tried nor served again"
            )
        if verb in ("shadow", "canary", "rollback"):
            sub.add_argument(
                "--despite-quarantine", action="store_true", help="though the release was taken back for cause"
            )
        if verb == "restore":
            asked = sub.add_mutually_exclusive_group(required=True)
            asked.add_argument("--rule", help="the rule that rejected them")
            asked.add_argument("--from", dest="source", metavar="TARGET", help="the TARGET of `aifactory backup`")
            sub.add_argument("--snapshot", metavar="NAME", help="of --from: which one; the newest by default")
        if verb == "rejected":
            sub.add_argument("--rule", help="the rule that rejected them")
        if verb in ("rejected", "restore"):
            sub.add_argument("--corpus", metavar="ID", help="the corpus; the newest by default")
        if verb == "rejected":
            sub.add_argument(
                "--limit", type=int, default=10, metavar="N", help="most rows that are shown; 10 by default"
            )
        if verb == "trace":
            traced = sub.add_mutually_exclusive_group(required=True)
            traced.add_argument("--text", help="the text")
            traced.add_argument("--completion", metavar="ID", help="the answer of this id")
            sub.add_argument("--release", metavar="NAME", help="whose training rows; the one in production by default")
            sub.add_argument(
                "--limit", type=int, default=10, metavar="N", help="most rows that are shown; 10 by default"
            )
            sub.add_argument(
                "--similar",
                type=int,
                default=10,
                metavar="N",
                help="most rows that resemble it by their words; 10 by default, 0 for none, as all rows are read for them",
            )
        if verb == "verify":
            sub.add_argument(
                "--from-scratch",
                action="store_true",
                help="rebuild what earlier cycles made, too, in place of taking it",
            )
        if verb == "explain":
            sub.add_argument("--html", metavar="FILE", help="write it as a page with pictures, too")
        if verb == "diff":
            sub.add_argument(
                "--prompts",
                metavar="FILE",
                help="JSON lines or a prompt in each line; rows that are held out by default",
            )
            sub.add_argument("--limit", type=int, default=8, metavar="N", help="most prompts; 8 by default, 0 for none")
            sub.add_argument(
                "--max-tokens", type=int, default=48, metavar="N", help="of each answer at most; 48 by default"
            )
        if verb == "audit":
            sub.add_argument("--subject", help="lines about this one alone")
            sub.add_argument("--action", help="lines of this action alone, such as rollback")
            sub.add_argument("--since", metavar="TIME", help="from then on; ISO 8601, UTC where it names no offset")
            sub.add_argument("--until", metavar="TIME", help="before then")
            sub.add_argument(
                "--expect", metavar="HEAD", help="a hash that was printed before: is it still in the chain?"
            )
            sub.add_argument(
                "--limit", type=int, default=20, metavar="N", help="most lines that are shown; 20 by default"
            )
        if verb == "energy":
            sub.add_argument("--since", metavar="TIME", help="from then on; ISO 8601, UTC where it names no offset")
            sub.add_argument("--until", metavar="TIME", help="before then")
        if verb == "forget":
            asked = sub.add_mutually_exclusive_group(required=True)
            asked.add_argument("--check", metavar="PROOF", help="does this proof, a file or an id, hold?")
            asked.add_argument(
                "--where", help="which rows: FIELD = VALUE [and ...]; fields: user, key, source, label, id"
            )
            sub.add_argument("--dry-run", action="store_true", help="say what would be erased, and change nothing")
        if verb == "status":
            sub.add_argument("--watch", action="store_true", help="again and again, until interrupted")
            sub.add_argument(
                "--every", type=_seconds, default=2.0, metavar="S", help="of --watch: seconds between; 2 by default"
            )
        if verb == "improve":
            sub.add_argument("--once", action="store_true", help="say what would be decided now, and change nothing")
    from aifactory.keys.arguments import add_verbs

    page = verbs.add_parser("page", help=_PAGE, description=f"page: {_PAGE}.")
    _add_config(page)
    completion = verbs.add_parser("completion", help="print the script with which a shell completes this command")
    completion.add_argument("shell", choices=SHELLS, help="which shell")
    from aifactory.plan.arguments import add_arguments

    about = "who may ask the endpoint: API keys, and what they may use"
    add_verbs(verbs.add_parser("keys", help=about, description=f"keys: {about}."))
    for verb, description in KEEPING.items():
        sub = verbs.add_parser(verb, help=description, description=f"{verb}: {description}.")
        if verb == "backup":
            sub.add_argument("target", metavar="TARGET", help="a folder or a URI outside the storage root")
            sub.add_argument(
                "--keep", type=int, default=7, metavar="N", help="so many of the newest snapshots stay; 7 by default"
            )
        _add_config(sub)
        if verb == "gc":
            sub.add_argument("--dry-run", action="store_true", help="say what would be deleted, and delete nothing")
            sub.add_argument("--caches", action="store_true", help="delete also what only makes the next run quicker")
            sub.add_argument(
                "--give-up", metavar="TRIGGER", help="a running cycle that nobody will ever turn again ends as failed"
            )
    for verb, description in STAYING.items():
        sub = verbs.add_parser(verb, help=description, description=f"{verb}: {description}.")
        _add_config(sub)
        if verb == "up":
            sub.add_argument(
                "--systemd", action="store_true", help="print a systemd unit that does it, and start nothing"
            )
            sub.add_argument("--user", metavar="NAME", help="whom the unit runs as; who runs this, by default")
    text = "print KubeRay manifests of the factory: RayCluster, RayJob, RayService, and what their pods share"
    sub = verbs.add_parser("kubernetes", help=text, description=f"kubernetes: {text}.")
    _add_config(sub)
    sub.add_argument("--image", required=True, help="container image with Ray and aifactory")
    sub.add_argument("--namespace", default="default", help="of Kubernetes; default by default")
    sub.add_argument(
        "--secret", default="aifactory-postgres", help="Secret with the database's URL at the key state_url; its name"
    )
    sub.add_argument("--storage-class", help="of the shared volume, ReadWriteMany; the cluster's own by default")
    sub.add_argument("--storage-size", default="200Gi", help="of that volume; 200Gi by default")
    sub.add_argument("--memory", default="16Gi", help="of each pod; 16Gi by default")
    sub.add_argument("--max-workers", type=int, default=4, help="training pods at most; 4 by default")
    sub.add_argument("--idle-s", type=int, default=300, help="until an idle pod is taken away, seconds; 300 by default")
    text = "what training, serving and ingestion would take and cost, on which accelerators, before anything is started"
    add_arguments(verbs.add_parser("plan", help=text, description=f"plan: {text}."))
    from aifactory.doctor.arguments import add_arguments as add_doctor_arguments
    from aifactory.observe.command import add_arguments as add_metrics_arguments

    text = (
        "what is wrong with this machine, its ports, the configuration, storage, database and cluster, and what to do"
    )
    add_doctor_arguments(verbs.add_parser("doctor", help=text, description=f"doctor: {text}."))
    text = "what is measured, and files for Grafana and Prometheus made from that"
    add_metrics_arguments(verbs.add_parser("metrics", help=text, description=f"metrics: {text}."))
    config = verbs.add_parser("config", help="about configurations")
    config.add_subparsers(dest="what", required=True).add_parser(
        "schema", help="print the JSON schema of a configuration, for editors"
    )
    return parser


def _add_config(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("config_file", nargs="?", metavar="CONFIG", help="configuration file; - reads AIFACTORY_CONFIG")
    sub.add_argument("--config", metavar="CONFIG", help="the same, as an option")
    sub.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, such as train.max_steps=10"
    )
    sub.add_argument("--json", action="store_true", help="print the result as one JSON document")


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def _config(arguments: argparse.Namespace) -> Config:

    from aifactory.cluster.handover import HANDOVER_VARIABLE, handed_over
    from aifactory.cluster.jobs import CONFIG_VARIABLE
    from aifactory.config import Config

    named = [name for name in (arguments.config_file, arguments.config) if name is not None]
    if len(named) != 1:
        found = "none" if not named else " and ".join(named)
        raise ConfigError(
            f"expected one configuration file, found {found}: aifactory {arguments.verb} CONFIG, for example "
            "configs/quickstart.yaml."
        )
    if named[0] != "-":
        return Config.from_yaml(named[0], arguments.set)
    text = os.environ.get(CONFIG_VARIABLE)
    if factory := os.environ.get(HANDOVER_VARIABLE):
        text = handed_over(factory)
    if text is None:
        raise ConfigError(f"expected a configuration in the environment variable {CONFIG_VARIABLE}, found it unset.")
    return Config.from_text(text, origin=CONFIG_VARIABLE, overrides=arguments.set)


def _run_verb(factory: Factory, arguments: argparse.Namespace, results: TextIO) -> Any:
    verb = arguments.verb
    if verb == "run" and arguments.cycle:
        return factory.turn_begun(arguments.cycle)
    if verb == "promote":
        return factory.promote(trial=arguments.trial, reason=arguments.reason)
    if verb in ("shadow", "canary"):
        asked = {name: getattr(arguments, name) for name in ("share", "reason", "despite_quarantine")}
        if verb == "canary":
            return factory.canary(arguments.release, by=arguments.by, **asked)
        return factory.shadow(arguments.release, **asked)
    if verb == "withdraw":
        return factory.withdraw(reason=arguments.reason, quarantine=arguments.quarantine)
    if verb == "rollback":
        return factory.rollback(
            to=arguments.to,
            reason=arguments.reason,
            quarantine=arguments.quarantine,
            despite_quarantine=arguments.despite_quarantine,
        )
    if verb == "retrain":
        asked = {name: getattr(arguments, name) for name in ("reason", "despite_cooldown", "key", "withdraw")}
        return factory.retrain(**asked)
    if verb == "judge":
        return factory.judge(arguments.labelled)
    if verb == "lineage":
        return factory.lineage(arguments.subject)
    if verb == "rejected":
        return factory.rejected(rule=arguments.rule, corpus=arguments.corpus, limit=arguments.limit)
    if verb == "trace":
        return factory.trace(
            arguments.text,
            completion=arguments.completion,
            release=arguments.release,
            limit=arguments.limit,
            similar=arguments.similar,
        )
    if verb == "verify":
        return factory.verify(arguments.release, from_scratch=arguments.from_scratch)
    if verb == "explain":
        return factory.explain(arguments.cycle, html=arguments.html)
    if verb == "diff":
        return factory.diff(
            arguments.first,
            arguments.second,
            prompts=arguments.prompts,
            limit=arguments.limit,
            max_tokens=arguments.max_tokens,
        )
    if verb == "audit":
        return factory.audit(
            subject=arguments.subject,
            action=arguments.action,
            since=arguments.since,
            until=arguments.until,
            expect=arguments.expect,
            limit=arguments.limit,
        )
    if verb == "energy":
        return factory.energy(since=arguments.since, until=arguments.until)
    if verb == "forget":
        if arguments.check is not None:
            return factory.check_forgotten(arguments.check)
        return factory.forget(arguments.where, dry_run=arguments.dry_run)
    if verb == "keys":
        from aifactory.keys.command import run

        return run(factory, arguments)
    if verb == "gc":
        return factory.gc(dry_run=arguments.dry_run, caches=arguments.caches, give_up=arguments.give_up)
    if verb == "backup":
        if arguments.keep < 1:
            raise ConfigError(f"expected --keep of at least 1, found {arguments.keep}; name how many snapshots stay.")
        return factory.backup(arguments.target, keep=arguments.keep)
    if verb == "restore" and arguments.source is not None:
        return factory.recover(arguments.source, snapshot=arguments.snapshot)
    if verb == "restore":
        if arguments.snapshot is not None:
            raise ConfigError("expected --snapshot beside --from alone, found it with --rule; leave it out.")
        return factory.restore(arguments.rule, corpus=arguments.corpus)
    if verb == "improve" and arguments.once:
        return factory.look()
    if verb in ("serve", "improve"):
        endpoint = factory.serve()
        if verb == "improve":
            factory.improve()
        _print(endpoint, results, as_json=arguments.json)
        results.flush()
        signal.signal(signal.SIGTERM, _interrupt)  # ray.init() has put its own in the place of ours
        factory.wait()
        return None
    method: Callable[[], Any] = getattr(factory, verb)
    result = method()
    if verb == "run" and not arguments.json:
        return [*result.lines(), *_how_to_go_on(factory, arguments)]
    return result


def _how_to_go_on(factory: Factory, arguments: argparse.Namespace) -> list[str]:
    """The commands with which the reader serves the release and asks it something."""
    if factory.books.registry.production() is None:
        return []
    endpoint = factory.config.runtime.endpoint
    port = endpoint.port or 8000
    # Port 0 takes a free one, which nobody knows before it is taken.
    overrides = [*arguments.set, *([] if endpoint.port else [f"runtime.endpoint.port={port}"])]
    serve = ["aifactory", "serve", arguments.config_file or arguments.config]
    body = json.dumps({"model": factory.config.name, "prompt": "def parse_header(line):\n", "max_tokens": 48})
    return [
        "",
        "Serve it:  " + shlex.join([*serve, *(word for item in overrides for word in ("--set", item))]),
        f"Ask it:    curl http://{endpoint.host}:{port}{endpoint.route_prefix.rstrip('/')}/v1/completions "
        f"-H 'Content-Type: application/json' -d '{body}'",
    ]


def _print(result: Any, results: TextIO, *, as_json: bool) -> None:
    if result is None:
        return
    if as_json:
        print(json.dumps(_plain(result), indent=2, default=str), file=results)
    else:
        print("\n".join(_lines(result)), file=results)


def _plain(result: Any) -> Any:
    if hasattr(result, "to_json"):
        return result.to_json()
    if is_dataclass(result) and not isinstance(result, type):
        plain = asdict(result)
        return plain | {"id": result.id} if hasattr(result, "id") else plain
    return result


def _lines(result: Any) -> list[str]:
    if isinstance(result, list):
        return result
    if hasattr(result, "lines"):
        return list(result.lines())
    plain = _plain(result)
    if isinstance(plain, Mapping) and "record" in plain:
        plain = {
            "id": plain["id"],
            "uri": plain["uri"],
            "digest": plain["record"]["digest"],
            **({"report": result.report} if hasattr(result, "report") else {}),
            # The examples of a corpus are whole texts, which its report shows; the curve of a model is in its card.
            **{name: fig for name, fig in plain["record"]["figures"].items() if name not in ("examples", "curve")},
        }
    if isinstance(plain, Mapping):
        return [
            f"{key:<22} {value if not isinstance(value, dict | list) else json.dumps(value)}"
            for key, value in plain.items()
        ]
    return [str(plain)]


def _fail(error: Exception, status: int) -> int:
    print(f"aifactory: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
