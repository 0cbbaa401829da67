"""The losses and their gradients are those of TRL on the same batch, for whole models and for adapters.

Ours are computed on packed rows in one forward pass, TRL's on padded documents one a row: so packing is checked as well.
Tolerance: 1e-5 of a loss, and 1e-4 of the norm of each gradient, in fp32; what is left is the order of sums.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from datasets import Dataset
from preferences import packed, padded, random_answers
from small_models import write_small_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from aifactory.config import Lora, Train
from aifactory.train.lora import adapters_off, with_adapters
from aifactory.train.objectives import objective_of
from aifactory.train.step import summed_loss

LOSS, GRADIENT = 1e-5, 1e-4
VOCABULARY = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("trl"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)


@pytest.fixture(params=["full", "lora"])
def models(request, folder):
    """The model that training starts from, as it is handed to training; and the weights that it has come to."""
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if request.param == "lora":
        start = with_adapters(start, Lora(rank=4, alpha=8), seed=1)
    torch.manual_seed(3)
    trained = {name for name, each in start.named_parameters() if each.requires_grad}
    now = {
        name: each + 0.03 * torch.randn_like(each) if name in trained else each
        for name, each in start.state_dict().items()
    }
    return start, now


def ours(models, recipe, rows, micro_batches):
    """Mean loss and gradients, over micro-batches."""
    start, now = models
    model = copy.deepcopy(start)
    without_adapters = partial(adapters_off, model) if hasattr(model, "peft_config") else None
    objective = objective_of(recipe, model, without_adapters)
    model.load_state_dict(now)
    objective.begin(model, enumerate_slots(rows, micro_batches), batch_rows=len(rows), precision="fp32")
    count = sum(len(row) for row in rows) // objective.documents_of_one
    total = 0.0
    for _, micro in enumerate_slots(rows, micro_batches):
        loss = objective.summed_loss(model, micro, precision="fp32") / count
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


def enumerate_slots(rows, micro_batches):
    at = 0
    for size in micro_batches:
        yield at, packed(rows[at : at + size])
        at += size


def gradients(model):
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def theirs(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return float(loss.detach()), gradients(trainer.model)


def same(one, other):
    assert one[0] == pytest.approx(other[0], rel=LOSS)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert float((gradient - other[1][name]).norm()) <= GRADIENT * float(other[1][name].norm()) + 1e-7, name


@pytest.fixture
def trainer(tmp_path, folder, tokenizer, models):
    """A trainer of TRL over the models; its data set is not what it is asked about."""
    start, now = models

    def make(kind, columns, **options):
        import trl

        config = getattr(trl, f"{kind}Config")(
            output_dir=str(tmp_path),
            report_to="none",
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=2,
            **options,
        )
        beside = {"peft_config": start.peft_config["default"]} if hasattr(start, "peft_config") else {}
        if not beside and kind != "SFT":
            beside = {"ref_model": copy.deepcopy(start)}
        made = getattr(trl, f"{kind}Trainer")(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            args=config,
            train_dataset=Dataset.from_dict(columns),
            processing_class=tokenizer,
            **beside,
        )
        made.model.load_state_dict(now)
        return made

    return make


def test_sft(models, trainer):
    answers = random_answers(1, 6, VOCABULARY)
    rows = packed([answers[:2], answers[2:]])
    start, now = models
    model = copy.deepcopy(start)
    model.load_state_dict(now)
    count = int(rows.loss_mask_BT.sum())
    loss = summed_loss(model, rows.ids_BT, rows.positions_BT, rows.loss_mask_BT, precision="fp32") / count
    loss.backward()
    mine = float(loss.detach()), gradients(model)

    made = trainer("SFT", {"prompt": ["a", "b"], "completion": ["x", "y"]}, completion_only_loss=True)
    batch = padded(answers)
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    same(mine, theirs(made, {**batch, "labels": labels}))


@pytest.mark.parametrize(("beta", "label_smoothing"), [(0.1, 0.0), (0.7, 0.0), (0.3, 0.2)])
def test_dpo(models, trainer, beta, label_smoothing):
    answers = random_answers(2, 12, VOCABULARY, pairs=True)
    recipe = Train(objective="dpo", preference={"beta": beta, "label_smoothing": label_smoothing})
    mine = ours(models, recipe, [answers[:4], answers[4:6], answers[6:]], [1, 2])

    made = trainer(
        "DPO",
        {"prompt": ["a", "b"], "chosen": ["x", "y"], "rejected": ["z", "w"]},
        beta=beta,
        label_smoothing=label_smoothing,
        loss_type=["robust" if label_smoothing else "sigmoid"],
    )
    same(mine, theirs(made, padded(answers[::2] + answers[1::2])))


@pytest.mark.parametrize(("beta", "weights"), [(0.1, (1.0, 1.0)), (0.5, (1.3, 0.7))])
def test_kto(models, trainer, beta, weights):
    answers = random_answers(3, 7, VOCABULARY)
    assert {each.mark for each in answers} == {1, -1}
    desirable, undesirable = weights
    options = {"beta": beta, "desirable_weight": desirable, "undesirable_weight": undesirable}
    mine = ours(models, Train(objective="kto", preference=options), [answers], [1])

    made = trainer("KTO", {"prompt": ["a", "b"], "completion": ["x", "y"], "label": [True, False]}, **options)
    others = [type(each)(each.prompt, answers[i - 1].answer, each.mark) for i, each in enumerate(answers)]
    batch = padded(answers) | {f"KL_{name}": values for name, values in padded(others).items()}
    labels = torch.tensor([each.mark > 0 for each in answers])
    same(mine, theirs(made, batch | {"label": labels}))
