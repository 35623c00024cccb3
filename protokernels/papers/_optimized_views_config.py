# SPDX-License-Identifier: MIT
"""Strategies, settings and published numbers of ``protokernels.papers.optimized_views``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

from ..data.datasets import data_name
from ..training.configuration import RunConfig

PresetName = Literal["paper", "fair"]
StrategyName = Literal[
    "random",
    "random+supervision",
    "self-supervised",
    "self-supervised+supervision",
    "simclr",
    "supervised",
    "supervised-all",
    "supervised-contrastive",
]
EncoderName = Literal["convolutional", "densenet121"]
Alphas = tuple[float, float, float, float, float]

TRANSFORMATIONS = ("blur", "noise", "crop", "hflip", "vflip", "rotate")  # Eq. 3, the first applied first
PARAMETERS = ("blur", "noise", "crop x", "crop y", "horizontal flip", "vertical flip", "rotation")


class Strategy(NamedTuple):
    """What makes the views, what the encoder minimises, and whose labels it sees."""

    title: str
    views: Literal[
        "M", "uniform", "half"
    ]  # Lambda from M; uniform; uniform, and each transformation with probability 1/2
    loss: Literal["pairs", "classes", "class pairs"]  # Eq. 1; cross-entropy alone; Khosla's
    labels: Literal["none", "share", "all"]
    alphas: Alphas  # alpha_0 to alpha_4 of Eq. 1


STRATEGIES: dict[str, Strategy] = {
    "random": Strategy("Random", "uniform", "pairs", "none", (0, 0, 1, 0, 0)),
    "random+supervision": Strategy("Random with supervision", "uniform", "pairs", "share", (0, 0, 1, 10, 10)),
    "self-supervised": Strategy("Self-supervised M", "M", "pairs", "none", (1, 0, 1, 0, 0)),
    "self-supervised+supervision": Strategy("M with supervision", "M", "pairs", "share", (1, 10, 1, 1, 1)),
    "simclr": Strategy("Base SimCLR", "half", "pairs", "none", (0, 0, 1, 0, 0)),
    "supervised": Strategy("Supervised, few labels", "half", "classes", "share", (0, 0, 0, 1, 0)),
    "supervised-all": Strategy("Supervised, all labels", "half", "classes", "all", (0, 0, 0, 1, 0)),
    "supervised-contrastive": Strategy("Supervised contrastive, few labels", "half", "class pairs", "share", (0,) * 5),
}

# Table 2, BraTS: strategy -> alphas -> AUC by linear evaluation, mean and standard deviation.
PAPER_RESULTS: dict[str, dict[str, dict[Alphas, tuple[float, float]]]] = {
    "brats": {
        "self-supervised+supervision": {
            (1, 10, 1, 1, 1): (0.884, 0.042),
            (0.1, 10, 0.1, 10, 10): (0.868, 0.030),
            (0.1, 10, 1, 1, 1): (0.887, 0.013),
        },
        "random+supervision": {
            (0, 0, 1, 1, 1): (0.874, 0.000),
            (0, 0, 0.1, 10, 10): (0.820, 0.037),
            (0, 0, 1, 10, 10): (0.883, 0.003),
        },
        "simclr": {(0, 0, 1, 0, 0): (0.730, 0.020)},
    }
}

# The text, BraTS: strategy -> AUC with the usual order of the transformations, and with another one that is not named
PAPER_ORDERS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "self-supervised+supervision": ((0.926, 0.020), (0.923, 0.021)),
    "simclr": ((0.730, 0.020), (0.760, 0.027)),
}


@dataclass(frozen=True)
class OptimizedViewsConfig(RunConfig):
    """Everything a result depends on, apart from seed, precision and hardware. The presets fill it in for a data set."""

    strategy: StrategyName = "self-supervised+supervision"
    labelled: float = 0.1  # share of the training images whose labels are used, drawn anew for every seed
    image_size: int = 64  # pixels; images are resized to it
    encoder: EncoderName = "convolutional"  # f
    width: int = 8  # channels of the convolutional encoder's first block; 32 in the paper preset
    m_width: int = 8  # channels of M's first block; 16 in the paper preset
    initial_weights: str = ""  # file with ImageNet weights of DenseNet121; empty: random
    # Eq. 1 and 2
    alphas: Alphas | None = None  # alpha_0 ... alpha_4; none: the strategy's
    sign: Literal["text", "printed"] = "text"  # M makes pairs hard and f makes them agree; or Eq. 1 and 2 to the letter
    reduction: Literal["mean", "sum"] = "mean"  # of I_NCE over the batch
    normalize: bool = False  # cosine instead of the inner product
    temperature: float = 1.0  # tau
    denominator: Literal["negatives", "all"] = "negatives"  # of I_NCE; all: the positive as well
    symmetric: bool = False  # also from the image to its view
    # T and the alternation
    order: tuple[str, ...] = TRANSFORMATIONS  # of the transformations, the first applied first; what is absent is off
    m_every: int = 1  # steps between two steps of M
    view: Literal["new", "shared"] = (
        "new"  # f learns from a new view of the M just trained, or from the one M learned from
    )
    statistics: Literal["both", "untransformed"] = "both"  # whose batches move the running statistics of f
    # Optimisation: Adam
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-3  # of f, g and p
    m_learning_rate: float | None = None  # of M; none: the paper's, 1e-3 where M has labels and 1e-4 where not
    supcon_temperature: float = 0.1  # of the strategy supervised-contrastive
    evaluations: int = 5  # how often the linear evaluation is run, evenly over training
    selection: bool = False  # for choosing hyper-parameters: score the validation set only, never the test set

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.labelled <= 1:
            raise ValueError(f"OptimizedViewsConfig: labelled must lie in (0, 1], a share; got {self.labelled}")
        positive = ("image_size", "width", "m_width", "temperature", "m_every", "epochs", "batch_size", "learning_rate")
        self.check_positive(*positive, "supcon_temperature", "evaluations")
        if self.recipe.loss != "classes":
            self.check_pairs()
        if self.m_learning_rate is not None and not self.m_learning_rate > 0:
            raise ValueError(
                f"OptimizedViewsConfig: m_learning_rate must be positive or none; got {self.m_learning_rate}"
            )
        if len(set(self.order)) != len(self.order) or not self.order or set(self.order) - set(TRANSFORMATIONS):
            raise ValueError(
                f"OptimizedViewsConfig: order must name some of {', '.join(TRANSFORMATIONS)}, each once; got "
                f"{', '.join(self.order) or 'nothing'}"
            )
        if self.encoder == "convolutional" and (self.image_size < 16 or self.initial_weights):
            raise ValueError(
                "OptimizedViewsConfig: the convolutional encoder halves images four times, so image_size must be at least "
                f"16, and has no ImageNet weights; got {self.image_size} and {self.initial_weights!r}"
            )
        if self.alphas is not None:
            if min(self.alphas) < 0:
                raise ValueError(f"OptimizedViewsConfig: alphas must not be negative; got {self.alphas}")
            if self.recipe.loss != "pairs":
                raise ValueError(
                    f"OptimizedViewsConfig: alphas weigh Eq. 1, which the strategy {self.strategy} does not minimise; leave "
                    "them out"
                )
            moves, sees = self.recipe.views == "M", self.recipe.labels != "none"
            weighs = (moves, moves and sees, True, sees, sees)
            pairs = enumerate(zip(self.alphas, weighs, strict=True))
            idle = [f"alpha_{index}" for index, (alpha, counts) in pairs if alpha > 0 and not counts]
            if idle:
                raise ValueError(
                    f"OptimizedViewsConfig: {', '.join(idle)} would weigh nothing: the strategy {self.strategy} has no M or sees no "
                    f"labels; got alphas {self.alphas}"
                )

    @classmethod
    def preset(cls, name: PresetName = "fair", data: str = "digits", **changes: Any) -> OptimizedViewsConfig:
        """The preset ``name`` for the data set ``data``, with single fields changed. ``ValueError`` for an unknown
        preset."""
        data = data_name(data)
        if name not in get_args(PresetName):
            why = ": the authors have not released their code" if str(name) == "official" else ""
            raise ValueError(
                f"OptimizedViewsConfig.preset: expected one of {', '.join(get_args(PresetName))}; got {name!r}{why}"
            )
        values = _PRESETS[name] | _FOR_DATA[name].get(data, {})
        return replace(cls(**{"data": data, "preset_name": name, **values}), **changes)

    @property
    def recipe(self) -> Strategy:
        """What the strategy does."""
        return STRATEGIES[self.strategy]

    @property
    def weights(self) -> Alphas:
        """alpha_0 ... alpha_4 in use."""
        return self.recipe.alphas if self.alphas is None else self.alphas

    @property
    def rate_of_m(self) -> float:
        """The learning rate of M."""
        return self.m_learning_rate or (1e-3 if self.weights[1] else 1e-4)


_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "image_size": 224,
        "width": 32,
        "m_width": 16,
        "epochs": 100,
        "learning_rate": 1e-4,
        "evaluations": 20,
    },
    "fair": {"normalize": True, "temperature": 0.5},  # the inner product did not settle in 8 epochs
}
_FOR_DATA: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "digits": {"image_size": 32},
        "brain_tumor": {"image_size": 128},  # as it is stored
        "chest_nih": {"image_size": 128, "encoder": "densenet121", "batch_size": 16},
        "chest_kermany": {"image_size": 96, "encoder": "densenet121", "batch_size": 16},
    },
    "fair": {"digits": {"image_size": 32, "epochs": 5}, "chest_nih": {"epochs": 30}},  # 22 steps an epoch
}

_OPTIMISED: dict[str, Any] = {"strategy": "self-supervised+supervision"}
_RANDOM: dict[str, Any] = {"strategy": "random+supervision", "alphas": None}  # those of M mean nothing here
_SIMCLR: dict[str, Any] = {"strategy": "simclr", "alphas": None}
_REVERSED = tuple(reversed(TRANSFORMATIONS))

ABLATIONS: dict[str, dict[str, Any]] = {
    "full": {},  # the configuration itself
    **{  # Table 2
        f"{name}-{'-'.join(f'{alpha:g}' for alpha in alphas)}": {"strategy": strategy, "alphas": alphas}
        for name, strategy in (("M", "self-supervised+supervision"), ("random", "random+supervision"))
        for alphas in PAPER_RESULTS["brats"][strategy]
    },
    "simclr": _SIMCLR,
    "M-order-reversed": {**_OPTIMISED, "order": _REVERSED},
    "simclr-order-reversed": {**_SIMCLR, "order": _REVERSED},
    "M-without-crop": {**_OPTIMISED, "order": tuple(name for name in TRANSFORMATIONS if name != "crop")},
    "random-without-crop": {**_RANDOM, "order": tuple(name for name in TRANSFORMATIONS if name != "crop")},
    "sign-printed": {**_OPTIMISED, "sign": "printed"},
    "sum": {**_OPTIMISED, "reduction": "sum"},
    "inner-product": {**_OPTIMISED, "normalize": False, "temperature": 1.0},  # Eq. 2 as printed
    "cosine": {**_OPTIMISED, "normalize": True, "temperature": 1.0},
    "cosine-0.1": {**_OPTIMISED, "normalize": True, "temperature": 0.1},
    "denominator-all": {**_OPTIMISED, "denominator": "all"},
    "symmetric": {**_OPTIMISED, "symmetric": True},
    "statistics-untransformed": {**_OPTIMISED, "statistics": "untransformed"},
    "M-every-4": {**_OPTIMISED, "m_every": 4},
    "shared-view": {**_OPTIMISED, "view": "shared"},
}
