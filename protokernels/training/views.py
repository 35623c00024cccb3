# SPDX-License-Identifier: MIT
"""Two random views of every image of a step's batch."""

from __future__ import annotations

from torch import Tensor

from ..data.mapped import Images
from ..nn import RandomViews
from .session import Session, Step


def two_views(views: RandomViews, images: Images, step: Step, session: Session) -> tuple[Tensor, Tensor]:
    """Both views of this process's images of a batch: the same for an image however many processes share the batch, and in a run
    that is resumed.

    Args:
        views: see :class:`protokernels.nn.RandomViews`; two strengths.
        images: of the whole data set, [N, C, H, W].
        step: whose images these are.
        session: see :class:`Session`.

    Returns:
        [b, C, *views.size] each.
    """
    x, generator = images[step.indices], session.shared_generator(step, "views")
    drawn = [
        views.draw(step.batch, view, sides=images.shape[2:], generator=generator).part(step.rank, step.processes)
        for view in (0, 1)
    ]
    return views.make(x, drawn[0], 0), views.make(x, drawn[1], 1)
