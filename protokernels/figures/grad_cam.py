# SPDX-License-Identifier: MIT
"""Which parts of an image speak for a class, in the dense map of an encoder.

R. Selvaraju, M. Cogswell, A. Das, R. Vedantam, D. Parikh, D. Batra. Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization. ICCV 2017.

An encoder that learned without labels has no score of a class. It gets one from a linear classifier on its pooled map, the logistic
regression with which representations are judged (:func:`protokernels.evaluation.linear_probe`, ``"fair"``), fitted on labelled training
images. For a linear score of the average over positions Grad-CAM is CAM (B. Zhou et al., CVPR 2016) divided by the number of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from ..data import Split, to_tensor
from ..evaluation import LinearProbe, label_subsets, linear_probe
from ..models import pooled
from .grids import labelled_rows

FITTED_ON = 1000  # training images at most
BATCH = 100  # images at a time
_COLOURS, _OPAQUE = "inferno", 0.75  # of the largest value


def grad_cam(dense: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:  # [N, K, h, w] -> [N, h, w]
    """ReLU(sum_k a_k A_k), a_k the mean over positions of the derivative of the score by A_k.

    Args:
        dense: the maps A of N images.
        score: [N, K, h, w] -> [N], each of its own image's map.

    Returns:
        The maps. One whose features or gradient are not finite has NaN in it.
    """
    with torch.enable_grad():
        A = dense.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(score(A).sum(), A)
    return torch.relu((gradient.mean(dim=(2, 3), keepdim=True) * A.detach()).sum(dim=1))


@torch.no_grad()
def class_probe(
    encoder: Callable[[Tensor], Tensor], train: Split, *, size: int, num_classes: int, seed: int
) -> tuple[LinearProbe, int] | None:
    """The linear classifier on the pooled map, and on how many images, a stratified choice, it was fitted. None where their features are
    not finite."""
    labels = torch.as_tensor(train.labels)
    share = min(1.0, FITTED_ON / len(labels))
    chosen = label_subsets(labels, [share], num_classes=num_classes, seed=seed)[share]
    parts = (to_tensor(train.images[part.numpy()], size=size) for part in chosen.split(BATCH))
    features = torch.cat([pooled(encoder(images)) for images in parts])
    if not bool(torch.isfinite(features).all()):
        return None
    return linear_probe(features, labels[chosen], num_classes=num_classes, protocol="fair"), len(chosen)


def class_weights(probe: LinearProbe) -> Tensor:  # -> [K, D]
    """The probe's weights with the mean over the classes taken away, 0 for one that it has not seen: logits are known up to a number that
    is the same for all classes, and scikit-learn's for two classes are 0 and their difference."""
    known = torch.isfinite(probe.bias)
    weight = probe.weight.clone()
    weight[known] -= weight[known].mean(dim=0)
    return weight


def overlaid(images: Tensor, maps: Tensor) -> Tensor:  # [N, C, H, W] in [0, 1], [N, h, w] -> [N, 3, H, W]
    """Grey images under their maps, enlarged bilinearly, in colours of which the image shows less the larger the value. The largest value
    of every map has the same colour; an image with an empty map, or one that is not finite, stays as it is."""
    fine = F.interpolate(maps[:, None].double(), images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    top = fine.amax(dim=(1, 2), keepdim=True)
    share = torch.where(torch.isfinite(top) & (top > 0), fine / top, 0.0)
    colours = torch.from_numpy(colormaps[_COLOURS](share.numpy())[..., :3]).permute(0, 3, 1, 2)
    grey = images.mean(dim=1, keepdim=True)
    return grey + _OPAQUE * share[:, None] * (colours - grey)


@torch.no_grad()
def grad_cam_figure(
    encoder: Callable[[Tensor], Tensor],  # [N, C, S, S] -> [N, D, h, w]
    probe: LinearProbe,
    images: Tensor,  # [N, C, S, S] in [0, 1]
    labels: Tensor,  # [N] int64
    *,
    class_names: Sequence[str],
    title: str,
) -> Figure:
    """Images above their Grad-CAM for the logit of their own class, with that class and the predicted one."""
    dense = encoder(images)
    weight = class_weights(probe)

    def score(A: Tensor) -> Tensor:
        return (A.mean(dim=(2, 3)) * weight[labels]).sum(dim=1)

    maps = grad_cam(dense.double(), score)
    predicted = probe.predict(pooled(dense))
    captions = [
        f"{class_names[own]}\npredicted: {class_names[other]}"
        for own, other in zip(labels.tolist(), predicted.tolist(), strict=True)
    ]
    return labelled_rows([("image", images), ("Grad-CAM", overlaid(images, maps))], captions=captions, title=title)
