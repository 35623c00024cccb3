# SPDX-License-Identifier: MIT
"""OPTiML: two views of an X-ray are aligned position by position, by optimal transport.

A. Singh, V. Gorade, D. Mishra. OPTiML: Dense Semantic Invariance Using Optimal Transport for Self-Supervised Medical
Image Representation. arXiv 2404.11868 (2024), version 1. Version 4 is called OTCXR: Rethinking Self-supervised
Alignment using Optimal Transport for Chest X-ray Analysis (WACV 2025).

An encoder maps both views to dense maps; the cost of a pair of positions is one minus their cosine. The pooled maps go
through an expander to q_s and q_t, from which cross-view attention (CV-SIM) makes the masses of the positions. The cost
of the optimal transport is minimised, with variance and covariance terms on q against collapse. Labels are used for
evaluation only.

    >>> from protokernels.papers import optiml
    >>> config = optiml.OPTiMLConfig.preset("fair", data="digits")
    >>> results = optiml.train(config, "runs/example")  # doctest: +SKIP

Presets
    ``paper``   what is known, with the settings of the authors' other work where nothing is: a standard ResNet18 at 224
                pixels, expander 4096-4096-4096, LARS, 300 epochs.
    ``fair``    ours, for one CPU core: width 16, 112 pixels, the same map of 7 x 7 positions, expander 512, AdamW, and the
                entropic value in place of the cost alone (see below).

What could be recovered
    The steps (sections III, text of version 1), the cost as a cosine between positions (Eq. 1), and the objective
    alpha L_OT + beta [var(q_s) + var(q_t)] + eta [cov(q_s) + cov(q_t)]. **Not recovered: any table, epsilon, the number
    of iterations, alpha, beta, eta, the number of heads.** There is no released code. So no number here is compared
    with the paper's, and nothing says that ours would be theirs.

Our choices
    Eq. 1 gives the cosine itself, but transport that minimises it would pair what is unlike: the cost is 1 - cos
    (``cost``).
    epsilon = 0.05 and 50 iterations: SwAV's epsilon; at 0.1 the plan of correlated features is almost uniform.
    alpha = beta = 25, eta = 1: VICReg's, and those of the authors' MLVICX. VICReg halves the sum of the two variance
    terms, the objective above does not: ``halve_variance``.
    No normalisation at the expander's end: it would fix every standard deviation and leave the variance term idle
    (``expander_norm``).
    The gradient goes through the iterations (``"unrolled"``). With a detached plan CV-SIM would not learn at all: the
    masses act through the plan only.
    CV-SIM's tokens are not said. ``"heads"`` (default): the h heads of one image's q attend to those of the other
    view's. ``"batch"``: the images of the batch, what PyTorch's attention does with a matrix [B, E]; an image's masses
    then depend on its batch. ``"dense"``: the positions of the dense maps, most natural for masses of positions, though
    the text feeds q.

What happens to the masses
    The cost of transport is least where all mass lies on one pair of positions that is alike, and nothing in the text
    forbids it. With the cost <P, C> and a gradient to the masses, that is what our runs on chest X-rays found: after a
    few epochs every image had its whole mass on the same one of 49 positions, and the alignment said nothing about the
    others. The entropic value, <P, C> + epsilon sum P (log P - 1), rewards spread masses: half of the positions kept
    them, but it was the half at the border; zero padding, which makes features there alike whatever the image shows, is
    suspected and not tested. Uniform masses (without CV-SIM) cannot retreat. ``positions``, the exponential of the
    masses' entropy, is recorded, and the figures show where masses lie; ``q_std`` and ``cost_range`` tell whether
    features collapse, against which only the variance of q stands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import protokernels

from ..data import ImageDataset
from ..models import mlp_head, pooled
from ..nn import variance_covariance_loss
from ..training import RunFolder, own_rows, whole_batch
from ..training.self_supervised import Method, PretrainingConfig, SelfSupervised
from ..training.transfer_report import results_table

__all__ = ["ABLATIONS", "CONFIG", "OPTiML", "OPTiMLConfig", "draw_figures", "evaluate", "results_table", "train"]

PAPER_RESULTS: dict[str, Any] = {}  # none could be recovered


@dataclass(frozen=True)
class OPTiMLConfig(PretrainingConfig):
    """Everything a result depends on, apart from seed, precision and hardware. The presets fill it in for a data
    set."""

    expander_dim: int = 512  # width of the three layers of the expansion head
    expander_norm: bool = False  # batch normalisation at its end, as in the authors' MLVICX
    marginals: Literal["cvsim", "uniform"] = "cvsim"  # where the masses of the positions come from
    cvsim: Literal["heads", "batch", "dense"] = "heads"  # what attends to what
    num_heads: int = 8  # h
    head_dim: int = 64  # d
    alignment: Literal["transport", "mse"] = "transport"  # of dense maps, or VICReg's squared distance of q_s and q_t
    cost: Literal["cosine", "neg_cos", "similarity"] = "cosine"  # 1 - cos; - cos; or cos, Eq. 1 to the letter
    epsilon: float = 0.05  # entropic regularisation in units of cost
    num_iters: int = 50  # Sinkhorn iterations
    value: Literal["transport", "entropic"] = "transport"  # <P, C>, or with the entropy term
    gradient: Literal["unrolled", "implicit", "envelope"] = "unrolled"  # see protokernels.sinkhorn
    alpha: float = 25.0  # weight of the alignment
    beta: float = 25.0  # weight of the variance terms
    eta: float = 1.0  # weight of the covariance terms
    halve_variance: bool = False  # the mean of the two variance terms, as in VICReg, instead of their sum

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {"expander_dim": 4096}, "fair": {"value": "entropic"}}
    POSITIVE: ClassVar[tuple[str, ...]] = ("expander_dim", "num_heads", "head_dim", "epsilon", "num_iters")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative("alpha", "beta", "eta")
        if self.gradient == "envelope" and self.value != "entropic":
            raise ValueError(
                'OPTiMLConfig: gradient "envelope" is that of value "entropic"; got value "transport", whose masses '
                "would get none"
            )


CONFIG = OPTiMLConfig  # the name under which the command line finds it

ABLATIONS: dict[str, dict[str, Any]] = {
    "full": {},  # the configuration itself
    "transport-alone": {"marginals": "uniform", "beta": 0.0, "eta": 0.0},
    "transport-cvsim": {"beta": 0.0, "eta": 0.0},
    "uniform-marginals": {"marginals": "uniform"},  # transport with variance and covariance, without CV-SIM
    "mse": {"alignment": "mse"},
    "cvsim-batch": {"cvsim": "batch"},
    "cvsim-dense": {"cvsim": "dense"},
    "halved-variance": {"halve_variance": True},
    "cost-similarity": {"cost": "similarity"},  # Eq. 1 to the letter
    "cost-neg-cos": {"cost": "neg_cos"},  # the same plan and gradients, another value
    "expander-norm": {"expander_norm": True},
    "value-transport": {"value": "transport", "gradient": "unrolled"},
    "value-entropic": {"value": "entropic"},
    "envelope-gradient": {"value": "entropic", "gradient": "envelope"},
    **{f"epsilon-{epsilon}": {"epsilon": epsilon} for epsilon in (0.01, 0.02, 0.1, 0.2)},
    **{f"iterations-{number}": {"num_iters": number} for number in (5, 20, 200)},
    **{f"alpha-{weight}": {"alpha": float(weight)} for weight in (1, 5, 100)},
    **{f"beta-{weight}": {"beta": float(weight)} for weight in (1, 5, 100)},
    **{f"eta-{weight}": {"eta": float(weight)} for weight in (0.1, 10)},
}


class Alignment(NamedTuple):
    """What the forward pass makes of two views; all float32, n positions."""

    q_first: Tensor  # [B, E]
    q_second: Tensor  # [B, E]
    cost: Tensor  # [B, n, n]
    a: Tensor  # [B, n], masses of the first view's positions, sum 1
    b: Tensor  # [B, n]
    solution: protokernels.SinkhornResult


class CrossView(nn.Module):
    """CV-SIM: the logits of one view's masses, from attention of that view (queries) to the other (keys and values).

    R = softmax(Q K^T / sqrt(d)) V with h heads of d dimensions; what the tokens are is ``reading``, see the module's
    docstring.

    Args:
        reading: ``"heads"``, ``"batch"`` or ``"dense"``.
        dim: of the tokens' source: of q, or of the dense map.
        positions: n.
        num_heads: h.
        head_dim: d.

    Shape: ``"heads"`` and ``"batch"``: q of this view and of the other, [B, E] each; ``"dense"``: dense maps as [B, n, C];
    -> [B, n].
    """

    def __init__(self, reading: str, dim: int, positions: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.reading, self.num_heads, self.head_dim = reading, num_heads, head_dim
        width = num_heads * head_dim
        self.query, self.key, self.value = (nn.Linear(dim, width, bias=False) for _ in range(3))
        self.logits = nn.Linear(width, 1 if reading == "dense" else positions)

    def forward(self, own: Tensor, other: Tensor) -> Tensor:
        Q, K, V = (
            layer(x).unflatten(-1, (self.num_heads, self.head_dim))
            for layer, x in ((self.query, own), (self.key, other), (self.value, other))
        )  # [B, (n,) h, d]
        if self.reading == "heads":  # tokens h, per image
            refined = _attend(Q, K, V).flatten(1)
        elif self.reading == "batch":  # tokens B, per head
            refined = _attend(Q.transpose(0, 1), K.transpose(0, 1), V.transpose(0, 1)).transpose(0, 1).flatten(1)
        else:  # tokens n, per image and head
            refined = _attend(Q.transpose(1, 2), K.transpose(1, 2), V.transpose(1, 2)).transpose(1, 2).flatten(2)
        logits: Tensor = self.logits(refined).float()
        return logits.squeeze(-1) if self.reading == "dense" else logits


def _attend(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:  # [..., tokens, d] each
    scores = (Q @ K.transpose(-1, -2)).float() / math.sqrt(Q.shape[-1])
    return torch.softmax(scores, dim=-1).to(V.dtype) @ V


class OPTiML(Method):
    """Siamese encoder, expander, CV-SIM and transport (section III, Fig. 1).

    Args:
        config: see :class:`OPTiMLConfig`.
        channels: image channels, 1 or 3.

    Shape: two views [B, C, S, S] in [0, 1] -> losses and diagnostics as means over the batch.
    """

    def __init__(self, config: OPTiMLConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.encoder = config.make_encoder(channels)
        dim, width = self.encoder.dim, config.expander_dim
        self.expander = mlp_head(dim, width, width, norm_last=config.expander_norm)
        side = -(-config.image_size // self.encoder.stride)  # every stride rounds up
        self.side = side
        self.cvsim: CrossView | None = None
        if config.marginals == "cvsim" and config.alignment == "transport":
            source = dim if config.cvsim == "dense" else width
            self.cvsim = CrossView(config.cvsim, source, side**2, config.num_heads, config.head_dim)

    def embed(self, views: Tensor) -> tuple[Tensor, Tensor]:  # [B, C, S, S] -> [B, n, D], [B, E]
        """Dense map as positions, and q = expander(pooled map)."""
        dense = self.encoder(views)
        return dense.flatten(2).transpose(1, 2), self.expander(pooled(dense)).float()

    def align(self, first: Tensor, second: Tensor) -> Alignment:
        """The transport between the positions of two views."""
        (F_s, q_s), (F_t, q_t) = self.embed(first), self.embed(second)
        cost = position_cost(F_s, F_t, self.config.cost)
        if self.cvsim is None:
            a = b = cost.new_full(cost.shape[:2], 1 / cost.shape[1])
        else:
            own, other = (F_s, F_t) if self.config.cvsim == "dense" else (q_s, q_t)
            batched = self.config.cvsim == "batch"  # images attend to one another
            own, other = (whole_batch(x) if batched else x for x in (own, other))
            masses = (torch.softmax(self.cvsim(*pair), dim=1) for pair in ((own, other), (other, own)))
            a, b = (own_rows(x) if batched else x for x in masses)
        try:
            solution = protokernels.sinkhorn(
                cost, a, b, epsilon=self.config.epsilon, num_iters=self.config.num_iters, gradient=self.config.gradient
            )
        except ValueError as error:
            if bool((torch.isfinite(a) & torch.isfinite(b)).all()):
                raise
            raise ValueError(
                "OPTiML: the masses of the positions are not finite; the model has diverged: train anew, into another folder, with a "
                "lower learning rate or precision fp32"
            ) from error
        return Alignment(q_s, q_t, cost, a, b, solution)

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        if self.config.alignment == "mse":
            q_s, q_t = self.embed(first)[1], self.embed(second)[1]
            return objective((q_s - q_t).square().mean(), q_s, q_t, self.config)
        aligned = self.align(first, second)
        solution = aligned.solution
        values = solution.transport_cost if self.config.value == "transport" else solution.entropic_value
        losses = objective(values.mean(), aligned.q_first, aligned.q_second, self.config)
        return {**losses, **diagnostics(aligned)}


def position_cost(first: Tensor, second: Tensor, kind: str) -> Tensor:  # [B, n, D], [B, m, D] -> [B, n, m] float32
    """C_ij from cos_ij = z_i . z_j / (|z_i| |z_j|), Eq. 1; the cosine of a position without any activation is 0."""
    with torch.autocast(first.device.type, enabled=False):
        cosine = F.normalize(first.float(), dim=2) @ F.normalize(second.float(), dim=2).transpose(1, 2)
    return cosine if kind == "similarity" else -cosine if kind == "neg_cos" else 1 - cosine


def objective(alignment: Tensor, q_first: Tensor, q_second: Tensor, config: OPTiMLConfig) -> dict[str, Tensor]:
    """alpha L + beta [var(q_s) + var(q_t)] + eta [cov(q_s) + cov(q_t)], and its terms; q over the whole batch."""
    q_first, q_second = whole_batch(q_first), whole_batch(q_second)
    (var_s, cov_s), (var_t, cov_t) = variance_covariance_loss(q_first), variance_covariance_loss(q_second)
    variance = (var_s + var_t) / (2 if config.halve_variance else 1)
    covariance = cov_s + cov_t
    loss = config.alpha * alignment + config.beta * variance + config.eta * covariance
    std = q_first.detach().std(dim=0, unbiased=False).mean()
    return {"loss": loss, "alignment": alignment, "variance": variance, "covariance": covariance, "q_std": std}


@torch.no_grad()
def diagnostics(aligned: Alignment) -> dict[str, Tensor]:
    """What tells a collapse: range of the costs, number of positions with mass, what the marginals miss."""
    entropy = torch.special.entr(aligned.a).sum(dim=1)
    spread = aligned.cost.amax(dim=(1, 2)) - aligned.cost.amin(dim=(1, 2))
    error = aligned.solution.marginal_error
    return {"cost_range": spread.mean(), "positions": entropy.exp().mean(), "marginal_error": error.mean()}


class _OPTiML(SelfSupervised[OPTiMLConfig]):
    """What the commands need to know of OPTiML beside what they know of every method of two views."""

    def draw(self, folder: Path, run: RunFolder, config: OPTiMLConfig, dataset: ImageDataset) -> list[Path]:
        from ..figures.optiml import draw  # matplotlib is not needed for training

        method = self.load_model(run, config, dataset)
        assert isinstance(method, OPTiML)
        return draw(folder, method, run, dataset)


EXPERIMENT = _OPTiML("optiml", OPTiMLConfig, OPTiML)
train, evaluate, draw_figures = EXPERIMENT.train, EXPERIMENT.evaluate, EXPERIMENT.draw_figures
