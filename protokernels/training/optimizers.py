# SPDX-License-Identifier: MIT
"""Optimisers and the learning-rate schedule of self-supervised learning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

OptimizerName = Literal["adamw", "sgd", "lars"]
Scaled = Literal["matrices", "all", "none"]


class LARS(Optimizer):
    """Momentum with a step that is scaled to the length of each weight tensor.

    Y. You, I. Gitman, B. Ginsburg. Large Batch Training of Convolutional Networks. 2017. For a tensor w with gradient g:

        g <- g + weight_decay w,   g <- eta |w| / |g| g,   v <- momentum v + g,   w <- w - lr v

    Tensors with one dimension (biases, normalisation) get neither decay nor scaling. Where w or g has no length, the ratio
    is 1. With ``lr_in_momentum`` the velocity holds steps, as in that paper: v <- momentum v + lr g, w <- w - v. The two
    differ where the learning rate changes: the first applies a new one to all of v at once. Parameters without a gradient stay as they are,
    with their velocity; gradients must be dense. All tensors of a group are updated together (``torch._foreach_*``), without a
    read-back from the device.

    Args:
        params: parameters or groups of them; every option may differ between groups.
        lr: learning rate, not negative.
        momentum: of v, in [0, 1).
        weight_decay: see above, not negative.
        eta: trust coefficient, positive.
        scaled: which tensors are decayed and scaled: ``"matrices"``, those with more than one dimension; ``"all"``; ``"none"``:
            SGD with momentum, without decay.
        lr_in_momentum: see above.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> import torch
        >>> from protokernels.training.optimizers import LARS
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = LARS([weight], lr=1.0, eta=0.1)
        >>> weight.grad = torch.tensor([[2.0, 0.0]])
        >>> optimizer.step()  # a tenth of the weight's length, 5, along the gradient
        >>> weight.tolist()
        [[2.5, 4.0]]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 1e-3,
        *,
        scaled: Scaled = "matrices",
        lr_in_momentum: bool = False,
    ) -> None:
        values = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta}
        super().__init__(params, {**values, "scaled": scaled, "lr_in_momentum": lr_in_momentum})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; what it does not name comes from the defaults. ``ValueError`` as above."""
        group = {**self.defaults, **param_group}
        if not (group["lr"] >= 0 and group["weight_decay"] >= 0 and group["eta"] > 0 and 0 <= group["momentum"] < 1):
            raise ValueError(
                "LARS: lr and weight_decay must not be negative, eta must be positive and momentum in [0, 1); got "
                f"{group['lr']}, {group['weight_decay']}, {group['eta']} and {group['momentum']}"
            )
        if group["scaled"] not in get_args(Scaled):
            raise ValueError(f"LARS: scaled must be one of {', '.join(get_args(Scaled))}; got {group['scaled']!r}")
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state_dict from before these options
            group.setdefault("scaled", "matrices")
            group.setdefault("lr_in_momentum", False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` is called first, with gradients, and its value returned. ``TypeError`` for sparse gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for weight in (weight for group in self.param_groups for weight in group["params"]):
            if weight.grad is not None and weight.grad.is_sparse:
                raise TypeError(
                    f"LARS: gradients must be dense; that of a parameter {list(weight.shape)} is sparse: take sparse=False in "
                    "its embedding, or another optimiser for it"
                )
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self._update(weights, group)
        return loss

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        gradients: list[Tensor] = [weight.grad for weight in weights if weight.grad is not None]
        chosen = [
            i
            for i, w in enumerate(weights)
            if group["scaled"] == "all" or (group["scaled"] == "matrices" and w.ndim > 1)
        ]
        for i, gradient in zip(
            chosen, self._scaled([weights[i] for i in chosen], [gradients[i] for i in chosen], group), strict=True
        ):
            gradients[i] = gradient
        for weight in weights:
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        velocities = [self.state[weight]["momentum"] for weight in weights]
        inside, outside = (group["lr"], 1.0) if group["lr_in_momentum"] else (1.0, group["lr"])
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, gradients, alpha=inside)
        torch._foreach_add_(weights, velocities, alpha=-outside)

    @staticmethod
    def _scaled(weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """eta |w| / |g| g, with the decay in g."""
        if not weights:
            return []
        if group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
        lengths, sizes = torch._foreach_norm(weights), torch._foreach_norm(gradients)
        ratios = [
            torch.where((length > 0) & (size > 0), group["eta"] * length / torch.where(size > 0, size, 1.0), 1.0)
            for length, size in zip(lengths, sizes, strict=True)
        ]
        return list(torch._foreach_mul(gradients, ratios))


def make_optimizer(module: nn.Module, name: OptimizerName, *, learning_rate: float, weight_decay: float) -> Optimizer:
    """The optimiser ``name`` over all parameters that need a gradient; momentum of sgd and lars is 0.9.

    Weight decay acts on tensors with more than one dimension only.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9)
    if name == "lars":
        return LARS(groups, lr=learning_rate)
    raise ValueError(f"make_optimizer: expected one of adamw, sgd, lars; got {name!r}")


def warmup_cosine(epochs: int, warmup: int, end: float = 1e-3) -> Callable[[int], float]:
    """Factor of the learning rate in an epoch: linear from 1 / warmup to 1, then half a cosine towards ``end``."""

    def factor(epoch: int) -> float:
        if epoch < warmup:
            return (epoch + 1) / warmup
        progress = min(1.0, (epoch - warmup) / max(1, epochs - warmup))
        return end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2

    return factor


def ramp_cosine(epochs: int, ramp: int, start: float, end: float) -> Callable[[int], float]:
    """Factor of the learning rate in an epoch: linear from ``start`` to 1 in the first ``ramp`` epochs, then half a cosine that
    reaches ``end`` after the last."""

    def factor(epoch: int) -> float:
        if epoch < ramp:
            return start + (1 - start) * epoch / ramp
        progress = min(1.0, (epoch - ramp) / max(1, epochs - ramp))
        return end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2

    return factor
