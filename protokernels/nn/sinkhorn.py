# SPDX-License-Identifier: MIT
"""Optimal transport as modules: a loss between clouds of features, and the balanced assignment of samples to prototypes."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops import _checks
from ..ops import _sinkhorn_problem as problems
from ..ops import sinkhorn as ops
from ..ops._sinkhorn_features import COSTS, Cost, clouds
from ..reference.sinkhorn import cost_matrix

Value = Literal["transport", "entropic", "divergence"]
Reduction = Literal["mean", "sum", "none"]


class SinkhornLoss(nn.Module):
    """Optimal transport between two clouds of features, or for given costs, as a loss.

    ``forward(x, y)`` with features [B, N, D] and [B, M, D] (or one pair without B); with ``cost=None`` instead ``forward(cost)`` with
    costs [B, N, M]. Masses and masks go by name: ``forward(x, y, a=a, row_mask=mask)``.

    Args:
        cost: ``"cosine"`` or ``"sqeuclidean"`` between features; None: the costs are given.
        value: what the loss is. ``"transport"``: <P, C>, by :func:`protokernels.sinkhorn`. ``"entropic"``: with the entropy (may be
            negative). ``"divergence"``: :func:`protokernels.sinkhorn_divergence`, which is 0 for equal clouds; between features, without
            ``marginal_penalty`` and ``annealing``.
        gradient: as in :func:`protokernels.sinkhorn`; default ``"unrolled"``, for the divergence ``"envelope"``. With ``"envelope"``
            features are never turned into a matrix of costs, and the value must be one that has this gradient (not ``"transport"``).
        epsilon, num_iters, tol, marginal_penalty, annealing: as in :func:`protokernels.sinkhorn`.
        reduction: over the batch: ``"mean"``, ``"sum"`` or ``"none"``. The mean over no problem is 0.

    Shape: [B, N, D], [B, M, D] -> [], or [B] without reduction.

    Example:
        >>> import torch
        >>> from protokernels.nn import SinkhornLoss
        >>> loss = SinkhornLoss(num_iters=20)
        >>> x = torch.randn(4, 49, 16, requires_grad=True)
        >>> loss(x, torch.randn(4, 49, 16)).backward()
        >>> x.grad.shape
        torch.Size([4, 49, 16])
    """

    def __init__(
        self,
        epsilon: float = 0.05,
        num_iters: int = 100,
        *,
        cost: Cost | None = "cosine",
        value: Value = "transport",
        gradient: problems.Gradient | None = None,
        tol: float = 0.0,
        marginal_penalty: problems.Penalty | None = None,
        annealing: float | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        if cost is not None and (not isinstance(cost, str) or cost not in COSTS):
            raise ValueError(f"SinkhornLoss: cost must be 'cosine', 'sqeuclidean' or None; got {cost!r}")
        if not isinstance(value, str) or value not in ("transport", "entropic", "divergence"):
            raise ValueError(f"SinkhornLoss: value must be 'transport', 'entropic' or 'divergence'; got {value!r}")
        if not isinstance(reduction, str) or reduction not in ("mean", "sum", "none"):
            raise ValueError(f"SinkhornLoss: reduction must be 'mean', 'sum' or 'none'; got {reduction!r}")
        if gradient is None:
            gradient = "envelope" if value == "divergence" else "unrolled"
        problems.check_gradient("SinkhornLoss", gradient, problems.penalties("SinkhornLoss", marginal_penalty))
        if not isinstance(epsilon, Tensor):  # one with a value for every problem is checked with them
            _checks.check_real("SinkhornLoss", "epsilon", epsilon)
            if not 0 < epsilon <= _checks.LARGEST:
                raise ValueError(f"SinkhornLoss: epsilon must be positive and finite; got {epsilon}")
        problems.check_iterations("SinkhornLoss", num_iters, tol)
        problems.check_annealing("SinkhornLoss", annealing)
        if value == "transport" and gradient == "envelope":
            raise ValueError(
                "SinkhornLoss: gradient='envelope' is the gradient of value='entropic' or 'divergence'; "
                "use one of them, or gradient='unrolled' or 'implicit'"
            )
        if value == "divergence" and (
            cost is None or gradient != "envelope" or marginal_penalty is not None or annealing is not None
        ):
            raise ValueError(
                "SinkhornLoss: value='divergence' is between features, with gradient='envelope', "
                "without marginal_penalty and annealing"
            )
        self.epsilon = epsilon
        self.num_iters = num_iters
        self.cost = cost
        self.value = value
        self.gradient: problems.Gradient = gradient
        self.tol = tol
        self.marginal_penalty = marginal_penalty
        self.annealing = annealing
        self.reduction = reduction

    def forward(
        self,
        x: Tensor,  # [B, N, D], or costs [B, N, M]
        y: Tensor | None = None,  # [B, M, D]
        *,
        a: Tensor | None = None,  # [B, N]
        b: Tensor | None = None,  # [B, M]
        row_mask: Tensor | None = None,  # [B, N] bool
        column_mask: Tensor | None = None,  # [B, M] bool
    ) -> Tensor:  # [] or [B]
        if (y is None) != (self.cost is None):
            expected = "costs alone" if self.cost is None else "features x and y"
            raise TypeError(f"SinkhornLoss: with cost={self.cost!r}, forward takes {expected}")
        value = self._value(x, y, a, b, row_mask, column_mask)
        if self.reduction == "none":
            return value
        total = value.sum()
        return total if self.reduction == "sum" else total / max(1, value.numel())

    def extra_repr(self) -> str:
        return (
            f"epsilon={self.epsilon}, num_iters={self.num_iters}, cost={self.cost!r}, value={self.value!r}, "
            f"gradient={self.gradient!r}"
        )

    def _value(
        self,
        x: Tensor,
        y: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        row_mask: Tensor | None,
        column_mask: Tensor | None,
    ) -> Tensor:
        if self.value == "divergence":
            assert y is not None and self.cost is not None
            return ops.sinkhorn_divergence(
                x,
                y,
                a,
                b,
                cost=self.cost,
                epsilon=self.epsilon,
                num_iters=self.num_iters,
                tol=self.tol,
                row_mask=row_mask,
                column_mask=column_mask,
            )
        if y is not None and self.gradient == "envelope":
            assert self.cost is not None
            result = ops.sinkhorn_features(
                x,
                y,
                a,
                b,
                cost=self.cost,
                epsilon=self.epsilon,
                num_iters=self.num_iters,
                tol=self.tol,
                row_mask=row_mask,
                column_mask=column_mask,
                marginal_penalty=self.marginal_penalty,
                annealing=self.annealing,
            )
        else:
            if y is not None:
                assert self.cost is not None
                single, x, y = clouds("SinkhornLoss", x, y, self.cost)
                x, y = _without(x, row_mask), _without(y, column_mask)
                x = cost_matrix(x, y, self.cost)
                x = x.squeeze(0) if single else x
            result = ops.sinkhorn(
                x,
                a,
                b,
                epsilon=self.epsilon,
                num_iters=self.num_iters,
                tol=self.tol,
                gradient=self.gradient,
                row_mask=row_mask,
                column_mask=column_mask,
                marginal_penalty=self.marginal_penalty,
                annealing=self.annealing,
            )
        return result.transport_cost if self.value == "transport" else result.entropic_value


class SinkhornAssignment(nn.Module):
    """Balanced soft assignment of a batch of samples to K prototypes, as in SwAV (Caron et al., NeurIPS 2020).

    ``forward(scores)`` with scores [B, K], larger is closer, returns targets [B, K]: every row sums to 1, and every prototype
    gets about B / K samples (exactly, as iterations go on). It is the transport plan between prototypes and samples for the
    cost -scores, times B. SwAV computes exp(scores / epsilon), which overflows for unnormalised scores; here no score does.
    No gradient flows.

    Under ``torch.distributed`` the samples of all ranks are assigned together and every rank gets the rows of its own, as
    one process with the whole batch would; every rank must call ``forward`` equally often. In an iteration ranks exchange two
    numbers for every prototype, however many samples and ranks there are, and the host waits for nothing.

    Args:
        epsilon: sharpness, in units of the scores; SwAV: 0.05 for cosine scores.
        num_iters: iterations; SwAV: 3.
        process_group: ranks that share the samples; default: all of them.

    Shape: [B, K] -> [B, K], float32 for half precision.

    Example:
        >>> import torch
        >>> from protokernels.nn import SinkhornAssignment
        >>> targets = SinkhornAssignment(epsilon=0.1)(torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.7, 0.2], [0.6, 0.4]]))
        >>> [[round(t, 2) for t in row] for row in targets.tolist()]
        [[0.95, 0.05], [0.5, 0.5], [0.5, 0.5], [0.05, 0.95]]
    """

    def __init__(
        self,
        epsilon: float = 0.05,
        num_iters: int = 3,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _checks.check_real("SinkhornAssignment", "epsilon", epsilon)
        _checks.check_whole("SinkhornAssignment", "num_iters", num_iters)
        if not epsilon > 0:
            raise ValueError(f"SinkhornAssignment: epsilon must be positive; got {epsilon}")
        if num_iters < 1:
            raise ValueError(f"SinkhornAssignment: num_iters must be at least 1; got {num_iters}")
        self.epsilon = epsilon
        self.num_iters = num_iters
        self.process_group = process_group

    @torch.no_grad()
    def forward(self, scores: Tensor) -> Tensor:  # [B, K] -> [B, K]
        if not isinstance(scores, Tensor) or scores.dtype not in _checks.FLOATING or not _checks.is_dense(scores):
            raise TypeError(
                f"SinkhornAssignment: scores must be a dense floating-point tensor [B, K]; got {_checks.describe(scores)}"
            )
        if scores.dim() != 2 or scores.shape[1] == 0:
            raise ValueError(f"SinkhornAssignment: scores must have shape [B, K] with K >= 1; got {list(scores.shape)}")
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1:
            return self._over_ranks(scores)
        if scores.shape[0] == 0:
            return scores
        result = ops.sinkhorn(-scores.T, epsilon=self.epsilon, num_iters=self.num_iters)
        return (result.plan.T * scores.shape[0]).contiguous()

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}, num_iters={self.num_iters}"

    def _over_ranks(self, scores: Tensor) -> Tensor:
        """The same iterations, up to factors that cancel: u_k = -log sum_j exp(x_jk + v_j) over the samples of all ranks, v_j likewise over
        prototypes, x = scores / epsilon. Float64, so that it does not show which rank held which sample."""
        x = scores.double() / self.epsilon
        v = x.new_zeros(x.shape[0], 1)
        for _ in range(self.num_iters):
            most = (x + v).amax(dim=0) if x.shape[0] else x.new_full(x.shape[1:], -torch.inf)
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.process_group)
            most.masked_fill_(most == -torch.inf, 0)  # nobody may have this prototype
            total = (x + v - most).exp().sum(dim=0)
            dist.all_reduce(total, group=self.process_group)
            u = torch.where(total > 0, -most - total.log(), 0)
            v = -torch.logsumexp(x + u, dim=1, keepdim=True)
            v.masked_fill_(v == torch.inf, 0)  # it may have no prototype
        return (x + u + v).exp().to(scores.dtype)


def _without(
    x: Tensor,  # [B, N, D]
    mask: Tensor | None,  # [B, N] or [N] bool
) -> Tensor:
    """Zeros for vectors that are absent, which may hold anything. A mask that does not fit is left to the checks of what comes."""
    if mask is None or mask.dtype is not torch.bool or mask.shape[-1:] != x.shape[1:2] or mask.dim() > 2:
        return x
    return torch.where(mask.unsqueeze(-1), x, 0.0)
