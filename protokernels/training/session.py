# SPDX-License-Identifier: MIT
"""The bookkeeping around a training loop: order of the data, processes and precision, checkpoints, metrics, progress,
interruption.

The loop itself stays in the paper's file and reads like its algorithm:

    for _ in session.epochs():
        for step in session.steps():
            loss = ... images[step.indices] ...
            session.optimise(loss, step)
            session.record(step, loss=loss)
"""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .checkpoints import FORMAT, CheckpointError, fitting
from .distributed import average_gradients, largest_over_processes, sum_over_processes, synchronize_batch_norm
from .progress import EpochProgress
from .randomness import derived_generator, derived_seed, epoch_order, random_state, set_random_state
from .run_folder import RunFolder

Precision = Literal["fp32", "bf16", "fp16"]
Model = TypeVar("Model", bound=nn.Module)


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal; ``exit_code`` is 130 for Ctrl-C, 143 for SIGTERM. The message is ``done``, what there is, and how
    to go on."""

    def __init__(self, done: str, advice: str, signal_number: int) -> None:
        super().__init__(f"{done}; {advice}")
        self.done, self.signal_number = done, signal_number
        self.exit_code = 128 + signal_number


@dataclass(frozen=True)
class Step:
    """One optimisation step as this process sees it."""

    epoch: int
    index: int
    progress: float  # share of the whole training that lies before this step, in [0, 1)
    indices: Tensor  # [b] int64, this process's images of the batch
    batch: int  # images of the batch over all processes
    seed: int
    rank: int
    processes: int

    def normal(self, *shape: int) -> Tensor:  # [b, *shape] float32 on the device of indices
        """Standard normal numbers for this process's images: the same for an image however many processes share the
        batch."""
        noise = torch.randn(self.batch, *shape, generator=derived_generator(self.seed, "noise", self.epoch, self.index))
        return noise[self.rank :: self.processes].to(self.indices.device)


def make_accelerator(device: Literal["auto", "cpu"] = "auto", precision: Precision = "fp32") -> Accelerator:
    """Devices, processes (``torchrun``, ``accelerate launch``) and mixed precision.

    Raises:
        ValueError: fp16 without a GPU.
    """
    cpu = device == "cpu" or not torch.cuda.is_available()
    if precision == "fp16" and cpu:
        raise ValueError(
            "precision 'fp16' needs a GPU; on the CPU use 'bf16' (fast on processors with AMX or AVX512-BF16) or 'fp32'"
        )
    AcceleratorState._reset_state()  # a second run in one process may choose another precision
    return Accelerator(cpu=cpu, mixed_precision="no" if precision == "fp32" else precision)


def preferred_layout(accelerator: Accelerator) -> torch.memory_format:
    """Channels-last where convolutions gain from it: on GPUs and in half precision. Not on the CPU in float32, where small networks would
    gain a sixth: there torch's batch normalisation adds up a channel term by term, and the first layers' gradients are off by a percent."""
    plain = accelerator.device.type == "cpu" and accelerator.mixed_precision == "no"
    return torch.contiguous_format if plain else torch.channels_last


def in_layout(model: Model, accelerator: Accelerator) -> Model:
    """``model`` in the preferred layout; again after layers were added, or a resumed run, which has them all, would differ in its bits."""
    nn.Module.to(model, memory_format=preferred_layout(accelerator))  # type: ignore[call-overload]
    return model


@dataclass(frozen=True)
class Plan:
    """How long a run is and what its random numbers start from."""

    count: int  # training images
    epochs: int  # how often they are all visited
    batch_size: int  # images per step over all processes
    seed: int  # of order and noise
    drop_last: bool = (
        False  # leave out a last batch that is smaller than the others; every epoch leaves out other images
    )

    def __post_init__(self) -> None:
        if min(self.count, self.epochs, self.batch_size) < 1:
            raise ValueError(f"Plan: count, epochs and batch_size must be at least 1; got {self}")


def batch_warning(batch_size: int, count: int) -> str | None:
    """What to say of a batch that ``count`` training images cannot fill; None where they can."""
    if batch_size <= count:
        return None
    return f"batch_size is {batch_size}, but there are {count} training images: every step takes them all, as with batch_size {count}"


class Session:
    """One training run from its first or its latest checkpoint to its end.

    Everything random is a function of (seed, epoch, step), batches are cut from one permutation per epoch and shared
    out among the processes, and loss gradients are averaged over images: a run does not depend on the number of
    processes beyond rounding, and on the CPU a resumed run ends with the bits of an uninterrupted one (same machine,
    same number of threads).

    Args:
        run: the folder.
        accelerator: from :func:`make_accelerator`.
        model: moved to the device and wrapped for several processes; the wrapped model is ``session.model``.
        optimizer: over the model's parameters.
        scheduler: stepped at the end of every epoch.
        plan: number of images, epochs, batch size and seed. A batch of more images than there are is all of them, with a warning.
        resume: continue from the newest checkpoint in ``run``; from the start where there is none yet.
        quiet: no progress output.

    Raises:
        CheckpointError: with ``resume``: no checkpoint is sound, or it is of another run.
        ValueError: fewer images in a batch than processes.
    """

    def __init__(
        self,
        run: RunFolder,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        plan: Plan,
        resume: bool = False,
        quiet: bool = False,
    ) -> None:
        self.run, self.accelerator, self.scheduler = run, accelerator, scheduler
        self.plan = plan
        self.count, self.total_epochs, self.seed = plan.count, plan.epochs, plan.seed
        self.batch_size = min(plan.batch_size, plan.count)
        message = batch_warning(plan.batch_size, plan.count)
        if message is not None and accelerator.is_main_process:
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        self.drop_last = plan.drop_last
        if self.batch_size < accelerator.num_processes:
            raise ValueError(
                f"Session: {accelerator.num_processes} processes cannot share a batch of {self.batch_size}; "
                "use fewer processes"
            )
        self.bare_model = synchronize_batch_norm(model) if accelerator.num_processes > 1 else model
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.epoch, self.step = 0, 0
        self._sums: dict[str, Tensor] = {}  # over images of this epoch and this process, float64
        self._notes: dict[str, float] = {}  # about this epoch as a whole
        self._seconds = 0.0
        self._signal: int | None = None
        if resume:
            self._restore()
        self._progress = EpochProgress(
            enabled=accelerator.is_main_process and not quiet, epochs=plan.epochs, steps=self.steps_per_epoch
        )

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch; a last batch with fewer images than processes is left out."""
        whole, rest = divmod(self.count, self.batch_size)
        if self.drop_last:
            return whole
        return whole + (1 if rest >= self.accelerator.num_processes else 0)

    @property
    def device(self) -> torch.device:
        """Where images and model live."""
        device: torch.device = self.accelerator.device
        return device

    def epochs(self) -> Iterator[int]:
        """The epochs still to do. After each: scheduler step, metrics line, checkpoint. ``FloatingPointError`` where a mean that was
        recorded is not finite: training has diverged, and the checkpoints are those before."""
        with self._signals(), self._progress:
            while self.epoch < self.total_epochs:
                self._started = time.perf_counter() - self._seconds
                self.bare_model.train()
                yield self.epoch
                self.scheduler.step()
                self._finish_epoch()
                self._stop_if_asked()

    def steps(self) -> Iterator[Step]:
        """The steps still to do in this epoch; writes a checkpoint and raises :class:`Interrupted` between two steps
        after Ctrl-C or SIGTERM. ``RuntimeError`` where an epoch ends and nothing was recorded."""
        order = epoch_order(self.count, self.seed, self.epoch)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        while self.step < self.steps_per_epoch:
            batch = order[self.step * self.batch_size :][: self.batch_size]
            progress = (self.epoch + self.step / self.steps_per_epoch) / self.total_epochs
            indices = batch[rank::processes].to(self.device)
            yield Step(self.epoch, self.step, progress, indices, len(batch), self.seed, rank, processes)
            self.step += 1
            self._progress.advance(self.epoch, self.step, self._sums)
            if self.step < self.steps_per_epoch:
                self._stop_if_asked()
        if not self._sums:
            raise RuntimeError("Session: no losses were recorded in this epoch; call session.record inside the loop")

    def shared_generator(self, step: Step, purpose: str) -> torch.Generator:
        """A CPU generator for choices about the whole batch of this step, the same in every process."""
        return derived_generator(self.seed, purpose, step.epoch, step.index)

    def step_generator(self, step: Step, purpose: str) -> torch.Generator:
        """A CPU generator for further random choices of this step, different in every process."""
        return torch.Generator().manual_seed(derived_seed(self.seed, purpose, step.epoch, step.index, step.rank))

    def optimise(self, loss: Tensor, step: Step, *, average: bool = False) -> None:
        """Gradient of ``loss`` (a mean over this process's images) and one optimiser step; parameters without a gradient stay.

        ``average``: the loss was computed on ``bare_model``, so that nobody has averaged its gradients over processes yet.
        """
        self.optimizer.zero_grad(set_to_none=True)
        weight = len(step.indices) * step.processes / step.batch  # makes the mean over processes the mean over images
        self.accelerator.backward(loss * weight if weight != 1 else loss)
        if average:
            average_gradients(self.bare_model)
        self.optimizer.step()

    def restart(self, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        """Goes on with another optimiser and its schedule: a new phase of training. A later resumption needs a model and an optimiser
        of the phase that its checkpoint was written in."""
        self.optimizer, self.scheduler = self.accelerator.prepare(optimizer), scheduler

    def record(self, step: Step, **values: Tensor | float) -> None:
        """Adds means over this process's images to the epoch's metrics; no wait for the device."""
        weight = len(step.indices)
        for name, value in {**values, "images": 1.0}.items():
            tensor = torch.as_tensor(value, dtype=torch.float64, device=self.device).detach() * weight
            self._sums[name] = self._sums[name] + tensor if name in self._sums else tensor

    def note(self, **values: float) -> None:
        """Adds numbers about the whole epoch, such as a validation score, to its metrics; call it after the last step, with
        the same numbers in every process."""
        self._notes.update(values)

    def _finish_epoch(self) -> None:
        sums = self._reduced_sums()
        images = sums.pop("images")
        values = {name: value / images for name, value in sums.items()} | self._notes
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            folder = self.run.checkpoints.folder
            raise FloatingPointError(
                f"training diverged in epoch {self.epoch + 1}: {', '.join(broken)} is not finite; "
                "train anew, into another folder, with a lower learning rate or precision fp32"
                + (f". The last sound checkpoint is in {folder}" if folder.is_dir() else "")
            )
        seconds = time.perf_counter() - self._started
        self.epoch, self.step, self._sums, self._notes, self._seconds = self.epoch + 1, 0, {}, {}, 0.0
        rate = float(self.optimizer.param_groups[0]["lr"])
        if self.accelerator.is_main_process:
            self.run.append_metrics(
                {"epoch": self.epoch, **values, "next_learning_rate": rate, "seconds": round(seconds, 3)}
            )
        self._progress.epoch_done(self.epoch, values, seconds)
        self._save()

    def _reduced_sums(self) -> dict[str, float]:
        names = list(self._sums)
        if not names:
            return {}
        return dict(
            zip(names, sum_over_processes(torch.stack([self._sums[name] for name in names])).tolist(), strict=True)
        )

    def _save(self) -> None:
        sums = self._reduced_sums()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "format": FORMAT,
                "plan": asdict(self.plan),
                "epoch": self.epoch,
                "step": self.step,
                "model": self.bare_model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": {key: value for key, value in self.scheduler.state_dict().items() if not callable(value)},
                "scaler": scaler.state_dict() if scaler is not None else {},
                "sums": sums,
                "seconds": time.perf_counter() - self._started if self.step else 0.0,
                "random": random_state(),
            }
            self.run.checkpoints.save(state, epoch=self.epoch, step=self.step)
        self.accelerator.wait_for_everyone()

    def _restore(self) -> None:
        state = self.run.checkpoints.load()
        if state is not None:
            self._check_plan(state.get("plan", {}))  # earlier versions did not record it
            with fitting(self.run.checkpoints):
                self._take_over(state)
        if self.accelerator.is_main_process:
            self.run.rewind_metrics(self.epoch)
        self.accelerator.wait_for_everyone()

    def _check_plan(self, before: dict[str, Any]) -> None:
        now = asdict(self.plan)
        if differing := [name for name in before if before[name] != now.get(name)]:
            pairs = ", ".join(f"{name}: {before[name]} there, {now.get(name)} now" for name in differing)
            raise CheckpointError(
                f"the checkpoint in {self.run.checkpoints.folder} cannot be continued as the run is now ({pairs}); have the data "
                "changed? Train anew in another folder, or put back what it was started with"
            )

    def _take_over(self, state: dict[str, Any]) -> None:
        self.bare_model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self._seconds = state["epoch"], state["step"], state["seconds"]
        share = 1.0 if self.accelerator.is_main_process else 0.0  # the saved sums are those of all processes
        self._sums = {
            name: torch.tensor(share * value, dtype=torch.float64, device=self.device)
            for name, value in state["sums"].items()
        }
        set_random_state(state["random"])

    def _stop_if_asked(self) -> None:
        asked = largest_over_processes(self._signal or 0, self.device)  # all processes stop after the same step
        if not asked:
            return
        if self.step:
            self._save()
        done = f"{self.epoch} of {self.total_epochs} epochs and {self.step} of {self.steps_per_epoch} steps"
        raise Interrupted(
            f"stopped after {done}; a checkpoint is in {self.run.checkpoints.folder}",
            "--resume continues from it",
            asked,
        )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """First signal: stop after the present step. Second Ctrl-C: at once, leaving the last checkpoint."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, _frame: FrameType | None) -> None:
            if self._signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal = number

        previous: dict[int, Any] = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
