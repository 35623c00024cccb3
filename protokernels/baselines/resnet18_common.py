# SPDX-License-Identifier: MIT
"""What the baselines on a frozen ResNet18 share: its features, and the commands.

The weights come from a local file (``initial_weights``, torchvision's names). Without one the network stays as it was initialised, and
results, tables and folders say "random weights": such numbers are no transfer from ImageNet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from ..data import ImageDataset, Split
from ..data.datasets import data_name, data_title
from ..data.mapped import tensor_batches
from ..evaluation import classification_scores, clustering_scores
from ..models import ResNet18, pooled
from ..papers._contrastive_autoencoder_config import PAPER_RESULTS
from ..training import RunFolder, seed_everything
from ..training.checkpoints import fitting
from ..training.classification_report import results_table
from ..training.configuration import RunConfig
from ..training.experiment import Experiment
from ..training.runs import Trial, load_runs
from ..training.scoring import evaluation_splits

PresetName = Literal["paper", "fair"]
Config = TypeVar("Config", bound="FrozenResNet18Config")


@dataclass(frozen=True)
class FrozenResNet18Config(RunConfig):
    """The network and its images. Grey images are repeated to three channels and normalised by ImageNet's statistics."""

    image_size: int = 224  # pixels; images are resized to it
    initial_weights: str = ""  # file with ImageNet weights of ResNet18; empty: random
    selection: bool = False  # score validation data only, never the test set

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "fair": {"image_size": 64},
    }  # `fair`: a twelfth of the time

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("image_size")

    @classmethod
    def preset(cls: type[Config], name: PresetName = "fair", data: str = "digits", **changes: Any) -> Config:
        """The preset ``name`` for the data set ``data``, with single fields changed. ``ValueError`` for an unknown
        preset."""
        data = data_name(data)
        if name not in get_args(PresetName):
            raise ValueError(f"{cls.__name__}.preset: expected one of {', '.join(get_args(PresetName))}; got {name!r}")
        return cls(**{"data": data, "preset_name": name, **cls.PRESETS[name], **changes})

    def make_encoder(self) -> ResNet18:
        """The frozen network, in evaluation mode."""
        encoder = ResNet18(channels=3)
        if self.initial_weights:
            encoder.load_imagenet_weights(self.initial_weights)
        return encoder.eval().requires_grad_(False)


def pooled_features(encoder: ResNet18, images: Tensor) -> Tensor:  # [B, 1 or 3, H, W] -> [B, 512] float32
    """The output of the pooling layer, on the CPU."""
    return pooled(encoder(images.expand(-1, 3, -1, -1))).cpu()


@torch.no_grad()
def features(encoder: ResNet18, split: Split, image_size: int) -> Tensor:  # -> [N, 512] float32
    """:func:`pooled_features` of all images of a split."""
    device = next(encoder.parameters()).device
    return torch.cat(
        [pooled_features(encoder, images.to(device)) for images in tensor_batches(split.images, 100, size=image_size)]
    )


class Fitted(NamedTuple):
    """The frozen network, and what was fitted to its features; the latter stays on the CPU, where features are."""

    encoder: ResNet18
    tensors: dict[str, Tensor]

    def to(self, device: torch.device | str) -> Fitted:
        """The same with the network on ``device``."""
        return self._replace(encoder=self.encoder.to(device))


class FrozenResNet18(Experiment[Any]):
    """One baseline as the command line and the tests see it; the same functions as a paper's module.

    Args:
        name: of the baseline's module, and of its row.
        config: its dataclass.
        fit: (training features [N, 512], labels [N], number of classes, configuration, seed) -> tensors by name, which a checkpoint
            keeps.
        predict: (those tensors, features [M, 512]) -> classes [M], and clusters [M] or None.
        description: the module's docstring.
    """

    PAPER_RESULTS = PAPER_RESULTS

    def __init__(
        self,
        name: str,
        config: type[FrozenResNet18Config],
        fit: Callable[[Tensor, Tensor, int, Any, int], dict[str, Tensor]],
        predict: Callable[[dict[str, Tensor], Tensor], tuple[Tensor, Tensor | None]],
        description: str | None,
    ) -> None:
        super().__init__(name, config)
        self.fit, self.predict = fit, predict
        self.__doc__ = description
        self.results_table = results_table

    def check(self, config: FrozenResNet18Config, dataset: ImageDataset) -> None:
        config.make_encoder()  # a missing weight file

    def title(self, config: FrozenResNet18Config) -> str:
        return self.name if config.initial_weights else f"{self.name}-random"

    def epochs(self, config: FrozenResNet18Config, dataset: ImageDataset) -> int:
        return 0  # nothing is trained step by step

    def run(self, trial: Trial, config: FrozenResNet18Config, dataset: ImageDataset) -> dict[str, Any]:
        if not trial.is_main_process:
            return {}
        seed_everything(trial.seed)
        encoder = config.make_encoder().to(trial.accelerator.device)
        train = self.training_split(dataset, config)
        x = features(encoder, train, config.image_size)
        fitted = self.fit(x, torch.as_tensor(train.labels), dataset.num_classes, config, trial.seed)
        trial.run.checkpoints.save({"encoder": encoder.state_dict(), "fitted": fitted}, epoch=0)
        return self.score_model(Fitted(encoder, fitted), dataset, config, trial.seed)

    def load_model(self, run: RunFolder, config: FrozenResNet18Config, dataset: ImageDataset) -> Fitted:
        state = run.checkpoint()
        encoder = ResNet18(channels=3).eval().requires_grad_(False)
        with fitting(run.checkpoints):
            encoder.load_state_dict(state["encoder"])
            return Fitted(encoder, state["fitted"])

    def embed(self, model: Fitted, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = pooled_features(model.encoder, images)
        return x, self.predict(model.tensors, x)[1]

    def draw_figures(
        self, folder: str | Path, *, data_root: str | Path | None = None, dataset: ImageDataset | None = None
    ) -> list[Path]:
        """Draws the elbow curve of the first seed into ``figures``, where an elbow was looked for, and returns the
        paths. The data is not needed."""
        from ..figures import elbow_curve, save_figure  # matplotlib is not needed for training

        run = load_runs(folder)[0]
        config, fitted = self.config_of(run), run.checkpoint()["fitted"]
        if not len(fitted.get("inertias", ())):
            return []
        figure = elbow_curve(
            fitted["candidates"].tolist(),
            fitted["inertias"].tolist(),
            len(fitted["centres"]),
            found=bool(fitted["elbow_found"]),
            title=f"ResNet18, {_weights(config.initial_weights)} weights, {data_title(config.data)}: KMeans on features",
        )
        return [save_figure(figure, Path(folder) / "figures" / "elbow.png")]

    def score_model(
        self, model: Fitted, dataset: ImageDataset, config: FrozenResNet18Config, seed: int
    ) -> dict[str, Any]:
        encoder, fitted = model
        train, tests = evaluation_splits(dataset, config.selection)
        majority = torch.bincount(torch.as_tensor(train.labels), minlength=dataset.num_classes).argmax()
        splits: dict[str, dict[str, Any]] = {}
        for name, split in tests.items():
            labels = torch.as_tensor(split.labels)
            prediction, clusters = self.predict(fitted, features(encoder, split, config.image_size))
            splits[name] = {
                key: classification_scores(value, labels, dataset.num_classes)
                for key, value in ((self.name, prediction), ("majority", majority.expand(len(labels))))
            }
            if clusters is not None:
                splits[name]["clustering"] = clustering_scores(clusters, labels)
        images = {name: len(split) for name, split in {"train": train, **tests}.items()}
        weights = _weights(config.initial_weights)
        protocol = {"weights": weights, "image_size": config.image_size}
        results = {"splits": splits, "images": images, "protocol": protocol, "weights": weights}
        return {**results, "prototypes": {"number": len(fitted["centres"])}} if "centres" in fitted else results


def _weights(path: str) -> str:
    return Path(path).name if path else "random"
