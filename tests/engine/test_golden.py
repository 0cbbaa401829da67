"""Laws of the golden answers: what is served is what was trained, or it is not served."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from aifactory.engine.golden import GOLDEN_NAME, check_golden_answers, golden_answers
from aifactory.errors import ParityError
from aifactory.text.tokenizer import TextTokenizer

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden_folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    (folder / GOLDEN_NAME).write_bytes(golden_answers(model, tokenizer, extra_prompts=["a prompt of one's own"]))
    return folder


def test_the_model_that_was_trained_passes(golden_folder, model, tokenizer):
    assert check_golden_answers(golden_folder, model, tokenizer, tolerance=TOLERANCE) <= 1e-6


def test_the_same_model_gives_the_same_bytes(golden_folder, model, tokenizer):
    again = golden_answers(model, tokenizer, extra_prompts=["a prompt of one's own"])

    assert (golden_folder / GOLDEN_NAME).read_bytes() == again
    assert len(json.loads(again)["answers"]) >= 5


@pytest.mark.parametrize("change", [1.01, float("nan"), float("inf")])
def test_a_changed_weight_is_refused(golden_folder, model, tokenizer, change):
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight *= change

    with pytest.raises(ParityError, match="weights were changed"):
        check_golden_answers(golden_folder, changed, tokenizer, tolerance=TOLERANCE)


def test_weights_that_are_no_numbers_are_refused_at_any_tolerance(golden_folder, model, tokenizer):
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.norm.weight.fill_(float("nan"))

    with pytest.raises(ParityError, match="difference of nan"):
        check_golden_answers(golden_folder, changed, tokenizer, tolerance=float("inf"))


def test_a_difference_within_the_tolerance_is_measured(golden_folder, model, tokenizer):
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight *= 1.01

    found = check_golden_answers(golden_folder, changed, tokenizer, tolerance=float("inf"))

    assert 1e-4 < found < 1


def test_another_tokenizer_is_refused_though_the_model_is_the_same(golden_folder, model, tokenizer):
    values = json.loads(tokenizer.__reduce__()[1][0])
    values["model"]["merges"] = values["model"]["merges"][:-40]
    changed = TextTokenizer(json.dumps(values).encode())

    with pytest.raises(ParityError, match="tokenizer is not the one"):
        check_golden_answers(golden_folder, model, changed, tolerance=float("inf"))
