"""A factory that serves a model over HTTP by Ray Serve, for `serve.py`: `endpoint_process.py STORAGE OPTIONS MODEL…`.

Each MODEL is a folder as the trainer exports it; all are published, the first is promoted and served. Asked to `promote`, it
puts the model of that number into production and answers when it did; asked for what was `swapped`, what the journal says of it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from contenders import serve_lines

from aifactory import Factory
from aifactory.config import Config
from aifactory.records.artifacts import Model, Record, digest_of
from aifactory.records.journal import Bound


def main(storage: str, options: dict[str, Any], folders: list[Path]) -> None:
    config = {
        "name": "bench",
        "ingest": {"sources": [{"name": "none", "kind": "text", "path": storage}]},
        "runtime": {"storage": storage, "endpoint": {"port": 0, **options}},
    }
    # JSON is YAML.
    with Factory(Config.from_text(json.dumps(config), origin="benchmarks/serve.py")) as factory:
        models = [_publish(factory, folder) for folder in folders]
        _promote(factory, models[0])
        endpoint = factory.serve()

        def answer(*, promote: int | None = None) -> Any:
            if promote is not None:
                # On the clock that all processes of the machine share.
                at = time.perf_counter()
                return {"release": _promote(factory, models[promote]), "at": at, "took": time.perf_counter() - at}
            events = factory.books.journal.events(event="swapped")
            return {"swapped": [{"release": event.subject, "seconds": event.seconds} for event in events]}

        serve_lines(answer, ready={"url": endpoint.url, "model": endpoint.model})


def _publish(factory: Factory, folder: Path) -> str:
    artifacts, fingerprint = factory.books.artifacts, folder.name.encode().hex().ljust(64, "0")
    files = factory.books.storage.upload(folder, *artifacts.folder("model", fingerprint))
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
    return artifacts.publish(Model, record).id


def _promote(factory: Factory, model: str) -> str:
    registry, journal = factory.books.registry, factory.books.journal
    serving = registry.production()
    bound = Bound(kind="run", sources_digest="0" * 64, champion=None if serving is None else serving.number)
    cycle = journal.claim(journal.open_cycle(f"cycle-{len(registry.promotions())}", recipe={}, bound=bound))
    return registry.promote(cycle, model=model, scorecard="scorecard/0", decision={}).name


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), [Path(folder) for folder in sys.argv[3:]])
