# SPDX-License-Identifier: MIT
"""Similarity of prototypes to each other."""

from __future__ import annotations

import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .canvas import new_figure


def similarity_heatmap(prototypes: Tensor, *, title: str) -> Figure:  # [K, D]
    """Cosine similarity between all prototypes; the identity is what an orthogonality term asks for."""
    unit = F.normalize(prototypes.detach().float().cpu(), dim=-1)
    figure = new_figure(5.2, 4.6)
    axes = figure.subplots()
    picture = axes.imshow((unit @ unit.T).numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    figure.suptitle(title, fontsize=10)
    axes.set_xlabel("prototype", fontsize=8)
    axes.set_ylabel("prototype", fontsize=8)
    axes.tick_params(labelsize=7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.colorbar(picture, ax=axes, shrink=0.85).set_label("cosine similarity", fontsize=8)
    return figure
