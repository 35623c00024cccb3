# SPDX-License-Identifier: MIT
"""GMVAE: a variational autoencoder whose prior is a mixture of Gaussians, with a Gumbel-softmax for the component.

The baseline of VAESim (Ferrante et al. 2023, Table 1, "default parameters"): J. Arias Figueroa's public PyTorch model
(https://github.com/jariasf/GMVAE), after D. P. Kingma, D. J. Rezende, S. Mohamed, M. Welling. Semi-supervised Learning with Deep
Generative Models. NeurIPS 2014 (model M2, stacked); Gumbel-softmax: E. Jang, S. Gu, B. Poole. Categorical Reparameterization with
Gumbel-Softmax. ICLR 2017, Eq. 2.

    y ~ q(y|x) by softmax((logits + Gumbel noise) / tau),   z ~ q(z|x, y) = N(mu(x, y), sigma^2(x, y))
    p(y) uniform over K,   p(z|y) = N(A y + a, softplus(B y + b)),   p(x|z) Bernoulli(d(z))

and, as a mean over images, the negative evidence bound

    L = BCE(x, d(z)), summed over pixels  +  log q(z|x, y) - log p(z|y)  +  KL(q(y|x) || uniform)

with one sample of y and z; the last term is log K minus the entropy of q(y|x), in closed form. tau falls as exp(-0.01386 epoch)
from 1 to 0.5 (after 50 epochs). Every network has two hidden layers of 512 units with ReLU. The cluster of an image is the
largest entry of q(y|x), its embedding the mean of q(z|x, y).

Presets
    ``paper``  the public model's defaults: K = 10, 64 dimensions, Adam 1e-3, batches of 64, 100 epochs, 28 x 28 pixels, and the
               evaluation of VAESim's released code (the 10-way linear probe of 10 epochs; k = 10 neighbours on PneumoniaMNIST).
    ``fair``   ours: batches of 256 (MNIST) or 128 with a cosine schedule, fewer epochs, the evaluation of VAESim's ``fair``.

Known deviations
    Evaluation draws nothing: q(z|x, y) gets the probabilities q(y|x) for y, where the public code draws Gumbel noise in evaluation
    too (``embedding`` "sample" draws y and z). The public code writes log 0.1 for the prior of the component whatever K is; here it
    is -log K. The Bernoulli term is computed from logits, without the cut at exp(-100). 1e-8 is added to variances once, not to
    deviations and logarithms separately.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.mapped import Images
from ..papers._vaesim_published import paper_results
from ..training import Session
from .clustering import (
    ClusteringBaseline,
    ClusteringConfig,
    ClusteringModel,
    cosine_factor,
    dense_layers,
    gaussian_sample,
    watch,
)

SMALLEST_VARIANCE = 1e-8
SMALLEST_UNIFORM = 1e-20  # the logarithm of a uniform number is taken, which may be 0

_PUBLIC: dict[str, Any] = {"batch_size": 64, "epochs": 100, "linear_protocol": "official", "schedule": "constant"}


@dataclass(frozen=True)
class GMVAEConfig(ClusteringConfig):
    """The shared settings and this method's own."""

    image_size: int = 28
    num_clusters: int = 10  # K
    latent_dim: int = 64
    hidden_dim: int = 512
    start_temperature: float = 1.0  # tau of the Gumbel-softmax in the first epoch
    end_temperature: float = 0.5  # and the lowest
    temperature_rate: float = 0.013862944  # tau = start exp(-rate epoch)
    schedule: Literal["constant", "cosine"] = "cosine"  # of the learning rate

    PRESETS: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "paper": {
            "mnist": _PUBLIC,
            "digits": {**_PUBLIC, "image_size": 16, "epochs": 50},
            "*": {**_PUBLIC, "knn_k": 10},
        },
        "fair": {
            "mnist": {"epochs": 30},
            "digits": {"image_size": 16, "epochs": 60, "batch_size": 64},
            "*": {"epochs": 60, "batch_size": 128},
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("num_clusters", "latent_dim", "hidden_dim", "start_temperature", "end_temperature")
        if not self.temperature_rate >= 0 or self.end_temperature > self.start_temperature:
            raise ValueError(
                "GMVAEConfig: the temperature falls from start_temperature to end_temperature at a temperature_rate of at least "
                f"0; got {self.start_temperature}, {self.end_temperature} and {self.temperature_rate}"
            )

    def learning_rate_factor(self, epoch: int) -> float:
        return cosine_factor(epoch, self.epochs) if self.schedule == "cosine" else 1.0

    def temperature(self, epoch: int) -> float:
        """tau in an epoch, counted from 0."""
        return max(self.start_temperature * math.exp(-self.temperature_rate * epoch), self.end_temperature)


class GMVAEOutput(NamedTuple):
    """What a forward pass returns; all float32."""

    pixel_logits: Tensor  # [B, C, H, W]; their sigmoid is the reconstruction
    logits: Tensor  # [B, K] of q(y|x)
    z: Tensor  # [B, D]
    mean: Tensor  # [B, D] of q(z|x, y)
    variance: Tensor  # [B, D]
    prior_mean: Tensor  # [B, D] of p(z|y)
    prior_variance: Tensor  # [B, D]


class GMVAE(ClusteringModel):
    """The four networks.

    Shape: images [B, C, H, W] in [0, 1], Gumbel noise [B, K], noise [B, D], temperature -> :class:`GMVAEOutput`.
    """

    def __init__(self, config: GMVAEConfig, channels: int, _classes: int = 0) -> None:
        super().__init__()
        self.num_clusters, self.shape = config.num_clusters, (channels, config.image_size, config.image_size)
        pixels, hidden, D, K = math.prod(self.shape), config.hidden_dim, config.latent_dim, config.num_clusters
        self.component = nn.Sequential(*dense_layers(pixels, hidden, hidden), nn.Linear(hidden, K))  # q(y|x)
        self.features = dense_layers(pixels + K, hidden, hidden)  # q(z|x, y)
        self.mean, self.variance = nn.Linear(hidden, D), nn.Linear(hidden, D)
        self.prior_mean, self.prior_variance = nn.Linear(K, D), nn.Linear(K, D)  # p(z|y)
        self.decoder = nn.Sequential(*dense_layers(D, hidden, hidden), nn.Linear(hidden, pixels))  # p(x|z)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def posterior(self, images: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # [B, C, H, W], [B, K]
        """Mean and variance of q(z|x, y), [B, D] each."""
        features = self.features(torch.cat([images.flatten(1), y.to(images.dtype)], dim=1))
        return self.mean(features).float(), positive(self.variance(features).float())

    def prior(self, y: Tensor) -> tuple[Tensor, Tensor]:  # [B, K]
        """Mean and variance of p(z|y), [B, D] each."""
        return self.prior_mean(y).float(), positive(self.prior_variance(y).float())

    def forward(self, images: Tensor, gumbel: Tensor, noise: Tensor, temperature: float) -> GMVAEOutput:
        logits = self.component(images.flatten(1)).float()
        y = torch.softmax((logits + gumbel) / temperature, dim=1)
        mean, variance = self.posterior(images, y)
        z = mean + variance.sqrt() * noise
        pixel_logits = self.decoder(z).float().unflatten(1, self.shape)
        return GMVAEOutput(pixel_logits, logits, z, mean, variance, *self.prior(y))

    def represent(self, images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        logits = self.component(images.flatten(1)).float()
        drawn = logits if generator is None else logits + gumbel_noise(logits.shape, generator).to(logits.device)
        mean, variance = self.posterior(images, torch.softmax(drawn, dim=1))
        z = mean if generator is None else gaussian_sample(mean, variance.sqrt(), generator)
        return z, logits.argmax(dim=1)

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.decode(self.represent(images, None)[0])

    def decode(self, z: Tensor) -> Tensor:
        images: Tensor = torch.sigmoid(self.decoder(z).float()).unflatten(1, self.shape)
        return images

    def centers(self) -> Tensor:
        weight = self.prior_mean.weight
        return self.prior(torch.eye(self.num_clusters, device=weight.device, dtype=weight.dtype))[0].detach().cpu()


def positive(x: Tensor) -> Tensor:
    """A variance: softplus(x), kept away from 0."""
    return F.softplus(x) + SMALLEST_VARIANCE


def gumbel_noise(shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
    """-log(-log(u)) with u uniform."""
    uniform = torch.rand(shape, generator=generator).clamp(SMALLEST_UNIFORM, 1 - torch.finfo(torch.float32).eps / 2)
    return -torch.log(-torch.log(uniform))


def log_normal(z: Tensor, mean: Tensor, variance: Tensor) -> Tensor:  # [B, D] each -> [B]
    """log N(z; mean, variance), summed over dimensions."""
    return -0.5 * (math.log(2 * math.pi) + variance.log() + (z - mean).square() / variance).sum(dim=1)


def component_kl(logits: Tensor) -> Tensor:  # [B, K] -> [B]
    """KL(softmax(logits) || uniform) = log K + sum_k q_k log q_k."""
    log_q = torch.log_softmax(logits, dim=1)
    return math.log(logits.shape[1]) + (log_q.exp() * log_q).sum(dim=1)


def gmvae_loss(images: Tensor, output: GMVAEOutput) -> dict[str, Tensor]:  # images [B, C, H, W]
    """The three terms as means over the batch, and their sum ``loss``."""
    bce = F.binary_cross_entropy_with_logits(output.pixel_logits, images, reduction="none").flatten(1).sum(dim=1).mean()
    posterior = log_normal(output.z, output.mean, output.variance)
    gaussian = (posterior - log_normal(output.z, output.prior_mean, output.prior_variance)).mean()
    categorical = component_kl(output.logits).mean()
    return {
        "loss": bce + gaussian + categorical,
        "reconstruction": bce,
        "gaussian": gaussian,
        "categorical": categorical,
    }


def fit(model: GMVAE, images: Images, session: Session, config: GMVAEConfig) -> None:  # images [N, C, H, W] in [0, 1]
    """The loop."""
    for epoch in session.epochs():
        temperature = config.temperature(epoch)
        for step in session.steps():
            x = images[step.indices]
            drawn = gumbel_noise((step.batch, config.num_clusters), session.shared_generator(step, "gumbel"))
            gumbel = drawn[step.rank :: step.processes].to(x.device)
            losses = gmvae_loss(x, session.model(x, gumbel, step.normal(config.latent_dim), temperature))
            session.optimise(losses["loss"], step)
            session.record(step, **losses, temperature=temperature)
        session.note(**watch(model, images))


BASELINE = ClusteringBaseline("gmvae", GMVAEConfig, GMVAE, fit, __doc__, paper_results("gmvae"))
