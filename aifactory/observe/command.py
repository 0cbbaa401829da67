"""`aifactory metrics`: the list of metrics, and the files that Grafana and Prometheus load, made from it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from aifactory.errors import StorageError
from aifactory.observe.alerts import rules
from aifactory.observe.dashboards import dashboard
from aifactory.observe.metrics import PREFIX, meters

_MADE = "# Made by `aifactory metrics write`; a test holds it to the list of metrics.\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `aifactory metrics`."""
    verbs = parser.add_subparsers(dest="what", required=True)
    for name, about in (
        ("list", "every metric: its name, kind, labels and meaning"),
        ("write", "write the dashboard for Grafana, and rules and scraping for Prometheus, into a folder"),
    ):
        sub = verbs.add_parser(name, help=about, description=f"metrics {name}: {about}.")
        sub.add_argument("--json", action="store_true", help="print the result as one JSON document")
        if name == "write":
            sub.add_argument("folder", metavar="FOLDER", help="it is made where it is not there")


def run(arguments: argparse.Namespace) -> Any:
    """What was asked. Raises StorageError where the folder can't be written."""
    if arguments.what == "list":
        return listed() if arguments.json else [_line(each) for each in listed()]
    folder = Path(arguments.folder).expanduser()
    try:
        for name, text in files().items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"expected to write into {folder}, found: {error}. Name another folder.") from error
    return [str(folder / name) for name in files()]


def listed() -> list[dict[str, Any]]:
    """The list."""
    return [
        {
            "name": PREFIX + metric.name,
            "kind": metric.kind,
            "labels": ["factory", *metric.labels],
            "meaning": metric.meaning,
        }
        for metric in meters.metrics.values()
    ]


def files() -> dict[str, str]:
    """By name what Grafana and Prometheus load."""
    return {
        "grafana-dashboard.json": json.dumps(dashboard(), indent=1) + "\n",
        "prometheus-alerts.yaml": _MADE + yaml.safe_dump(rules(), sort_keys=False, width=1000),
        "prometheus.yaml": _MADE + yaml.safe_dump(_scraping(), sort_keys=False),
    }


def _scraping() -> dict[str, Any]:
    """How Prometheus finds the metrics ports: the head of the cluster keeps a file of all its nodes."""
    return {
        "global": {"scrape_interval": "10s", "evaluation_interval": "10s"},
        "rule_files": ["prometheus-alerts.yaml"],
        "scrape_configs": [
            {"job_name": "ray", "file_sd_configs": [{"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}]}
        ],
    }


def _line(metric: dict[str, Any]) -> str:
    return f"{metric['name']:<52}{metric['kind']:<11}{','.join(metric['labels']):<30}{metric['meaning']}"
