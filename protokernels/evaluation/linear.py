# SPDX-License-Identifier: MIT
"""Linear probes: how well one linear layer on frozen embeddings tells the classes apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .threads import one_thread
from .types import check_embeddings, check_labels

LinearProtocol = Literal["paper", "official", "fair"]


@dataclass(frozen=True)
class GradientProtocol:
    """One linear layer, Adam on the cross-entropy, no weight decay, embeddings not standardised.

    Raises:
        ValueError: epochs or batch_size below 1, a learning rate that is negative or not finite.
    """

    learning_rate: float
    epochs: int
    batch_size: int = 512
    least_outputs: int = 0  # outputs beyond the number of classes can be predicted and are then wrong

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1 or not 0 <= self.learning_rate < math.inf:
            raise ValueError(
                "GradientProtocol: epochs and batch_size must be at least 1, learning_rate finite and not negative; got "
                f"{self.epochs}, {self.batch_size} and {self.learning_rate}"
            )


GRADIENT_PROTOCOLS = {
    "paper": GradientProtocol(learning_rate=3e-4, epochs=200),
    "official": GradientProtocol(learning_rate=1e-3, epochs=10, least_outputs=10),
}


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A fitted linear layer, logits = x W^T + b."""

    weight: Tensor  # [outputs, D]
    bias: Tensor  # [outputs]; -infinity for a class that training had no sample of (protocol "fair")
    protocol: LinearProtocol | GradientProtocol

    def predict(self, embeddings: Tensor) -> Tensor:  # [N, D] -> [N] int64
        """The output with the largest logit. ``ValueError`` for NaN or infinity and for another D."""
        if len(embeddings) == 0:
            return torch.empty(0, dtype=torch.int64, device=embeddings.device)
        check_embeddings("LinearProbe.predict", "embeddings", embeddings)
        if embeddings.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"LinearProbe.predict: embeddings must have the shape [N, {self.weight.shape[1]}]; got "
                f"{list(embeddings.shape)}"
            )
        weight, bias = self.weight.to(embeddings.device), self.bias.to(embeddings.device)
        return F.linear(embeddings.detach().to(weight.dtype), weight, bias).argmax(dim=1)


def linear_probe(
    train_embeddings: Tensor,  # [N, D]
    train_labels: Tensor,  # [N] int64
    *,
    num_classes: int,
    protocol: LinearProtocol | GradientProtocol = "paper",
    seed: int = 0,
) -> LinearProbe:
    """Fits a linear probe on training embeddings.

    - ``paper``: Adam 3e-4, 200 epochs, batch 512 (the text of VAESim).
    - ``official``: Adam 1e-3, 10 epochs, batch 512 and always at least 10 outputs, also for two classes (VAESim's
      released code). After so few steps an output without a class can still win; it is then wrong, and the accuracy
      may lie below the majority rate.
    - ``fair``: logistic regression to convergence (scikit-learn, C = 1) on embeddings standardised with the training
      mean and deviation.
    - a :class:`GradientProtocol`: Adam as it says.

    Args:
        train_embeddings: frozen embeddings of the training split.
        train_labels: their labels.
        num_classes: number of classes.
        protocol: see above.
        seed: initial weights and order of the samples; without effect on ``fair``. Torch's global generator is not
            touched, and on the CPU the number of threads changes nothing.

    Returns:
        The fitted layer, in float32 (``fair``: float64), on the device of the embeddings.

    Raises:
        ValueError: NaN or infinity, wrong shapes, labels out of range, an unknown protocol.
        ImportError: ``fair`` without scikit-learn.

    Example:
        >>> import torch
        >>> from protokernels.evaluation import linear_probe
        >>> embeddings, labels = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
        >>> linear_probe(embeddings, labels, num_classes=2, protocol="fair").predict(embeddings).tolist()
        [0, 0, 1, 1]
    """
    caller = "linear_probe"
    check_embeddings(caller, "train_embeddings", train_embeddings)
    check_labels(caller, "train_labels", train_labels, length=len(train_embeddings), upper=num_classes)
    if protocol == "fair":
        return _logistic_regression(train_embeddings.detach(), train_labels, num_classes)
    settings = GRADIENT_PROTOCOLS.get(protocol) if isinstance(protocol, str) else protocol
    if not isinstance(settings, GradientProtocol):
        raise ValueError(
            f"{caller}: protocol must be 'paper', 'official', 'fair' or a GradientProtocol; got {protocol!r}"
        )
    device = train_embeddings.device
    outputs = max(num_classes, settings.least_outputs)
    with one_thread():
        weight, bias = _train_layer(train_embeddings.detach().float(), train_labels.to(device), outputs, settings, seed)
    return LinearProbe(weight, bias, protocol)


@torch.no_grad()
def _train_layer(
    x: Tensor, labels: Tensor, outputs: int, settings: GradientProtocol, seed: int
) -> tuple[Tensor, Tensor]:
    """Adam on the mean cross-entropy.

    The gradient is written out, (softmax(x W^T + b) - onehot)^T [x, 1] / B: thousands of tiny steps without a graph.
    """
    generator = torch.Generator().manual_seed(seed)
    count, dim = x.shape
    bound = 1.0 / math.sqrt(dim)  # as torch.nn.Linear initialises
    drawn = torch.rand(outputs, dim + 1, generator=generator, dtype=torch.float32)
    layer = (drawn * 2.0 - 1.0) * bound  # the last column is the bias
    layer = layer.to(x.device)
    x = torch.cat([x, x.new_ones(count, 1)], dim=1)
    optimizer = torch.optim.Adam([layer], lr=settings.learning_rate, foreach=False)
    for _ in range(settings.epochs):
        order = torch.randperm(count, generator=generator).to(x.device)
        batches = x.index_select(0, order).split(settings.batch_size)
        targets = labels.index_select(0, order).split(settings.batch_size)
        for batch, target in zip(batches, targets, strict=True):
            error = torch.softmax(batch @ layer.t(), dim=1)
            error.scatter_add_(1, target[:, None], error.new_full((len(batch), 1), -1.0))
            layer.grad = (error.t() @ batch).div_(len(batch))
            optimizer.step()
    layer.grad = None
    return layer[:, :dim].clone(), layer[:, dim].clone()


def _logistic_regression(embeddings: Tensor, labels: Tensor, num_classes: int) -> LinearProbe:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(
            'linear_probe: the protocol "fair" needs scikit-learn: pip install "protokernels[train]"'
        ) from error
    x, y = embeddings.cpu().double().numpy(), labels.cpu().numpy()
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    deviation[deviation <= 1e-12 * np.abs(x).max(axis=0)] = 1.0  # a constant feature: nothing to scale
    weight = np.zeros((num_classes, x.shape[1]))
    bias = np.full(num_classes, -np.inf)
    classes = np.unique(y)
    if len(classes) == 1:
        bias[classes[0]] = 0.0
    else:
        with one_thread():
            model = LogisticRegression(C=1.0, max_iter=1000).fit((x - mean) / deviation, y)
        coefficients, intercept = model.coef_, model.intercept_
        if len(classes) == 2:  # one row, for the second class
            coefficients = np.concatenate([0.0 * coefficients, coefficients])
            intercept = np.concatenate([0.0 * intercept, intercept])
        weight[classes] = coefficients / deviation
        bias[classes] = intercept - weight[classes] @ mean
    device = embeddings.device
    return LinearProbe(torch.from_numpy(weight).to(device), torch.from_numpy(bias).to(device), "fair")
