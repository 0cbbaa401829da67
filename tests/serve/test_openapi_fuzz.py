"""Laws of the endpoint's own description (schemathesis): no request that it describes, or describes as wrong, fails the server;
what is wrong by it is refused; each answer has a status, a type and a form that it names.
"""

from __future__ import annotations

import os
import time
from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
]


def ask_all(endpoint, *, start: int, each: int) -> Counter[str]:
    """Ask each operation so many times; the statuses that came."""
    print(f"AIFACTORY_FUZZ_SEED={start}")
    # A body that is too large is refused before anybody reads what is wrong in it.
    refused = {
        "expected-statuses": ["400", "401", "403", "404", "405", "406", "409", "413", "415", "422", "428", "429", "5xx"]
    }
    config = SchemathesisConfig.from_dict({"checks": {"negative_data_rejection": refused}})
    description = schemathesis.openapi.from_url(f"{endpoint.url}/openapi.json", config=config)
    statuses: Counter[str] = Counter()
    for found in description.get_all_operations():
        operation = found.ok()
        asked = strategies.one_of(*(operation.as_strategy(mode) for mode in GenerationMode))

        @seed(start)
        @settings(
            max_examples=each,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=asked)
        def ask(case):
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = "alpha"  # any other is 404, which would be all that is seen
            response = case.call(timeout=120)
            statuses[f"{response.status_code}"] += 1
            # Whoever asks for too little time is told so by 504.
            timed = isinstance(case.body, dict) and "timeout" in case.body
            assert response.status_code < 500 or (response.status_code == 504 and timed), response.text
            case.validate_response(response, checks=CHECKS)

        ask()
    print(f"{sum(statuses.values())} requests: {dict(statuses.most_common())}")
    return statuses


@pytest.mark.slow
def test_requests_by_the_description_are_answered_by_it(endpoint):
    statuses = ask_all(endpoint, start=20261125, each=12)

    assert statuses["200"] > 12
    assert statuses["400"] > 40
    assert endpoint.engine.num_unfinished == 0


@pytest.mark.fuzz
def test_very_many_requests_by_the_description_are_answered_by_it(endpoint):
    number = int(os.environ.get("AIFACTORY_FUZZ_REQUESTS") or 50_000)
    statuses = ask_all(endpoint, start=int(os.environ.get("AIFACTORY_FUZZ_SEED") or time.time()), each=number // 100)

    # What is asked for and takes its time (/v1/retrains) was right too.
    assert statuses["200"] + statuses["202"] > number // 100
    assert endpoint.engine.num_unfinished == 0
