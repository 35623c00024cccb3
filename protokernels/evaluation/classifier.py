# SPDX-License-Identifier: MIT
"""Training a classifier on a few labelled images and choosing its hyper-parameters on a validation split.

Nothing here is ever given a test split.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from ..data.mapped import MappedImages
from ..models.modes import evaluating
from .roc import auroc
from .threads import one_thread
from .types import described

BIAS_DECAY = 1e-4  # keeps the bias finite for a class that all images have, or none


@dataclass(frozen=True, eq=False)
class Labelled:
    """Inputs of a classifier (images or features) with one label each, or several. Images of a mapped file stay in it.

    Raises:
        ValueError: no image, other lengths, targets of another kind.
    """

    inputs: Tensor  # [N, C, H, W] or [N, D] floating point
    targets: Tensor  # [N] int64, or [N, K] float with 0 and 1

    def __post_init__(self) -> None:
        tensors = isinstance(self.inputs, Tensor | MappedImages) and isinstance(self.targets, Tensor)
        single = tensors and self.targets.ndim == 1 and self.targets.dtype == torch.int64
        several = tensors and self.targets.ndim == 2 and self.targets.is_floating_point()
        if not (single or several) or len(self.targets) != len(self.inputs) or len(self.inputs) == 0:
            raise ValueError(
                f"Labelled: targets must be int64 of shape [N] or floating point of shape [N, K], with the N of the inputs, "
                f"at least 1; got {described(self.targets)} for inputs {described(self.inputs)}"
            )

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, indices: Tensor) -> Labelled:  # [n] int64
        """The images at ``indices``."""
        indices = indices.to(self.targets.device)
        inputs: Any = self.inputs
        chosen: Any = inputs.subset(indices) if isinstance(inputs, MappedImages) else inputs[indices]
        return Labelled(chosen, self.targets[indices])


@dataclass(frozen=True, eq=False)
class Fitted:
    """A trained classifier and how it was chosen."""

    module: nn.Module  # inputs -> logits [N, K]; in evaluation mode
    epoch: int | None  # best epoch counted from 1; None where training has no epochs
    weight_decay: float
    val_score: float  # what selection maximised: macro AUROC, or minus the loss where no class can be scored


@dataclass(frozen=True)
class AdamWProtocol:
    """AdamW with cosine warm restarts and early stopping on the validation split.

    The learning rate follows half cosines of 10 (or all, if fewer), 20, 40, ... epochs down to 1e-6; gradients are clipped to norm 1.
    """

    learning_rate: float
    epochs: int
    patience: int  # epochs without a better validation score before training stops
    batch_size: int
    weight_decay: float = 0.01
    least_steps: int = 1  # per epoch; small training sets are visited several times
    flip: bool = False  # mirror every training image with probability 1/2


def label_loss(logits: Tensor, targets: Tensor) -> Tensor:  # [N, K], [N] int64 or [N, K] -> []
    """Cross-entropy for one label per image, mean binary cross-entropy for several."""
    if targets.ndim == 1:
        return F.cross_entropy(logits, targets)
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))


def selection_score(logits: Tensor, targets: Tensor) -> float:
    """Macro AUROC; minus the loss where the targets leave no class with both labels. Not a number counts as the worst."""
    if not bool(torch.isfinite(logits).all()):
        return -math.inf
    area = auroc(logits, targets, [str(index) for index in range(logits.shape[1])]).macro
    return area if area is not None else -float(label_loss(logits.double(), targets))


def fit_logistic(
    train: Labelled,  # features [N, D]
    val: Labelled,
    *,
    num_classes: int,
    weight_decays: tuple[float, ...],
) -> Fitted:
    """A linear layer by L-BFGS in float64: label_loss + weight_decay / 2 * ||W||^2, for every weight decay.

    The problem is convex and starts from zero: no seed, no schedule, at most 100 iterations each. Features should have unit
    scale. The best validation score decides; of equal ones the strongest weight decay.

    Raises:
        ValueError: no weight decay, or one that is not positive.
    """
    if not weight_decays or min(weight_decays) <= 0:
        raise ValueError(f"fit_logistic: weight_decays must be positive numbers, at least one; got {weight_decays}")
    x, features = train.inputs.double(), val.inputs.double()
    layer = torch.zeros(num_classes, x.shape[1] + 1, dtype=torch.float64, device=x.device, requires_grad=True)
    best: tuple[float, float, Tensor] | None = None
    with one_thread():
        for decay in sorted(weight_decays, reverse=True):  # the solution of the stronger one is a good start
            _minimise(layer, x, train.targets, decay)
            with torch.no_grad():
                score = selection_score(F.linear(features, layer[:, :-1], layer[:, -1]), val.targets)
            if best is None or score > best[0]:
                best = (score, decay, layer.detach().clone())
    assert best is not None
    score, decay, chosen = best
    return Fitted(_linear(chosen).eval(), None, decay, score)


def _minimise(layer: Tensor, x: Tensor, targets: Tensor, decay: float) -> None:  # layer [K, D + 1], x [N, D]
    penalty = torch.full_like(layer, decay / 2).detach()
    penalty[:, -1] = BIAS_DECAY / 2
    optimizer = torch.optim.LBFGS([layer], max_iter=100, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = label_loss(F.linear(x, layer[:, :-1], layer[:, -1]), targets) + (penalty * layer.square()).sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def _linear(layer: Tensor) -> nn.Linear:  # [K, D + 1] -> features [N, D] -> logits [N, K]
    linear = _unset_linear(layer.shape[1] - 1, len(layer), layer.device)
    with torch.no_grad():
        linear.weight.copy_(layer[:, :-1])
        linear.bias.copy_(layer[:, -1])
    return linear


def _unset_linear(features: int, outputs: int, device: torch.device | str = "cpu") -> nn.Linear:
    """A linear layer whose values are to be written: torch's own would be drawn from its global generator."""
    linear: nn.Linear = skip_init(nn.Linear, features, outputs, device=device, dtype=torch.float32)
    return linear


def seeded_linear(features: int, outputs: int, seed: int) -> nn.Linear:
    """A linear layer initialised as torch does it, from its own generator."""
    linear = _unset_linear(features, outputs)
    generator = torch.Generator().manual_seed(seed)
    bound = 1.0 / math.sqrt(features)
    with torch.no_grad():
        linear.weight.copy_((torch.rand(linear.weight.shape, generator=generator, dtype=torch.float32) * 2 - 1) * bound)
        linear.bias.zero_()
    return linear


def fit_adamw(
    module: nn.Module,  # inputs -> logits [N, K]; trained in place and left with its best weights
    train: Labelled,
    val: Labelled,
    protocol: AdamWProtocol,
    *,
    seed: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Fitted:
    """Trains all parameters that require a gradient and keeps the weights of the epoch with the best validation score, of
    equal ones the first.

    Args:
        module: in training mode during an epoch (batch statistics), in evaluation mode for scores.
        train: what is trained on.
        val: what selects the epoch; used for nothing else.
        protocol: see :class:`AdamWProtocol`.
        seed: order of the images and flips. Torch's global generator is not touched unless the module uses it.
        precision: of the forward pass.

    Raises:
        ValueError: nothing to train, epochs, patience, batch_size or least_steps below 1, another precision, flips of what
            are no images.
    """
    if min(protocol.epochs, protocol.patience, protocol.batch_size, protocol.least_steps) < 1:
        raise ValueError(f"fit_adamw: epochs, patience, batch_size and least_steps must be at least 1; got {protocol}")
    if protocol.flip and train.inputs.ndim != 4:
        raise ValueError(f"fit_adamw: flip needs images [N, C, H, W]; got inputs {described(train.inputs)}")
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("fit_adamw: the module has no parameter that requires a gradient")
    optimizer = torch.optim.AdamW(parameters, lr=protocol.learning_rate, weight_decay=protocol.weight_decay)
    scheduler = CosineAnnealingWarmRestarts(optimizer, T_0=min(10, protocol.epochs), T_mult=2, eta_min=1e-6)
    generator = torch.Generator().manual_seed(seed)
    best_epoch, best_score, best_state = 0, -math.inf, copy.deepcopy(module.state_dict())
    for epoch in range(1, protocol.epochs + 1):
        for batch in _batches(len(train), protocol, generator):
            inputs, targets = train.inputs[batch.to(train.inputs.device)], train.targets[batch.to(train.targets.device)]
            if protocol.flip:
                mirrored = torch.rand(len(batch), generator=generator, dtype=torch.float32) < 0.5
                inputs = torch.where(mirrored.to(inputs.device)[:, None, None, None], inputs.flip(3), inputs)
            module.train(len(batch) > 1)  # one image has no batch statistics
            with _autocast(inputs.device, precision):
                logits = module(inputs)
            optimizer.zero_grad(set_to_none=True)
            label_loss(logits.float(), targets).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        scheduler.step()
        score = selection_score(predict(module, val.inputs, precision=precision), val.targets)
        if score > best_score:
            best_epoch, best_score, best_state = epoch, score, copy.deepcopy(module.state_dict())
        elif epoch - best_epoch >= protocol.patience:
            break
    module.load_state_dict(best_state)
    return Fitted(module.eval(), best_epoch, protocol.weight_decay, best_score)


def _batches(count: int, protocol: AdamWProtocol, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch: batches of nearly equal size, at least ``least_steps`` of them."""
    steps = -(-count // protocol.batch_size)
    for _ in range(-(-protocol.least_steps // steps)):
        yield from torch.randperm(count, generator=generator).tensor_split(steps)


def predict(
    module: nn.Module,
    inputs: Tensor,  # [N, ...]
    *,
    batch_size: int = 256,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Tensor:  # [N, K] float32
    """The module's outputs in evaluation mode, without gradients; its mode is restored."""
    with evaluating(module), torch.no_grad(), _autocast(inputs.device, precision):
        return torch.cat([module(batch).float() for batch in inputs.split(batch_size)])


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be 'fp32' or 'bf16'; got {precision!r}")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
