"""Laws of preference training on packed rows: what shares a row does not show, nor how a batch is divided."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from preferences import packed, random_answers
from small_models import VOCABULARY, make_model
from torch.nn import functional

from aifactory.config import Train
from aifactory.train.objectives import MarkedRows, document_marks, mismatched, objective_of, token_log_probs

KINDS = ["llama", "qwen2", "gpt2"]


def log_prob_alone(model, answer):
    ids = torch.tensor([answer.ids])
    logits = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    at = range(len(answer.prompt), len(answer.ids))
    return sum(logits[i - 1, answer.ids[i]] for i in at)


def moved(model, by=0.05):
    torch.manual_seed(9)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data += by * torch.randn_like(parameter)
    return other


class Both:
    """A model as it starts and as it is now, and an objective over the two."""

    def __init__(self, kind, **recipe):
        self.start = make_model(kind)
        self.now = make_model(kind)
        self.objective = objective_of(Train(**recipe), self.now, None)
        self.now.load_state_dict(moved(self.start).state_dict())

    def ratio(self, answer):
        return log_prob_alone(self.now, answer) - log_prob_alone(self.start, answer).detach()

    def loss(self, rows, micro_batches):
        """Sum of the losses of rows of answers, divided in this way."""
        ends = [sum(micro_batches[:i]) for i in range(len(micro_batches) + 1)]
        parts = [(at, packed(rows[at:end])) for at, end in pairwise(ends)]
        self.objective.begin(self.now, parts, batch_rows=len(rows), precision="fp32")
        return sum(self.objective.summed_loss(self.now, part, precision="fp32") for _, part in parts)

    def gradient(self, loss):
        return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(self.now.parameters()))])


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_the_gradient_of_packed_pairs_are_those_of_the_pairs_alone(kind):
    both = Both(kind, objective="dpo", preference={"beta": 0.4})
    answers = random_answers(1, 10, VOCABULARY, pairs=True)
    together = both.loss([answers[:6], answers[6:]], [2])
    margins = [both.ratio(answers[i]) - both.ratio(answers[i + 1]) for i in range(0, 10, 2)]
    alone = -sum(functional.logsigmoid(0.4 * margin) for margin in margins)

    assert float(together.detach()) == pytest.approx(float(alone.detach()), rel=1e-5)
    one, other = both.gradient(together), both.gradient(alone)
    assert float((one - other).norm()) < 1e-4 * float(other.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_the_gradient_of_packed_answers_are_those_of_the_answers_alone(kind):
    options = {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    both = Both(kind, objective="kto", preference=options)
    answers = random_answers(2, 8, VOCABULARY)
    rows = [answers[:4], answers[4:7], answers[7:]]  # the last has no other answer
    together = both.loss(rows, [3])

    others = [type(row[i])(row[i].prompt, row[i - 1].answer, 1) for row in rows[:2] for i in range(len(row))]
    baseline = max(0.0, float(sum(both.ratio(each).detach() for each in others)) / len(others))
    alone = sum(
        (1.5 if each.mark > 0 else 0.5) * (1 - torch.sigmoid(0.4 * each.mark * (both.ratio(each) - baseline)))
        for each in answers
    )
    assert float(together.detach()) == pytest.approx(float(alone.detach()), rel=1e-5)
    one, other = both.gradient(together), both.gradient(alone)
    assert float((one - other).norm()) < 1e-4 * float(other.norm())


def test_the_baseline_counts_and_has_no_gradient():
    both = Both("llama", objective="kto", preference={"beta": 0.4})
    # What it has learnt to say is likelier after any prompt.
    answers = [type(a)(a.prompt, [5, 6, 7, 8], a.mark) for a in random_answers(2, 6, VOCABULARY)]
    both.now.load_state_dict(both.start.state_dict())
    optimizer = torch.optim.SGD(both.now.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        (-sum(log_prob_alone(both.now, each) for each in answers)).backward()
        optimizer.step()
    loss = both.loss([answers], [1])
    baseline = both.objective._baseline
    without = sum(1 - torch.sigmoid(0.4 * each.mark * both.ratio(each)) for each in answers)

    assert float(baseline) > 1
    assert not baseline.requires_grad
    assert abs(float(loss.detach()) - float(without.detach())) > 1e-3


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_how_a_batch_is_divided_changes_nothing(objective):
    both = Both("llama", objective=objective)
    answers = random_answers(3, 16, VOCABULARY, pairs=objective == "dpo")
    rows = [answers[:4], answers[4:6], answers[6:14], answers[14:]]
    whole = both.loss(rows, [4])
    other = both.gradient(whole)

    for micro_batches in ([1, 1, 1, 1], [2, 2], [3, 1]):
        part = both.loss(rows, micro_batches)
        assert float(part.detach()) == pytest.approx(float(whole.detach()), rel=1e-5)
        one = both.gradient(part)
        assert float((one - other).norm()) < 1e-4 * float(other.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_passes_between_documents_of_a_row_as_long_as_there_is_no_attention_mask(kind):
    answers = random_answers(4, 4, VOCABULARY, pairs=True)
    rows = packed([answers])
    model = make_model(kind)
    embeddings = model.get_input_embeddings()

    def leak(**options):
        """The gradient of the last document's log-probability in the embeddings of those before it."""
        given = embeddings(rows.ids_BT).detach().requires_grad_()

        def forward(*, input_ids, **rest):
            return model(inputs_embeds=given, **rest, **options)

        log_probs_BT = token_log_probs(forward, rows, precision="fp32")
        border = sum(len(each.ids) for each in answers[:-1])
        log_probs_BT[0, border:].sum().backward()
        return float(given.grad[0, :border].abs().max()), float(given.grad[0, border:].abs().max())

    between, within = leak()
    assert between == 0.0
    assert within > 1e-3
    # The negative control: with a mask of ones the chosen answer is seen from the rejected one, and nothing says so.
    assert leak(attention_mask=torch.ones_like(rows.ids_BT))[0] > 1e-3


def test_after_each_prompt_stands_the_answer_before_it_in_the_row():
    answers = random_answers(5, 9, VOCABULARY)
    rows = [answers[:5], answers[5:8], answers[8:]]
    made, count_B = mismatched(packed(rows))

    expected = [[type(row[i])(row[i].prompt, row[i - 1].answer, row[i].mark) for i in range(len(row))] for row in rows]
    padded = [width - sum(len(each.ids) for each in row) for row in rows for width in [made.ids_BT.shape[1]]]
    for i, row in enumerate(expected):
        wanted = packed([row], padding=padded[i])
        assert made.ids_BT[i].tolist() == wanted.ids_BT[0].tolist()
        assert made.positions_BT[i].tolist() == wanted.positions_BT[0].tolist()
        if i < 2:
            assert made.loss_mask_BT[i].tolist() == wanted.loss_mask_BT[0].tolist()
    assert count_B.tolist() == [5, 3, 0]
    assert not made.loss_mask_BT[2].any()  # one document has no other answer


def test_a_row_of_nothing_but_padding_has_no_documents():
    nothing = torch.zeros(1, 5, dtype=torch.long)
    rows = MarkedRows(ids_BT=nothing, positions_BT=torch.arange(5)[None], loss_mask_BT=nothing, marks_BT=nothing)
    _, count_B = mismatched(rows)

    assert count_B.tolist() == [0]
    assert document_marks(rows).tolist() == [0]


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_as_it_starts_no_answer_is_preferred(objective):
    both = Both("llama", objective=objective)
    both.now.load_state_dict(both.start.state_dict())
    answers = random_answers(6, 8, VOCABULARY, pairs=objective == "dpo")

    loss = float(both.loss([answers], [1])) / (8 // both.objective.documents_of_one)
    assert loss == pytest.approx(0.6931472 if objective == "dpo" else 0.5, rel=1e-6)


@pytest.mark.parametrize("name", ["beta", "label_smoothing"])
def test_each_option_of_dpo_changes_the_loss(name):
    rows = [random_answers(7, 4, VOCABULARY, pairs=True)]
    one, other = (Both("llama", objective="dpo", preference=options).loss(rows, [1]) for options in ({}, {name: 0.3}))

    assert abs(float(one) - float(other)) > 1e-4


def test_the_likelihood_is_no_preference():
    assert objective_of(Train(), make_model("llama"), None) is None
