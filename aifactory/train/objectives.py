"""Objectives: how answers that were preferred are told from those that were not. Torch alone.

    likelihood   `step.summed_loss`: nothing here
    dpo          pairs: -log sigmoid(beta (r_chosen - r_rejected)), where r is log p(answer | prompt) now minus the same by the
                 model that training started from (Rafailov et al. 2023, "Direct Preference Optimization",
                 arXiv:2305.18290, equation 7); label_smoothing as in Chowdhury et al. 2024, "Provably Robust DPO",
                 arXiv:2403.00409, equation 12
    kto          answers that were liked or not: 1 - sigmoid(beta (r - z)) and 1 - sigmoid(beta (z - r)), where z is the mean of
                 r over answers that follow another answer's prompt, at least 0, and has no gradient (Ethayarajh et al. 2024,
                 "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv:2402.01306, equation 8 and section 4.2)

Rows     A row holds whole documents (a prompt and one answer each), of a pair the chosen one and at once the rejected one.
         `marks` says +1 for each token of a document that was preferred, -1 for one that was not, 0 for padding. Positions
         restart with each document, so one forward pass gives the log-probabilities of all of them.
Law      The mean is over the pairs, or the documents, of the whole batch; z is over all of its rows, summed in the order of
         the slots. Neither depends on the number of workers.

Legend   B rows of a micro-batch, T tokens of a row, V vocabulary, D documents and paddings of the rows end to end,
         R rows of the global batch.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn
from torch.nn import functional

from aifactory.train.step import Precision, autocast

if TYPE_CHECKING:
    from aifactory.config import Preference, Train

Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedRows:
    """Rows of documents that were preferred or not."""

    ids_BT: torch.Tensor
    positions_BT: torch.Tensor
    loss_mask_BT: torch.Tensor
    """1 for the tokens of an answer."""
    marks_BT: torch.Tensor


# ── log-probabilities ─────────────────────────────────────────────────────────────────────────────────────────────────


def token_log_probs(model: Forward, rows: MarkedRows, *, precision: Precision) -> torch.Tensor:
    """The log-probability (nats) of each token of an answer, given those before it; 0 for all others. B x T, fp32."""
    with autocast(precision, rows.ids_BT.device):
        logits_BTV = model(input_ids=rows.ids_BT, position_ids=rows.positions_BT, use_cache=False).logits
    targets_BT = torch.where(rows.loss_mask_BT[:, 1:].bool(), rows.ids_BT[:, 1:], -100)
    lost = functional.cross_entropy(
        logits_BTV[:, :-1].float().flatten(0, 1), targets_BT.flatten(), ignore_index=-100, reduction="none"
    )
    return functional.pad(-lost.view_as(targets_BT), (1, 0))


def document_sums(values_BT: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
    """The sum over each document and each padding, in their order; D numbers."""
    starts_D = (positions_BT.flatten() == 0).nonzero().squeeze(1)
    ends_D = torch.cat([starts_D[1:], starts_D.new_tensor([positions_BT.numel()])])
    return torch.segment_reduce(values_BT.flatten(), "sum", lengths=ends_D - starts_D)


def document_marks(rows: MarkedRows) -> torch.Tensor:
    """The mark of each document and each padding; D numbers."""
    return rows.marks_BT.flatten()[rows.positions_BT.flatten() == 0]


def mismatched(rows: MarkedRows) -> tuple[MarkedRows, torch.Tensor]:
    """The same rows, but after each prompt the answer of the document before it in the row, the last one's after the first;
    and how many documents of each row are so, B.

    They have as many tokens as before. A row with one document has no other answer: nothing in it counts.
    """
    is_document_BT = rows.marks_BT != 0
    is_answer_BT = rows.loss_mask_BT.bool() & is_document_BT
    document_BT = (rows.positions_BT == 0).cumsum(1) - 1
    count_B = torch.where(is_document_BT, document_BT + 1, 0).amax(1)
    target_BT = torch.where(is_answer_BT, (document_BT + 1) % count_B.clamp(min=1)[:, None], document_BT)
    # Prompts before answers, document by document, each in the order of its tokens; the padding stays behind.
    order_BT = torch.argsort(target_BT * 2 + is_answer_BT, dim=1, stable=True)
    document_BT = target_BT.gather(1, order_BT)
    at_T = torch.arange(order_BT.shape[1], device=order_BT.device)
    begins_BT = torch.cat([document_BT[:, :1] == document_BT[:, :1], document_BT[:, 1:] != document_BT[:, :-1]], 1)
    start_BT = torch.where(begins_BT, at_T, 0).cummax(1).values
    others_B = torch.where(count_B > 1, count_B, 0)
    made = MarkedRows(
        ids_BT=rows.ids_BT.gather(1, order_BT),
        positions_BT=at_T - start_BT,
        loss_mask_BT=rows.loss_mask_BT.gather(1, order_BT) * (others_B > 0)[:, None],
        marks_BT=rows.marks_BT.gather(1, order_BT),
    )
    return made, others_B


# ── losses ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def dpo_losses(
    chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, beta: float, label_smoothing: float
) -> torch.Tensor:
    """Of each pair, from the log-ratios of its two answers (nats)."""
    margin_P = beta * (chosen_P - rejected_P)
    right_P, wrong_P = -functional.logsigmoid(margin_P), -functional.logsigmoid(-margin_P)
    return ((1 - label_smoothing) * right_P - label_smoothing * wrong_P) / (1 - 2 * label_smoothing)


def kto_losses(
    ratios_D: torch.Tensor,
    marks_D: torch.Tensor,
    baseline: torch.Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> torch.Tensor:
    """Of each document, from its log-ratio and the baseline z (nats)."""
    liked_D = marks_D > 0
    value_D = torch.sigmoid(beta * torch.where(liked_D, ratios_D - baseline, baseline - ratios_D))
    return torch.where(liked_D, desirable_weight, undesirable_weight) * (1 - value_D)


# ── objectives ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Objective(ABC):
    """What is learnt from marked rows. Holds the model that training started from, or gets it by switching adapters off."""

    documents_of_one = 1
    """Documents of what the mean is over."""
    is_shared = False
    """Whether several workers have a part of each batch."""

    def __init__(
        self, options: Preference, model: nn.Module, without_adapters: Callable[[], AbstractContextManager[None]] | None
    ) -> None:
        """`model` is as training starts, on its device. `without_adapters` gives it back as it started at any time;
        without it a copy is kept."""
        self._options = options
        self._model = model
        self._without_adapters = without_adapters or nullcontext
        self._start: nn.Module = model if without_adapters else copy.deepcopy(model).requires_grad_(False).eval()

    def share(self, frozen: Callable[[nn.Module], nn.Module]) -> None:
        """Hand the kept copy to whatever shares the model and the batch among the workers."""
        self.is_shared = True
        if self._start is not self._model:
            self._start = frozen(self._start)

    @abstractmethod
    def begin(
        self, model: Forward, micro_batches: Iterable[tuple[int, MarkedRows]], *, batch_rows: int, precision: Precision
    ) -> None:
        """Look at the batch before its losses are computed: the worker's micro-batches, each with its first slot."""

    @abstractmethod
    def summed_loss(self, model: Forward, rows: MarkedRows, *, precision: Precision) -> torch.Tensor:
        """The sum of the losses of the pairs, or of the documents, of a micro-batch."""

    def _ratios(self, model: Forward, rows: MarkedRows, precision: Precision) -> torch.Tensor:
        """By how much (nats) each token of an answer is likelier now than it was at the start; B x T."""
        with torch.no_grad(), self._evaluated(), self._without_adapters():
            before_BT = token_log_probs(self._start, rows, precision=precision)
        return token_log_probs(model, rows, precision=precision) - before_BT

    @contextmanager
    def _evaluated(self) -> Iterator[None]:
        """The model without dropout."""
        was_training = self._model.training
        self._model.eval()
        try:
            yield
        finally:
            self._model.train(was_training)


class Dpo(Objective):
    """Pairs."""

    documents_of_one = 2

    def begin(
        self, model: Forward, micro_batches: Iterable[tuple[int, MarkedRows]], *, batch_rows: int, precision: Precision
    ) -> None:
        """The loss of a pair depends on no other."""

    def summed_loss(self, model: Forward, rows: MarkedRows, *, precision: Precision) -> torch.Tensor:
        ratios_D = document_sums(self._ratios(model, rows, precision), rows.positions_BT)
        marks_D = document_marks(rows)
        losses_P = dpo_losses(
            ratios_D[marks_D > 0],
            ratios_D[marks_D < 0],
            beta=self._options.beta,
            label_smoothing=self._options.label_smoothing,
        )
        return losses_P.sum()


class Kto(Objective):
    """Answers that were liked or not."""

    _baseline = torch.zeros(())

    def begin(
        self, model: Forward, micro_batches: Iterable[tuple[int, MarkedRows]], *, batch_rows: int, precision: Precision
    ) -> None:
        totals_R2 = None
        for slot, rows in micro_batches:
            others, count_B = mismatched(rows)
            with torch.no_grad(), self._evaluated():
                ratios_B = self._ratios(model, others, precision).sum(1)
            if totals_R2 is None:
                totals_R2 = torch.zeros(batch_rows, 2, dtype=torch.float64, device=ratios_B.device)
            totals_R2[slot : slot + len(count_B)] = torch.stack([ratios_B, count_B], 1).double()
        assert totals_R2 is not None, "a worker has at least one row"
        if self.is_shared and distributed.is_initialized():
            # Each row is 0 but with one worker, so this sum is exact, and what follows is the same for all of them.
            distributed.all_reduce(totals_R2)
        ratio, count = totals_R2.sum(0)
        self._baseline = (ratio / count.clamp(min=1)).clamp(min=0).float()

    def summed_loss(self, model: Forward, rows: MarkedRows, *, precision: Precision) -> torch.Tensor:
        ratios_D = document_sums(self._ratios(model, rows, precision), rows.positions_BT)
        marks_D = document_marks(rows)
        losses_D = kto_losses(
            ratios_D[marks_D != 0],
            marks_D[marks_D != 0],
            self._baseline,
            beta=self._options.beta,
            desirable_weight=self._options.desirable_weight,
            undesirable_weight=self._options.undesirable_weight,
        )
        return losses_D.sum()


def objective_of(
    recipe: Train, model: nn.Module, without_adapters: Callable[[], AbstractContextManager[None]] | None
) -> Objective | None:
    """What a recipe asks for; None for the likelihood."""
    kinds: dict[str, type[Objective]] = {"dpo": Dpo, "kto": Kto}
    kind = kinds.get(recipe.objective)
    return None if kind is None else kind(recipe.preference, model, without_adapters)


def marked_rows(tensors: Sequence[torch.Tensor]) -> MarkedRows:
    """ids, positions, loss mask and marks, as they are read."""
    ids_BT, positions_BT, loss_mask_BT, marks_BT = tensors
    return MarkedRows(ids_BT=ids_BT, positions_BT=positions_BT, loss_mask_BT=loss_mask_BT, marks_BT=marks_BT)
