# SPDX-License-Identifier: MIT
"""Pictures. Every function takes tensors or plain values and returns a matplotlib ``Figure``; nothing touches pyplot's
global state."""

from .canvas import save_figure
from .curves import loss_curves
from .elbow import elbow_curve
from .embedding import embedding_pair, embedding_triptych
from .grids import image_grid, labelled_rows, reconstruction_rows
from .heatmap import similarity_heatmap

__all__ = [
    "elbow_curve",
    "embedding_pair",
    "embedding_triptych",
    "image_grid",
    "labelled_rows",
    "loss_curves",
    "reconstruction_rows",
    "save_figure",
    "similarity_heatmap",
]
