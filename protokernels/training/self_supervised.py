# SPDX-License-Identifier: MIT
"""One loop for all methods that learn from two views of an image: their settings, optimiser, checkpoints, run folders.

A method is a :class:`Method`: a module with an ``encoder``, whose ``forward`` takes the two views and returns its losses.
What it learns is the encoder, which is judged by :func:`protokernels.training.transfer_scoring.transfer_scores`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..data import ImageDataset, Split
from ..data.datasets import data_name
from ..data.mapped import Images, prepared
from ..evaluation import TransferProtocol
from ..models import ResNet18, Stem, pooled
from ..nn import RandomViews
from .checkpoints import fitting
from .configuration import RunConfig
from .experiment import Experiment
from .optimizers import OptimizerName, make_optimizer, warmup_cosine
from .run_folder import RunFolder
from .runs import Trial
from .session import Session
from .transfer_scoring import choosing_splits, transfer_scores
from .views import two_views

PretrainingPreset = Literal["paper", "fair"]
ViewMaker = Literal["RandomViews", "matrices"]
Config = TypeVar("Config", bound="PretrainingConfig")


@dataclass(frozen=True)
class PretrainingConfig(RunConfig):
    """What every method has: encoder, views, optimisation. A method's own dataclass inherits it and adds its own
    fields; its presets go into ``PRESETS``, what of it has to be positive into ``POSITIVE``."""

    image_size: int = 112  # pixels of a view
    stem: Stem = "imagenet"  # first layers of the encoder; "small" keeps the resolution
    width: int = 16  # channels of the encoder's first stage; 64 is ResNet18
    last_stride: int = 1  # of the encoder's last stage; 2 is ResNet18, 1 gives a map twice as fine
    initial_weights: str = ""  # file with ImageNet weights of the standard ResNet18; empty: random
    crop_scale: float = 0.2  # smallest share of the image in a crop
    blur: bool = True  # Gaussian blur in the views
    solarise: bool = True  # solarisation in the second view
    view_maker: ViewMaker = "RandomViews"  # "matrices": in records of earlier runs, which cannot be continued
    epochs: int = 30
    batch_size: int = 64
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup_epochs: int = 2
    transfer: TransferProtocol = "fair"  # how the encoder is judged
    selection: bool = False  # for choosing hyper-parameters: score validation data only, never the test set

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}  # preset -> a method's own fields
    POSITIVE: ClassVar[tuple[str, ...]] = ()  # a method's own fields that have to be

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("image_size", "width", "last_stride", "batch_size", "crop_scale", *self.POSITIVE)
        if not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise ValueError(
                f"{type(self).__name__}: learning_rate must be positive and weight_decay not negative; got "
                f"{self.learning_rate} and {self.weight_decay}"
            )
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(
                f"{type(self).__name__}: warmup_epochs must lie between 0 and epochs; got {self.warmup_epochs} of "
                f"{self.epochs}"
            )

    @classmethod
    def preset(cls: type[Config], name: PretrainingPreset = "fair", data: str = "digits", **changes: Any) -> Config:
        """The preset ``name`` for the data set ``data``, with single fields changed. ``ValueError`` for an unknown
        preset."""
        data = data_name(data)
        if name not in get_args(PretrainingPreset):
            raise ValueError(
                f"{cls.__name__}.preset: expected one of {', '.join(get_args(PretrainingPreset))}; got {name!r}"
            )
        common = _PRESETS[name] | (_DIGITS if data == "digits" else {})
        return cls(**{"data": data, "preset_name": name, **common, **cls.PRESETS.get(name, {}), **changes})

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """The configuration in a run folder; ``ValueError`` for fields this version does not know."""
        return super().from_dict({"view_maker": "matrices", **values})  # before it was recorded there was nothing else

    def views(self) -> RandomViews:
        """The random transformations: crop, flip, brightness, contrast, blur, solarisation; those of OPTiML for every method. How they
        differ from the authors': :meth:`protokernels.nn.RandomViews.preset`.

        Raises:
            ValueError: the views were made in another way than now: up to version 0.1 by products with matrices, from other random
                numbers of the same distributions. They differ by the blur at a view's border and the smoothing where an image shrinks.
        """
        if self.view_maker != "RandomViews":
            raise ValueError(
                f"{type(self).__name__}: views by {self.view_maker} are those of an earlier version of protokernels; evaluate the "
                "run, or train anew with view_maker='RandomViews'"
            )
        both = [
            replace(
                strength,
                crop_scale=(self.crop_scale, 1.0),
                blur=strength.blur if self.blur else 0.0,
                solarise=strength.solarise if self.solarise else 0.0,
            )
            for strength in RandomViews.preset("optiml", self.image_size).strengths
        ]
        return RandomViews(self.image_size, *both)

    def make_encoder(self, channels: int) -> ResNet18:
        """The encoder, with its initial weights."""
        encoder = ResNet18(channels, width=self.width, stem=self.stem, last_stride=self.last_stride)
        if self.initial_weights:
            encoder.load_imagenet_weights(self.initial_weights)
        return encoder


# What methods share, so that they differ in nothing but their loss. `paper`: the settings of the authors' other
# self-supervised work on chest X-rays; `fair`: ours, for one CPU core.
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "image_size": 224,
        "width": 64,
        "last_stride": 2,
        "crop_scale": 0.08,
        "epochs": 300,
        "optimizer": "lars",
        "learning_rate": 0.05,  # 0.2 * batch / 256
        "weight_decay": 1e-6,
        "transfer": "sister",
    },
    "fair": {},
}
# 8 x 8 pixels: a map of 4 x 4 positions, a demonstration in a minute
_DIGITS: dict[str, Any] = {
    "image_size": 32,
    "stem": "small",
    "last_stride": 2,
    "epochs": 5,
    "optimizer": "adamw",
    "learning_rate": 1e-3,
    "transfer": "probe",
}


class Method(nn.Module):
    """A way to learn an encoder from two views of every image.

    Everything with a state is a submodule or buffer (teachers and queues too), so that a checkpoint holds it.
    Parameters that need a gradient are optimised; a teacher's do not need one (see :func:`frozen_copy`).
    """

    encoder: ResNet18

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:  # [B, C, S, S] each, in [0, 1]
        """The losses as means over the batch: ``"loss"``, which is minimised, and others, which are recorded."""
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """Called after every step of the optimiser, with the share of training that is done: moving averages, ..."""


def frozen_copy(source: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """A teacher: what ``build`` makes, with the state of ``source``, without gradients."""
    teacher = build()
    teacher.load_state_dict(source.state_dict())
    return teacher.requires_grad_(False)


@torch.no_grad()
def move_towards(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum teacher + (1 - momentum) student, for parameters; buffers are copied."""
    for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
        old.lerp_(new, 1 - momentum)
    for before, after in zip(teacher.buffers(), student.buffers(), strict=True):
        before.copy_(after)


def pretrain(method: Method, images: Images, session: Session, views: RandomViews) -> None:
    """The loop: two views, losses, one step.

    Args:
        method: the model of the session, before it was wrapped for several processes.
        images: [N, C, H, W] uint8, on the device.
        session: see :class:`Session`.
        views: the random transformations.
    """
    for _ in session.epochs():
        for step in session.steps():
            first, second = two_views(views, images, step, session)
            losses = session.model(*(view.contiguous(memory_format=torch.channels_last) for view in (first, second)))
            session.optimise(losses["loss"], step)
            method.after_step(step.progress)
            session.record(step, **losses)


class SelfSupervised(Experiment[Config]):
    """A method as the command line sees it: :func:`pretrain`, and then its encoder is judged by :func:`transfer_scores`.

    Args:
        name: of its module.
        config: its dataclass.
        build: (configuration, image channels) -> method; encoder first, so that all methods start from the same encoder.
    """

    drop_last = True

    def __init__(self, name: str, config: type[Config], build: Callable[[Any, int], Method]) -> None:
        super().__init__(name, config)
        self.build = build

    def check(self, config: Any, dataset: ImageDataset) -> None:
        super().check(config, dataset)
        config.views()
        choosing_splits(dataset, config.selection)

    def new_model(self, config: Any, dataset: ImageDataset) -> Method:
        return self.build(config, dataset.channels)

    def start(self, trial: Trial, config: Any, dataset: ImageDataset) -> Method:
        return in_fast_layout(self.new_model(config, dataset))

    def optimizer(self, model: Method, config: Any) -> tuple[Optimizer, LRScheduler]:
        optimizer = make_optimizer(
            model, config.optimizer, learning_rate=config.learning_rate, weight_decay=config.weight_decay
        )
        return optimizer, LambdaLR(optimizer, warmup_cosine(config.epochs, config.warmup_epochs))

    def fit_split(self, model: Method, split: Split, session: Session, config: Any) -> None:
        pretrain(model, training_bytes(split, session), session, config.views())

    def load_model(self, run: RunFolder, config: Any, dataset: ImageDataset) -> Method:
        return load_method(run, self.new_model(without_weight_file(config), dataset))

    def embed(self, model: Method, images: Tensor) -> tuple[Tensor, None]:
        return pooled(model.encoder(images.contiguous(memory_format=torch.channels_last))).float(), None

    def score_model(self, model: Method, dataset: ImageDataset, config: Any, seed: int) -> dict[str, Any]:
        return transfer_scores(model.encoder.eval(), dataset, config, seed)


def without_weight_file(config: Config) -> Config:
    """``config`` for a model that a checkpoint fills: the file of initial weights may be gone by then."""
    return replace(config, initial_weights="")


def load_method(run: RunFolder, method: Method) -> Method:
    """``method`` with the state of the newest sound checkpoint of a run, in evaluation mode."""
    state = run.checkpoint()
    with fitting(run.checkpoints):
        method.load_state_dict(state["model"])
    return in_fast_layout(method).eval()


def in_fast_layout(method: Method) -> Method:
    """Channels last, which this encoder's convolutions prefer in every precision, on the CPU by a quarter."""
    nn.Module.to(method, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return method


def training_bytes(split: Split, session: Session) -> Images:  # [N, C, H, W] uint8
    """All images of a split on the device."""
    return prepared(split.images, lambda rows: as_bytes(rows).to(session.device))


def as_bytes(images: np.ndarray) -> Tensor:  # [N, H, W] or [N, H, W, 3] uint8 -> [N, C, H, W] uint8
    """Images as the views take them: a quarter of the memory of floating point."""
    values = torch.as_tensor(images if images.flags.writeable else images.copy())
    return values[:, None] if values.ndim == 3 else values.permute(0, 3, 1, 2)
