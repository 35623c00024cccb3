# SPDX-License-Identifier: MIT
"""The calls of ``fuzz_calls``, for modules (made and called once) and for ``protokernels.cluster``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from protokernels import cluster, nn
from python_tests.fuzz import FLOATS, Call, Draws
from python_tests.fuzz_calls import FORMS, PADDINGS, contrast

OPS_OF = {
    "Prototypes": ("soft_assign", "prototype_step"),
    "SinkhornLoss": ("sinkhorn",),
    "SinkhornAssignment": ("sinkhorn",),
    "LocalContrastiveLoss": ("local_contrastive_loss",),
    "SupConLoss": ("supcon_loss",),
    "NTXentLoss": ("nt_xent_loss",),
    "CrossViewLoss": ("cross_view_loss",),
    "DifferentiableTransform": ("transform",),
    "RandomViews": ("ViewStrength", "affine_warp"),
    "choose_n_clusters": ("find_elbow", "KMeans"),
}
"""Whose names an error may give instead: those of the functions that a module is a thin class of."""


def call(name: str, run: Any, arguments: dict[str, Any], **more: Any) -> Call:
    return Call(run, (name, *OPS_OF.get(name, ())), arguments, **more)


def prototypes(d: Draws) -> Call:
    K, D = d.size(1, 2, 5), d.size(1, 3, 9)

    def run(
        num_prototypes: int, dim: int, z: Tensor, similarity: Any = "cosine", temperature: Any = 0.5,
        new_weight: Any = 0.95, sample: Any = False, skip_nonfinite: Any = False, revive_after: Any = None,
        generator: Any = None, training: Any = True,
    ) -> Any:  # fmt: skip
        module = nn.Prototypes(num_prototypes, dim, similarity=similarity, temperature=temperature, new_weight=new_weight, sample=sample,
                               skip_nonfinite=skip_nonfinite, revive_after=revive_after, generator=generator)  # fmt: skip
        if not training:
            module.initialize(z)
        found = module.train(bool(training))(z)
        assert bool(module.initialized)
        return found, module.prototypes

    arguments = {
        "num_prototypes": K, "dim": D, "z": d.tensor(K + d.size(0, 1, 7), D), "similarity": d.one("cosine", "dot"),
        "temperature": d.one(0.5, nn.LinearTemperature()), "new_weight": d.one(0, 0.95), "sample": d.one(False, True),
        "skip_nonfinite": d.one(False, True), "revive_after": d.one(None, 1), "training": d.one(False, True),
        "generator": d.one(None, torch.Generator()),
    }  # fmt: skip
    return call("Prototypes", run, arguments, overflow=arguments["similarity"] == "dot", kept=("training",))


def linear_temperature(d: Draws) -> Call:
    def run(start: Any, end: Any, until: Any, progress: Any) -> Any:
        return torch.tensor(nn.LinearTemperature(start, end, until)(progress))

    return call(
        "LinearTemperature",
        run,
        {"start": 1.0, "end": 0.01, "until": 0.5, "progress": d.one(0, 0.3, 2.0)},
        kept=("progress",),
    )


def sinkhorn_loss(d: Draws) -> Call:
    B, N, M, D = d.size(1, 2, 0), d.size(1, 5, 17), d.size(1, 7), d.size(1, 9)

    def run(
        x: Any, y: Any, epsilon: Any = 0.05, num_iters: Any = 5, cost: Any = "cosine", value: Any = "transport", gradient: Any = None,
        tol: Any = 0.0, marginal_penalty: Any = None, annealing: Any = None, reduction: Any = "mean",
    ) -> Tensor:  # fmt: skip
        return nn.SinkhornLoss(epsilon, num_iters, cost=cost, value=value, gradient=gradient, tol=tol, marginal_penalty=marginal_penalty,
                               annealing=annealing, reduction=reduction)(x, y)  # fmt: skip

    cost, value = d.one("cosine", "sqeuclidean"), d.one("transport", "entropic", "divergence")
    arguments = {"x": d.tensor(B, N, D), "y": d.tensor(B, M, D), "cost": cost, "value": value, "epsilon": d.one(0.05, 1),
                 "reduction": d.one("mean", "sum", "none"), "num_iters": 5, "tol": d.one(0.0, 1e-2)}  # fmt: skip
    arguments["gradient"] = d.one(None, "unrolled", "implicit") if value == "transport" else None
    if value != "divergence":
        arguments["annealing"] = d.one(None, 0.5)
        arguments["marginal_penalty"] = d.one(None, 1.0) if arguments["gradient"] != "implicit" else None
    exact = cost == "cosine" and arguments["tol"] == 0 and arguments["gradient"] != "implicit"
    return call("SinkhornLoss", run, arguments, overflow=cost != "cosine", tolerance=2e4 * exact)


def sinkhorn_assignment(d: Draws) -> Call:
    def run(scores: Any, epsilon: Any = 0.05, num_iters: Any = 3) -> Tensor:
        return nn.SinkhornAssignment(epsilon, num_iters)(scores)

    return call(
        "SinkhornAssignment",
        run,
        {"scores": d.tensor(d.size(), d.size(1, 3, 30)), "epsilon": d.one(0.05, 1), "num_iters": d.one(1, 3)},
        tolerance=2e5,
    )


def contrastive(d: Draws, name: str) -> Call:
    module = getattr(nn, name)
    N, D = d.size(), d.size(1, 2, 9)
    if name == "LocalContrastiveLoss":

        def run(
            features: Any, labels: Any, temperature: Any = 0.1, block_size: Any = None, stride: Any = None, form: Any = "supcon",
            scope: Any = "group", reduction: Any = "group", background: Any = 0, ignore_index: Any = None, normalize: Any = True,
            drop_remainder: Any = False, precision: Any = "highest",
        ) -> Tensor:  # fmt: skip
            return module(temperature, block_size=block_size, stride=stride, form=form, scope=scope, reduction=reduction,
                          background=background, ignore_index=ignore_index, normalize=normalize, drop_remainder=drop_remainder,
                          precision=precision)(features, labels)  # fmt: skip

        features = d.tensor(2, 3, d.size(1, 5, 8), d.size(1, 5, 8))
        edges = d.one({}, {"block_size": d.one(2, (3, 4))}, {"stride": d.one(2, (1, 3))})
        arguments = contrast(d) | edges | {
            "features": features, "labels": d.integers(0, 3, 2, *features.shape[2:]), "form": d.one(*FORMS),
            "scope": d.one("group", "image"), "reduction": d.one("group", "anchor", "image", "none"), "background": d.one(0, None),
            "ignore_index": d.one(None, 1),
            "drop_remainder": d.one(False, True),
        }  # fmt: skip
        return call(name, run, arguments, overflow=not arguments["normalize"])
    if name == "SupConLoss":

        def run(
            embeddings: Any, labels: Any, temperature: Any = 0.1, form: Any = "supcon", reduction: Any = "mean", ignore_index: Any = None,
            normalize: Any = True, gather: Any = False, precision: Any = "highest",
        ) -> Tensor:  # fmt: skip
            return module(temperature, form=form, reduction=reduction, ignore_index=ignore_index, normalize=normalize, gather=gather,
                          precision=precision)(embeddings, labels)  # fmt: skip

        arguments = contrast(d) | {
            "embeddings": d.tensor(N, D), "labels": d.integers(0, 3, N), "form": d.one(*FORMS), "reduction": d.one("mean", "none"),
            "ignore_index": d.one(None, 1), "gather": False,
        }  # fmt: skip
        return call(name, run, arguments, overflow=not arguments["normalize"])

    option = {"NTXentLoss": "gather", "CrossViewLoss": "symmetric"}[name]

    def run(
        first: Any, second: Any, temperature: Any = 0.5, denominator: Any = "all", normalize: Any = True, precision: Any = "highest",
        last: Any = False,
    ) -> Tensor:  # fmt: skip
        return module(temperature, denominator=denominator, normalize=normalize, precision=precision, **{option: last})(
            first, second
        )

    arguments = contrast(d) | {
        "first": d.tensor(N, D),
        "second": d.tensor(N, D),
        "denominator": d.one("all", "negatives"),
    }
    arguments["last"] = d.one(False, option == "symmetric")
    return call(name, run, arguments, overflow=not arguments["normalize"])


def differentiable_transform(d: Draws) -> Call:
    def run(
        images: Any, params: Any, order: Any = ("blur", "rotate"), sigma_max: Any = 2.0, noise_std: Any = 0.1, crop_size: Any = 0.25,
        sharpness: Any = 1.0, radius: Any = 6, blur_padding: Any = "reflect", enabled: Any = None, generator: Any = None, seed: Any = None,
    ) -> Tensor:  # fmt: skip
        module = nn.DifferentiableTransform(order=order, sigma_max=sigma_max, noise_std=noise_std, crop_size=crop_size, sharpness=sharpness,
                                            radius=radius, blur_padding=blur_padding)  # fmt: skip
        return module(images, params, enabled=enabled, generator=generator, seed=seed)

    B = d.size(1, 2, 0)
    arguments = {
        "images": d.tensor(B, 1, d.size(1, 5, 8, 0), 6), "params": d.tensor(B, 7),
        "order": d.one(("blur", "rotate"), ["noise", "crop"], ()), "sigma_max": d.one(2.0, 0), "noise_std": d.one(0.1, 0),
        "crop_size": d.one(0.25, 1), "sharpness": d.one(1.0, 3), "radius": d.one(0, 6),
        "blur_padding": d.one("reflect", "replicate", "zeros"), "enabled": d.one(None, d.mask(B, 6)),
    }  # fmt: skip
    arguments |= d.one({"seed": torch.arange(B)}, {"generator": torch.Generator()})
    return call("DifferentiableTransform", run, arguments)


STRENGTHS = ("crop", "hflip", "vflip", "rotate", "jitter", "offset", "gamma", "blur", "noise", "solarise")


def random_views(d: Draws) -> Call:
    def run(
        images: Any, size: Any, limits: Any = (0.0, 1.0), padding_mode: Any = "border", antialias: Any = True, generator: Any = None,
        chance: Any = 0.5, crop_scale: Any = (0.2, 1.0), crop_ratio: Any = (0.75, 1.3), rotation: Any = (-1.0, 1.0), brightness: Any = 0.4,
        contrast: Any = 0.4, offset_normal: Any = (0.0, 1.0), gamma_range: Any = (0.5, 2.0), blur_sigma: Any = (0.1, 2.0),
        noise_std: Any = (0.0, 0.1), blur_radius: Any = None,
    ) -> Any:  # fmt: skip
        ranges = dict(crop_scale=crop_scale, crop_ratio=crop_ratio, rotation=rotation, brightness=brightness, contrast=contrast,
                      offset_normal=offset_normal, gamma_range=gamma_range, blur_sigma=blur_sigma, noise_std=noise_std,
                      blur_radius=blur_radius)  # fmt: skip
        chances = dict.fromkeys(STRENGTHS, chance) | ({"solarise": 0.0} if limits is None else {})  # which needs limits
        strength = nn.ViewStrength(**chances, **ranges)
        return nn.RandomViews(size, strength, limits=limits, padding_mode=padding_mode, antialias=antialias)(
            images, generator=generator
        )

    sides = [d.size(1, 5, 8, 33, 0) for _ in range(2)]
    x = d.tensor(d.size(1, 2, 0), d.size(1, 3), *sides, dtype=d.one(*FLOATS))
    if d.one(False, False, True):
        x = (torch.rand(x.shape, generator=d.generator) * 255).to(torch.uint8)
    d.moderate &= 0 not in sides
    arguments = {
        "images": x, "size": d.one(7, (4, 9)), "padding_mode": d.one(*PADDINGS), "chance": d.one(0, 0.5, 1),
        "blur_radius": d.one(None, 0, 2), "limits": d.one((0.0, 1.0), None), "antialias": d.one(False, True),
        "generator": d.one(None, torch.Generator()),
        "crop_scale": d.one((0.2, 1.0), (1, 4)), "crop_ratio": d.one((0.75, 1.3), (0.1, 10)), "rotation": d.one((-1.0, 1.0), (-10, 10)),
        "brightness": d.one(0.4, 0, 1), "contrast": d.one(0.4, 0, 1), "offset_normal": d.one((0.0, 1.0), (-5, 0)),
        "gamma_range": d.one((0.5, 2.0), (0.1, 10)), "blur_sigma": d.one((0.1, 2.0), (0, 5)), "noise_std": d.one((0.0, 0.1), (1, 1)),
    }  # fmt: skip
    return call("RandomViews", run, arguments, overflow=not d.moderate)


def variance_covariance_loss(d: Draws) -> Call:
    arguments = {"embeddings": d.tensor(d.size(), d.size(1, 2, 9, 33)), "branch": d.one("auto", "gram", "covariance")}
    return call("variance_covariance_loss", nn.variance_covariance_loss, arguments, tolerance=100, overflow=True)


def kmeans(d: Draws) -> Call:
    K, D = d.size(1, 2, 5), d.size(1, 3, 9)

    def run(
        x: Any,
        n_clusters: Any,
        y: Any,
        init: Any = "k-means++",
        n_init: Any = 2,
        max_iter: Any = 5,
        tol: Any = 1e-4,
        random_state: Any = 0,
    ) -> Any:
        model = cluster.KMeans(
            n_clusters, init=init, n_init=n_init, max_iter=max_iter, tol=tol, random_state=random_state
        ).fit(x)
        assert not model.labels_.numel() or 0 <= int(model.labels_.min()) <= int(model.labels_.max()) < n_clusters
        return model.cluster_centers_, torch.tensor(model.inertia_), model.predict(y), model.transform(y)

    arguments = {
        "x": d.tensor(K + d.size(0, 1, 30), D, gradient=False),
        "n_clusters": K,
        "y": d.tensor(d.size(), D, gradient=False),
        "n_init": d.one(1, 2),
        "max_iter": d.one(1, 5),
        "tol": d.one(1e-4, 0),
        "random_state": d.one(0, 7),
    }
    arguments["init"] = d.one("k-means++", arguments["x"][:K].clone())
    return call("KMeans", run, arguments, kept=("init",))


def find_elbow(d: Draws) -> Call:
    def run(n_clusters: Any, inertias: Any, sensitivity: Any = 1.0) -> Any:
        found = cluster.find_elbow(n_clusters, inertias, sensitivity=sensitivity)
        assert found is None or found in n_clusters

    return call(
        "find_elbow",
        run,
        {
            "n_clusters": [2, 3, 4, 6],
            "inertias": [float(v) for v in torch.rand(4, generator=d.generator)],
            "sensitivity": d.one(1.0, 0, 3),
        },
    )


def choose_n_clusters(d: Draws) -> Call:
    def run(x: Any, candidates: Any, fallback: Any = None, n_init: Any = 1) -> Any:
        return cluster.choose_n_clusters(x, candidates, fallback=fallback, n_init=n_init).model.cluster_centers_

    return call(
        "choose_n_clusters",
        run,
        {
            "x": d.tensor(12, 2, gradient=False),
            "candidates": d.one([1, 2, 3], (2, 3, 4, 5), range(2, 6)),
            "fallback": d.one(None, 2, 3),
            "n_init": d.one(1, 2),
        },
    )


CALLS = {
    "Prototypes": prototypes,
    "LinearTemperature": linear_temperature,
    "SinkhornLoss": sinkhorn_loss,
    "SinkhornAssignment": sinkhorn_assignment,
    **{
        name: lambda d, name=name: contrastive(d, name)
        for name in ("LocalContrastiveLoss", "SupConLoss", "NTXentLoss", "CrossViewLoss")
    },
    "DifferentiableTransform": differentiable_transform,
    "RandomViews": random_views,
    "variance_covariance_loss": variance_covariance_loss,
    "KMeans": kmeans,
    "find_elbow": find_elbow,
    "choose_n_clusters": choose_n_clusters,
}
