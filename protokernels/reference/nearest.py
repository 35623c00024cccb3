# SPDX-License-Identifier: MIT
"""Nearest neighbours in plain PyTorch, a block of distances at a time.

    sqeuclidean    d(q, b) = sum_j (q_j - b_j)^2
    cosine         d(q, b) = 1 - <q, b> / (|q| |b|), not below 0; 1 where a vector is no longer than ``NORM_FLOOR``

in float64, the sums over j = 0, 1, ... one after the other: that order is part of the definition (csrc/ops/nearest.h), because rows
at equal distance are ranked by their index, and whether two rows are equally far must not depend on how a sum was taken.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NORM_FLOOR = 1e-12
"""Vectors no longer than this count as zero: cosine distance 1 from everything."""
BLOCK_ENTRIES = 1 << 21
"""float64 distances held at a time: 16 MiB."""


def nearest(
    queries: Tensor,  # [N, D]
    bank: Tensor,  # [M, D]
    k: int,
    metric: str,
) -> tuple[Tensor, Tensor]:  # distances [N, k] ascending, float64 if an input is, else float32; indices [N, k] int64
    wide = torch.float64 in (queries.dtype, bank.dtype)
    queries, bank = queries.detach().double(), bank.detach().double()
    columns = bank.T.contiguous()  # [D, M]
    distances = queries.new_empty(len(queries), k, dtype=torch.float64 if wide else torch.float32)
    indices = queries.new_empty(len(queries), k, dtype=torch.int64)
    rows = max(1, BLOCK_ENTRIES // max(1, len(bank)))
    for start in range(0, len(queries), rows):
        block = slice(start, start + rows)
        ranked = _distances(queries[block], columns, metric).sort(dim=1, stable=True)  # NaN last, equals by index
        distances[block] = ranked.values[:, :k].to(distances.dtype)
        indices[block] = ranked.indices[:, :k]
    return distances, indices


def closer_to_candidates(
    x: Tensor,  # [N, D]
    candidates: Tensor,  # [K, D]
    closest: Tensor,  # [N] squared distances to the closest center so far
) -> tuple[Tensor, Tensor]:  # the same if candidate k became a center [K, N], and their sums [K] float64
    apart = torch.cdist(candidates, x, compute_mode="donot_use_mm_for_euclid_dist").square()  # equal rows are at 0
    closer = torch.minimum(closest, apart)
    return closer, row_sums(closer)


def row_sums(rows: Tensor) -> Tensor:  # [K, N] -> [K] float64
    """In an order that no number of threads changes: they share parts of a row, not the sum of a part."""
    padded = torch.nn.functional.pad(rows.double(), (0, -rows.shape[1] % 1024))
    parts = padded.reshape(len(rows), -1, 1024).sum(2) if rows.numel() else padded
    return parts.cumsum(1)[:, -1] if parts.shape[1] else parts.sum(1)


def _distances(queries: Tensor, columns: Tensor, metric: str) -> Tensor:  # [n, D], [D, M] -> [n, M]
    total = queries.new_zeros(queries.shape[0], columns.shape[1])
    for query, column in zip(queries.unbind(1), columns, strict=True):
        if metric == "cosine":
            total += query[:, None] * column
        else:
            difference = query[:, None] - column
            total += difference * difference
    if metric == "sqeuclidean":
        return total
    query_norms, bank_norms = _norms(queries.T)[:, None], _norms(columns)
    zero = (query_norms <= NORM_FLOOR) | (bank_norms <= NORM_FLOOR)
    cosine = torch.where(zero, 0.0, total / torch.where(zero, 1.0, query_norms * bank_norms))
    return (1.0 - cosine).clamp(min=0.0)  # NaN stays NaN


def _norms(columns: Tensor) -> Tensor:  # [D, n] -> [n]
    total = columns.new_zeros(columns.shape[1])
    for column in columns:
        total += column * column
    if total.device.type == "cpu":  # MKL's root, which torch calls there, misses the last bit now and then
        return torch.from_numpy(np.sqrt(total.numpy()))
    return total.sqrt()
