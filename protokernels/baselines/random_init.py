# SPDX-License-Identifier: MIT
"""Random initialisation: the encoder as it is before any training, the floor under every method.

With ``--initial-weights FILE --width 64 --last-stride 2``, a local file of ResNet18 weights in torchvision's key names, it is the
ImageNet initialisation instead. Nothing is downloaded; a missing file or other keys give an error that says what to do. Fine-tuning
the random encoder on all labels is what papers call "supervised from scratch", without augmentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..data import ImageDataset
from ..training import seed_everything
from ..training.runs import Trial
from ..training.self_supervised import Method, PretrainingConfig
from .common import Baseline

_NOTHING: dict[str, Any] = {"epochs": 0, "warmup_epochs": 0}


@dataclass(frozen=True)
class RandomInitConfig(PretrainingConfig):
    """The shared settings; those of training have no effect, and epochs are always 0."""

    epochs: int = 0
    warmup_epochs: int = 0

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"paper": _NOTHING, "fair": _NOTHING}

    def __post_init__(self) -> None:
        for name, value in _NOTHING.items():  # whatever the other methods were told
            object.__setattr__(self, name, value)
        super().__post_init__()


class RandomInit(Method):
    """The encoder alone."""

    def __init__(self, config: RandomInitConfig, channels: int) -> None:
        super().__init__()
        self.encoder = config.make_encoder(channels)


class _Untrained(Baseline):
    def title(self, config: Any) -> str:
        return "imagenet" if config.initial_weights else self.name

    def check(self, config: Any, dataset: ImageDataset) -> None:
        self.new_model(config, dataset)  # it has no epochs to plan

    def run(self, trial: Trial, config: Any, dataset: ImageDataset) -> dict[str, Any]:
        seed_everything(trial.seed)
        method = self.new_model(config, dataset).to(trial.accelerator.device)
        if not trial.is_main_process:
            return {}
        trial.run.checkpoints.save({"model": method.state_dict()}, epoch=0)
        return self.score_model(method, dataset, config, trial.seed)


BASELINE = _Untrained("random_init", RandomInitConfig, RandomInit, __doc__)
