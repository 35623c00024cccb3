# SPDX-License-Identifier: MIT
"""The figures of OPTiML (Singh et al. 2024): transport plans, masses, Grad-CAM, label fractions, and what training went through."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..data import ImageDataset, to_tensor
from ..data.datasets import data_title
from ..nn.random_views import ViewParameters
from ..training import RunFolder, derived_generator
from ..training.scoring import evaluation_splits
from ..training.self_supervised import as_bytes
from .canvas import save_figure
from .curves import loss_curves
from .diagram import Box, Shapes, diagram
from .fractions import label_fraction_curves
from .grad_cam import class_probe, grad_cam_figure
from .grids import of_each_class
from .transport import mass_maps, transport_maps

if TYPE_CHECKING:
    from ..papers.optiml import OPTiML

_IMAGES = 8
_CURVES = ("loss", "alignment", "variance", "covariance", "q_std", "cost_range", "positions", "marginal_error")


@torch.no_grad()
def draw(
    folder: Path,
    method: OPTiML,
    run: RunFolder,
    dataset: ImageDataset,
) -> list[Path]:
    """Draws everything into ``folder / "figures"`` and returns the paths."""
    config, seed = method.config, run.config()["seed"]
    name = f"OPTiML, {config.preset_name}, {data_title(config.data)}"
    train, tests = evaluation_splits(dataset, config.selection)
    split_name, split = next(iter(tests.items()))
    metrics = run.metrics()
    figures = {
        "losses": loss_curves(
            metrics, [key for key in _CURVES if any(key in line for line in metrics)], title=f"{name}: training"
        )
    }
    example = to_tensor(split.images[:2], size=config.image_size)
    figures["architecture"] = architecture(method, example, title=f"{name}: networks and losses")
    if config.alignment == "transport":
        images, generator = as_bytes(split.images[:4]), derived_generator(seed, "figures")
        views = replace(config, view_maker="RandomViews").views()  # also for a run that saw those of an earlier version
        drawn = [views.draw(len(images), view, sides=images.shape[2:], generator=generator) for view in (0, 1)]
        first, second = (views.make(images, parameters, view) for view, parameters in enumerate(drawn))
        aligned = method.align(first, second)
        plan, side = aligned.solution.plan.cpu(), method.side
        figures["transport"] = transport_maps(
            first,
            second,
            plan,
            side=side,
            positions=chosen_positions(side),
            partners=partner_places(drawn[0], drawn[1], side),
            title=f"{name}: where the mass of a position goes (x: the same point of the image)",
        )
        figures["masses"] = mass_maps(
            first, second, aligned.a.cpu(), aligned.b.cpu(), plan, side=side, title=f"{name}: masses and plans"
        )
    encoder, size = method.encoder, config.image_size
    fitted = class_probe(encoder, train, size=size, num_classes=dataset.num_classes, seed=seed)
    if fitted is not None:
        probe, count = fitted
        shown = of_each_class(split, _IMAGES).numpy()
        figures["grad_cam"] = grad_cam_figure(
            encoder,
            probe,
            to_tensor(split.images[shown], size=size),
            torch.as_tensor(split.labels[shown]),
            class_names=dataset.class_names,
            title=f"{name}: Grad-CAM of an image's class ({split_name}; logistic regression on {count} training images)",
        )
    results = RunFolder(folder).results() or {}
    for task, figure in fraction_figures(name, results).items():
        figures[f"label_fractions_{task}"] = figure
    return [save_figure(figure, folder / "figures" / f"{key}.png") for key, figure in figures.items()]


@torch.no_grad()
def architecture(method: OPTiML, images: Tensor, *, title: str) -> Figure:  # [B, C, S, S]
    """From two views to the objective: encoder and expander, and where transport aligns them, costs, masses and plan."""
    config, shapes = method.config, Shapes(method, len(images))
    transport, variance = config.alignment == "transport", config.beta / (2 if config.halve_variance else 1)
    with shapes.measured():
        aligned = method.align(images, images) if transport else None
        method.embed(images)
    boxes = {
        "views": Box(0, 1, shapes.value("two views, each", images), "data"),
        "encoder": Box(1, 1, shapes.module("encoder"), "module"),
        "expander": Box(2, 2, f"of the mean over positions\n{shapes.module('expander')}", "module"),
        "q": Box(3, 2, f"{variance:g} variance + {config.eta:g} covariance\nof each view's q", "loss"),
    }
    arrows = [("views", "encoder"), ("encoder", "expander"), ("expander", "q")]
    if aligned is None:
        boxes["mse"] = Box(3, 1, f"{config.alpha:g} squared distance of q_s and q_t", "loss")
        return diagram(boxes, [*arrows, ("expander", "mse")], title=title)
    solution = aligned.solution
    cost = {"cosine": "1 - cos", "neg_cos": "-cos", "similarity": "cos"}[config.cost]
    value = "<P, C>" if config.value == "transport" else "<P, C> + ε Σ P (log P - 1)"
    boxes |= {
        "cost": Box(2, 0, shapes.value(f"C = {cost} of positions", aligned.cost)),
        "plan": Box(
            4, 0, shapes.value(f"Sinkhorn, ε = {config.epsilon:g}\n{config.num_iters} iterations, P", solution.plan)
        ),
        "transport": Box(5, 0, f"{config.alpha:g} ({value})", "loss"),
    }
    arrows += [("encoder", "cost"), ("cost", "plan"), ("plan", "transport")]
    if method.cvsim is None:
        boxes["masses"] = Box(3, 1, shapes.value("uniform masses a, b", aligned.a))
    else:
        masses = f"{shapes.module('cvsim')}\n{shapes.value('softmax: masses a, b', aligned.a)}"
        boxes["masses"] = Box(3, 1, masses, "module")
        arrows.append(("encoder" if config.cvsim == "dense" else "expander", "masses"))
    return diagram(boxes, [*arrows, ("masses", "plan")], title=title)


def fraction_figures(name: str, results: dict[str, Any]) -> dict[str, Figure]:
    """Label-fraction curves of one run folder, by task; none where a task has no score."""
    tasks: dict[str, Any] = next(iter(results.get("splits", {}).values()), {})
    figures = {}
    for task, ways in tasks.items():
        try:
            figures[task] = label_fraction_curves({"OPTiML": ways}, title=f"{name}: macro AUROC, {task}")
        except ValueError:
            continue
    return figures


def chosen_positions(side: int) -> list[int]:
    """Four positions, near three corners and the middle; one where the map has no others."""
    low, middle, high = side // 4, side // 2, side - 1 - side // 4
    places = [(low, low), (low, high), (high, low), (middle, middle)]
    return list(dict.fromkeys(row * side + column for row, column in places))


def partner_places(first: ViewParameters, second: ViewParameters, side: int) -> Tensor:  # [N, side * side, 2]
    """Where the centre of each position of the first view lies in the second: row and column in units of the view's
    side, NaN where the second crop does not show it."""
    centres = (torch.arange(side) + 0.5) / side
    places = []
    for axis in (1, 0):  # rows, columns
        start, length = first.box[:, axis, None], first.box[:, axis + 2, None]
        along = centres.expand(len(first.box), side)
        if axis == 0:
            along = torch.where(first.mirror[:, :1], 1 - along, along)
        other = (start + length * along - second.box[:, axis, None]) / second.box[:, axis + 2, None]
        if axis == 0:
            other = torch.where(second.mirror[:, :1], 1 - other, other)
        places.append(other)
    rows, columns = places
    grid = torch.stack([rows[:, :, None].expand(-1, -1, side), columns[:, None, :].expand(-1, side, -1)], dim=3)
    grid = torch.where(((grid >= 0) & (grid <= 1)).all(dim=3, keepdim=True), grid, torch.nan)
    return grid.flatten(1, 2)
