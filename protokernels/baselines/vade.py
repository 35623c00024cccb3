# SPDX-License-Identifier: MIT
"""VaDE: a variational autoencoder whose prior is a mixture of Gaussians, with the responsibilities in closed form.

Z. Jiang, Y. Zheng, H. Tan, B. Tang, H. Zhou. Variational Deep Embedding: An Unsupervised and Generative Approach to Clustering.
IJCAI 2017. A baseline of VAESim (Ferrante et al. 2023, Table 1), there by two public ports: slim1017/VaDE (Keras, the first
author's) and GuHongyang/VaDE-pytorch.

    p(c) = pi_c,   p(z|c) = N(mu_c, sigma_c^2),   p(x|z) Bernoulli(d(z)),   q(z|x) = N(mu, sigma^2)

With gamma_c = p(c|z) for one sample z of q(z|x) (Eq. 16) the negative evidence bound (Eq. 12) is, as a mean over images,

    L = BCE(x, d(z)), summed over pixels  +  sum_c gamma_c KL(N(mu, sigma^2) || N(mu_c, sigma_c^2))  +  KL(gamma || pi)

    KL_c = 1/2 sum_d [ log(sigma_cd^2 / sigma_d^2) + (sigma_d^2 + (mu_d - mu_cd)^2) / sigma_cd^2 - 1 ]
    gamma_c = softmax_c( log pi_c - 1/2 sum_d [ log 2 pi + log sigma_cd^2 + (z_d - mu_cd)^2 / sigma_cd^2 ] )

Training has two stages in one run: encoder and decoder first learn as an autoencoder (squared error, no noise); then scikit-learn's
GaussianMixture (diagonal) on the latent vectors of the training images gives pi, mu_c and sigma_c, Adam starts afresh, and all
of it is trained on L. The cluster of an image is its largest responsibility.

Presets
    ``pytorch``  the PyTorch port: 50 epochs of pre-training with Adam 1e-3, 300 epochs with Adam 2e-3 times 0.95 every 10, batches
                 of 800; the weights of the mean are copied into the log-variance before the second stage. Evaluated as VAESim's
                 released code does (sampled z, the 10-way linear probe of 10 epochs, k = 10 neighbours on PneumoniaMNIST).
    ``keras``    the authors' port: batches of 100, Adam 2e-3 times 0.9 every 10 epochs, at least 2e-4, 3000 epochs (up to; its README),
                 log-variances start random. **It trains on the test images too** (``transductive``), without labels.
    ``fair``     ours: pre-training and schedule chosen on held-out training images; the log-variance starts constant, at a
                 tenth of the mixture's average variance; the evaluation of VAESim's ``fair``.
    All have the ports' networks, 784-500-500-2000-10 and back, with ReLU.

Known deviations
    Responsibilities are a softmax of logarithms. Both ports exponentiate first and add 1e-10, which makes an image that is far
    from every component belong to all of them equally, without a gradient. pi is the softmax of free parameters; the ports
    optimise it unconstrained, as a number that may leave [0, 1]. The Keras port counts log pi once for every dimension of z in
    the responsibilities, adds a constant to L, keeps pi uniform at the start and has 1e-4 as Adam's epsilon: none of these is
    repeated. The PyTorch port draws a second z for the responsibilities; here, as in the paper and the Keras port, one z serves
    both. The Keras port loads a published autoencoder; here its pre-training is run, as in the other port.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import ImageDataset, Split
from ..data.mapped import Images
from ..evaluation.threads import one_thread
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

_PUBLIC: dict[str, Any] = {"learning_rate": 2e-3, "embedding": "sample", "linear_protocol": "official"}
_PYTORCH: dict[str, Any] = {**_PUBLIC, "epochs": 300, "batch_size": 800, "decay": 0.95, "log_variance_start": "copied"}
_KERAS: dict[str, Any] = {
    **_PUBLIC,
    "epochs": 3000,
    "batch_size": 100,
    "decay": 0.9,
    "smallest_factor": 0.1,
    "log_variance_start": "random",
    "transductive": True,
}
_DIGITS: dict[str, Any] = {"image_size": 16, "epochs": 60, "batch_size": 100}


@dataclass(frozen=True)
class VaDEConfig(ClusteringConfig):
    """The shared settings and this method's own."""

    image_size: int = 28
    num_clusters: int = 10  # K
    latent_dim: int = 10
    hidden: tuple[int, ...] = (500, 500, 2000)  # of the encoder; the decoder has them in reverse
    pretraining_epochs: int = 50  # as an autoencoder
    pretraining_rate: float = 1e-3  # learning rate of that
    schedule: Literal["step", "cosine"] = "step"
    decay: float = 0.95  # "step": the learning rate is multiplied by it every 10 epochs
    smallest_factor: float = 0.0  # "step": and does not fall below this share of it
    log_variance_start: Literal["constant", "copied", "random"] = "constant"  # of q(z|x), when the second stage begins
    mixture_starts: int = 1  # GaussianMixture keeps the best of so many starts
    transductive: bool = False  # train on the test images too, without their labels

    PRESETS: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "pytorch": {"mnist": _PYTORCH, "digits": {**_PYTORCH, **_DIGITS}, "*": {**_PYTORCH, "knn_k": 10}},
        "keras": {"mnist": _KERAS, "digits": {**_KERAS, **_DIGITS}, "*": {**_KERAS, "knn_k": 10}},
        "fair": {
            "mnist": {"schedule": "cosine", "epochs": 30, "pretraining_epochs": 20},
            "digits": {**_DIGITS, "schedule": "cosine", "epochs": 40},
            "*": {"schedule": "cosine", "epochs": 60, "batch_size": 128},
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("num_clusters", "latent_dim", "pretraining_rate", "mixture_starts")
        if self.pretraining_epochs < 0:
            raise ValueError(f"VaDEConfig: pretraining_epochs must not be negative; got {self.pretraining_epochs}")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"VaDEConfig: hidden must hold at least one width of at least 1; got {self.hidden}")
        if not 0 < self.decay <= 1 or not 0 <= self.smallest_factor <= 1:
            raise ValueError(
                f"VaDEConfig: decay must lie in (0, 1] and smallest_factor in [0, 1]; got {self.decay} and {self.smallest_factor}"
            )

    @property
    def total_epochs(self) -> int:
        return self.pretraining_epochs + self.epochs

    def learning_rate_factor(self, epoch: int) -> float:
        if epoch < self.pretraining_epochs:
            return self.pretraining_rate / self.learning_rate
        epoch -= self.pretraining_epochs
        if self.schedule == "cosine":
            return cosine_factor(epoch, self.epochs)
        return max(self.decay ** (epoch // 10), self.smallest_factor)


class VaDEOutput(NamedTuple):
    """What a forward pass returns; all float32."""

    pixel_logits: Tensor  # [B, C, H, W]; their sigmoid is the reconstruction
    z: Tensor  # [B, D]
    mean: Tensor  # [B, D]
    log_variance: Tensor  # [B, D]


class Mixture(NamedTuple):
    """A mixture of K Gaussians with diagonal covariances."""

    log_weights: Tensor  # [K]
    means: Tensor  # [K, D]
    log_variances: Tensor  # [K, D]


class VaDE(ClusteringModel):
    """Encoder, decoder and mixture.

    Shape: images [B, C, H, W] in [0, 1], noise [B, D] or None (then z is the mean) -> :class:`VaDEOutput`.
    """

    initialized: Tensor  # [] bool: the mixture has been fitted

    def __init__(self, config: VaDEConfig, channels: int, _classes: int = 0) -> None:
        super().__init__()
        self.num_clusters, self.shape = config.num_clusters, (channels, config.image_size, config.image_size)
        pixels, D, K = math.prod(self.shape), config.latent_dim, config.num_clusters
        self.encoder = dense_layers(pixels, *config.hidden)
        self.mean, self.log_variance = nn.Linear(config.hidden[-1], D), nn.Linear(config.hidden[-1], D)
        self.decoder = nn.Sequential(*dense_layers(D, *config.hidden[::-1]), nn.Linear(config.hidden[0], pixels))
        self.mixture_logits = nn.Parameter(torch.zeros(K))
        self.mixture_means = nn.Parameter(torch.zeros(K, D))
        self.mixture_log_variances = nn.Parameter(torch.zeros(K, D))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))

    @property
    def mixture(self) -> Mixture:
        """The prior."""
        return Mixture(torch.log_softmax(self.mixture_logits, 0), self.mixture_means, self.mixture_log_variances)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), [B, D] each, float32."""
        features = self.encoder(images.flatten(1))
        return self.mean(features).float(), self.log_variance(features).float()

    def forward(self, images: Tensor, noise: Tensor | None = None) -> VaDEOutput:
        mean, log_variance = self.encode(images)
        z = mean if noise is None else mean + torch.exp(log_variance / 2) * noise
        return VaDEOutput(self.decoder(z).float().unflatten(1, self.shape), z, mean, log_variance)

    def represent(self, images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        mean, log_variance = self.encode(images)
        z = mean if generator is None else gaussian_sample(mean, torch.exp(log_variance / 2), generator)
        return z, log_responsibilities(z, self.mixture).argmax(dim=1) if self.initialized else None

    def reconstruct(self, images: Tensor) -> Tensor:
        return torch.sigmoid(self(images).pixel_logits)

    def decode(self, z: Tensor) -> Tensor:
        images: Tensor = torch.sigmoid(self.decoder(z).float()).unflatten(1, self.shape)
        return images

    def centers(self) -> Tensor:
        return self.mixture_means.detach().cpu()


def log_responsibilities(z: Tensor, mixture: Mixture) -> Tensor:  # [B, D] -> [B, K]
    """log p(c|z) (Eq. 16), never exponentiated on the way, so that nothing underflows however far z is from every component.

    Source: log-softmax of log pi_c + log N(z; mu_c, sigma_c^2).

    Example:
        >>> import math, torch
        >>> far = Mixture(torch.tensor([0.5, 0.5]).log(), torch.tensor([[0.0], [1.0]]), torch.zeros(2, 1))
        >>> log_responsibilities(torch.tensor([[1000.0]]), far).exp().tolist()  # exp(-500000) would have been 0 / 0
        [[0.0, 1.0]]
    """
    scaled = (z[:, None] - mixture.means).square() * torch.exp(-mixture.log_variances)  # [B, K, D]
    log_density = -0.5 * (math.log(2 * math.pi) + mixture.log_variances + scaled).sum(dim=2)
    return torch.log_softmax(mixture.log_weights + log_density, dim=1)


def component_kls(mean: Tensor, log_variance: Tensor, mixture: Mixture) -> Tensor:  # [B, D], [B, D] -> [B, K]
    """KL(N(mu, sigma^2) || N(mu_c, sigma_c^2)) for every component."""
    squares = log_variance.exp()[:, None] + (mean[:, None] - mixture.means).square()  # [B, K, D]
    ratio = mixture.log_variances - log_variance[:, None]
    return 0.5 * (ratio + squares * torch.exp(-mixture.log_variances) - 1).sum(dim=2)


def vade_loss(images: Tensor, output: VaDEOutput, mixture: Mixture) -> dict[str, Tensor]:  # images [B, C, H, W]
    """The three terms as means over the batch, and their sum ``loss``."""
    bce = F.binary_cross_entropy_with_logits(output.pixel_logits, images, reduction="none").flatten(1).sum(dim=1).mean()
    log_gamma = log_responsibilities(output.z, mixture)
    gamma = log_gamma.exp()
    gaussian = (gamma * component_kls(output.mean, output.log_variance, mixture)).sum(dim=1).mean()
    categorical = (gamma * (log_gamma - mixture.log_weights)).sum(dim=1).mean()
    return {
        "loss": bce + gaussian + categorical,
        "reconstruction": bce,
        "gaussian": gaussian,
        "categorical": categorical,
    }


def autoencoder_loss(images: Tensor, output: VaDEOutput) -> dict[str, Tensor]:  # images [B, C, H, W]
    """||x - d(mu)||^2, what the first stage minimises; under a name of its own, since it is no bound."""
    return {"squared_error": (images - torch.sigmoid(output.pixel_logits)).square().flatten(1).sum(dim=1).mean()}


def fit(model: VaDE, images: Images, session: Session, config: VaDEConfig) -> None:  # images [N, C, H, W] in [0, 1]
    """Both stages."""
    for epoch in session.epochs():
        pretraining = epoch < config.pretraining_epochs
        if not pretraining and not model.initialized:
            initialize_mixture(model, images, config, session.seed)
            session.optimizer.state.clear()  # Adam starts afresh
        for step in session.steps():
            x = images[step.indices]
            with session.accelerator.autocast():  # the bare model: each stage leaves some parameters without a gradient
                output = model(x) if pretraining else model(x, step.normal(config.latent_dim))
            losses = autoencoder_loss(x, output) if pretraining else vade_loss(x, output, model.mixture)
            session.optimise(losses["squared_error" if pretraining else "loss"], step, average=True)
            session.record(step, **losses)
        session.note(**watch(model, images))


@torch.no_grad()
def initialize_mixture(model: VaDE, images: Images, config: VaDEConfig, seed: int) -> None:  # images [N, C, H, W]
    """Sets the mixture to scikit-learn's fit to the latent vectors, and the log-variance's layer to its start.

    Raises:
        ValueError: fewer images than clusters, or latent vectors that are not finite.
    """
    from sklearn.mixture import GaussianMixture  # slow to import

    model.eval()
    z = torch.cat([model.encode(batch)[0] for batch in images.split(1000)]).double().cpu()
    if len(z) < config.num_clusters or not bool(z.isfinite().all()):
        raise ValueError(
            f"VaDE: a mixture of {config.num_clusters} components needs at least as many images, and finite latent vectors; got "
            f"{len(z)} images, {int((~z.isfinite()).any(dim=1).sum())} of them with NaN or infinity"
        )
    with one_thread():  # the same bits whatever the number of threads
        fitted = GaussianMixture(
            config.num_clusters, covariance_type="diag", n_init=config.mixture_starts, random_state=seed
        ).fit(z.numpy())
    variances = torch.from_numpy(fitted.covariances_)
    model.mixture_logits.copy_(torch.from_numpy(fitted.weights_).log())
    model.mixture_means.copy_(torch.from_numpy(fitted.means_))
    model.mixture_log_variances.copy_(variances.log())
    if config.log_variance_start == "copied":
        model.log_variance.load_state_dict(model.mean.state_dict())
    elif config.log_variance_start == "constant":
        nn.init.zeros_(model.log_variance.weight)
        average = (torch.from_numpy(fitted.weights_)[:, None] * variances).sum(dim=0)
        model.log_variance.bias.copy_((0.1 * average).log())
    model.initialized.fill_(True)
    model.train()


class _VaDE(ClusteringBaseline):
    def check(self, config: Any, dataset: ImageDataset) -> None:
        super().check(config, dataset)
        count = len(self.training_split(dataset, config))
        if config.num_clusters > count:
            raise ValueError(
                f"vade: num_clusters must be at most {count}, the number of training images; got {config.num_clusters}"
            )

    def training_split(self, dataset: ImageDataset, config: Any) -> Split:
        split = super().training_split(dataset, config)
        return split.join(dataset.test) if config.transductive and not config.selection else split

    def remarks(self, results: dict[str, Any]) -> list[str]:
        seen = results["config"]["transductive"] and not results["config"]["selection"]
        return [*super().remarks(results), *(["trained on the test images too, without their labels"] if seen else [])]


BASELINE = _VaDE("vade", VaDEConfig, VaDE, fit, __doc__, paper_results("vade"))
