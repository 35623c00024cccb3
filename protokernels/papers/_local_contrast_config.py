# SPDX-License-Identifier: MIT
"""Methods, settings and published numbers of ``protokernels.papers.local_contrast``."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, get_args

from ..data.datasets import data_name
from ..models import GlobalHead, LocalHead
from ..ops._contrastive_checks import Form
from ..training.configuration import RunConfig
from ..training.segmentation import StageSettings

PresetName = Literal["paper", "official", "fair"]
MethodName = Literal[
    "random",
    "global",
    "global+local-self",
    "mixup",
    "tcsm",
    "local-stride",
    "local-block",
    "global+local-stride",
    "global+local-block",
]


class Recipe(NamedTuple):
    """The stages of a method."""

    title: str  # in the paper's Table 1
    global_contrast: bool  # stage 1
    local_contrast: Literal["", "self", "stride", "block"]  # stage 2
    fine_tuning: Literal["plain", "mixup", "tcsm"]  # stage 3


METHODS: dict[str, Recipe] = {
    "random": Recipe("Random", False, "", "plain"),
    "global": Recipe("Global", True, "", "plain"),
    "global+local-self": Recipe("Global+local(self)", True, "self", "plain"),
    "mixup": Recipe("Mixup", False, "", "mixup"),
    "tcsm": Recipe("TCSM", False, "", "tcsm"),
    "local-stride": Recipe("Local(stride)", False, "stride", "plain"),
    "local-block": Recipe("Local(block)", False, "block", "plain"),
    "global+local-stride": Recipe("Global+local(stride)", True, "stride", "plain"),
    "global+local-block": Recipe("Global+local(block)", True, "block", "plain"),
}

# Table 1: data -> share of labelled volumes -> Dice, mean over four folds, in the order of METHODS.
PAPER_RESULTS: dict[str, dict[str, dict[str, float]]] = {
    data: {share: dict(zip(METHODS, row, strict=True)) for share, row in rows.items()}
    for data, rows in {
        "hippocampus": {
            "5%": (0.788, 0.817, 0.808, 0.818, 0.796, 0.818, 0.817, 0.822, 0.824),
            "10%": (0.833, 0.834, 0.843, 0.847, 0.838, 0.845, 0.843, 0.851, 0.849),
            "20%": (0.852, 0.861, 0.858, 0.861, 0.855, 0.860, 0.862, 0.863, 0.866),
        },
        "mmwhs": {
            "10%": (0.328, 0.359, 0.367, 0.365, 0.347, 0.354, 0.366, 0.384, 0.382),
            "20%": (0.440, 0.487, 0.490, 0.541, 0.489, 0.485, 0.475, 0.525, 0.553),
            "40%": (0.715, 0.724, 0.730, 0.755, 0.733, 0.743, 0.736, 0.758, 0.764),
        },
    }.items()
}


@dataclass(frozen=True)
class LocalContrastConfig(RunConfig):
    """Everything a result depends on, apart from seed, precision and hardware. The presets fill it in for a data set.

    Every stage trains for its epochs or, where its number of steps is positive, for as many epochs as make that many steps:
    then few labelled volumes are trained on as long as many.
    """

    data: str = "phantoms"
    method: MethodName = "global+local-block"
    labelled: float = 0.05  # share of the training volumes whose labels are used
    fold: int = 0  # which random split of the volumes
    split: Literal["paper", "official"] = "paper"  # shares of the three sets
    image_size: int = 64  # pixels; slices are resized to it; a multiple of 2**depth
    width: int = 16  # channels of the U-Net's first level
    depth: int = 3  # levels of the U-Net
    # Stage 1, global contrast on the slices of all training volumes
    global_epochs: int = 100
    global_steps: int = 0
    global_batch_size: int = 80
    global_learning_rate: float = 3e-4
    global_weight_decay: float = 1e-5
    global_flat_epochs: int = 10  # epochs before the learning rate falls
    global_temperature: float = 0.5
    global_head: GlobalHead = "linear"  # "mlp": with a ReLU between its two layers, as in the text
    train_global_head: bool = True  # false: the head stays random, as in the released code
    transductive: bool = False  # also the volumes of the validation and test sets, as in the released code
    # Stage 2, local contrast
    local_epochs: int = 60
    local_steps: int = 0
    local_batch_size: int = 4
    local_learning_rate: float = 1e-4
    local_weight_decay: float = 1e-4
    local_head: LocalHead = "mlp"
    temperature: float = 0.1
    block_size: int = 16  # pixels; methods with "block"
    stride: int = 4  # pixels; methods with "stride" and "self"
    form: Literal["supcon", "in", "paper", "negout"] = "supcon"  # of methods with labels; without: "supcon"
    scope: Literal["group", "image"] = (
        "group"  # a pixel meets the pixels of all images, or of its own; without labels: "group"
    )
    reduction: Literal["group", "anchor", "image"] = "group"  # image: Eq. 3, of every block and then over blocks
    drop_remainder: bool = False  # leave out the pixels beyond the last whole block
    identical_views: bool = False  # both views the same, as in the released code
    spatial_views: bool = False  # deform both views, labels along with them; methods with labels
    # Stage 3, segmentation
    fine_tune_epochs: int = 120
    fine_tune_steps: int = 0
    fine_tune_batch_size: int = 8
    fine_tune_learning_rate: float = 5e-4
    fine_tune_weight_decay: float = 0.0
    cosine: bool = False  # stages 2 and 3: half a cosine of the learning rate
    augment: bool = True  # deform the labelled slices ...
    augment_scale: tuple[float, float] = (0.5, 1.9)  # ... showing so many times as much of each side, from < 1 to > 1
    keep: Literal["best", "last"] = "last"  # epoch: of the best validation score, or the last
    validations: int = 10  # how often the validation volumes are scored, evenly over stage 3
    validation_volumes: int = 0  # how many of them; 0: all
    mixup_alpha: float = 1.0  # of the Beta distribution
    tcsm_weight: float = 1.0  # largest weight of the consistency
    tcsm_noise: float = 0.5  # standard deviation of the noise on student's and teacher's input
    tcsm_momentum: float = 0.999  # largest momentum of the teacher
    selection: bool = False  # for choosing hyper-parameters: score the validation set only, never the test set
    stages: str = ""  # folder in which runs share the stages before the last; empty: inside the run's own folder

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.labelled <= 1:
            raise ValueError(f"LocalContrastConfig: labelled must lie in (0, 1], a share; got {self.labelled}")
        positive = ["temperature", "global_temperature", "block_size", "stride", "width", "validations", "mixup_alpha"]
        for stage in ("global", "local", "fine_tune"):
            positive += [f"{stage}_{name}" for name in ("epochs", "batch_size", "learning_rate")]
            self.check_not_negative(f"{stage}_steps", f"{stage}_weight_decay")
        self.check_positive(*positive)
        self.check_not_negative("global_flat_epochs", "validation_volumes", "tcsm_weight", "tcsm_noise")
        if not 0 <= self.tcsm_momentum <= 1:
            raise ValueError(f"LocalContrastConfig: tcsm_momentum must lie in [0, 1]; got {self.tcsm_momentum}")
        low, high = self.augment_scale
        if not 0 < low <= 1 <= high:
            raise ValueError(
                f"LocalContrastConfig: augment_scale must be (low, high), 0 < low <= 1 <= high; got {self.augment_scale}"
            )
        self.check_pairs("global_batch_size")
        if self.image_size < 2**self.depth or self.image_size % 2**self.depth:
            raise ValueError(
                f"LocalContrastConfig: image_size must be a multiple of 2**depth = {2**self.depth}; got {self.image_size}"
            )

    @classmethod
    def preset(cls, name: PresetName = "fair", data: str = "phantoms", **changes: Any) -> LocalContrastConfig:
        """The preset ``name`` for the data set ``data``, with single fields changed. ``ValueError`` for an unknown
        preset."""
        data = data_name(data)
        if name not in get_args(PresetName):
            raise ValueError(
                f"LocalContrastConfig.preset: expected one of {', '.join(get_args(PresetName))}; got {name!r}"
            )
        values = _PRESETS[name] | _FOR_DATA[name].get(data, {})
        return replace(cls(**{"data": data, "preset_name": name, **values}), **changes)

    @property
    def recipe(self) -> Recipe:
        """The stages of the method."""
        return METHODS[self.method]

    @property
    def local_form(self) -> Form:
        """The form of the loss of stage 2. Without labels ``"supcon"`` whatever ``form`` says: Eq. 2 is that of the supervised loss;
        the label-free one, a pixel against all others, has its positive in the denominator, in the authors' code and in Chaitanya et
        al. 2020."""
        return "supcon" if self.recipe.local_contrast == "self" else self.form

    @property
    def local_scope(self) -> Literal["group", "image"]:
        """Whose pixels the loss of stage 2 compares. Without labels ``"group"`` whatever ``scope`` says: the positive is in another map."""
        return "group" if self.recipe.local_contrast == "self" else self.scope

    def record(self) -> dict[str, Any]:
        """What goes into a run's ``config.json``: everything but where shared stages lie, on which nothing depends."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "stages"}

    def stage(self, name: Literal["global", "local", "fine_tune"]) -> StageSettings:
        """How a stage is optimised."""
        values = {
            key: getattr(self, f"{name}_{key}")
            for key in ("epochs", "steps", "batch_size", "learning_rate", "weight_decay")
        }
        if name == "global":
            return StageSettings(**values, cosine=True, flat=self.global_flat_epochs)
        return StageSettings(**values, cosine=self.cosine)

    def stage_record(self, name: Literal["global", "local"]) -> dict[str, Any]:
        """What the weights after a stage depend on: the fields that it, or the stage before it, reads."""
        names = ["data", "fold", "split", "image_size", "width", "depth"]
        if name == "global" or self.recipe.global_contrast:
            names += [key for key in self.record() if key.startswith("global_")] + ["train_global_head", "transductive"]
            if self.global_head == "linear":  # not named: stages that are older than the field are found
                names.remove("global_head")
        if name == "local":
            names += [key for key in self.record() if key.startswith("local_")]
            names += ["temperature", "reduction", "identical_views", "spatial_views", "cosine"]
            names += ["block_size", "drop_remainder"] if self.recipe.local_contrast == "block" else ["stride"]
            if self.recipe.local_contrast != "self":
                names.append("labelled")
        values = {key: getattr(self, key) for key in names}
        if name == "local":
            values |= {
                "global": self.recipe.global_contrast,
                "local": self.recipe.local_contrast,
                "form": self.local_form,
                "scope": self.local_scope,
            }
        return values

    def warnings(self) -> list[str]:
        """What of the released code's errors is switched on, in sentences for the results."""
        sentences = []
        if self.transductive and self.recipe.global_contrast:
            sentences.append(
                "transductive: the global pre-training saw the slices of the validation and test volumes, without labels, "
                "as in the released code"
            )
        if self.identical_views and self.recipe.local_contrast:
            sentences.append(
                "identical_views: both views of the local pre-training were the same image, as in the released code"
            )
        if not self.train_global_head and self.recipe.global_contrast:
            sentences.append("train_global_head: the global head stayed random, as in the released code")
        return sentences


ABLATIONS: dict[str, dict[str, Any]] = {
    "full": {},  # the configuration itself
    **{f"block-{size}": {"method": "global+local-block", "block_size": size} for size in (4, 8, 16, 32, 64)},
    **{f"stride-{step}": {"method": "global+local-stride", "stride": step} for step in (2, 4, 8)},
    **{f"temperature-{value}": {"temperature": value} for value in (0.05, 0.07, 0.1, 0.2, 0.5)},
    **{f"form-{form}": {"form": form} for form in ("in", "paper", "negout")},
    "reduction-image": {"reduction": "image"},  # Eq. 3, in every block
    "scope-image": {"scope": "image"},  # a pixel meets its own image only
    "head-cls": {"local_head": "cls"},
    "spatial-views": {"spatial_views": True},  # which the text permits and the code does not use
    "identical-views": {"identical_views": True},  # the released code
    "global-head-random": {"train_global_head": False},  # the released code
    "without-global": {"method": "local-block"},
    "without-local": {"method": "global"},
    "random": {"method": "random"},
}

_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "width": 64,
        "depth": 3,
        "global_epochs": 70,
        "global_learning_rate": 1e-4,
        "global_weight_decay": 0.0,
        "global_flat_epochs": 70,
        "global_head": "mlp",
        "local_epochs": 70,
        "local_learning_rate": 1e-4,
        "local_weight_decay": 0.0,
        "form": "paper",
        "reduction": "image",
        "fine_tune_learning_rate": 1e-5,
    },
    "official": {
        "width": 64,
        "depth": 4,
        "split": "official",
        "train_global_head": False,
        "transductive": True,
        "identical_views": True,
        "drop_remainder": True,
    },
    "fair": {
        "global_steps": 600,
        "global_batch_size": 32,
        "global_learning_rate": 1e-4,
        "global_flat_epochs": 0,
        "local_steps": 400,
        "local_learning_rate": 1e-3,
        "fine_tune_steps": 1000,
        "fine_tune_learning_rate": 2e-3,
        "cosine": True,
        "keep": "best",
        "validation_volumes": 12,
        "tcsm_noise": 0.1,
        "tcsm_momentum": 0.99,
    },
}
_LARGE: dict[str, dict[str, Any]] = {"mmwhs": {"image_size": 160, "labelled": 0.1}, "acdc": {"image_size": 128}}
_FOR_DATA: dict[str, dict[str, dict[str, Any]]] = {
    "paper": _LARGE,
    "official": _LARGE,
    "fair": {
        "mmwhs": {"labelled": 0.1},
        "phantoms": {
            "image_size": 32,
            "labelled": 0.2,
            "global_steps": 40,
            "local_steps": 60,
            "fine_tune_steps": 200,
            "validations": 5,
        },
    },
}
