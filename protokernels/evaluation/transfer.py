# SPDX-License-Identifier: MIT
"""What an encoder is worth to somebody with few labels: linear probe and fine-tuning at several label fractions.

The validation split chooses the weight decay or the epoch; the test split is scored once, with what was chosen. The validation
split is always whole, so at small fractions more labels choose than train; this favours no method over another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .classifier import AdamWProtocol, Fitted, Labelled, fit_adamw, fit_logistic, predict, seeded_linear
from .fractions import label_subsets
from .roc import as_multi_hot, auroc
from .types import described

Precision = Literal["fp32", "bf16"]
TransferProtocol = Literal["fair", "sister", "probe"]


PROBE_ADAMW = AdamWProtocol(learning_rate=3e-3, epochs=300, patience=10, batch_size=128)
FINE_TUNE = AdamWProtocol(learning_rate=1e-3, epochs=8, patience=8, batch_size=32, least_steps=8)
SISTER_FINE_TUNE = AdamWProtocol(learning_rate=3e-4, epochs=300, patience=10, batch_size=128)


@dataclass(frozen=True)
class TransferConfig:
    """How transfer is measured.

    :data:`TRANSFER_PROTOCOLS` has three by name: ``fair``, the defaults, ours and sized for a CPU; ``sister``, AdamW for both
    ways, batches of 128 and up to 300 epochs with patience 10, as in the released code of MLVICX; ``probe``, ``fair`` without
    fine-tuning.

    Attributes:
        fractions: shares of the training labels, each a linear probe.
        probe: ``lbfgs``, logistic regression to convergence on standardised features, the weight decay chosen from
            ``weight_decays``; or ``adamw``, on the features as they are.
        weight_decays: for ``lbfgs``.
        probe_adamw: for ``adamw``.
        fine_tune_fractions: shares of the training labels, each a fine-tuning of the whole encoder; empty for none.
        fine_tune: how.

    Raises:
        ValueError: another probe.
    """

    fractions: tuple[float, ...] = (0.01, 0.05, 0.1, 0.3, 1.0)
    probe: Literal["lbfgs", "adamw"] = "lbfgs"
    weight_decays: tuple[float, ...] = (1.0, 0.1, 1e-2, 1e-3, 1e-4)
    probe_adamw: AdamWProtocol = PROBE_ADAMW
    fine_tune_fractions: tuple[float, ...] = (0.01, 0.05, 0.1, 0.3, 1.0)
    fine_tune: AdamWProtocol = FINE_TUNE

    def __post_init__(self) -> None:
        if self.probe not in ("lbfgs", "adamw"):
            raise ValueError(f"TransferConfig: probe must be 'lbfgs' or 'adamw'; got {self.probe!r}")


TRANSFER_PROTOCOLS: dict[TransferProtocol, TransferConfig] = {
    "fair": TransferConfig(),
    "sister": TransferConfig(probe="adamw", fine_tune=SISTER_FINE_TUNE),
    "probe": TransferConfig(fine_tune_fractions=()),
}


class PooledEncoder(nn.Module):
    """An encoder's output as one vector per image: a dense map is averaged over its positions.

    Shape: [B, C, H, W] -> [B, D].

    Raises:
        ValueError: the encoder gives something else.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.encoder(images)
        if not isinstance(features, Tensor) or features.ndim not in (2, 4):
            raise ValueError(
                f"the encoder must give features [B, D] or a dense map [B, D, h, w]; got {described(features)} for images "
                f"{list(images.shape)}"
            )
        return features.float().mean(dim=(2, 3)) if features.ndim == 4 else features.float()


@torch.inference_mode(False)  # it trains, also within an evaluation without gradients
def evaluate_transfer(
    encoder: nn.Module,  # [B, C, H, W] -> [B, D] or a dense map [B, D, h, w]; not modified
    train: Labelled,
    val: Labelled,
    test: Labelled,
    *,
    class_names: Sequence[str],
    config: TransferConfig | None = None,
    seed: int = 0,
    precision: Precision = "fp32",
) -> dict[str, dict[str, Any]]:
    """Linear probes and fine-tuning at every label fraction.

    Args:
        encoder: on the device of the images.
        train: labelled images; subsets of them are trained on (:func:`label_subsets`, the same for both ways).
        val: chooses.
        test: scored once per fraction and way.
        class_names: K names.
        config: default :class:`TransferConfig`.
        seed: subsets, order and initial heads.
        precision: of the encoder's passes; probes are fitted in float64 by ``lbfgs``, in float32 by ``adamw``.

    Returns:
        ``{"probe": {"1%": row, ...}, "fine_tune": {...}}``; a row holds ``macro_auroc`` (absent where no class can be scored),
        ``auroc`` by class, ``left_out`` (classes without both labels in the test split), ``accuracy`` for one label per
        image, ``images`` trained on, ``val_score``, and ``weight_decay`` and ``epoch`` as they were chosen: ``lbfgs`` chooses the
        decay and has no epoch, AdamW has one decay and chooses the epoch.

    Raises:
        ValueError: features of another shape or not finite, targets and class names that do not fit or are of two kinds,
            another precision.
    """
    config = config or TransferConfig()
    classes = len(class_names)
    if len({part.targets.ndim for part in (train, val, test)}) > 1:
        raise ValueError("evaluate_transfer: train, val and test must all have one label per image, or all several")
    subsets = label_subsets(
        train.targets, sorted({*config.fractions, *config.fine_tune_fractions}), num_classes=classes, seed=seed
    )
    pooled = PooledEncoder(encoder)

    def features(name: str, part: Labelled) -> Labelled:
        vectors = predict(pooled, part.inputs, precision=precision)
        if not bool(torch.isfinite(vectors).all()):
            raise ValueError(
                f"evaluate_transfer: the encoder gives {name} features that are not finite; it has diverged"
            )
        return Labelled(vectors, part.targets)

    fit_probe = _probe(features("training", train), features("validation", val), classes, config, seed)
    test_features = features("test", test)
    results: dict[str, dict[str, Any]] = {"probe": {}, "fine_tune": {}}
    for fraction in config.fractions:
        fitted = fit_probe(subsets[fraction])
        row = {"images": len(subsets[fraction]), **_scores(fitted, test_features, class_names, "fp32")}
        results["probe"][_percent(fraction)] = row
    for fraction in config.fine_tune_fractions:
        fitted = fine_tune(encoder, train.subset(subsets[fraction]), val, classes, config.fine_tune, seed, precision)
        row = {"images": len(subsets[fraction]), **_scores(fitted, test, class_names, precision)}
        results["fine_tune"][_percent(fraction)] = row
    return results


class Standardised(nn.Module):
    """A linear layer on (x - mean) / deviation. Shape: [N, D] -> [N, K]."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor, linear: nn.Module) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.linear = linear

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.linear((features - self.mean) / self.deviation)
        return logits


def _probe(
    train: Labelled, val: Labelled, classes: int, config: TransferConfig, seed: int
) -> Callable[[Tensor], Fitted]:
    """How a probe is fitted on the training features at given indices: by AdamW on the features as they are, as in the released code;
    by L-BFGS on standardised ones. Their scale and mean come from all training features: they need no labels."""
    if config.probe == "adamw":

        def fit_plain(indices: Tensor) -> Fitted:
            head = seeded_linear(train.inputs.shape[1], classes, seed).to(train.inputs.device)
            return fit_adamw(head, train.subset(indices), val, config.probe_adamw, seed=seed)

        return fit_plain
    mean, deviation = train.inputs.mean(dim=0), train.inputs.std(dim=0, correction=0)
    deviation = torch.where(deviation <= 1e-6 * train.inputs.abs().amax(dim=0), 1.0, deviation)  # constant features
    scaled, scaled_val = (Labelled((part.inputs - mean) / deviation, part.targets) for part in (train, val))

    def fit(indices: Tensor) -> Fitted:
        fitted = fit_logistic(
            scaled.subset(indices), scaled_val, num_classes=classes, weight_decays=config.weight_decays
        )
        module = Standardised(mean, deviation, fitted.module).eval()
        return Fitted(module, fitted.epoch, fitted.weight_decay, fitted.val_score)

    return fit


@torch.inference_mode(False)
def fine_tune(
    encoder: nn.Module,
    train: Labelled,
    val: Labelled,
    num_classes: int,
    protocol: AdamWProtocol,
    seed: int = 0,
    precision: Precision = "fp32",
) -> Fitted:
    """Trains a copy of the encoder with a new linear head; the encoder itself is not modified.

    Args:
        encoder: [B, C, H, W] -> [B, D] or a dense map, on the device of the images; all of its copy is trained.
        train: what is trained on.
        val: chooses the epoch.
        num_classes: K.
        protocol: see :class:`AdamWProtocol`.
        seed: initial head, order of the images, flips.
        precision: of the forward passes.

    Returns:
        Encoder and head as one module, images -> logits [B, K], and how it was chosen.

    Raises:
        ValueError: features of another shape, targets that do not fit K or are of two kinds, a protocol that cannot be trained, another
            precision.
    """
    if train.targets.ndim != val.targets.ndim:
        raise ValueError("fine_tune: train and val must both have one label per image, or both several")
    for part in (train, val):
        as_multi_hot("fine_tune", part.targets, len(part), num_classes)
    pooled = PooledEncoder(copy.deepcopy(encoder)).requires_grad_()
    width = predict(pooled, train.inputs[:1], precision=precision).shape[1]
    head = seeded_linear(width, num_classes, seed).to(train.inputs.device)
    return fit_adamw(nn.Sequential(pooled, head), train, val, protocol, seed=seed, precision=precision)


def _scores(fitted: Fitted, test: Labelled, class_names: Sequence[str], precision: Precision) -> dict[str, Any]:
    logits = predict(fitted.module, test.inputs, precision=precision)
    row = auroc(logits, test.targets, class_names).as_dict()
    if test.targets.ndim == 1:
        row["accuracy"] = float((logits.argmax(dim=1) == test.targets).double().mean())
    row |= {"val_score": fitted.val_score, "weight_decay": fitted.weight_decay}
    return row if fitted.epoch is None else {**row, "epoch": fitted.epoch}


def _percent(fraction: float) -> str:
    return f"{100 * fraction:g}%"
