# SPDX-License-Identifier: MIT
"""What the baselines of the clustering papers share: their settings, one loop around their losses, one evaluation.

A method is a :class:`ClusteringModel` and a function ``fit``; :class:`ClusteringBaseline` makes of them what a paper's module
offers (``CONFIG``, ``train``, ``evaluate``, ``draw_figures``). All are judged as VAESim is: statistical mapping, nearest
neighbours and a linear probe on every set, with the majority rate beside them.

A mixture can collapse without a word: every image in one cluster, or a latent vector that nothing is written to. Every epoch's
metrics therefore hold

    clusters_used       clusters that at least one image belongs to
    largest_cluster     the share of the largest
    effective_clusters  exp(entropy of the shares): K where all are equally large, 1 after a collapse
    active_dimensions   dimensions of z whose mean varies over images by more than 0.01 (Burda et al. 2016, section 5)

measured on the training images (at most 5,000 of them, evenly spaced). A run that ends with nearly everything in one cluster
says so in a warning, in ``results.json`` (``"collapsed"``, and for every scored set) and under its table.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..data import ImageDataset, Split
from ..data.datasets import data_name
from ..data.mapped import Images, tensor_batches
from ..evaluation import EvaluationConfig, Representation
from ..evaluation.linear import LinearProtocol
from ..training import RunFolder, Session, derived_generator
from ..training.configuration import RunConfig
from ..training.experiment import Experiment, training_images
from ..training.report import PaperResults, results_table
from ..training.scoring import evaluation_splits, score

WATCHED = 5000  # training images on which an epoch's use of clusters is measured
COLLAPSED = 0.95  # share of the largest cluster from which on a run counts as collapsed

Config = TypeVar("Config", bound="ClusteringConfig")


@dataclass(frozen=True)
class ClusteringConfig(RunConfig):
    """What every method has. A method's own dataclass inherits it and adds its own fields; its presets go into ``PRESETS``."""

    image_size: int = 32  # pixels; images are resized to it
    epochs: int = 20
    batch_size: int = 256
    learning_rate: float = 1e-3  # of Adam
    embedding: Literal["mean", "sample"] = "mean"  # the z that is evaluated
    knn_k: int = 5
    linear_protocol: LinearProtocol = "fair"
    selection: bool = False  # for choosing hyper-parameters: score validation data only, never the test set

    PRESETS: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {}
    """Preset -> data set, or ``"*"`` for any other -> fields."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("image_size", "epochs", "batch_size", "learning_rate", "knn_k")

    @classmethod
    def preset(cls: type[Config], name: str = "fair", data: str = "digits", **changes: Any) -> Config:
        """The preset ``name`` for the data set ``data``, with single fields changed. ``ValueError`` for an unknown
        preset."""
        data = data_name(data)
        if name not in cls.PRESETS:
            raise ValueError(f"{cls.__name__}.preset: expected one of {', '.join(cls.PRESETS)}; got {name!r}")
        chosen = cls.PRESETS[name]
        return cls(**{"data": data, "preset_name": name, **chosen.get(data, chosen["*"]), **changes})

    @property
    def total_epochs(self) -> int:
        """Epochs of all stages of training."""
        return self.epochs

    def learning_rate_factor(self, epoch: int) -> float:
        """What the learning rate is multiplied by in an epoch, counted from 0."""
        return 1.0


@dataclass(frozen=True, eq=False)
class Clustering:
    """A trained model and its clusters, ready to be scored and drawn."""

    represent: Callable[[Split, str], Representation]  # of a split, given its name
    centers: Tensor  # [K, D], the middle of every cluster in the space of z
    results: dict[str, Any]  # what else belongs into results.json


class ClusteringModel(nn.Module):
    """A model of images with clusters. Everything with a state is a parameter or buffer, so that a checkpoint holds it."""

    num_clusters: int = 0  # K; 0: clusters are found afterwards
    generative = True  # it can reconstruct and decode

    def represent(self, images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        """Embeddings [B, D] float32 and clusters [B] int64 (None without any) of images [B, C, H, W]; the mean of z, or with a
        ``generator`` a sample of it."""
        raise NotImplementedError

    def reconstruct(self, images: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W] in [0, 1]
        """Images that went through the mean of their latent vectors."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:  # [B, D] -> [B, C, H, W] in [0, 1]
        """Images of latent vectors."""
        raise NotImplementedError

    def centers(self) -> Tensor:  # [K, D]
        """The middle of every cluster in the space of z."""
        raise NotImplementedError


def cosine_factor(epoch: int, epochs: int) -> float:
    """From 1 in the first epoch along half a cosine towards 0 after the last."""
    return 0.5 * (1 + math.cos(math.pi * min(epoch, epochs) / epochs))


def gaussian_sample(mean: Tensor, deviation: Tensor, generator: torch.Generator) -> Tensor:  # [B, D] each -> [B, D]
    """mean + deviation * noise; the generator is on the CPU, so that every device draws the same."""
    return mean + deviation * torch.randn(mean.shape, generator=generator).to(mean.device)


def dense_layers(*sizes: int) -> nn.Sequential:
    """Linear layers of these sizes, each followed by ReLU."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers)


def cluster_usage(clusters: Tensor, num_clusters: int) -> dict[str, float]:  # [N] int64
    """How evenly clusters are used: ``clusters_used``, ``largest_cluster`` and ``effective_clusters`` of the module's docstring.

    >>> cluster_usage(torch.tensor([0, 0, 2, 2]), 4)
    {'clusters_used': 2.0, 'largest_cluster': 0.5, 'effective_clusters': 2.0}
    """
    share = torch.bincount(clusters.cpu(), minlength=num_clusters).double() / len(clusters)
    entropy = -torch.special.xlogy(share, share).sum()
    return {
        "clusters_used": float((share > 0).sum()),
        "largest_cluster": float(share.max()),
        "effective_clusters": round(float(entropy.exp()), 12),
    }


def active_dimensions(z: Tensor) -> float:  # [N, D] means
    """Number of dimensions whose variance over images is above 0.01; the others hold nothing about the image."""
    return float((z.double().var(dim=0, correction=0) > 0.01).sum())


@torch.no_grad()
def watch(model: ClusteringModel, images: Images) -> dict[str, float]:  # images [N, C, H, W]
    """An epoch's measures of collapse, in evaluation mode."""
    model.eval()
    chosen = images[:: -(-len(images) // WATCHED)]
    parts = [model.represent(batch, None) for batch in chosen.split(1000)]
    measures = {"active_dimensions": active_dimensions(torch.cat([z for z, _ in parts]))}
    clusters = [labels for _, labels in parts if labels is not None]
    return {**measures, **(cluster_usage(torch.cat(clusters), model.num_clusters) if clusters else {})}


@torch.no_grad()
def represent(model: ClusteringModel, split: Split, config: Any, *, name: str, seed: int) -> Representation:
    """Embeddings, labels and clusters of a split, in evaluation mode and on the device of the model."""
    model.eval()
    device = next(model.parameters()).device
    generator = derived_generator(seed, "evaluation", name) if config.embedding == "sample" else None
    parts = [
        model.represent(images.to(device), generator)
        for images in tensor_batches(split.images, 1000, size=config.image_size)
    ]
    clusters = [labels.cpu() for _, labels in parts if labels is not None]
    z = torch.cat([embeddings.float().cpu() for embeddings, _ in parts])
    return Representation(z, torch.as_tensor(split.labels), torch.cat(clusters) if clusters else None)


def remembered(represent: Callable[[Split, str], Representation]) -> Callable[[Split, str], Representation]:
    """``represent``, which is called once for every name."""
    known: dict[str, Representation] = {}

    def of(split: Split, name: str) -> Representation:
        if name not in known:
            known[name] = represent(split, name)
        return known[name]

    return of


class ClusteringBaseline(Experiment[Any]):
    """One method as the command line and the tests see it; the same functions as a paper's module.

    Args:
        name: of the method's module.
        config: its dataclass.
        build: (configuration, image channels, number of classes) -> model, untrained.
        fit: (model, images [N, C, H, W] in [0, 1], session, configuration); trains with the session. It sees no labels. None for
            a method that overrides :meth:`fit_split`.
        description: the module's docstring.
        paper: the paper's table: data set -> (split it was scored on, method -> (mean, standard deviation)).
    """

    def __init__(
        self,
        name: str,
        config: type[ClusteringConfig],
        build: Callable[[Any, int, int], Any],
        fit: Callable[[Any, Images, Session, Any], None] | None,
        description: str | None,
        paper: PaperResults,
    ) -> None:
        super().__init__(name, config)
        self.build, self.fit = build, fit
        self.PAPER_RESULTS = paper
        self.__doc__ = description

    def new_model(self, config: Any, dataset: ImageDataset) -> Any:
        return self.build(config, dataset.channels, dataset.num_classes)

    def optimizer(self, model: Any, config: Any) -> tuple[Optimizer, LRScheduler]:
        optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
        return optimizer, LambdaLR(optimizer, config.learning_rate_factor)

    def epochs(self, config: Any, dataset: ImageDataset) -> int:
        count: int = config.total_epochs
        return count

    def fit_split(self, model: Any, split: Split, session: Session, config: Any) -> None:
        """Trains on images; a supervised method, which has no ``fit``, overrides this and takes the labels too."""
        assert self.fit is not None
        self.fit(model, training_images(split, config.image_size, session), session, config)

    def clustering(
        self, model: Any, dataset: ImageDataset, config: Any, seed: int, known: dict[str, Any] | None = None
    ) -> Clustering:
        """What is scored and drawn; a method that clusters afterwards overrides this. ``known``: the results of the run, where
        they are not to be found out again."""

        def of(split: Split, name: str) -> Representation:
            return represent(model, split, config, name=name, seed=seed)

        return Clustering(remembered(of), model.centers(), {})

    def embed(self, model: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
        found: tuple[Tensor, Tensor | None] = model.represent(images, None)
        return found

    def more_scores(self, model: Any, found: Representation, num_classes: int) -> dict[str, dict[str, float]]:
        """Scores of one set that only this method has."""
        return {}

    def score_model(self, model: Any, dataset: ImageDataset, config: Any, seed: int) -> dict[str, Any]:
        """Every protocol on every set of the data, and how the training images are spread over the clusters."""
        found = self.clustering(model, dataset, config, seed)
        more, number = found.results, len(found.centers)
        results = score(
            found.represent,
            dataset,
            EvaluationConfig(knn_k=config.knn_k, linear_protocol=config.linear_protocol),
            num_clusters=number,
            selection=config.selection,
            seed=seed,
        )
        train, tests = evaluation_splits(dataset, config.selection)
        for name, split in tests.items():
            shown, scores = found.represent(split, name), results["splits"][name]
            scores |= self.more_scores(model, shown, dataset.num_classes)
            if shown.clusters is not None:  # as numbers beside the scores, so that a summary over seeds keeps them
                usage = cluster_usage(shown.clusters, number)
                scores["clustering"] |= {**usage, "collapsed": float(usage["largest_cluster"] > COLLAPSED)}
        clusters = found.represent(train, "train").clusters
        if clusters is not None:
            usage = cluster_usage(clusters, number)
            collapsed = usage["largest_cluster"] > COLLAPSED
            more = {"clusters": {"number": number, **usage}, "collapsed": collapsed, **more}
            if collapsed:
                warnings.warn(
                    f"{self.name} has collapsed: {usage['largest_cluster']:.1%} of the training images are in one of "
                    f"{number} clusters; its statistical accuracy is that of a constant",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return {**results, **more, "protocol": {"embedding": config.embedding, **results["protocol"]}}

    def draw(self, folder: Path, run: RunFolder, config: Any, dataset: ImageDataset) -> list[Path]:
        from ..figures.clustering import draw  # matplotlib is not needed for training

        return draw(folder / "figures", self, self.load_model(run, config, dataset), config, run, dataset)

    def results_table(self, results: dict[str, Any], paper: PaperResults) -> Table:
        """The table at the end of a run, with what has to be known about it in its caption."""
        epochs = self.CONFIG.from_dict(results["config"]).total_epochs
        table = results_table({**results, "config": {**results["config"], "epochs": epochs}}, paper)
        table.caption = "\n".join([str(table.caption), *self.remarks(results)])
        return table

    def remarks(self, results: dict[str, Any]) -> list[str]:
        """Sentences about a result that nobody should miss."""
        name, scores = next(iter(results["splits"].items()))
        if "clusters" not in results:
            return []
        usage = {key: value["mean"] for key, value in scores["clustering"].items()}
        lines = [
            f"clusters used by {name}: {usage['clusters_used']:.1f} of {results['clusters']['number']}, the largest with "
            f"{usage['largest_cluster']:.1%}"
        ]
        if collapsed := round(usage["collapsed"] * results["number_of_runs"]):
            lines.append(f"COLLAPSED to one cluster: {collapsed} of {results['number_of_runs']} runs")
        return lines
