# SPDX-License-Identifier: MIT
"""Supervised: the encoder learns all training labels, on the views and with the budget of the self-supervised methods.

Cross-entropy for data with one label per image, mean binary cross-entropy over the findings where an image may have several, as
a mean over both views. Its probes on few labels are no fair comparison: the encoder has seen them all. They show what labels
are worth.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ..data import ImageDataset, Split, load_dataset
from ..evaluation.classifier import label_loss
from ..models import pooled
from ..training import Plan, RunFolder, Session, seed_everything
from ..training.optimizers import make_optimizer, warmup_cosine
from ..training.runs import RunSettings, load_runs, train_runs, update_results, write_summary
from ..training.scoring import evaluation_splits
from ..training.self_supervised import Method, PretrainingConfig, as_bytes, load_method
from ..training.transfer_scoring import transfer_scores
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
    def _train(
        self, config: Any, out: str | Path | None, data_root: str | Path | None, download: bool, settings: RunSettings
    ) -> dict[str, Any]:
        dataset = load_dataset(config.data, data_root, download=download)
        config.make_encoder(dataset.channels)  # a missing weight file is noticed before a folder is made

        def run_one(run: RunFolder, seed: int, accelerator: Accelerator) -> dict[str, Any]:
            seed_everything(seed)
            method = _build(config, dataset)
            nn.Module.to(method, memory_format=torch.channels_last)  # type: ignore[call-overload]
            optimizer = make_optimizer(
                method, config.optimizer, learning_rate=config.learning_rate, weight_decay=config.weight_decay
            )
            scheduler = LambdaLR(optimizer, warmup_cosine(config.epochs, config.warmup_epochs))
            split, _ = evaluation_splits(dataset, config.selection)
            plan = Plan(len(split), config.epochs, config.batch_size, seed, drop_last=True)
            session = Session(run, accelerator, method, optimizer, scheduler, plan, settings.resume, settings.quiet)
            fit(split, session, config)
            return transfer_scores(method.encoder.eval(), dataset, config, seed) if accelerator.is_main_process else {}

        return train_runs(
            f"{self.name}-{Path(config.data).stem}-{config.preset_name}",
            {"paper": self.name, "config": asdict(config)},
            run_one,
            out=out,
            settings=settings,
            provenance=dataset.provenance,
            epochs=config.epochs,
        )

    def evaluate(self, folder: str | Path, *, data_root: str | Path | None = None) -> dict[str, Any]:
        for run in load_runs(folder):
            config = self.CONFIG.from_dict(run.config()["config"])
            dataset = load_dataset(config.data, data_root)
            method = load_method(run, _build(config, dataset))
            scores = transfer_scores(method.encoder, dataset, config, run.config()["seed"])
            update_results(run, scores, dataset.provenance, epochs=config.epochs)
        return write_summary(folder)


def fit(split: Split, session: Session, config: PretrainingConfig) -> None:
    """The loop: both views of every image, and its labels."""
    images, targets = as_bytes(split.images).to(session.device), targets_of(split).to(session.device)
    views = config.views()
    for _ in session.epochs():
        for step in session.steps():
            first, second = two_views(views, images, step, session)
            losses = session.model(first, second, targets[step.indices])
            session.optimise(losses["loss"], step)
            session.record(step, **losses)


def _build(config: Any, dataset: ImageDataset) -> Supervised:
    return Supervised(config, dataset.channels, len(dataset.target_names) or dataset.num_classes)


BASELINE = _WithLabels("supervised", SupervisedConfig, Supervised, __doc__)
