# SPDX-License-Identifier: MIT
"""Nearest neighbours by the definition, in NumPy: float64 sums over the columns one after the other, then a sort by (distance, index)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from protokernels import nearest

Array = np.ndarray


def as_array(x: Tensor) -> Array:
    return x.detach().cpu().double().numpy()


def distances(queries: Tensor, bank: Tensor, metric: str) -> Array:  # [N, M]
    q, b = as_array(queries), as_array(bank)
    total = np.zeros((len(q), len(b)))
    with np.errstate(all="ignore"):
        for j in range(q.shape[1]):
            x, y = q[:, j, None], b[None, :, j]
            total = total + (x * y if metric == "cosine" else (x - y) * (x - y))
        if metric == "sqeuclidean":
            return total
        norms = [np.sqrt(sum((a[:, j] * a[:, j] for j in range(a.shape[1])), np.zeros(len(a)))) for a in (q, b)]
        zero = (norms[0][:, None] <= 1e-12) | (norms[1][None] <= 1e-12)
        cosine = np.where(zero, 0.0, total / np.where(zero, 1.0, norms[0][:, None] * norms[1][None]))
        return np.where(cosine > 1.0, 0.0, 1.0 - cosine)


def expected(queries: Tensor, bank: Tensor, k: int, metric: str) -> tuple[Array, Array]:
    all_of_them = distances(queries, bank, metric)
    columns = np.broadcast_to(np.arange(len(bank)), all_of_them.shape)
    order = np.lexsort((columns, all_of_them, np.isnan(all_of_them)))[:, :k]
    wide = torch.float64 in (queries.dtype, bank.dtype)
    with np.errstate(over="ignore"):
        return np.take_along_axis(all_of_them, order, 1).astype(np.float64 if wide else np.float32), order


def check(queries: Tensor, bank: Tensor, k: int, metric: str) -> None:
    """The op's result is the definition's, bit for bit."""
    found = nearest(queries, bank, k, metric=metric)  # type: ignore[arg-type]
    values, indices = expected(queries, bank, k, metric)
    assert found.distances.shape == found.indices.shape == (len(queries), k)
    assert found.indices.dtype == torch.int64 and found.distances.dtype == torch.from_numpy(values).dtype
    np.testing.assert_array_equal(found.indices.cpu().numpy(), indices)
    np.testing.assert_array_equal(found.distances.cpu().numpy(), values)


def draw(N: int, M: int, D: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, D, generator=generator, dtype=torch.float64).to(dtype) for n in (N, M))  # type: ignore[return-value]
