# SPDX-License-Identifier: MIT
"""What the person at the terminal sees of a training run."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

_REFRESH_SECONDS = 0.5


class EpochProgress:
    """A bar with the losses on a terminal; one line now and then where the output goes to a file."""

    def __init__(self, *, enabled: bool, epochs: int, steps: int) -> None:
        self.console = Console(stderr=True)
        self.epochs, self.steps = epochs, steps
        self._lines = enabled and not self.console.is_terminal
        self._bar: Progress | None = None
        self._shown = 0.0
        if enabled and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("training", total=epochs * steps)

    def __enter__(self) -> EpochProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, epoch: int, step: int, sums: dict[str, Tensor]) -> None:
        """After a step; reads the losses from the device at most twice a second."""
        if self._bar is None or time.monotonic() - self._shown < _REFRESH_SECONDS:
            return
        self._shown = time.monotonic()
        images = float(sums["images"])
        losses = {name: float(value) / images for name, value in sums.items() if name != "images"}
        self._bar.update(
            self._task, completed=epoch * self.steps + step, description=_line(epoch + 1, self.epochs, losses)
        )

    def epoch_done(self, epoch: int, losses: dict[str, float], seconds: float) -> None:
        """After an epoch, with its mean losses."""
        if self._bar is not None:
            self._bar.update(self._task, completed=epoch * self.steps, description=_line(epoch, self.epochs, losses))
        elif self._lines and (epoch in (1, self.epochs) or epoch % max(1, self.epochs // 10) == 0):
            self.console.print(f"{_line(epoch, self.epochs, losses)}  {seconds:.1f} s", highlight=False, soft_wrap=True)


def _line(epoch: int, epochs: int, losses: dict[str, float]) -> str:
    return f"epoch {epoch}/{epochs}  " + "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
