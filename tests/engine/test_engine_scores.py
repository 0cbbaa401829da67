"""Laws of scores: they are the model's own log-probabilities, and those of a row depend on that row alone, to the bit."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from small_models import write_small_model
from transformers import PreTrainedModel

from aifactory.engine.load import load_model
from aifactory.engine.scores import _windows, continuation_log_probs, each_alone, sum_log_probs

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def random_ids(seed: int, count: int, longest: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(300) for _ in range(rng.randrange(2, longest))] for _ in range(count)]


@torch.inference_mode()
def log_probs_alone(model: PreTrainedModel, ids: list[int], first: int) -> float:
    """Token by token, in double precision from the logits on."""
    log_probs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(float(log_probs[i - 1, ids[i]]) for i in range(first, len(ids)))


def test_the_sum_is_that_of_each_token_after_those_before_it(any_model: PreTrainedModel) -> None:
    for ids in random_ids(1, 20, 60):
        for first in (1, len(ids) // 2 + 1, len(ids)):
            assert sum_log_probs(any_model, ids, first=first) == pytest.approx(
                log_probs_alone(any_model, ids, first), rel=1e-5, abs=1e-6
            )


def test_continuations_have_the_log_probability_of_a_forward_over_prompt_and_continuation(
    any_model: PreTrainedModel,
) -> None:
    for prompt, *continuations in zip(*(random_ids(seed, 10, 12) for seed in range(4)), strict=True):
        for chosen in (continuations, [ids[:1] for ids in continuations]):
            found = continuation_log_probs(any_model, prompt, chosen)
            expected = [log_probs_alone(any_model, prompt + ids, len(prompt)) for ids in chosen]
            assert found == pytest.approx(expected, rel=1e-5)


def test_a_long_text_is_read_in_windows(model: PreTrainedModel) -> None:
    (ids,) = random_ids(3, 1, 400)
    ids *= 400 // len(ids) + 1
    length = model.config.max_position_embeddings
    expected = sum(
        log_probs_alone(model, ids[begin:end], scored - begin) for begin, scored, end in _windows(len(ids), 5, length)
    )

    assert sum_log_probs(model, ids, first=5) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("count", "first"), [(1, 1), (2, 1), (96, 1), (97, 1), (400, 50), (400, 399), (97, 97)])
def test_windows_score_each_token_once_after_half_a_window_or_all_there_is(count: int, first: int) -> None:
    windows = list(_windows(count, first, 96))

    assert [at for _, scored, end in windows for at in range(scored, end)] == list(range(first, count))
    for begin, scored, end in windows:
        assert end - begin <= 96
        assert scored - begin >= min(48, scored)


def test_a_row_has_the_same_bits_whatever_is_beside_it_and_however_many_threads_there_are(
    tmp_path_factory: pytest.TempPathFactory, two_threads: None
) -> None:
    # Wide enough for kernels to share a product among threads.
    folder = write_small_model(tmp_path_factory.mktemp("wide"), hidden=512, context=512)
    wide = load_model(folder, device="cpu", dtype=torch.float32)
    rows = random_ids(4, 16, 300)
    labels = random_ids(5, 3, 5)

    def scores(ids: list[int]) -> tuple[float, ...]:
        assert torch.get_num_threads() == 1
        return (sum_log_probs(wide, ids, first=1), *continuation_log_probs(wide, ids, labels))

    beside = each_alone(scores, rows, device=CPU)
    assert torch.get_num_threads() == 2
    assert beside == [score for ids in rows for score in each_alone(scores, [ids], device=CPU)]
    assert beside == each_alone(scores, rows[::-1], device=CPU)[::-1]
    torch.set_num_threads(1)
    assert beside == each_alone(scores, rows, device=CPU)


def test_an_error_in_one_row_comes_out_and_the_threads_are_as_before(two_threads: None) -> None:
    def fail(item: int) -> None:
        raise ValueError(item)

    with pytest.raises(ValueError, match="1"):
        each_alone(fail, [1, 2], device=CPU)
    assert torch.get_num_threads() == 2
