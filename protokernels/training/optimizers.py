# SPDX-License-Identifier: MIT
"""Optimisers and the learning-rate schedule of self-supervised learning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

OptimizerName = Literal["adamw", "sgd", "lars"]


class LARS(Optimizer):
    """Momentum with a step that is scaled to the length of each weight tensor.

    Y. You, I. Gitman, B. Ginsburg. Large Batch Training of Convolutional Networks. 2017. For a tensor w with gradient g:

        g <- g + weight_decay w,   g <- eta |w| / |g| g,   v <- momentum v + g,   w <- w - lr v

    Tensors with one dimension (biases, normalisation) get neither decay nor scaling.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        momentum: of v.
        weight_decay: see above.
        eta: trust coefficient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 1e-3,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` is called first, with gradients, and its value returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)
        return loss

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if weight.ndim > 1:
            gradient = gradient + group["weight_decay"] * weight
            length, size = weight.norm(), gradient.norm()
            trusted = (length > 0) & (size > 0)
            gradient = gradient * torch.where(trusted, group["eta"] * length / torch.where(trusted, size, 1.0), 1.0)
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].mul_(group["momentum"]).add_(gradient)
        weight.sub_(group["lr"] * state["momentum"])


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
