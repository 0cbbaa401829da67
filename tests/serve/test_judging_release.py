"""A factory's own release as the judge of another one: it is asked over the endpoint, and its name is its version."""

from __future__ import annotations

import pytest

from aifactory.config import Judge
from aifactory.errors import JudgeError
from aifactory.evaluate import judge as judging
from aifactory.evaluate.judge import JudgeClient, Pair

PAIRS = [Pair(prompt="what is it?", first="the quick", second="brown fox")]


@pytest.fixture(autouse=True)
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small model that judges here has no room for more."""
    monkeypatch.setattr(judging, "_ASK", "{rubric}")
    monkeypatch.setattr(judging, "_SHOW", "{prompt} A {first} B {second}")


def test_a_release_judges_and_its_name_is_its_version(endpoint) -> None:
    judge = Judge(url=f"{endpoint.url}/v1", model="alpha-r1", rubric="Short.")

    (said,) = JudgeClient(judge).judge(PAIRS)

    assert -1 <= said.value <= 1
    assert said == JudgeClient(judge).judge(PAIRS)[0]


def test_whatever_is_in_production_is_no_judge_that_can_be_pinned(endpoint) -> None:
    judge = Judge(url=f"{endpoint.url}/v1", model="alpha", rubric="Short.")

    with pytest.raises(JudgeError, match=r"expected the judge alpha .* calls itself \['alpha-r1'"):
        JudgeClient(judge).judge(PAIRS)
