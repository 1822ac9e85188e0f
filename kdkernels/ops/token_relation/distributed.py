"""Relations between the tokens of all ranks."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ... import distributed
from ...distributed import LossAndGradients, Ranks
from ...types import COMPARISONS, Backend
from ..congruence.distributed import congruence
from ..congruence.distributed import explained as of_congruence
from ..congruence.plan import GRAM, Coefficients, Sum
from ..operator import full_precision
from ..shapes import accumulation_dtype
from . import TOKEN_RELATION, Problem, Settings, channels_of, explained, token_relation, tokens_of
from .reference import EPS, as_rows, as_tokens, clipped, compare, weights_of


def token_relation_over_ranks(problem: Problem, backend: Backend, group: ProcessGroup) -> Tensor:
    """Return the loss of the concatenated batch; see ``kdkernels.token_relation_loss``."""
    inputs = problem.inputs
    learns = [torch.is_grad_enabled() and x.requires_grad for x in inputs]
    whole = problem.settings.across == "batch"
    ranks = distributed.agree(
        group,
        problem.student.shape[0],
        problem.student.device,
        channels=[channels_of(x) for x in inputs],
        masked=problem.mask is not None,
        dtype=accumulation_dtype(*inputs),
        settings=problem.settings,
        **({"requires_grad": learns} if whole else {}),
    )
    return _over_the_batch(problem, backend, ranks) if whole else _over_images(problem, backend, ranks)


def _over_images(problem: Problem, backend: Backend, ranks: Ranks) -> Tensor:
    """Add what the images of every rank contribute. Relations within an image need no other rank."""
    settings = problem.settings
    share = token_relation(problem._replace(settings=settings._replace(reduction="sum")), backend)
    total = distributed.sum_over(ranks, share)
    if settings.reduction == "sum":
        return total
    count = distributed.add(ranks, _terms(problem).double())[0].clamp(min=1)
    return (total / count).to(total.dtype)


def _terms(problem: Problem) -> Tensor:
    """Return how many terms this rank has: pairs, or rows if a comparison has one term per row."""
    heads, batch, channels = problem.settings.codes[2:5]

    def kept(features: Tensor, mask: Tensor | None) -> Tensor:
        tokens = as_tokens(features.detach())
        length = tokens.shape[2] // heads if channels else tokens.shape[1]
        return weights_of(mask, tokens.new_empty(tokens.shape[0] * heads, length), heads, batch, channels)

    rows = kept(problem.student, problem.mask)
    columns = rows if problem.student_keys is None else kept(problem.student_keys, problem.key_mask)
    if COMPARISONS.index(problem.settings.comparison) < 2:
        return (rows.sum(1) * columns.sum(1)).sum()
    return (rows & columns.any(1, keepdim=True)).sum()


def _over_the_batch(problem: Problem, backend: Backend, ranks: Ranks) -> Tensor:
    """Relate the rows of all ranks. A ring brings their blocks, and relations of channels are sums over the ranks."""
    settings = problem.settings
    squares = settings.in_features and problem.student_keys is None and settings.axis == "tokens"

    def sums(_: str) -> list[list[Sum]]:
        if not squares:
            return [[explained(problem, GRAM)]]
        width, other = (channels_of(x) // settings.heads for x in (problem.student, problem.teacher))
        return [[of_congruence(ranks, tokens_of(problem.student), width, other, False, settings.form)]]

    TOKEN_RELATION.choose(backend, problem.student, sums=sums)
    if squares:
        return _squares(problem, backend, ranks)
    run = functools.partial(_by_channels if settings.axis == "channels" else _by_ring, problem=problem, ranks=ranks)
    return distributed.loss(ranks, run, *problem.inputs)


def _squares(problem: Problem, backend: Backend, ranks: Ranks) -> Tensor:
    """Return "mse" of one input, whose heads are differences of correlation structures, as in ``congruence``."""
    with full_precision(problem.student.device):
        student, teacher = _rows(problem, problem.inputs, normalize=problem.settings.normalize)
    counts = weights_of(problem.mask, student, *problem.settings.codes[2:5])
    scale = 1.0
    if problem.settings.reduction == "mean":
        rows = distributed.add(ranks, counts.sum(1).double())[0]
        scale = 1 / max(rows.square().sum().item(), 1)
    heads, ranks = zip(student, teacher, strict=True), _with_rows(ranks, student)
    coefficients = Coefficients(scale, 0.0, 0.0, 0.0)
    terms = [
        congruence(ranks, x.contiguous(), y.contiguous(), 1, coefficients, problem.settings.form, backend)
        for x, y in heads
    ]
    return torch.stack(terms).sum()


def _rows(problem: Problem, inputs: Sequence[Tensor], normalize: bool) -> list[Tensor]:
    """Return this rank's rows of every input, heads x rows x depth."""
    layout = *problem.settings.codes[2:5], normalize, accumulation_dtype(*inputs)
    masks = problem.masks[: len(inputs) // 2] * 2
    return [as_rows(x, mask, *layout) for x, mask in zip(inputs, masks, strict=True)]


def _with_rows(ranks: Ranks, rows: Tensor) -> Ranks:
    """Count rows of ranks instead of samples."""
    own = torch.tensor([rows.shape[1]], device=rows.device)
    return ranks._replace(sizes=tuple(torch.cat(distributed.gather(ranks.group, own)).tolist()))


class _Block(NamedTuple):
    """Rows of both networks of one input on one rank. Tensors are heads x rows x numbers."""

    x: Tensor
    y: Tensor
    counts: Tensor  # one number, not 0 if the row counts
    sums: Tensor  # of the row's softmax: log-sum-exp of both networks, and the teacher's expected payoff; or nothing

    def ring(self, ranks: Ranks) -> Iterator[_Block]:
        """Yield the block of every rank."""
        packed = torch.cat(list(self), 2).transpose(0, 1)
        for _, block in distributed.ring(_with_rows(ranks, self.x), packed):
            yield _Block(*block.transpose(0, 1).split([part.shape[2] for part in self], 2))

    def chunks(self, other: _Block) -> Iterator[slice]:
        """Yield slices of the rows whose relations with another block are held together."""
        heads, rows, _ = self.x.shape
        length = max(1, distributed.CHUNK // (heads * other.x.shape[1]))
        return (slice(begin, begin + length) for begin in range(0, rows, length))

    def part(self, rows: slice) -> _Block:
        return _Block(*(part[:, rows] for part in self))


def _by_ring(*inputs: Tensor, problem: Problem, ranks: Ranks, wanted: Sequence[bool]) -> LossAndGradients:
    """Meet the blocks of all ranks: once for the softmaxes of this rank's rows, and once for each gradient."""
    settings = problem.settings
    leaves = [x.requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
    with torch.set_grad_enabled(any(wanted)):
        rows = _rows(problem, leaves, settings.normalize)
    half = len(rows) // 2
    blocks = [
        _Block(x.detach(), y.detach(), *_counts_of(problem, mask, x))
        for x, y, mask in zip(rows[:half], rows[half:], problem.masks, strict=False)
    ]
    counts = distributed.add(ranks, torch.stack([block.counts.sum().double() for block in blocks]) / settings.heads)[0]
    by_rows, queries, keys = COMPARISONS.index(settings.comparison) >= 2, blocks[0], blocks[-1]
    if by_rows:
        queries = queries._replace(
            counts=queries.counts * (counts[-1] > 0), sums=_softmaxes(queries, keys, ranks, settings)
        )
    one_input = half == 1
    passes = [(queries, queries if one_input else keys, True, one_input)] + [(keys, queries, False, True)] * (half - 1)
    total, slopes = queries.x.new_zeros((), dtype=torch.float64), []
    for index, (own, others, own_terms, other_terms) in enumerate(passes):
        needed = wanted[index], wanted[half + index]
        if own_terms or any(wanted[1::2]):
            loss, *found = _compare(own, others, ranks, settings, own_terms, other_terms, needed)
            total = total + loss if own_terms else total
            slopes.append(found)
    value = distributed.add(ranks, total)[0]
    terms = torch.ones_like(value)
    if settings.reduction == "mean":
        columns = (counts[-1] > 0) if by_rows else counts[-1]
        terms = (settings.heads * counts[0] * columns).clamp(min=1)
    gradients = [
        torch.autograd.grad(rows[place], leaf, slopes[place % half][place // half] / terms)[0] if want else None
        for place, (leaf, want) in enumerate(zip(leaves, wanted, strict=True))
    ]
    return (value / terms).to(rows[0].dtype), gradients


def _counts_of(problem: Problem, mask: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    counts = weights_of(mask, rows, *problem.settings.codes[2:5])[..., None]
    return counts.to(rows.dtype), rows.new_empty(*rows.shape[:2], 0)


def _logits(own: _Block, other: _Block, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return the relations of both networks, after clipping, divided by the temperatures: heads x rows x rows."""
    relations = clipped(own.x @ other.x.mT, own.y @ other.y.mT, settings.codes[1])
    s, t = (x / temperature for x, temperature in zip(relations, settings.temperatures, strict=True))
    return s, t


def _payoff(s: Tensor, t: Tensor, settings: Settings) -> Tensor:
    """Return the terms whose mean under the teacher's softmax is the loss of a row, except for a constant."""
    return t - s if settings.comparison == "kl" else -s


def _softmaxes(own: _Block, others: _Block, ranks: Ranks, settings: Settings) -> Tensor:
    """Return three numbers of each row's softmax; see ``_Block``."""
    lowest = torch.finfo(own.x.dtype).min / 8
    largest = own.x.new_full((2, *own.x.shape[:2]), lowest)
    total, weighted = torch.zeros_like(largest), torch.zeros_like(largest[0])
    for other in others.ring(ranks):
        for rows in own.chunks(other):
            logits = _logits(own.part(rows), other, settings)
            masked = [x.masked_fill(other.counts.mT == 0, lowest) for x in logits]
            now = torch.stack([torch.maximum(a, x.amax(2)) for a, x in zip(largest[:, :, rows], masked, strict=True)])
            factors = (largest[:, :, rows] - now).exp()
            weights = [(x - a[..., None]).exp() for a, x in zip(now, masked, strict=True)]
            total[:, :, rows] = total[:, :, rows] * factors + torch.stack([x.sum(2) for x in weights])
            more = (weights[1] * _payoff(*logits, settings)).sum(2)
            weighted[:, rows] = weighted[:, rows] * factors[1] + more
            largest[:, :, rows] = now
    return torch.stack([*(largest + total.log()), weighted / total[1]], 2)


def _compare(
    own: _Block,
    others: _Block,
    ranks: Ranks,
    settings: Settings,
    own_terms: bool,
    other_terms: bool,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return this rank's share of the loss and the gradients to its rows, before they are divided by the count.

    Args:
        own_terms, other_terms: whether the softmaxes of these rows, and of the other rows, have terms. Otherwise a pair
            is a term of both.
    """
    total = own.x.new_zeros((), dtype=torch.float64)
    gradients = [torch.zeros_like(x) if want else x for x, want in zip(own[:2], wanted, strict=True)]
    for other in others.ring(ranks):
        for rows in own.chunks(other):
            mine = own.part(rows)
            loss, slopes = _terms_of(mine, other, settings, own_terms, other_terms)
            total += loss.sum().double()
            for gradient, slope, theirs, want in zip(gradients, slopes, other[:2], wanted, strict=True):
                if want:
                    gradient[:, rows] += slope @ theirs
    return total, gradients[0], gradients[1]


def _terms_of(
    own: _Block, other: _Block, settings: Settings, own_terms: bool, other_terms: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return the terms of pairs of rows, and their derivatives with respect to the relations of both networks."""
    relations = own.x @ other.x.mT, own.y @ other.y.mT
    kept = clipped(*relations, settings.codes[1])
    if settings.comparison in ("mse", "hinge"):
        difference = kept[0] - kept[1]
        if settings.comparison == "mse":
            loss, slope = difference.square(), 2 * difference
        else:
            loss = (difference.abs() - settings.margin).relu()
            slope = difference.sign() * (loss > 0)
        slope = slope * (int(own_terms) + int(other_terms))
        slopes = [slope, -slope]
    else:
        counted = (own.counts * other.counts.mT) != 0
        s, t = (x / temperature for x, temperature in zip(kept, settings.temperatures, strict=True))
        loss, slopes = torch.zeros_like(s), [torch.zeros_like(s), torch.zeros_like(t)]
        for block, present in ((own.sums, own_terms), (other.sums.mT, other_terms)):
            if present:
                softmax = block.unbind(2) if block is own.sums else block.unbind(1)
                numbers = [x[..., None] if block is own.sums else x[:, None] for x in softmax]
                terms, *found = _softmax_terms(s, t, numbers, settings)
                loss = terms.masked_fill(~counted, 0) if block is own.sums else loss
                slopes = [slope + more.masked_fill(~counted, 0) for slope, more in zip(slopes, found, strict=True)]
        slopes = [slope / temperature for slope, temperature in zip(slopes, settings.temperatures, strict=True)]
    if settings.clip is not None:
        filled = [(before < 0) & (after == 0) for before, after in zip(relations, kept, strict=True)]
        slopes = [slope.masked_fill(gone, 0) for slope, gone in zip(slopes, filled, strict=True)]
    return loss, slopes


def _softmax_terms(s: Tensor, t: Tensor, sums: Sequence[Tensor], settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Return terms and slopes of softmaxes. A term of "kl" is q log(q/p) + p - q, which is not negative."""
    of_student, of_teacher, expected = sums
    log_p, log_q = s - of_student, t - of_teacher
    p, q = log_p.exp(), log_q.exp()
    slope_t = q * (_payoff(s, t, settings) - expected)
    if settings.comparison == "cross_entropy":
        return -q * log_p, p - q, slope_t
    ratio = log_q - log_p
    near = ratio.abs() <= 0.5
    excess = torch.expm1(-ratio.clamp(-0.5, 0.5))
    return torch.where(near, q * (excess + ratio), q * ratio + (p - q)), torch.where(near, q * excess, p - q), slope_t


def _by_channels(*inputs: Tensor, problem: Problem, ranks: Ranks, wanted: Sequence[bool]) -> LossAndGradients:
    """Relations of channels are sums over the tokens of all ranks. The ranks add up matrices of channels."""
    settings, learns = problem.settings, any(wanted)
    leaves = [x.requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
    with torch.set_grad_enabled(learns):
        rows = _rows(problem, leaves, normalize=False)
        half = len(rows) // 2
        shares = []
        for queries, keys in ((rows[0], rows[half - 1]), (rows[half], rows[-1])):
            shares += [queries @ keys.mT, queries.square().sum(2), keys.square().sum(2)]
        counts = weights_of(problem.mask, rows[0], *settings.codes[2:5])
        sums = [x.requires_grad_(learns) for x in distributed.add(ranks, *(x.detach() for x in shares))]
        counts = distributed.add(ranks, counts.double())[0] > 0
        s, t = (_unit(*sums[:3]), _unit(*sums[3:])) if settings.normalize else (sums[0], sums[3])
        comparison, clip, *_, mean = settings.codes
        value = compare(s, t, counts, counts, comparison, clip, settings.temperatures, settings.margin, mean)
    if not learns:
        return value, [None] * len(inputs)
    of_sums = torch.autograd.grad(value, sums, materialize_grads=True)
    local = [(x, gradient) for x, gradient in zip(shares, of_sums, strict=True) if x.requires_grad]
    outputs, gradients = zip(*local, strict=True)
    found = iter(torch.autograd.grad(outputs, [x for x in leaves if x.requires_grad], gradients))
    return value.detach(), [next(found) if want else None for want in wanted]


def _unit(products: Tensor, of_rows: Tensor, of_columns: Tensor) -> Tensor:
    """Divide products of rows by the norms, whose squares are given. A row without a norm has relation 0."""
    inverse = []
    for squares in (of_rows, of_columns):
        dead = squares <= EPS**2
        inverse.append(squares.masked_fill(dead, 1).rsqrt().masked_fill(dead, 0))
    return products * inverse[0][..., None] * inverse[1][:, None]
