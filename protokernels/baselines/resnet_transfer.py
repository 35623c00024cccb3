# SPDX-License-Identifier: MIT
"""ResNet transfer: a supervised network, the ceiling beside methods that learn without labels.

A baseline of VAESim (Ferrante et al. 2023, Table 1: ResNet50 from ImageNet, .99 on MNIST and .85 on PneumoniaMNIST). K. He, X. Zhang,
S. Ren, J. Sun. Deep Residual Learning for Image Recognition. CVPR 2016, with a new linear layer; cross-entropy, Adam.

    L = -log softmax(W f(x) + b)_label

The transfer that the contrastive autoencoder is compared with, :mod:`protokernels.baselines.resnet18_transfer`, is another: there the
network stays as it is, and a linear layer is fitted to its output.

``--initial-weights FILE`` is a local file with torchvision's names (``resnet50-0676ba61.pth``); nothing is downloaded. **Without it
the network starts at random and is no transfer**: its folder, its figures, its protocol, its results and a line under its table
say so. ``frozen`` trains the linear layer alone.

The accuracy of the network itself is ``"supervised"`` in ``results.json``; kNN and linear probe are those of its features, which have
seen every training label.

Presets
    ``paper``  the standard size, 224 pixels, 10 epochs of Adam at a constant 1e-4. The paper gives no setting of this baseline, and
               the released code has none; these are usual ones.
    ``fair``   ours, for one CPU core: 32 pixels, cosine schedule; Adam 1e-3, which suits a random start (for ImageNet weights
               1e-4 is usual).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import ImageDataset, Split, to_tensor
from ..evaluation import Representation, classification_scores
from ..models.resnet_encoder import Depth, ResNetEncoder
from ..papers._vaesim_published import PUBLISHED
from ..training import RunFolder, Session, preferred_layout
from ..training.checkpoints import fitting
from .clustering import ClusteringBaseline, ClusteringConfig, ClusteringModel, cosine_factor

_PAPER: dict[str, Any] = {
    "image_size": 224,
    "epochs": 10,
    "batch_size": 64,
    "learning_rate": 1e-4,
    "schedule": "constant",
}


@dataclass(frozen=True)
class ResNetTransferConfig(ClusteringConfig):
    """The shared settings and this method's own."""

    # without effect: features are no distribution, and are evaluated as they are
    embedding: Literal["mean", "sample"] = "mean"
    depth: Depth = 50
    initial_weights: str = ""  # file with ImageNet weights; empty: random, and labelled so
    frozen: bool = False  # train the linear layer alone
    schedule: Literal["constant", "cosine"] = "cosine"  # of the learning rate

    PRESETS: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "paper": {"*": {**_PAPER, "linear_protocol": "paper"}},
        "fair": {"mnist": {"epochs": 5, "batch_size": 128}, "*": {"epochs": 10, "batch_size": 64}},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < 32:
            raise ValueError(f"ResNetTransferConfig: image_size must be at least 32 pixels; got {self.image_size}")
        if self.frozen and not self.initial_weights:
            raise ValueError("ResNetTransferConfig: a frozen network needs initial_weights; without them it is random")

    def learning_rate_factor(self, epoch: int) -> float:
        return cosine_factor(epoch, self.epochs) if self.schedule == "cosine" else 1.0


class ResNetTransfer(ClusteringModel):
    """Encoder and one linear layer.

    Shape: images [B, C, H, W] in [0, 1] -> logits [B, number of classes], float32.
    """

    generative = False

    def __init__(self, config: ResNetTransferConfig, channels: int, classes: int) -> None:
        super().__init__()
        self.encoder = ResNetEncoder(config.depth, channels)
        self.head = nn.Linear(self.encoder.dim, classes)
        self.frozen = config.frozen
        if config.initial_weights:
            self.encoder.load_imagenet_weights(config.initial_weights)
        self.encoder.requires_grad_(not config.frozen)

    def train(self, mode: bool = True) -> ResNetTransfer:
        super().train(mode)
        self.encoder.train(mode and not self.frozen)  # a frozen network keeps its running statistics
        return self

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(images)).float()
        return logits

    def represent(self, images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, None]:
        features: Tensor = self.encoder(images)
        return features, None

    def centers(self) -> Tensor:
        return torch.empty(0, self.encoder.dim)


class _Transfer(ClusteringBaseline):
    drop_last = True  # batch normalisation has no variance in a batch of one

    def title(self, config: Any) -> str:
        return f"resnet{config.depth}_{'imagenet' if config.initial_weights else 'random_init'}"

    def load_model(self, run: RunFolder, config: Any, dataset: ImageDataset) -> Any:
        state = run.checkpoint()["model"]
        model = self.build(replace(config, initial_weights="", frozen=False), dataset.channels, len(state["head.bias"]))
        with fitting(run.checkpoints):
            model.load_state_dict(state)
        return model.eval()

    def fit_split(self, model: Any, split: Split, session: Session, config: Any) -> None:
        """Resizes batch by batch: 60,000 images of 224 pixels would take 12 GB."""
        if not config.initial_weights:
            warnings.warn(
                "resnet_transfer starts from random weights, which is no transfer; pass --initial-weights FILE",
                RuntimeWarning,
                stacklevel=2,
            )
        labels = torch.as_tensor(split.labels)
        layout = preferred_layout(session.accelerator)
        for _ in session.epochs():
            for step in session.steps():
                chosen = step.indices.cpu()
                x = to_tensor(split.images[chosen.numpy()], size=config.image_size).to(
                    session.device, memory_format=layout
                )
                targets = labels[chosen].to(session.device)
                logits = session.model(x)
                loss = F.cross_entropy(logits, targets)
                session.optimise(loss, step)
                session.record(step, loss=loss, training_accuracy=(logits.argmax(dim=1) == targets).double().mean())

    @torch.no_grad()
    def more_scores(self, model: Any, found: Representation, num_classes: int) -> dict[str, dict[str, float]]:
        logits = model.head(found.embeddings.to(model.head.weight.device)).cpu()
        return {"supervised": classification_scores(logits.argmax(dim=1), found.labels, num_classes)}

    def score_model(self, model: Any, dataset: Any, config: Any, seed: int) -> dict[str, Any]:
        results = super().score_model(model, dataset, config, seed)
        start = "ImageNet" if config.initial_weights else "random"
        protocol = {key: value for key, value in results["protocol"].items() if key != "embedding"}
        return {**results, "protocol": {"labels": "all", "initial weights": start, **protocol}}

    def remarks(self, results: dict[str, Any]) -> list[str]:
        scores = {name: row["supervised"]["accuracy"]["mean"] for name, row in results["splits"].items()}
        lines = ["supervised: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items())]
        for row in PUBLISHED.get(results["config"]["data"], ()):
            if row.method == self.name:
                lines.append(f"the paper's ResNet50: {row.split} {row.accuracies['supervised'][0]:.2f}")
        if not results["config"]["initial_weights"]:
            lines.append("RANDOM INITIALISATION: no ImageNet weights were given, so this is no transfer")
        return lines


BASELINE = _Transfer("resnet_transfer", ResNetTransferConfig, ResNetTransfer, None, __doc__, {})
