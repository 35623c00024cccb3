# SPDX-License-Identifier: MIT
"""k nearest neighbours, exactly ranked, without a matrix of all distances.

The equations stand in ``protokernels.reference.nearest`` and ``csrc/ops/nearest.h``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .. import _native, backend
from ..reference import nearest as reference
from ..reference import prototypes as reference_prototypes
from . import _calls
from ._checks import check_choice, check_matrix, check_same_device, describe

Metric = Literal["sqeuclidean", "cosine"]
METRICS = get_args(Metric)
MOST_CUDA = 64
"""The largest k that the CUDA kernels take; beyond it the reference runs."""


MOST_CENTERS = 2048
"""Up to so many centers the CPU assigns and sums in one pass; more of them are a bank."""


class NearestResult(NamedTuple):
    """What ``nearest`` returns; unpacks like scikit-learn's ``kneighbors``."""

    distances: Tensor
    """[N, k] ascending; float64 if an input is float64, else float32."""
    indices: Tensor
    """[N, k] int64, rows of the bank."""


def nearest(
    queries: Tensor,  # [N, D]
    bank: Tensor,  # [M, D]
    k: int = 5,
    *,
    metric: Metric = "sqeuclidean",
) -> NearestResult:
    """Finds the k rows of ``bank`` that are nearest to each query.

        sqeuclidean    d(q, b) = sum_j (q_j - b_j)^2
        cosine         d(q, b) = 1 - <q, b> / (|q| |b|)

    In plain PyTorch: ``torch.cdist(queries, bank).square().topk(k, largest=False)``, but exact, and without the N x M matrix: a
    fused product and selection leaves little more than k candidates that rounding cannot rule out, and those are ranked by the float64
    sum of their true differences. Of rows at equal distance the one with the lower index is the nearer. Every processor, device and
    number of threads gives the same indices and distances.

    No gradient: distances come detached. For a differentiable distance gather the neighbours,
    ``(queries[:, None] - bank[indices]).square().sum(-1)``.

    Args:
        queries: float32, float64, bfloat16 or float16, any strides.
        bank: the rows to search; may be of another floating-point type.
        k: number of neighbours, at most M.
        metric: ``"sqeuclidean"``, or ``"cosine"``, in which a vector no longer than 1e-12 is at distance 1 from everything.

    Returns:
        ``distances`` [N, k], squared for ``sqeuclidean``, ascending, float64 if queries or bank are, else float32, and ``indices``
        [N, k]. A distance that is NaN, because of NaN or infinity in a row, comes after all others. Sums of squares are float64: rows
        of float32, bfloat16 and float16 never leave its range, float64 rows longer than 1.3e154 do. Their squared distances are
        infinite and tie, their cosine distances NaN or 1; scale such data.

    Raises:
        TypeError: no floating-point tensors, or k is no integer.
        ValueError: wrong shapes or devices, k not in 1..M, unknown metric.

    Example:
        >>> import torch
        >>> from protokernels import nearest
        >>> bank = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0], [-1.0, 0.0]])
        >>> distances, indices = nearest(torch.tensor([[0.0, 0.0]]), bank, k=3)
        >>> distances.tolist(), indices.tolist()
        ([[0.0, 1.0, 1.0]], [[0, 2, 3]])
    """
    check_matrix("nearest", "queries", queries, "[N, D]")
    check_matrix("nearest", "bank", bank, "[M, D]")
    check_same_device("nearest", "queries", queries, "bank", bank)
    if queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"nearest: queries [N, D] and bank [M, D] must have the same D; got {describe(queries)} and {describe(bank)}"
        )
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"nearest: k must be an integer; got {describe(k)}")
    if not 1 <= k <= bank.shape[0]:
        raise ValueError(f"nearest: k must lie in 1..{bank.shape[0]}, the rows of the bank; got {k}")
    check_choice("nearest", "metric", metric, METRICS)
    if backend.native_serves(queries.device) and (queries.device.type != "cuda" or k <= MOST_CUDA):
        found = _calls.call("nearest_search", queries.detach(), bank.detach(), k, metric == "cosine")
    else:
        found = reference.nearest(queries, bank, k, metric)
    return NearestResult(*found)


class Assignment(NamedTuple):
    """What ``assign`` returns."""

    labels: Tensor
    """[N] int64: the nearest center, of equally near ones the first."""
    sums: Tensor | None
    """[K, D] float64: the sum of each cluster's rows, as ``update_prototypes`` takes it. None unless asked for."""
    counts: Tensor | None
    """[K] int64: rows of each cluster. None unless asked for."""
    distances: Tensor | None
    """[N]: squared distances to the own center, as ``nearest`` gives them. May be None unless asked for."""


def assign(
    x: Tensor,  # [N, D]
    centers: Tensor,  # [K, D]
    *,
    with_sums: bool = False,
    with_distances: bool = False,
) -> Assignment:
    """An iteration of k-means: ``nearest(x, centers, 1)`` and the sums of the clusters.

    On the CPU one pass over the rows does both, and only a row that the filter leaves undecided is measured in float64; elsewhere, and
    for many centers, it is ``nearest`` and the segmented sum of ``update_prototypes``. Both give the same bits.

    Args:
        x: rows, float32 or float64, any strides.
        centers: float32 or float64, on the same device; of another type than ``x`` they take two passes.
        with_sums: whether sums and counts are wanted.
        with_distances: whether distances are wanted. They may come unasked where they cost nothing.
    """
    K = centers.shape[0]
    fits = x.dtype == centers.dtype and K <= MOST_CENTERS and x.shape[1] > 0
    if fits and x.device.type == "cpu" and backend.native_serves(x.device):
        labels, sums, counts, distances = _calls.call("nearest_assign", x, centers, with_sums, with_distances)
        if not with_sums:
            sums = counts = None
        return Assignment(labels, sums, counts, distances if with_distances else None)
    found = nearest(x, centers, 1)
    labels = found.indices[:, 0]
    if not with_sums:
        return Assignment(labels, None, None, found.distances[:, 0])
    if backend.native_serves(x.device):
        sums, counts = _calls.call("prototypes_accumulate", x, labels, K, False)
    else:
        sums, counts = reference_prototypes.accumulate(x, labels, K, False)
    return Assignment(labels, sums, counts, found.distances[:, 0])


def closer_to_candidates(
    x: Tensor,  # [N, D]
    candidates: Tensor,  # [K, D]
    closest: Tensor,  # [N]
) -> tuple[Tensor, Tensor]:
    """A round of k-means++: ``closer[k, i] = min(closest[i], |x_i - candidates_k|^2)``, [K, N], and its sums over i, [K] float64.

    The CPU's kernel gives the same bits on every processor; on CUDA the operator is the reference.

    Args:
        x: rows, float32 or float64, any strides, at least one column.
        candidates: rows that may become the next center, of the same type.
        closest: squared distance of each row to the closest center so far, infinity where there is none.
    """
    if backend.native_serves(x.device):
        closer, totals = _calls.call("nearest_seed", x, candidates, closest)
        return closer, totals
    return reference.closer_to_candidates(x, candidates, closest)


def _assign_in_torch(
    x: Tensor, centers: Tensor, with_sums: bool, with_distances: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator on CUDA, of the two kernels it stands for."""
    distances, indices = _calls.call("nearest_search", x, centers, 1, False)
    labels = indices.flatten()
    if with_sums:
        sums, counts = _calls.call("prototypes_accumulate", x, labels, centers.shape[0], False)
    else:
        sums = x.new_empty(0, x.shape[1], dtype=torch.float64)
        counts = x.new_empty(0, dtype=torch.int64)
    return labels, sums, counts, distances.flatten() if with_distances else x.new_empty(0)


def _fake_search(queries: Tensor, bank: Tensor, k: int, cosine: bool) -> tuple[Tensor, Tensor]:
    wide = torch.float64 in (queries.dtype, bank.dtype)
    distances = queries.new_empty(queries.shape[0], k, dtype=torch.float64 if wide else torch.float32)
    return distances, queries.new_empty(queries.shape[0], k, dtype=torch.int64)


def _fake_assign(
    x: Tensor, centers: Tensor, with_sums: bool, with_distances: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, D, K = x.shape[0], x.shape[1], centers.shape[0] if with_sums else 0
    labels = x.new_empty(N, dtype=torch.int64)
    sums, counts = x.new_empty(K, D, dtype=torch.float64), x.new_empty(K, dtype=torch.int64)
    return labels, sums, counts, x.new_empty(N if with_distances else 0)


def _fake_seed(x: Tensor, candidates: Tensor, closest: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(candidates), len(x)), x.new_empty(len(candidates), dtype=torch.float64)


if _native.LIBRARY is not None:
    torch.library.impl("protokernels::nearest_assign", "CUDA")(_assign_in_torch)
    torch.library.impl("protokernels::nearest_seed", "CUDA")(reference.closer_to_candidates)
_calls.register("nearest_search", _fake_search)
_calls.register("nearest_assign", _fake_assign)
_calls.register("nearest_seed", _fake_seed)
