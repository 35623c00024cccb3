# SPDX-License-Identifier: MIT
"""Tensors of several shapes in one (`torch.nested`) are refused by the name of the argument, in every place that takes a tensor."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import protokernels as pk

Z, Q, LABELS = torch.randn(8, 4), torch.randn(3, 4), torch.arange(8) % 3
COST, MAPS, CLASSES = torch.rand(2, 5, 4), torch.randn(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.int64)
IMAGES, PARAMS = torch.rand(2, 1, 8, 8), torch.rand(2, 7)
CASES: dict[str, tuple[Callable[[Any], object], Tensor]] = {  # the words of the message -> a call with the tensor, and one that fits
    "soft_assign: z": (lambda x: pk.soft_assign(x, Q, temperature=0.1), Z),
    "soft_assign: prototypes": (lambda x: pk.soft_assign(Z, x, temperature=0.1), Q),
    "soft_assign: temperature": (lambda x: pk.soft_assign(Z, Q, temperature=x), torch.ones(1)),
    "update_prototypes: prototypes": (lambda x: pk.update_prototypes_(x, Z, LABELS, new_weight=0.5), Q),
    "update_prototypes: labels_or_assignments": (lambda x: pk.update_prototypes(Q, Z, x, new_weight=0.5), LABELS),
    "update_prototypes: revive": (lambda x: pk.update_prototypes(Q, Z, LABELS, new_weight=0.5, revive=x), LABELS[:3] > 0),
    "sinkhorn: cost": (lambda x: pk.sinkhorn(x, epsilon=0.1), COST),
    "sinkhorn: a": (lambda x: pk.sinkhorn(COST, x, epsilon=0.1), torch.full((2, 5), 0.2)),
    "sinkhorn: epsilon": (lambda x: pk.sinkhorn(COST, epsilon=x), torch.ones(2)),
    "sinkhorn: row_mask": (lambda x: pk.sinkhorn(COST, epsilon=0.1, row_mask=x), COST[..., 0] > 0),
    "sinkhorn: init": (lambda x: pk.sinkhorn(COST, epsilon=0.1, init=x), COST[:, 0]),
    "sinkhorn_features: x": (lambda x: pk.sinkhorn_features(x, COST, epsilon=0.1), COST),
    "SinkhornAssignment: scores": (pk.nn.SinkhornAssignment(epsilon=0.1), Z),
    "local_contrastive_loss: features": (lambda x: pk.local_contrastive_loss(x, CLASSES), MAPS),
    "local_contrastive_loss: labels": (lambda x: pk.local_contrastive_loss(MAPS, x), CLASSES),
    "supcon_loss: embeddings": (lambda x: pk.supcon_loss(x, LABELS), Z),
    "nt_xent_loss: second": (lambda x: pk.nt_xent_loss(Z, x), Z),
    "variance_covariance_loss: embeddings": (pk.nn.variance_covariance_loss, Z),
    "transform: images": (lambda x: pk.transform(x, PARAMS), IMAGES),
    "transform: params": (lambda x: pk.transform(IMAGES, x), PARAMS),
    "transform: enabled": (lambda x: pk.transform(IMAGES, PARAMS, enabled=x), PARAMS[:, 1:] > 0),
    "gaussian_blur: sigma": (lambda x: pk.gaussian_blur(IMAGES, x), PARAMS[:, 0]),
    "gaussian_noise: seed": (lambda x: pk.gaussian_noise(IMAGES, 1.0, seed=x), torch.arange(2)),
    "affine_warp: matrix": (lambda x: pk.affine_warp(IMAGES, x), torch.rand(2, 2, 3)),
    "nearest: queries": (lambda x: pk.nearest(x, Z, 1), Z),
    "nearest: bank": (lambda x: pk.nearest(Z, x, 1), Z),
    "KMeans.fit: x": (pk.cluster.KMeans(2).fit, Z),
}  # fmt: skip


@pytest.mark.parametrize("words", CASES)
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
def test_they_are_refused_by_name(words: str, layout: torch.layout) -> None:
    call, fits = CASES[words]
    call(fits.clone())
    rows = [row if row.dim() else row[None] for row in fits]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's: that nested tensors may change
        nested = torch.nested.nested_tensor(rows, layout=layout)
    with pytest.raises((TypeError, ValueError), match=f"^{words} must be .*; got a nested (one|tensor)"):
        call(nested)
