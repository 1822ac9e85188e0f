"""dkd's loss: ``pytest bench/bench_dkd.py``. The limit is the bytes that must move."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import Case, Work
from torch import Tensor

import kdkernels

ALPHA, BETA, TEMPERATURE = 1.0, 8.0, 4.0


def inputs(batch: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(classes, (batch,))
    return torch.randn(batch, classes, requires_grad=True), torch.randn(batch, classes), labels


def textbook(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """From probabilities, with the label's logit masked for the other classes."""
    is_label = F.one_hot(labels, student.shape[1]).bool()
    q, p = (F.softmax(z / TEMPERATURE, dim=1) for z in (student, teacher))
    pairs = (torch.stack([(x * is_label).sum(1), (x * ~is_label).sum(1)], 1) for x in (q, p))
    of_pair = F.kl_div(next(pairs).log(), next(pairs), reduction="batchmean")
    others = [z / TEMPERATURE - 1000.0 * is_label for z in (student, teacher)]
    of_others = F.kl_div(F.log_softmax(others[0], dim=1), F.softmax(others[1], dim=1), reduction="batchmean")
    return TEMPERATURE**2 * (ALPHA * of_pair + BETA * of_others)


def log_target(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """From log-sum-exps, with few passes over the logits."""
    rows = torch.arange(len(labels), device=labels.device)
    of_label, log_others = [], []
    for z in (student / TEMPERATURE, teacher / TEMPERATURE):
        others = z.index_put((rows, labels), z.new_full((), -1e9))
        log_sum = others.logsumexp(1)
        of_label.append(z[rows, labels] - log_sum)
        log_others.append(others - log_sum[:, None])
    (q, p), (log_q, log_p) = of_label, log_others
    of_pair = p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q)) + (-p).sigmoid() * (F.logsigmoid(-p) - F.logsigmoid(-q))
    of_others = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return TEMPERATURE**2 * (ALPHA * of_pair.mean() + BETA * of_others)


def fused(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return kdkernels.dkd_loss(student, teacher, labels, alpha=ALPHA, beta=BETA, temperature=TEMPERATURE)


def work(student: Tensor, teacher: Tensor, labels: Tensor) -> Work:
    return Work(bytes=2 * student.nbytes + teacher.nbytes + labels.nbytes)


def case(batch: int, classes: int, headline: bool = False) -> Case:
    baselines = {"textbook": textbook, "log target": log_target}
    return Case(f"DKD K={classes}", batch, inputs, (batch, classes), fused, baselines, work, headline=headline)


CASES = tuple(
    case(batch, classes, headline=(batch, classes) == (256, 1000)) for classes in (1000, 100) for batch in (64, 256)
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dkd(compare, case):
    compare(case)
