"""Laws of the step: documents that share a row do not see one another, and the schedule ends where it says."""

from __future__ import annotations

import pytest
import torch
from small_models import VOCABULARY, make_model
from torch.nn import functional

from aifactory.config import Train
from aifactory.train.step import clip_gradients, dropout_seed, make_optimizer, resolve_precision, summed_loss, update

LENGTHS = [5, 9, 3, 7]


@pytest.fixture(scope="module")
def packed():
    """Two rows of the same four documents and three tokens of padding, as the packing makes them."""
    torch.manual_seed(6)
    documents = [torch.randint(1, VOCABULARY, (length,)) for length in LENGTHS]
    ids_T = torch.cat([*documents, torch.zeros(3, dtype=torch.long)])
    positions_T = torch.cat([torch.arange(length) for length in [*LENGTHS, 3]])
    mask_T = torch.cat([*(torch.tensor([0] + [1] * (length - 1)) for length in LENGTHS), torch.zeros(3).long()])
    return documents, ids_T.repeat(2, 1), positions_T.repeat(2, 1), mask_T.repeat(2, 1)


def loss_alone(model, documents):
    total = torch.zeros(())
    for ids in documents:
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        total = total + functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")
    return total


def gradient_between(model, ids_BT, positions_BT, **options):
    """The largest gradient of a later document's logits in the embeddings of the first document."""
    embeddings = model.get_input_embeddings()(ids_BT).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, position_ids=positions_BT, use_cache=False, **options).logits
    logits[0, LENGTHS[0] :].square().sum().backward()
    return float(embeddings.grad[0, : LENGTHS[0]].abs().max())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_the_loss_of_a_packed_row_is_that_of_its_documents_alone(packed, kind):
    documents, *tensors = packed
    model = make_model(kind)

    with torch.no_grad():
        together = summed_loss(model, *tensors, precision="fp32")
        alone = 2 * loss_alone(model, documents)

    assert float(together) == pytest.approx(float(alone), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_no_gradient_passes_between_documents_of_a_row_as_long_as_there_is_no_attention_mask(packed, kind):
    _, ids_BT, positions_BT, _ = packed
    model = make_model(kind)

    assert gradient_between(model, ids_BT, positions_BT) == 0.0
    # The negative control: with a mask of ones the documents see one another, and nothing says so.
    assert gradient_between(model, ids_BT, positions_BT, attention_mask=torch.ones_like(ids_BT)) > 1e-3


def test_tokens_without_loss_do_not_count(packed):
    _, ids_BT, positions_BT, mask_BT = packed
    model = make_model("llama")

    with torch.no_grad():
        nothing = summed_loss(model, ids_BT, positions_BT, torch.zeros_like(mask_BT), precision="fp32")
        first_row = summed_loss(model, ids_BT[:1], positions_BT[:1], mask_BT[:1], precision="fp32")
        half = summed_loss(model, ids_BT, positions_BT, mask_BT * torch.tensor([[1], [0]]), precision="fp32")

    assert float(nothing) == 0.0
    assert float(half) == pytest.approx(float(first_row), rel=1e-6)


def test_bf16_computes_products_in_bf16_and_keeps_weights_and_loss_in_fp32(packed):
    _, *tensors = packed
    model = make_model("llama")
    exact = summed_loss(model, *tensors, precision="fp32")
    rounded = summed_loss(model, *tensors, precision="bf16")
    rounded.backward()
    exact, rounded = exact.detach(), rounded.detach()

    assert rounded.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert float(rounded) != float(exact)
    assert float(rounded) == pytest.approx(float(exact), rel=0.02)


def test_vectors_do_not_decay():
    model = make_model("llama")
    groups = make_optimizer(model, Train(weight_decay=0.1)).param_groups

    assert {p.dim() for p in groups[0]["params"]} == {2}
    assert {p.dim() for p in groups[1]["params"]} == {1}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_gradients_are_clipped_to_the_norm_which_is_returned_as_it_was():
    weight = torch.nn.Linear(2, 1, bias=False)
    weight.weight.data.zero_()
    weight.weight.grad = torch.tensor([[3.0, 4.0]])
    norm = clip_gradients(weight, 1.0)
    update(torch.optim.SGD(weight.parameters(), lr=9.0), rate=0.5)

    assert norm == pytest.approx(5.0)
    assert weight.weight.grad is None
    assert weight.weight.tolist() == [[pytest.approx(-0.3, abs=1e-5), pytest.approx(-0.4, abs=1e-5)]]


def test_dropout_seeds_differ_by_seed_step_and_slot_and_fit_the_generator():
    seeds = {dropout_seed(seed, step, slot) for seed in range(5) for step in range(40) for slot in range(40)}

    assert len(seeds) == 5 * 40 * 40
    torch.manual_seed(max(dropout_seed(2**62, 10**9, 10**6), *seeds))


def test_auto_is_what_the_hardware_computes_in():
    cpu = torch.device("cpu")

    assert resolve_precision("auto", cpu) in ("fp32", "bf16")
    assert (resolve_precision("fp32", cpu), resolve_precision("bf16", cpu)) == ("fp32", "bf16")
