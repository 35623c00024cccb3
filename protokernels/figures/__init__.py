# SPDX-License-Identifier: MIT
"""Pictures. Every function takes tensors or plain values and returns a matplotlib ``Figure``; nothing touches pyplot's
global state."""

from .canvas import save_figure
from .curves import loss_curves
from .embedding import embedding_pair
from .grids import image_grid, reconstruction_rows
from .heatmap import similarity_heatmap

__all__ = ["embedding_pair", "image_grid", "loss_curves", "reconstruction_rows", "save_figure", "similarity_heatmap"]
