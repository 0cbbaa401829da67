"""Laws of execution: however a step is computed, the loss and the gradients are the same but for rounding."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from aifactory.config import Runtime
from aifactory.errors import TrainingError
from aifactory.train import cross_entropy, memory
from aifactory.train.attention import NAME, alone, document_arguments
from aifactory.train.cross_entropy import summed_cross_entropy
from aifactory.train.execution import Execution
from aifactory.train.float8 import convert_to_float8, float8_layers
from aifactory.train.preparation import prepare
from aifactory.train.step import resolve_precision, summed_loss

CPU = torch.device("cpu")
VOCABULARY = 61
LENGTH = 24


def make_model(kind="llama", **changes):
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.3}
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}, **ids)),
        "tied": lambda: LlamaForCausalLM(LlamaConfig(**sizes, **ids, tie_word_embeddings=True)),
        "grouped": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes, **ids, num_key_value_heads=2)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0, **ids)
        ),
        "sliding": lambda: MistralForCausalLM(MistralConfig(**sizes, **ids, num_key_value_heads=2, sliding_window=4)),
        "capped": lambda: Gemma2ForCausalLM(
            Gemma2Config(
                **sizes, **ids, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=0.5
            )
        ),
    }
    return made[kind]().train()


@pytest.fixture
def rows():
    """Three rows: several documents, one alone, one that begins in the middle of a document; padding in two of them."""
    torch.manual_seed(6)
    ids_BT = torch.randint(1, VOCABULARY, (3, LENGTH))
    lengths = ([5, 9, 1, 7, 2], [LENGTH], [4, 12, 8])
    positions_BT = torch.stack([torch.cat([torch.arange(each) for each in row]) for row in lengths])
    mask_BT = (positions_BT > 0).long()
    mask_BT[0, -2:] = mask_BT[2, -8:] = 0
    return ids_BT, positions_BT, mask_BT


def loss_and_gradients(model, rows, *, precision="fp32"):
    model.zero_grad()
    torch.manual_seed(9)
    loss = summed_loss(model, *rows, precision=precision)
    (loss / 7).backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other, *, tolerance=1e-5):
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        difference = float((gradient - other[1][name]).norm() / other[1][name].norm().clamp(min=1e-12))
        assert difference < tolerance * 10, (name, difference)


def prepared(model, **choices):
    prepare(model, Execution(**choices), CPU, "fp32")
    return model


class Largest(TorchDispatchMode):
    """The most numbers in one tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, torch.Tensor):
                self.numbers = max(self.numbers, each.numel())
        return made


# ── cross-entropy in pieces ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "tied", "grouped", "gpt2"])
def test_the_loss_in_pieces_equals_the_plain_one_and_so_do_its_gradients(rows, monkeypatch, kind, pieces):
    num_tokens = int(rows[2][:, 1:].sum())
    monkeypatch.setitem(cross_entropy._PIECE_BYTES, "cpu", 4 * VOCABULARY * -(-num_tokens // pieces))
    plain = loss_and_gradients(make_model(kind), rows)
    model = prepared(make_model(kind), loss="pieces", attention="mask")

    assert model.ends_in_loss
    assert_same(loss_and_gradients(model, rows), plain)


def test_logits_of_the_whole_batch_never_exist(monkeypatch):
    hidden_NH = torch.randn(64, 8, requires_grad=True)
    weight_VH = torch.randn(1000, 8, requires_grad=True)
    at_N, targets_N = torch.arange(64), torch.arange(64)
    monkeypatch.setitem(cross_entropy._PIECE_BYTES, "cpu", 4 * 1000 * 16)
    with Largest() as pieces:
        summed_cross_entropy(hidden_NH, weight_VH, at_N, targets_N).backward()
    with Largest() as plain:
        functional.cross_entropy(hidden_NH @ weight_VH.t(), targets_N, reduction="sum").backward()

    assert plain.numbers == 64 * 1000
    assert pieces.numbers == 16 * 1000


def test_pieces_know_the_loss_of_a_token_that_is_all_but_impossible():
    weight_VH = torch.eye(3) * 200
    loss = summed_cross_entropy(torch.eye(3), weight_VH, torch.tensor([0, 2]), torch.tensor([1, 2]))

    assert float(loss) == pytest.approx(200.0)
    assert torch.isnan(summed_cross_entropy(torch.eye(3) * torch.nan, weight_VH, torch.tensor([0]), torch.tensor([0])))


def test_pieces_in_bf16_differ_from_plain_ones_in_bf16_by_rounding(rows):
    plain = loss_and_gradients(make_model(), rows, precision="bf16")
    found = loss_and_gradients(prepared(make_model(), loss="pieces", attention="mask"), rows, precision="bf16")

    assert {gradient.dtype for gradient in found[1].values()} == {torch.float32}
    assert_same(found, plain, tolerance=3e-3)


def test_a_batch_without_loss_and_a_head_that_is_not_trained(rows):
    ids_BT, positions_BT, mask_BT = rows
    model = prepared(make_model())
    nothing, gradients = loss_and_gradients(model, (ids_BT, positions_BT, torch.zeros_like(mask_BT)))

    assert nothing == 0.0
    assert all(not gradient.any() for gradient in gradients.values())

    plain = make_model()
    for each in (model, plain):
        each.get_output_embeddings().weight.requires_grad_(False)
    assert_same(loss_and_gradients(model, rows), loss_and_gradients(plain, rows))


def test_what_a_compiler_makes_one_kernel_of_is_the_same():
    torch.manual_seed(4)
    logits_CV, targets_C = torch.randn(9, VOCABULARY) * 20, torch.randint(0, VOCABULARY, (9,))
    (loss, gradient_CV), (one_loss, one_gradient_CV) = (
        each(logits_CV, targets_C) for each in (cross_entropy._losses, cross_entropy._losses_in_one)
    )

    torch.testing.assert_close(one_loss, loss)
    torch.testing.assert_close(one_gradient_CV, gradient_CV, atol=1e-5, rtol=1e-5)
    for each in (cross_entropy._losses, cross_entropy._losses_in_one):
        assert each(logits_CV.bfloat16(), targets_C)[1].dtype == torch.bfloat16


def test_a_second_backward_pass_through_what_was_handed_on_is_refused():
    hidden_NH = torch.randn(4, 8, requires_grad=True)
    loss = summed_cross_entropy(hidden_NH, torch.randn(5, 8), torch.arange(4), torch.arange(4))
    loss.backward(retain_graph=True)

    with pytest.raises(AssertionError, match="expected one backward pass"):
        loss.backward()


# ── attention over documents ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["llama", "tied", "grouped", "gpt2"])
def test_attention_by_documents_equals_the_mask_and_so_do_its_gradients(rows, kind):
    plain = loss_and_gradients(make_model(kind), rows)
    model = prepared(make_model(kind), attention="varlen", loss="plain")

    assert_same(loss_and_gradients(model, rows), plain)
    whole = tuple(each[1:2] for each in rows)
    assert_same(loss_and_gradients(model, whole), loss_and_gradients(make_model(kind), whole))


def test_no_gradient_passes_between_documents_and_their_bounds_are_why(rows):
    ids_BT, positions_BT, _ = rows
    model = prepared(make_model(), attention="varlen")

    def gradient(bounds):
        embeddings = model.get_input_embeddings()(ids_BT).detach().requires_grad_()
        with alone():
            logits = model(inputs_embeds=embeddings, position_ids=positions_BT, use_cache=False, **bounds).logits
        logits[0, 5:].square().sum().backward()
        return float(embeddings.grad[0, :5].abs().max()), float(embeddings.grad[1:].abs().max())

    assert gradient(document_arguments(positions_BT)) == (0.0, 0.0)
    # The negative control: one document a row.
    one_a_row = torch.arange(LENGTH).expand(3, LENGTH)
    assert gradient(document_arguments(one_a_row))[0] > 1e-3


def test_bounds_are_those_of_documents_and_rows_in_few_shapes(rows):
    _, positions_BT, _ = rows
    found = document_arguments(positions_BT + 0)
    bounds = found["cu_seq_lens_q"].tolist()

    assert bounds[:10] == [0, 5, 14, 15, 22, 24, 48, 52, 64, 72]
    assert bounds[9:] == [72] * 7
    assert found["max_length_q"] == LENGTH
    # A row that goes on in the middle of a document, and positions that are not changed by being looked at.
    middle_BT = torch.tensor([[7, 8, 9, 0]])
    assert document_arguments(middle_BT)["cu_seq_lens_q"].tolist()[:3] == [0, 3, 4]
    assert middle_BT.tolist() == [[7, 8, 9, 0]]


def test_a_prepared_model_answers_as_before(rows):
    ids_BT, positions_BT, _ = rows
    plain, model = make_model().eval(), prepared(make_model()).eval()
    padding_BT = torch.ones_like(ids_BT)
    padding_BT[:, :3] = 0

    with torch.no_grad():
        for options in ({}, {"position_ids": positions_BT}, {"attention_mask": padding_BT}):
            assert torch.equal(model(ids_BT, **options).logits, plain(ids_BT, **options).logits)
        answers = [each.generate(ids_BT[:1, :5], max_new_tokens=6, do_sample=False) for each in (model, plain)]
    assert torch.equal(*answers)


def test_a_copy_of_a_prepared_model_computes_with_its_own_weights(rows):
    model = prepared(make_model(), activations="full")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.get_output_embeddings().weight.zero_()

    assert float(summed_loss(copied, *rows, precision="fp32").detach()) == pytest.approx(
        int(rows[2].sum()) * torch.tensor(float(VOCABULARY)).log().item(), rel=1e-5
    )
    assert_same(loss_and_gradients(model, rows), loss_and_gradients(make_model(), rows))


# ── what can't be had ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [("sliding", {}, "full attention"), ("llama", {"attention_dropout": 0.1}, "a dropout of 0.1")],
)
def test_attention_that_a_model_has_not_is_left_by_auto_and_refused_by_name(rows, kind, changes, why):
    plain = loss_and_gradients(make_model(kind, **changes), rows)
    assert_same(loss_and_gradients(prepared(make_model(kind, **changes)), rows), plain)

    with pytest.raises(TrainingError, match=rf"runtime\.execution\.attention: varlen, found that they can't: .*{why}"):
        prepared(make_model(kind, **changes), attention="varlen")


def test_a_model_that_does_more_after_its_head_is_found_out(rows):
    plain = loss_and_gradients(make_model("capped"), rows)
    model = make_model("capped")
    chosen = prepare(model, Execution(), CPU, "fp32")

    assert (chosen.attention, chosen.loss) == ("mask", "plain")
    assert_same(loss_and_gradients(model, rows), plain)
    with pytest.raises(TrainingError, match=r"runtime\.execution\.loss: pieces.* the loss of a packed row is"):
        prepared(make_model("capped"), loss="pieces", attention="mask")


# ── activations, compilation ──────────────────────────────────────────────────────────────────────────────────────────


def kept_bytes(model, rows):
    """Bytes of distinct activations that wait for the backward pass."""
    weights = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = summed_loss(model, *rows, precision="fp32")
    held = sum(kept.values())
    loss.backward()
    return held


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("attention", ["mask", "varlen"])
def test_what_is_computed_a_second_time_gives_the_same_gradients_to_the_bit(rows, how, attention):
    plain = loss_and_gradients(prepared(make_model(), attention=attention), rows)
    found = loss_and_gradients(prepared(make_model(), attention=attention, activations=how), rows)

    assert found[0] == plain[0]
    assert all(torch.equal(found[1][name], gradient) for name, gradient in plain[1].items())


def test_dropout_is_the_same_when_it_is_computed_a_second_time(rows):
    plain = loss_and_gradients(make_model(attention_dropout=0.5), rows)
    found = loss_and_gradients(prepared(make_model(attention_dropout=0.5), activations="full"), rows)
    undropped = loss_and_gradients(make_model(), rows)

    assert_same(found, plain)
    assert abs(undropped[0] - plain[0]) > 1e-2


def test_whole_blocks_that_are_computed_again_keep_less():
    ids_BT = torch.randint(1, VOCABULARY, (2, 64))
    rows = ids_BT, torch.arange(64).expand(2, 64), torch.ones(2, 64, dtype=torch.long)
    kept = {how: kept_bytes(prepared(make_model(), activations=how), rows) for how in ("none", "full")}

    assert kept["full"] < 0.5 * kept["none"]


def test_products_are_kept_and_the_rest_computed_again(monkeypatch, rows):
    class Counted(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.products = self.others = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            name = operation.name().split(".")[0]
            self.products += name in ("aten::mm", "aten::bmm")
            self.others += name in ("aten::rsqrt", "aten::silu")
            return operation(*args, **(kwargs or {}))

    counts = {}
    for how in ("none", "selective", "full"):
        model = prepared(make_model(), activations=how)
        with Counted() as counted:
            summed_loss(model, *rows, precision="fp32").backward()
        counts[how] = (counted.products, counted.others)

    assert counts["selective"][0] == counts["none"][0] < counts["full"][0]
    assert counts["selective"][1] == counts["full"][1] > counts["none"][1]


@pytest.mark.parametrize("activations", ["none", "full"])
def test_compiled_blocks_give_the_same_but_for_rounding(rows, monkeypatch, activations):
    plain = loss_and_gradients(make_model(), rows)
    model = make_model()
    compiled = []

    def compile_blocks(model):
        compiled.append(model)
        memory.compile_blocks(model, backend="eager")  # captured as for any, without a C++ compiler

    monkeypatch.setattr("aifactory.train.preparation.compile_blocks", compile_blocks)
    fused = []
    monkeypatch.setattr(cross_entropy, "_compiled", lambda: fused.append(1) or cross_entropy._losses_in_one)
    prepared(model, compile=True, activations=activations)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = loss_and_gradients(model, rows)

    assert compiled == [model]
    assert fused
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 1
    assert_same(found, plain)
    assert set(dict(model.named_parameters())) == set(dict(make_model().named_parameters()))


def test_a_model_without_blocks_is_refused(rows):
    model = make_model()
    model._no_split_modules = []

    for choice in ({"activations": "full"}, {"compile": True}):
        with pytest.raises(TrainingError, match="the model names no blocks"):
            prepared(copy.deepcopy(model), **choice)


# ── fp8 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_fp8_is_refused_where_the_device_has_none():
    with pytest.raises(TrainingError, match=r"capability 8\.9 or above for train\.precision: fp8, found a cpu device"):
        convert_to_float8(make_model(), CPU)


def test_a_run_that_asks_for_fp8_where_there_is_none_ends_before_its_first_step(runs):
    task = runs.work("fp8", precision="fp8")

    with pytest.raises(TrainingError, match=r"train\.precision: fp8"):
        runs.run(task)
    assert resolve_precision("fp8", CPU) == "bf16"


def test_the_layers_of_fp8_are_those_of_the_blocks_whose_sides_it_can_divide():
    model = make_model(intermediate_size=40, hidden_size=32)
    names = {name.rsplit(".", 1)[1] for name in float8_layers(model)}

    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(float8_layers(model)) == 8


# ── configuration ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_the_runtime_offers_is_what_the_step_knows():
    offered = Runtime().execution.model_dump()

    assert Execution(**offered) == Execution()
    assert offered == dataclasses.asdict(Execution())


def test_a_run_says_how_its_steps_were_computed(runs):
    said = {}
    for dropout in (0.0, 0.1):
        task = runs.work(f"says-{dropout}", dropout=dropout, max_steps=1)
        runs.run(task)
        said[dropout] = runs.figures(task)["execution"]

    assert (said[0.0]["attention"], said[0.0]["loss"]) == ("varlen", "pieces")
    assert (said[0.1]["attention"], said[0.1]["loss"]) == ("mask", "pieces")


def test_attention_is_chosen_by_the_name_that_transformers_knows():
    model = prepared(make_model())

    assert model.config._attn_implementation == NAME
    assert prepared(make_model(), attention="mask").config._attn_implementation == "sdpa"
    # It is a matter of this process: what is exported does not know of it.
    assert NAME not in model.config.to_json_string()
