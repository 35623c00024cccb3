# SPDX-License-Identifier: MIT
"""What the trainings of a segmentation network share: loss, prediction of whole volumes, stages before the last one, and
the weights that are kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..data.volumes import LabelledVolume
from ..models.modes import evaluating
from .distributed import summed
from .files import exclusive, make_folder
from .optimizers import warmup_cosine
from .randomness import derived_seed
from .run_folder import RunFolder
from .runs import RunSettings, check_same_data
from .session import Plan, Session


def segmentation_losses(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:  # [B, K, H, W], [B, H, W] int64
    """Cross-entropy plus soft Dice, as means over the batch; ``"loss"`` is their sum.

    >>> sure = 50.0 * torch.eye(3)[None, :, :, None]  # one image of 3 x 1 pixels with the classes 0, 1, 2
    >>> bool(segmentation_losses(sure, torch.tensor([[[0], [1], [2]]]))["loss"] < 1e-6)
    True
    """
    logits = logits.float()
    cross_entropy, dice = F.cross_entropy(logits, labels), soft_dice_loss(logits, labels)
    return {"loss": cross_entropy + dice, "cross_entropy": cross_entropy, "soft_dice": dice}


def soft_dice_loss(logits: Tensor, labels: Tensor) -> Tensor:  # [B, K, H, W], [B, H, W] int64 -> []
    """Mean over the foreground classes of 1 - (2 sum p y + 1) / (sum p^2 + sum y + 1), the sums over all pixels of the batch, those of
    all processes that train together.

    The 1 makes a class that is neither there nor predicted count as right.
    """
    p = torch.softmax(logits.float(), dim=1)[:, 1:]
    y = F.one_hot(labels, logits.shape[1]).movedim(-1, 1)[:, 1:].to(p.dtype)
    overlap, sizes = summed(torch.stack([(p * y).sum(dim=(0, 2, 3)), (p.square() + y).sum(dim=(0, 2, 3))]))
    loss: Tensor = (1 - (2 * overlap + 1) / (sizes + 1)).mean()
    return loss


@torch.no_grad()
def predict_volumes(
    model: nn.Module, volumes: Sequence[LabelledVolume], device: torch.device | str = "cpu", batch_size: int = 64
) -> list[np.ndarray]:  # [S, H, W] uint8 each
    """The most probable class of every pixel, slice by slice, in evaluation mode; the model's mode is put back.

    Args:
        model: [B, 1, H, W] float32 in [0, 1] -> logits [B, K, H, W].
        volumes: what to predict; their labels are not looked at.
        device: where the model lives.
        batch_size: slices at a time.
    """
    predictions = []
    with evaluating(model):
        for volume in volumes:
            slices = torch.from_numpy(volume.image)[:, None].split(batch_size)
            predictions.append(
                np.concatenate([model(part.to(device)).argmax(dim=1).to(torch.uint8).cpu().numpy() for part in slices])
            )
    return predictions


@dataclass(frozen=True)
class StageSettings:
    """How one stage is optimised.

    Attributes:
        epochs: passes over its images ...
        steps: ... or, where positive, as many passes as make at least this many steps.
        batch_size: images per step.
        learning_rate: of Adam.
        weight_decay: of Adam, added to the gradient.
        cosine: half a cosine of the learning rate to a thousandth, else constant ...
        flat: ... after this many epochs.
    """

    epochs: int
    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    cosine: bool = False
    flat: int = 0

    def plan(self, count: int, seed: int, name: str) -> Plan:
        """The plan for ``count`` images; the last, smaller batch of an epoch is left out."""
        batch = min(self.batch_size, count)
        epochs = -(-self.steps // (count // batch)) if self.steps else self.epochs
        return Plan(count, epochs, batch, derived_seed(seed, name), drop_last=True)

    def optimizer(self, model: nn.Module) -> Optimizer:
        """Adam over the parameters that need a gradient."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.Adam(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)

    def scheduler(self, optimizer: Optimizer, epochs: int) -> LambdaLR:
        """Factor of the learning rate per epoch."""
        factor = warmup_cosine(max(1, epochs - self.flat), 0)
        return LambdaLR(optimizer, lambda epoch: factor(max(0, epoch - self.flat)) if self.cosine else 1.0)


@dataclass(frozen=True)
class Stages:
    """The stages of one run: the last one in the run's own folder, those before it in folders that runs may share.

    The name of a shared folder is a digest of everything its stage depends on. Whoever needs the stage first trains it;
    others, of any run, wait for it or find it there.

    Attributes:
        run: the run's folder.
        folder: of the stages before the last.
        seed: of the run.
        accelerator: device and processes.
        settings: resume and quiet.
    """

    run: RunFolder
    folder: Path
    seed: int
    accelerator: Accelerator
    settings: RunSettings

    def before(
        self,
        name: str,
        record: dict[str, Any],
        model: nn.Module,
        count: int,
        stage: StageSettings,
        loop: Callable[[Session], None],
    ) -> dict[str, Any]:
        """Trains ``model``, or what of it is not trained yet, and says how that went.

        Args:
            name: of the stage.
            record: everything the result depends on, apart from seed, precision and number of processes.
            model: trained in place.
            count: number of images.
            stage: epochs and so on.
            loop: the epochs and steps.

        Returns:
            Epochs, steps and so on, and ``"folder"``, the stage's as seen from the run's.
        """
        record = {
            "stage": name,
            "seed": self.seed,
            "precision": self.settings.precision,
            "processes": self.accelerator.num_processes,
            **record,
        }
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]
        run = RunFolder(self.folder / f"{name}-{digest}")
        main = self.accelerator.is_main_process
        if main:
            make_folder(self.folder, parents=True)
        with exclusive(run.path.with_suffix(".lock"), wanted=main):
            if main:
                RunFolder.create(run.path, record, resume=True)
                data = self.run.environment().get("data") or {}
                check_same_data(run, data)  # the record has the name of the data, not what was in it
                if not run.environment():
                    run.write_environment(
                        device=str(self.accelerator.device), precision=self.settings.precision, data=data
                    )
            self.accelerator.wait_for_everyone()
            session = self._session(run, name, model, count, stage, resume=True)
            loop(session)
        return {**_summary(run, session), "folder": os.path.relpath(run.path, self.run.path)}  # both may be moved

    def last(
        self, name: str, model: nn.Module, count: int, stage: StageSettings, loop: Callable[[Session], None]
    ) -> dict[str, Any]:
        """The last stage, in the run's own folder; see :meth:`before`."""
        session = self._session(self.run, name, model, count, stage, resume=self.settings.resume)
        loop(session)
        return _summary(self.run, session)

    def _session(
        self, run: RunFolder, name: str, model: nn.Module, count: int, stage: StageSettings, *, resume: bool
    ) -> Session:
        plan, optimizer = stage.plan(count, self.seed, name), stage.optimizer(model)
        scheduler = stage.scheduler(optimizer, plan.epochs)
        return Session(run, self.accelerator, model, optimizer, scheduler, plan, resume, self.settings.quiet)


def _summary(run: RunFolder, session: Session) -> dict[str, Any]:
    metrics = run.metrics()
    return {
        "epochs": session.total_epochs,
        "steps": session.total_epochs * session.steps_per_epoch,
        "images": session.count,
        "batch_size": session.batch_size,
        "seconds": round(sum(line["seconds"] for line in metrics), 1),
        "last_epoch": {key: value for key, value in metrics[-1].items() if key != "seconds"} if metrics else {},
    }
