# SPDX-License-Identifier: MIT
"""Supervised: the encoder learns all training labels, on the views and with the budget of the self-supervised methods.

Cross-entropy for data with one label per image, mean binary cross-entropy over the findings where an image may have several, as
a mean over both views. Its probes on few labels are no fair comparison: the encoder has seen them all. They show what labels
are worth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data import ImageDataset, Split
from ..evaluation.classifier import label_loss
from ..models import pooled
from ..training import RunFolder, Session
from ..training.checkpoints import fitting
from ..training.self_supervised import Method, PretrainingConfig, load_method, training_bytes, without_weight_file
from ..training.views import two_views
from .common import Baseline, spread


@dataclass(frozen=True)
class SupervisedConfig(PretrainingConfig):
    """The shared settings."""


class Supervised(Method):
    """Encoder and one linear layer."""

    def __init__(self, config: SupervisedConfig, channels: int, outputs: int = 1) -> None:
        super().__init__()
        self.encoder = config.make_encoder(channels)
        self.head = nn.Linear(self.encoder.dim, outputs)

    def forward(self, first: Tensor, second: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
        """``targets`` [B] int64 or [B, L] with 0 and 1; see :func:`protokernels.evaluation.classifier.label_loss`."""
        assert targets is not None, "Supervised needs the labels of the batch"
        features = [pooled(self.encoder(view)) for view in (first, second)]
        losses = [label_loss(self.head(z).float(), targets) for z in features]
        return {"loss": (losses[0] + losses[1]) / 2, "spread": spread(features[0])}


def targets_of(split: Split) -> Tensor:  # [N] int64, or [N, L] float
    """What an image is to be called: its findings where the data has them, else its class."""
    return torch.as_tensor(split.labels) if split.targets is None else torch.as_tensor(split.targets).float()


class _WithLabels(Baseline):
    def new_model(self, config: Any, dataset: ImageDataset) -> Supervised:
        return Supervised(config, dataset.channels, len(dataset.target_names) or dataset.num_classes)

    def load_model(self, run: RunFolder, config: Any, dataset: ImageDataset) -> Method:
        """As many outputs as the checkpoint has: images to embed come without classes."""
        state = run.checkpoint()
        with fitting(run.checkpoints):
            outputs = len(state["model"]["head.bias"])
        return load_method(run, Supervised(without_weight_file(config), dataset.channels, outputs))

    def fit_split(self, model: Method, split: Split, session: Session, config: Any) -> None:
        fit(split, session, config)


def fit(split: Split, session: Session, config: PretrainingConfig) -> None:
    """The loop: both views of every image, and its labels."""
    images, targets = training_bytes(split, session), targets_of(split).to(session.device)
    views = config.views()
    for _ in session.epochs():
        for step in session.steps():
            first, second = two_views(views, images, step, session)
            losses = session.model(first, second, targets[step.indices])
            session.optimise(losses["loss"], step)
            session.record(step, **losses)


BASELINE = _WithLabels("supervised", SupervisedConfig, Supervised, __doc__)
