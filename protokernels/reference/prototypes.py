# SPDX-License-Identifier: MIT
"""Prototypes in plain PyTorch: soft assignment, per-cluster sums, moving-average blend.

With unit vectors for ``cosine`` and the vectors themselves for ``dot``:

    s_ik = <z_i, q_k> / temperature          c_i = softmax_k(s_ik)          H_i = -sum_k c_ik log c_ik
    q_k <- new_weight * mean{z_i : label_i = k} + (1 - new_weight) * q_k    if any label_i = k

Half-precision inputs are computed in float32. Everything is differentiable by autograd except labels, sums and counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._precision import without_autocast

NORM_FLOOR = 1e-12
"""Vectors no longer than this count as zero: uniform assignment, zero gradient."""


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: no op accumulates in less."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def unit_vectors(x: Tensor) -> Tensor:  # x: [N, D] -> [N, D]
    """``x / |x|`` by rows; rows no longer than ``NORM_FLOOR`` become zero and pass no gradient."""
    squared = x.double().square().sum(-1, keepdim=True)
    nonzero = ~(squared <= NORM_FLOOR**2)  # a NaN row stays NaN
    norm = torch.where(nonzero, squared, 1.0).sqrt()
    return torch.where(nonzero, (x / norm).to(x.dtype), 0.0)


def scores(
    z: Tensor,  # [B, D]
    prototypes: Tensor,  # [K, D]
    temperature: float | Tensor,
    similarity: str,
) -> Tensor:  # [B, K]
    dtype = compute_dtype(z, prototypes)
    z, prototypes = z.to(dtype), prototypes.to(dtype)
    if similarity == "cosine":
        z, prototypes = unit_vectors(z), unit_vectors(prototypes)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype).reshape(())
    with without_autocast(z.device.type):
        return z @ prototypes.T / temperature


def soft_assign(
    z: Tensor,  # [B, D]
    prototypes: Tensor,  # [K, D]
    temperature: float | Tensor,
    similarity: str,
) -> tuple[Tensor, Tensor, Tensor]:  # assignment [B, K], labels [B], entropy [B] in nats
    s = scores(z, prototypes, temperature, similarity)
    log_c = torch.log_softmax(s, dim=-1)
    c = log_c.exp()
    entropy = -torch.where(c > 0, c * log_c, c * 0).sum(-1)  # c * 0 keeps a NaN row NaN
    return c, s.argmax(dim=-1), entropy


def sample_labels(
    assignment: Tensor,  # [B, K], rows sum to 1
    uniform: Tensor,  # [B], in [0, 1)
) -> Tensor:  # [B] int64
    """Categorical sampling by the inverse distribution function: the first k whose cumulative probability exceeds ``uniform``."""
    cumulative = assignment.cumsum(-1)
    below = cumulative <= (uniform.to(cumulative.dtype) * cumulative[:, -1]).unsqueeze(-1)
    last = (
        assignment.shape[1] - 1 - (assignment > 0).flip(-1).int().argmax(-1)
    )  # the last with a weight: where rounding leaves none above
    return torch.minimum(below.sum(-1), last)


def accumulate(
    z: Tensor,  # [B, D]
    labels: Tensor,  # [B] int64; negative labels are ignored
    num_prototypes: int,
    skip_nonfinite: bool,
) -> tuple[Tensor, Tensor]:  # sums [K, D] float64, counts [K] int64
    if not torch.compiler.is_compiling() and labels.device.type == "cpu" and bool((labels >= num_prototypes).any()):
        raise IndexError(f"prototypes: labels must be below {num_prototypes}; got {int(labels.max())}")
    return sums_and_counts(z, labels, num_prototypes, skip_nonfinite)


def sums_and_counts(
    z: Tensor,  # [B, D]
    labels: Tensor,  # [B] int64, below num_prototypes; negative labels are ignored
    num_prototypes: int,
    skip_nonfinite: bool,
) -> tuple[Tensor, Tensor]:  # sums [K, D] float64, counts [K] int64
    """What ``accumulate`` gives, without a look at the labels, which ``torch.func.vmap`` would not allow."""
    keep = labels >= 0
    if skip_nonfinite:
        keep = keep & z.isfinite().all(-1)
    target = torch.where(keep, labels, num_prototypes)  # ignored rows go to a row that is cut off
    sums = z.new_zeros(num_prototypes + 1, z.shape[1], dtype=torch.float64)
    sums = sums.index_add(0, target, z.detach().double())
    counts = torch.zeros(num_prototypes + 1, dtype=torch.int64, device=z.device)
    counts = counts.index_add(0, target, torch.ones_like(target))
    return sums[:num_prototypes], counts[:num_prototypes]


def blend(
    prototypes: Tensor,  # [K, D]
    sums: Tensor,  # [K, D] float64
    counts: Tensor,  # [K] int64
    new_weight: float,
) -> Tensor:  # [K, D]
    mean = sums / counts.clamp(min=1).unsqueeze(-1)
    old = prototypes.detach()
    blended = new_weight * mean + (1.0 - new_weight) * old.double()
    return torch.where((counts > 0).unsqueeze(-1), blended.to(old.dtype), old)
