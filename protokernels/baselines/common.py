# SPDX-License-Identifier: MIT
"""What the baselines share: precision of the losses, a measure of collapse, and the commands."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import ImageDataset
from ..data.datasets import data_title
from ..training import RunFolder
from ..training.runs import load_runs
from ..training.self_supervised import Method, PretrainingConfig, SelfSupervised
from ..training.transfer_report import results_table

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Baseline(SelfSupervised[Any]):
    """One method as the command line and the tests see it; the same functions as a paper's module.

    Args:
        name: of the method's module.
        config: its dataclass.
        build: (configuration, image channels) -> method.
        description: the module's docstring.
    """

    PAPER_RESULTS: dict[str, Any] = {}  # noqa: RUF012 - none: nobody published numbers for these small encoders

    def __init__(
        self, name: str, config: type[PretrainingConfig], build: Callable[[Any, int], Method], description: str | None
    ) -> None:
        super().__init__(name, config, build)
        self.__doc__ = description
        self.results_table = results_table

    def draw_figures(
        self, folder: str | Path, *, data_root: str | Path | None = None, dataset: ImageDataset | None = None
    ) -> list[Path]:
        """Draws the training curves of the first seed of a run and the scores over label fractions into ``figures`` and returns
        the paths. The data is not needed."""
        from ..figures.canvas import save_figure  # matplotlib is not needed for training
        from ..figures.curves import loss_curves
        from ..figures.fractions import label_fraction_curves

        run: RunFolder = load_runs(folder)[0]
        metrics, config = run.metrics(), run.config()["config"]
        name = f"{self.name}, {config['preset_name']}, {data_title(config['data'])}"
        figures = {}
        if metrics:
            curves = [key for key in metrics[0] if key not in ("epoch", "seconds")]
            figures["losses"] = loss_curves(metrics, curves, title=f"{name}: training")
        for split, tasks in (RunFolder(Path(folder)).results() or {"splits": {}})["splits"].items():
            for task, ways in tasks.items():
                if any("macro_auroc" in row for rows in ways.values() for row in rows.values()):
                    title = f"{name}: {split}, {task}"
                    figures[f"fractions_{split}_{task}"] = label_fraction_curves({self.name: ways}, title=title)
        return [save_figure(figure, Path(folder) / "figures" / f"{key}.png") for key, figure in figures.items()]


def in_float32(loss: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Computes a loss in float32 (float64 stays) also where the networks run in half precision: it is cheap, and
    exponentials and differences of large numbers need the digits."""

    @wraps(loss)
    def computed(*arguments: Parameters.args, **keywords: Parameters.kwargs) -> Result:
        full = [
            a.float() if isinstance(a, Tensor) and a.dtype in (torch.float16, torch.bfloat16) else a for a in arguments
        ]
        device = next((a.device.type for a in arguments if isinstance(a, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return loss(*full, **keywords)  # type: ignore[arg-type]

    return computed


@torch.no_grad()
def spread(z: Tensor) -> Tensor:  # [B, D] -> []
    """How far embeddings are from collapse: sqrt(D) times the mean deviation of unit vectors per dimension; about 1 where
    they point everywhere, 0 where all are the same."""
    unit = F.normalize(z.float(), dim=1)
    measure: Tensor = unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5
    return measure
