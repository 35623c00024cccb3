# SPDX-License-Identifier: MIT
"""Contrast with the embeddings of all ranks of ``torch.distributed``, gathered at once or passed round.

A rank's rows meet the embeddings of one rank after the other; the statistics of the parts add up: p = logaddexp(p, p_part), n likewise,
l = l + l_part. The backward pass sends round what the pairs need of the other side, its embeddings with three statistics and three
coefficients each, so that every rank works out the whole gradient of its own embeddings, also what they are to the other ranks' losses:
no gradient travels. Statistics add up in float64, for a logarithm of 1e6 in float32 is off by up to 3 % of its exponential; they travel in
float32, and what they lack goes into the coefficients, of which it is a factor (up to scores of 1e9).

Per rank and step, with N embeddings of C numbers on each of W ranks: forward (W - 1) N (C + 2) numbers come in, backward (W - 1) N (C +
8); memory is W N C gathered, 2 N C passed round. Between two views of N rows: forward (W - 1) N (C + 2) in one direction, (W - 1) N (2 C +
2) in both, backward (W - 1) N (2 C + 14), and twice the memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import backend
from ..reference import contrastive as reference
from ..reference._derivatives import first_order, under_transforms
from ..reference._precision import without_autocast
from . import _calls
from ._contrastive_autograd import numbers_kept

Parts = list[Tensor]


def gathered_losses(
    op: str,
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N] int64
    temperature: float,
    form: str,
    ignore_index: int | None,
    normalize: bool,
    ring: bool,
    precision: str,
    *,
    labels_are_local: bool = False,
) -> tuple[Tensor, Tensor]:  # losses [N], 0 where there is no anchor; which of them are anchors [N]
    """The losses of this rank's embeddings among those of all ranks; labels mean the same on all ranks unless they ``are_local``."""
    (embeddings,) = _permitted(op, embeddings)
    kept = torch.arange(len(labels), device=labels.device)
    if ignore_index is not None:
        kept = kept[labels != ignore_index]
    order = kept[labels[kept].argsort(stable=True)]
    labels = labels[order]
    if labels_are_local:
        labels = labels * dist.get_world_size() + dist.get_rank()
    rows, kernel = _packed(embeddings, order, temperature, normalize, precision)
    travel = _Travel(len(rows), rows.device, ring)
    statistics, positives, negatives = _Statistics.apply(rows, labels, travel, kernel)
    p, n, linear = statistics
    losses, anchors = reference.losses_of(p, n, linear, positives, negatives, form)
    losses = losses.to(rows.dtype)
    return losses.new_zeros(len(embeddings)).index_put((order,), losses), torch.zeros(
        len(embeddings), dtype=torch.bool, device=order.device
    ).index_put((order,), anchors)


def gathered_cross_view_loss(
    op: str,
    first: Tensor,  # [N, D]
    second: Tensor,  # [N, D]
    temperature: float,
    form: str,
    symmetric: bool,
    normalize: bool,
    ring: bool,
    precision: str,
) -> Tensor:  # []
    """The mean loss of this rank's pairs, each of which meets the other view's rows of all ranks."""
    first, second = _permitted(op, first, second)
    pairs = torch.arange(len(first), device=first.device)
    (rows, kernel), (others, _) = (_packed(x, pairs, temperature, normalize, precision) for x in (first, second))
    travel = _Travel(len(pairs), pairs.device, ring)
    labels = pairs * dist.get_world_size() + dist.get_rank()
    positives, negatives = torch.ones_like(pairs), torch.full_like(pairs, sum(travel.counts) - 1)
    ways = _CrossStatistics.apply(rows, others, labels, travel, kernel, symmetric)
    losses = torch.stack([reference.losses_of(p, n, linear, positives, negatives, form)[0] for p, n, linear in ways])
    return (losses.sum() / max(1, losses.numel())).to(rows.dtype)


def _permitted(op: str, *embeddings: Tensor) -> Parts:
    """The embeddings, whose loss has one derivative; errors where there can be no loss."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{op}: gather needs torch.distributed; call torch.distributed.init_process_group first, or pass gather=False"
        )
    if under_transforms():
        raise NotImplementedError(f"{op}: gather does not work under torch.func (grad, vmap, jvp); pass gather=False")
    # What comes from the other ranks, and the statistics, are constants to the backward pass: a second derivative would lack terms.
    message = f"{op}: gather has no second derivative and no forward mode; pass gather=False"
    return [first_order(x, message) for x in embeddings]


def _packed(
    embeddings: Tensor,  # [N, D]
    order: Tensor,  # [R]
    temperature: float,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, _Kernel]:  # rows [R, C], and what multiplies them
    if backend.native_serves(embeddings.device):
        rows = _calls.call("contrastive_pack", embeddings.unsqueeze(-1), order, normalize)[0]
        number = ("highest", "high", "medium").index(precision)
        return rows, _NativeKernel(embeddings.shape[1], temperature, normalize, number)
    return reference.prepared(embeddings, normalize)[order], _ReferenceKernel(temperature)


def _of_nothing(rows: Tensor) -> Tensor:  # [R, C] -> [3, R] float64
    """p, n and l over no columns."""
    statistics = torch.zeros(3, len(rows), dtype=torch.float64, device=rows.device)
    statistics[:2] = -torch.inf
    return statistics


def _joined(statistics: Tensor, part: Tensor) -> Tensor:  # [3, R], [3, R] -> [3, R]
    return torch.stack([*torch.logaddexp(statistics[:2], part[:2]), statistics[2] + part[2]])


def _travelling(
    exact: Tensor, grads: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:  # [3, R], [3, R] -> the same
    """The statistics, and the coefficients of the derivative by them: weights are coefficient exp(s - statistic)."""
    statistics = exact.to(dtype)
    lost = (statistics[:2].double() - exact[:2]).exp()
    by_log = torch.where(grads[:2] == 0, 0.0, grads[:2] * lost)
    return statistics, torch.cat([by_log, grads[2:]]).to(dtype)


class _Statistics(torch.autograd.Function):
    """p, n and l of every row over the columns of all ranks, and how many positives and negatives it has."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, labels: Tensor, travel: _Travel, kernel: _Kernel) -> tuple[Tensor, ...]:
        statistics = _of_nothing(rows)
        positives = negatives = torch.zeros_like(labels)
        for own, (columns, column_labels) in travel.round([rows, labels]):
            ranges = class_ranges(labels, column_labels, own)
            statistics = _joined(statistics, kernel.statistics(rows, columns, ranges))
            in_class = (ranges[:, 1] - ranges[:, 0]).long()
            positives = positives + in_class - int(own)
            negatives = negatives + len(columns) - in_class
        ctx.save_for_backward(rows, labels, statistics)
        ctx.travel, ctx.kernel = travel, kernel
        ctx.mark_non_differentiable(positives, negatives)
        return statistics, positives, negatives

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, labels, exact = ctx.saved_tensors
        mine = _travelling(exact, grads[0], rows.dtype)
        grad_rows = torch.zeros_like(rows)
        for own, (columns, column_labels, *theirs) in ctx.travel.round([rows, labels, *(x.T for x in mine)]):
            ranges = class_ranges(labels, column_labels, own)
            grad_rows += ctx.kernel.gradient(rows, columns, ranges, mine, [x.T.contiguous() for x in theirs])
        return grad_rows, None, None, None


class _CrossStatistics(torch.autograd.Function):
    """p, n and l of every row of the first view over the second views of all ranks; if ``symmetric`` also the other way round."""

    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor, labels: Tensor, travel: _Travel, kernel: _Kernel, symmetric: bool
    ) -> tuple[Tensor, ...]:
        rows, others = ([first, second], [second, first]) if symmetric else ([first], [second])
        ways = [_of_nothing(first) for _ in rows]
        for _, (*columns, column_labels) in travel.round([*others, labels]):
            ranges = class_ranges(labels, column_labels, own=False)
            for way, views in enumerate(zip(rows, columns, strict=True)):
                ways[way] = _joined(ways[way], kernel.statistics(*views, ranges))
        ctx.save_for_backward(first, second, labels, *ways)
        ctx.travel, ctx.kernel = travel, kernel
        return tuple(ways)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first, second, labels, *ways = ctx.saved_tensors
        if len(ways) == 1:  # the second view's rows are no anchors
            ways, grads = [*ways, _of_nothing(second)], (*grads, torch.zeros_like(grads[0]))
        of_first, of_second = (_travelling(*both, first.dtype) for both in zip(ways, grads, strict=True))
        grad_first, grad_second = torch.zeros_like(first), torch.zeros_like(second)
        mine = [first, second, labels, *(x.T for x in (*of_first, *of_second))]
        for _, (firsts, seconds, column_labels, *sent) in ctx.travel.round(mine):
            ranges = class_ranges(labels, column_labels, own=False)
            theirs = [x.T.contiguous() for x in sent]
            grad_first += ctx.kernel.gradient(first, seconds, ranges, of_first, theirs[2:])
            grad_second += ctx.kernel.gradient(second, firsts, ranges, of_second, theirs[:2])
        return grad_first, grad_second, None, None, None, None


def class_ranges(labels: Tensor, column_labels: Tensor, own: bool) -> Tensor:  # [R], [M] sorted -> [R, 3] int32
    """For every row the columns of its class, and the column that is the row itself: its own place among its rank's rows, else -1."""
    begin = torch.searchsorted(column_labels, labels)
    end = torch.searchsorted(column_labels, labels, right=True)
    itself = torch.arange(len(labels), device=labels.device) if own else torch.full_like(begin, -1)
    return torch.stack([begin, end, itself], dim=1).to(torch.int32)


class _Kernel:
    """What a pair of row and column blocks needs."""

    def statistics(self, rows: Tensor, columns: Tensor, ranges: Tensor) -> Tensor:  # [3, R] float64
        raise NotImplementedError

    def gradient(
        self, rows: Tensor, columns: Tensor, ranges: Tensor, own: Sequence[Tensor], other: Sequence[Tensor]
    ) -> Tensor:  # [R, C]
        raise NotImplementedError


class _NativeKernel(_Kernel):
    def __init__(self, channels: int, temperature: float, unit: bool, precision: int) -> None:
        self.settings = (channels, temperature, unit)
        self.precision = precision

    def statistics(self, rows: Tensor, columns: Tensor, ranges: Tensor) -> Tensor:
        groups = self._groups(rows, columns)
        outputs = _calls.call(
            "contrastive_forward", rows, columns, groups, ranges, None, *self.settings, 0, self.precision
        )
        statistics: Tensor = outputs[2].double()
        if len(statistics) == 3:
            return statistics
        tops = statistics[3:] * math.log(2)  # p, n and l come less these
        positives = ranges[:, 1] - ranges[:, 0] - ((ranges[:, 2] >= ranges[:, 0]) & (ranges[:, 2] < ranges[:, 1])).int()
        return statistics[:3] + torch.stack([*tops, positives * tops[0]])

    def gradient(
        self, rows: Tensor, columns: Tensor, ranges: Tensor, own: Sequence[Tensor], other: Sequence[Tensor]
    ) -> Tensor:
        groups = self._groups(rows, columns)
        own, other = ((self._kept(rows, statistics), coefficients) for statistics, coefficients in (own, other))
        grad: Tensor = _calls.call(
            "contrastive_backward", rows, columns, groups, ranges, *own, *other, *self.settings, self.precision
        )
        return grad

    @staticmethod
    def _kept(rows: Tensor, statistics: Tensor) -> Tensor:
        """As contrastive_forward returns them; of l nothing but its place is needed."""
        if numbers_kept(rows) == 3:
            return statistics
        logs = statistics[:2].double()
        tops = torch.where(logs.isfinite(), logs / math.log(2), 0.0).to(rows.dtype)
        rest = logs - tops.double() * math.log(2)
        return torch.cat([rest.to(rows.dtype), torch.zeros_like(tops[:1]), tops])

    @staticmethod
    def _groups(rows: Tensor, columns: Tensor) -> Tensor:
        R, M = len(rows), len(columns)
        return torch.tensor([[0, R, R, 0, M, M]], dtype=torch.int32, device=rows.device)


class _ReferenceKernel(_Kernel):
    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def _pairs(self, rows: Tensor, columns: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        column = torch.arange(len(columns), device=rows.device)
        same = (column >= ranges[:, :1]) & (column < ranges[:, 1:2])
        with without_autocast(rows.device.type):
            s = rows @ columns.T / self.temperature
        return s, same & (column != ranges[:, 2:]), ~same

    def statistics(self, rows: Tensor, columns: Tensor, ranges: Tensor) -> Tensor:
        s, positive, negative = self._pairs(rows, columns, ranges)
        s = s.double()
        linear = torch.where(positive, s, 0.0).sum(1)
        return torch.stack([reference.masked_logsumexp(s, positive), reference.masked_logsumexp(s, negative), linear])

    def gradient(
        self, rows: Tensor, columns: Tensor, ranges: Tensor, own: Sequence[Tensor], other: Sequence[Tensor]
    ) -> Tensor:
        s, positive, negative = self._pairs(rows, columns, ranges)
        s = s.double()
        H = torch.zeros_like(s)
        for (statistics, coefficients), axis in ((own, 1), (other, 0)):
            p, n, _ = statistics.unsqueeze(1 + axis)
            dp, dn, dl = coefficients.unsqueeze(1 + axis)
            H = H + torch.where(positive, dp * _weight(s, p) + dl, 0.0) + torch.where(negative, dn * _weight(s, n), 0.0)
        with without_autocast(rows.device.type):
            return H.to(columns.dtype) @ columns / self.temperature


def _weight(s: Tensor, log_sum: Tensor) -> Tensor:
    """exp(s - log_sum), 0 where nothing was summed."""
    return torch.where(log_sum == -torch.inf, 0.0, (s - log_sum).exp())


class _Travel:
    """Brings the tensors of all ranks by, one rank's after the other, this rank's first."""

    def __init__(self, count: int, device: torch.device, ring: bool) -> None:
        self.ring, self.rank, self.world = ring, dist.get_rank(), dist.get_world_size()
        own = torch.tensor([count], device=device)
        counts = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(counts, own)
        self.counts = [int(count) for count in counts]

    def round(self, mine: Sequence[Tensor]) -> Iterator[tuple[bool, Parts]]:
        """Pairs of whether it is this rank's own part, and the part: tensors like ``mine``, with the other rank's number of rows."""
        yield from (self._passed_round if self.ring else self._gathered)([part.contiguous() for part in mine])

    def _gathered(self, mine: Parts) -> Iterator[tuple[bool, Parts]]:
        most = max(self.counts)
        everyone = []
        for part in mine:
            padded = part.new_zeros(most, *part.shape[1:])
            padded[: len(part)] = part
            parts = [torch.empty_like(padded) for _ in range(self.world)]
            dist.all_gather(parts, padded)
            everyone.append(parts)
        for step in range(self.world):
            rank = (self.rank + step) % self.world
            yield step == 0, [parts[rank][: self.counts[rank]].contiguous() for parts in everyone]

    def _passed_round(self, mine: Parts) -> Iterator[tuple[bool, Parts]]:
        """The next part is on its way while the caller works on the present one."""
        present = mine
        for step in range(self.world):
            following, requests = present, []
            if step + 1 < self.world:
                count = self.counts[(self.rank - step - 1) % self.world]
                following = [part.new_empty(count, *part.shape[1:]) for part in present]
                to, source = (self.rank + 1) % self.world, (self.rank - 1) % self.world
                moves = [dist.P2POp(dist.isend, part, to) for part in present]
                moves += [dist.P2POp(dist.irecv, part, source) for part in following]
                requests = dist.batch_isend_irecv(moves)
            yield step == 0, present
            for request in requests:
                request.wait()
            present = following
