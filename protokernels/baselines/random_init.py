# SPDX-License-Identifier: MIT
"""Random initialisation: the encoder as it is before any training, the floor under every method.

With ``--initial-weights FILE --width 64 --last-stride 2``, a local file of ResNet18 weights in torchvision's key names, it is the
ImageNet initialisation instead. Nothing is downloaded; a missing file or other keys give an error that says what to do. Fine-tuning
the random encoder on all labels is what papers call "supervised from scratch", without augmentation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from accelerate import Accelerator

from ..data import load_dataset
from ..training import RunFolder, seed_everything
from ..training.runs import RunSettings, train_runs
from ..training.self_supervised import Method, PretrainingConfig
from ..training.transfer_scoring import transfer_scores
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
    def _train(
        self, config: Any, out: str | Path | None, data_root: str | Path | None, download: bool, settings: RunSettings
    ) -> dict[str, Any]:
        dataset = load_dataset(config.data, data_root, download=download)
        config.make_encoder(dataset.channels)  # a missing weight file is noticed before a folder is made

        def run_one(run: RunFolder, seed: int, accelerator: Accelerator) -> dict[str, Any]:
            seed_everything(seed)
            method = self.build(config, dataset.channels).to(accelerator.device).eval()
            if not accelerator.is_main_process:
                return {}
            run.checkpoints.save({"model": method.state_dict()}, epoch=0)
            return transfer_scores(method.encoder, dataset, config, seed)

        kind = "imagenet" if config.initial_weights else self.name
        return train_runs(
            f"{kind}-{Path(config.data).stem}-{config.preset_name}",
            {"paper": self.name, "config": asdict(config)},
            run_one,
            out=out,
            settings=settings,
            provenance=dataset.provenance,
            epochs=0,
        )


BASELINE = _Untrained("random_init", RandomInitConfig, RandomInit, __doc__)
