# SPDX-License-Identifier: MIT
"""Variance and covariance of embeddings over a batch, the two terms that keep a representation from collapsing.

A. Bardes, J. Ponce, Y. LeCun. VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning. ICLR
2022.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._checks import FLOATING, describe, is_dense
from ..reference._precision import without_autocast

Branch = Literal["auto", "gram", "covariance"]
VARIANCE_FLOOR = 1e-4  # added to the variance under the root


def variance_covariance_loss(
    embeddings: Tensor,  # [N, D]
    *,
    branch: Branch = "auto",
) -> tuple[Tensor, Tensor]:  # [], []
    """How far dimensions fall short of a standard deviation of 1, and how much they say the same.

        variance   = mean_d max(0, 1 - sqrt(Var_d + 1e-4))        covariance = sum_{i != j} Cov_ij^2 / D

    with the unbiased Var and Cov over the batch. With c the centred embeddings, sum_ij Cov_ij^2 is the squared norm of
    c^T c as well as of c c^T, over (N - 1)^2: for D > N the second form needs N x N numbers in place of D x D (at N = 64
    and D = 4096: 64 times fewer operations, 4096 times less memory).

    Args:
        embeddings: any floating point; half precision is computed in float32.
        branch: the form; ``"auto"``: ``"gram"`` (c c^T) if D > N, else ``"covariance"`` (c^T c).

    Returns:
        The two terms; both zero, with a zero gradient, for fewer than two embeddings.

    Raises:
        ValueError: another shape, dtype or branch.

    Example:
        >>> import torch
        >>> from protokernels.nn import variance_covariance_loss
        >>> variance, covariance = variance_covariance_loss(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
        >>> variance.item(), covariance.item()  # Var = Cov = 2; 2 * 2^2 / 2
        (0.0, 4.0)
    """
    if not isinstance(embeddings, Tensor) or not is_dense(embeddings) or embeddings.dtype not in FLOATING:
        raise ValueError(
            f"variance_covariance_loss: embeddings must be a dense floating-point tensor of shape [N, D]; got {describe(embeddings)}"
        )
    if embeddings.ndim != 2 or not embeddings.shape[1]:
        raise ValueError(
            "variance_covariance_loss: embeddings must be floating point of shape [N, D] with D at least 1; got "
            f"{describe(embeddings)}"
        )
    if not isinstance(branch, str) or branch not in get_args(Branch):
        raise ValueError(
            f"variance_covariance_loss: branch must be one of {', '.join(get_args(Branch))}; got {branch!r}"
        )
    z = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    N, D = z.shape
    if N < 2:
        nothing = z[:0].sum()
        return nothing, nothing
    with without_autocast(z.device.type):
        c = z - z.mean(dim=0)
        squares = c.square().sum(dim=0)  # (N - 1) Var
        variance = F.relu(1 - (squares / (N - 1) + VARIANCE_FLOOR).sqrt()).mean()
        if branch == "gram" or (branch == "auto" and D > N):
            # the diagonal is taken from the sum of all: in float64, since both may be large beside the difference
            off_diagonal = (c @ c.T).double().square().sum() - squares.double().square().sum()
        else:
            product = c.T @ c
            off_diagonal = (product - torch.diag(product.diagonal())).square().sum()
        covariance = (off_diagonal / ((N - 1) ** 2 * D)).to(z.dtype)
    return variance, covariance
