# SPDX-License-Identifier: MIT
"""Transformations for contrastive learning that a network chooses, so that a pair is hard to match and yet shows what matters.

C. Ruppli, P. Gori, R. Ardon, I. Bloch. Optimizing transformations for contrastive learning in a differentiable framework. MILLanD
workshop, MICCAI 2022. arXiv 2207.13367.

A small network M looks at an image X and gives the parameters Lambda of six differentiable transformations (Table 1), whose
composition T makes X_M. The encoder f with a projection g learns that X_M and the untransformed X belong together (I_NCE, Eq. 2), and M
learns to make that difficult. With a tenth of the labels, a linear classifier p on f keeps both from losing the pathology: M may not
crop it away, since X_M must be classified as well.

    >>> from protokernels.papers import optimized_views
    >>> config = optimized_views.OptimizedViewsConfig.preset("fair", data="digits", strategy="self-supervised+supervision")
    >>> results = optimized_views.train(config, "runs/example")  # doctest: +SKIP

Presets
    ``paper``  the text: encoder widths 32 to 256, or DenseNet121 for chest X-rays; batches of 32 or 16, 100 epochs, Adam 1e-4.
    ``fair``   ours, for minutes on one CPU core: 64 pixels, widths 8 to 64 for every data set, 10 epochs with 1e-3 (chest_nih 30 epochs;
               digits 32 pixels and 5 epochs).
    The authors have not released their code, so there is no preset ``official``.

Strategies of section 3 (``strategy``)
    ``random``                       Lambda is uniform in [0, 1]^7, all six transformations act
    ``random+supervision``           and p learns from the labelled share
    ``self-supervised``              M without labels; the paper reports crops without content
    ``self-supervised+supervision``  the paper's method
    ``simclr``                       Lambda is uniform, each transformation acts with probability 1/2; one image of a pair is transformed
    ``supervised``                   cross-entropy of images transformed like that, on the labelled share
    ``supervised-all``               the same with all labels
    ``supervised-contrastive``       Khosla's loss on the labelled share
    All start from the same f, g and p. An epoch has as many steps for all: those with few labels see their images more often, each time
    transformed anew.

What the paper contradicts or leaves open, and our choice
    Signs: with the minus of Eq. 2, I_NCE is a loss, and Eq. 1 as printed makes f push pairs apart and M bring them together. The text says
    the opposite, ``sign="text"``: f, g, p minimise +alpha_2 I_NCE, M minimises -alpha_0 I_NCE. ``"printed"`` is to the letter.

    I_NCE: Eq. 2 sums over the batch; beside a mean cross-entropy, weights of 0.1 to 10 make sense for a mean only (``reduction``).
    Similarity is the inner product with tau = 1, the positive is not in the denominator (``denominator``), and only X_M looks for X among
    the images (``symmetric``). So I_NCE has no lower bound, and with 1e-3 it did not settle: ``fair`` takes the cosine with tau = 0.5.

    Labels: cross-entropy is the mean over the labelled images of a batch, and 0 with a zero gradient where there are none (Adam's momentum
    goes on). They are drawn by the seed, a share of each class; the paper draws at random.

    Alternation: one step of M, then one of f, g, p on a new X_M of the M just trained, with new noise. f(X) is the same for both, since
    only M has changed, and is computed once. ``view="shared"``: both steps use the X_M of the M before its step, and one pass of it through
    f, which costs less. X and X_M go through f as two batches. Batch normalisation always uses the batch; running
    statistics of f move in its own step, by both batches or by X alone (``statistics``), those of M in M's.

    Order: the reversed one stands for the "different transformation order", which is not given. Images are scaled to [0, 1]. Sizes of M, f
    and g: :mod:`protokernels.papers._optimized_views_networks`. Adam without decay. A last batch that is smaller is left out. With
    several processes, I_NCE and the mean over labelled images are those of the whole batch.

Evaluation (section 2.4)
    ``hold_out``  the paper's: the test set is cut into three hold-out sets without a common patient; in each, a linear probe is fitted and
                  scored by three-fold cross-validation, patients together. The probe sees test labels.
    ``probe``     the usual one: fitted on training labels, scored on the whole test set.
    The first is also run in between, for the AUC over epochs. No score chooses anything, the last epoch counts. The paper's Table 2 ends
    at 0.887 where its text gives 0.93 for the same method; nothing explains it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

import protokernels

from ..data import ImageDataset, Split, to_tensor
from ..data.datasets import data_title
from ..training import (
    Plan,
    RunFolder,
    Session,
    Step,
    derived_generator,
    process_count,
    seed_everything,
    whole_batch,
)
from ..training.experiment import Experiment
from ..training.files import read_json_lines, write_json_lines
from ..training.runs import Trial
from ..training.transfer_scoring import choosing_splits
from ._optimized_views_config import ABLATIONS, PAPER_RESULTS, PARAMETERS, STRATEGIES, OptimizedViewsConfig
from ._optimized_views_networks import Latents, OptimizedViews, drawn_parameters, frozen, load_model, new_model, still
from ._optimized_views_report import ablation_tables, compare_views, draw_ablations, results_table
from ._optimized_views_scoring import (
    check_hold_out,
    check_presence,
    example_views,
    examples,
    hidden_labels,
    hold_out_scores,
    labelled_images,
    load_presence,
    parameter_counts,
    score,
    scored_split,
)

__all__ = [
    "ABLATIONS",
    "CONFIG",
    "PAPER_RESULTS",
    "STRATEGIES",
    "OptimizedViews",
    "OptimizedViewsConfig",
    "ablation_tables",
    "compare_views",
    "draw_ablations",
    "draw_figures",
    "evaluate",
    "load_model",
    "load_presence",
    "new_model",
    "results_table",
    "train",
]

CONFIG = OptimizedViewsConfig  # the name under which the command line finds it
CHOSEN = "parameters.jsonl"  # in the run folder: what M chooses, a line per epoch


def contrast(z_M: Tensor, z: Tensor, config: OptimizedViewsConfig) -> Tensor:  # [B, e] each -> []
    """I_NCE, Eq. 2: every view looks for its image among the others of the batch, also those of other processes."""
    z_M, z = whole_batch(z_M), whole_batch(z)
    loss = protokernels.cross_view_loss(
        z_M,
        z,
        temperature=config.temperature,
        denominator=config.denominator,
        symmetric=config.symmetric,
        normalize=config.normalize,
    )
    return loss * len(z) if config.reduction == "sum" else loss


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:  # [B], [B] int64 with -1 where the label is unknown -> []
    """L of Eq. 1: the mean over the labelled images of the batch, 0 where there are none."""
    logits, y = whole_batch(logits), whole_batch(y)
    known = (y >= 0).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, y.clamp(min=0).to(logits.dtype), reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)


def transformation_losses(
    model: OptimizedViews,
    x: Tensor,  # [B, C, H, W]
    y: Tensor,  # [B] int64, -1: unknown
    keys: Tensor,  # [B, e], g(f(X)), constant
    seed: Tensor,  # [B] int64
) -> dict[str, Tensor]:
    """First line of Eq. 1: what M minimises. The gradient runs through p, g, f and T into M; f, g and p are constants."""
    assert model.M is not None
    with frozen(*model.parts()):
        Lambda = model.M(x)
        return losses_of_M(model, model.embed(model.transform(x, Lambda, seed)), keys, y, Lambda)


def losses_of_M(
    model: OptimizedViews,
    view: Latents,  # of X_M
    keys: Tensor,  # [B, e]
    y: Tensor,  # [B] int64, -1: unknown
    Lambda: Tensor,  # [B, 7]
) -> dict[str, Tensor]:
    """alpha_0 and alpha_1 of Eq. 1, and what M chose."""
    config, (alpha_0, alpha_1, *_) = model.config, model.config.weights
    nce, bce = contrast(view.z, keys.detach(), config), cross_entropy(model.classify(view.h), y)
    sign = -1 if config.sign == "text" else 1
    means = {
        f"mean_{name.replace(' ', '_')}": value for name, value in zip(PARAMETERS, Lambda.detach().mean(0), strict=True)
    }
    return {"m_loss": sign * alpha_0 * nce + alpha_1 * bce, "m_contrast": nce, "m_cross_entropy": bce, **means}


def encoder_losses(
    model: OptimizedViews,
    view: Latents,  # of X_M
    plain: Latents | None,  # of X; None: the strategy does not need them
    y: Tensor,  # [B] int64, -1: unknown
) -> dict[str, Tensor]:
    """Second line of Eq. 1: what f, g and p minimise; or the loss of a strategy that has another."""
    config, (*_, alpha_2, alpha_3, alpha_4) = model.config, model.config.weights
    if plain is None:
        loss = cross_entropy(model.classify(view.h), y)
        return {"loss": loss, "view_cross_entropy": loss}
    if config.recipe.loss == "class pairs":
        z, labels = torch.cat([whole_batch(view.z), whole_batch(plain.z)]), whole_batch(y).repeat(2)
        loss = protokernels.supcon_loss(z, labels, temperature=config.supcon_temperature)
        return {"loss": loss, "contrast": loss}
    nce = contrast(view.z, plain.z, config)
    bce_M, bce = (cross_entropy(model.classify(h), y) for h in (view.h, plain.h))
    sign = 1 if config.sign == "text" else -1
    loss = sign * alpha_2 * nce + alpha_3 * bce_M + alpha_4 * bce
    return {"loss": loss, "contrast": nce, "view_cross_entropy": bce_M, "cross_entropy": bce}


class Draws(NamedTuple):
    """What is random in one step."""

    Lambda: Tensor  # [b, 7], for strategies without M
    enabled: Tensor | None  # [b, 6] bool, which transformations act; None: all
    seed_M: Tensor  # [b] int64, of the noise in M's step
    seed_f: Tensor  # [b] int64, of the noise in the step of f


def alternate(
    model: OptimizedViews,
    x: Tensor,  # [b, C, H, W]
    y: Tensor,  # [b] int64, -1: unknown
    draws: Draws,
    optimise: Callable[[Tensor], None],
    *,
    turn_of_M: bool = True,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Tensor]:
    """One batch of section 2.1: a step of M, then a step of f, g and p, each through ``optimise``. Returns the losses."""
    M, config, plain = model.M, model.config, None
    losses: dict[str, Tensor] = {}
    with autocast():
        if config.recipe.loss != "classes":
            plain = model.embed(x)  # g(f(X)) for both steps: f does not change in between
        if M is not None and plain is not None and turn_of_M and config.view == "new":
            losses = transformation_losses(model, x, y, plain.z, draws.seed_M)
    if losses:
        optimise(losses["m_loss"])  # M moves
    of_images_alone = config.statistics == "untransformed" and plain is not None
    with autocast():
        shared = M is not None and turn_of_M and config.view == "shared"
        with nullcontext() if shared else torch.no_grad(), nullcontext() if shared else frozen(M):
            Lambda, enabled = (draws.Lambda, draws.enabled) if M is None else (M(x), None)
            x_M = model.transform(x, Lambda, draws.seed_f, enabled)
        seen = x_M.detach().requires_grad_(shared)
        with still(*model.parts()) if of_images_alone else nullcontext():
            view = model.embed(seen)
        if shared and plain is not None:
            losses = losses_of_M(model, view, plain.z, y, Lambda)
    if shared:  # the gradient of the one pass through f goes into M first
        (gradient,) = torch.autograd.grad(losses["m_loss"], seen, retain_graph=True)
        share = (
            len(x) * process_count() / len(whole_batch(y))
        )  # optimise weighs with it; this gradient is of the whole batch already
        optimise((x_M * gradient).sum() / share)
    with autocast():
        losses = {**losses, **encoder_losses(model, view, plain, y)}
    optimise(losses["loss"])  # f, g and p move
    return losses


def fit(
    model: OptimizedViews,
    split: Split,
    labels: Tensor,  # [N] int64, -1: unknown
    rows: Tensor,  # [n] int64, the images that are trained on
    session: Session,
    after_epoch: Callable[[int], None],
) -> None:
    """The loop over batches."""
    config, labels = model.config, labels.to(session.device)
    for epoch in session.epochs():
        turns = range(-(epoch * session.steps_per_epoch) % config.m_every, session.steps_per_epoch, config.m_every)
        for step in session.steps():
            chosen = images_of(step, rows, session)
            x = to_tensor(split.images[chosen.numpy()], size=config.image_size).to(session.device)
            losses = alternate(
                model,
                x.contiguous(memory_format=torch.channels_last),
                labels[chosen.to(session.device)],
                drawn(step, session, config),
                partial(session.optimise, step=step, average=True),
                turn_of_M=step.index in turns,
                autocast=session.accelerator.autocast,
            )
            # What M's steps tell is a mean over those; the epoch's mean is over all steps, which have equal batches.
            share = session.steps_per_epoch / max(1, len(turns))
            of_M = {name: value * share for name, value in losses.items() if name.startswith(("m_", "mean_"))}
            session.record(step, **{**losses, **of_M})
        after_epoch(epoch)


def images_of(step: Step, rows: Tensor, session: Session) -> Tensor:  # [n] int64 -> [b] int64, of this process
    """The batch out of ``rows``: all images, or few that are gone through again and again, in a new order each time. What does not fill a
    batch waits for the next turn, so no image is twice in a batch, unless there are fewer than it holds."""
    if len(rows) == session.count:
        return rows[step.indices.cpu()]
    turn, batch = divmod(step.index, max(1, len(rows) // session.batch_size))
    generator = derived_generator(session.seed, "few", step.epoch, turn)
    order = torch.randperm(len(rows), generator=generator)
    places = (batch * session.batch_size + torch.arange(step.batch)) % len(rows)
    return rows[order[places]][step.rank :: step.processes]


def drawn(step: Step, session: Session, config: OptimizedViewsConfig) -> Draws:
    """The random numbers of this process's images: the same for an image however many processes share the batch; noise is new for
    every call of T."""
    generator = session.shared_generator(step, "parameters")
    Lambda, acting = drawn_parameters(step.batch, config.recipe.views == "half", generator)
    seed_M, seed_f = torch.randint(2**63 - 1, (2, step.batch), generator=session.shared_generator(step, "noise"))
    values = (
        None if value is None else value[step.rank :: step.processes] for value in (Lambda, acting, seed_M, seed_f)
    )
    return Draws(*(None if value is None else value.to(session.device) for value in values))  # type: ignore[arg-type]


class _OptimizedViews(Experiment[OptimizedViewsConfig]):
    """What the commands need to know of the optimised views beside the alternation."""

    drop_last = True

    def load(
        self, config: OptimizedViewsConfig, data_root: str | Path | None = None, *, download: bool = False
    ) -> ImageDataset:
        return load_presence(config.data, data_root, download=download)

    def check(self, config: OptimizedViewsConfig, dataset: ImageDataset) -> None:
        super().check(config, dataset)
        check_presence(dataset)
        check_hold_out(dataset, config)
        choosing_splits(dataset, config.selection)

    def new_model(self, config: OptimizedViewsConfig, dataset: ImageDataset) -> OptimizedViews:
        return new_model(config, dataset.channels)

    def folder_name(self, config: OptimizedViewsConfig) -> str:
        return f"{self.name}-{data_title(config.data)}-{config.strategy}-{config.preset_name}"

    def run(self, trial: Trial, config: OptimizedViewsConfig, dataset: ImageDataset) -> dict[str, Any]:
        """Every seed draws its own labels."""
        seed_everything(trial.seed)
        model = self.new_model(config, dataset)
        split, (name, test) = self.training_split(dataset, config), scored_split(dataset, config)
        labelled = labelled_images(split, config, trial.seed)
        rows = torch.arange(len(split)) if config.recipe.loss == "pairs" else torch.as_tensor(labelled)
        untrained = hold_out_scores(model.f, test, config)
        plan = Plan(len(split), config.epochs, config.batch_size, trial.seed, drop_last=True)
        session = trial.session(model, *self.optimizer(model, config), plan)

        def after_epoch(epoch: int) -> None:
            if epoch + 1 in _evaluated_epochs(config):
                scores = hold_out_scores(model.f, test, config)
                session.note(**{key: scores[key] for key in ("auc", "auc_std") if key in scores})
            if model.M is not None and trial.is_main_process:
                line = {"epoch": epoch + 1, "counts": parameter_counts(model, test)}
                before = [each for each in read_json_lines(trial.run.path / CHOSEN) if each["epoch"] <= epoch]
                write_json_lines(trial.run.path / CHOSEN, [*before, line])

        fit(model, split, hidden_labels(split, labelled), rows, session, after_epoch)
        if not trial.is_main_process:
            return {}
        results = score(model, dataset, config, trial.seed)
        results["splits"][name]["untrained"] = untrained
        results["images"]["labelled"] = len(labelled)
        return results

    def optimizer(self, model: OptimizedViews, config: OptimizedViewsConfig) -> tuple[Optimizer, LRScheduler]:
        groups = [{"params": [p for part in model.parts() for p in part.parameters()], "lr": config.learning_rate}]
        if model.M is not None:
            groups.append({"params": list(model.M.parameters()), "lr": config.rate_of_m})
        optimizer = torch.optim.Adam(groups)
        return optimizer, LambdaLR(optimizer, lambda _epoch: 1.0)

    def load_model(self, run: RunFolder, config: OptimizedViewsConfig, dataset: ImageDataset) -> OptimizedViews:
        return load_model(run, dataset.channels)[0]

    def score_again(self, run: RunFolder, config: OptimizedViewsConfig, dataset: ImageDataset) -> dict[str, Any]:
        """What was known before training, of the untrained f and about labels, stays in the results."""
        model = self.load_model(run, config, dataset)
        results, before = score(model, dataset, config, run.config()["seed"]), run.results() or {}
        name, _ = scored_split(dataset, config)
        if untrained := before.get("splits", {}).get(name, {}).get("untrained"):
            results["splits"][name]["untrained"] = untrained
        return {**results, "images": {**before.get("images", {}), **results["images"]}}

    def embed(self, model: OptimizedViews, images: Tensor) -> tuple[Tensor, None]:
        return model.embed(images).h.float(), None

    def draw(self, folder: Path, run: RunFolder, config: OptimizedViewsConfig, dataset: ImageDataset) -> list[Path]:
        from ..figures.optimized_views import draw  # matplotlib is not needed for training

        model = self.load_model(run, config, dataset)
        name, split = scored_split(dataset, config)
        indices, x, masks = examples(split, config)
        generator = derived_generator(run.config()["seed"], "figures")
        view, again = (example_views(model.cpu(), x, masks, generator) for _ in range(2))
        captions = [dataset.class_names[label] for label in split.labels[indices]]
        rows = {"X": (x, masks), "X_M": view, "again": again}
        return draw(folder, run, name, config, rows, captions, read_json_lines(run.path / CHOSEN), model)


def _evaluated_epochs(config: OptimizedViewsConfig) -> set[int]:
    number = min(config.evaluations, config.epochs)
    return {round(config.epochs * (index + 1) / number) for index in range(number)}


EXPERIMENT = _OptimizedViews("optimized_views", OptimizedViewsConfig)
train, evaluate, draw_figures = EXPERIMENT.train, EXPERIMENT.evaluate, EXPERIMENT.draw_figures
