# SPDX-License-Identifier: MIT
"""For every public function the calls that hypothesis draws of it; see ``fuzz``."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import protokernels
from python_tests.fuzz import Call, Draws

FORMS = ("supcon", "in", "paper", "negout")
PADDINGS = ("zeros", "border", "reflection")


def drawn(build: Any) -> st.SearchStrategy[Call]:
    """Two calls of three as drawn, the third with one argument replaced by something wrong."""

    @st.composite
    def strategy(draw: st.DrawFn) -> Call:
        draws = Draws(draw)
        call: Call = build(draws)
        call.moderate = call.moderate and draws.moderate
        return draws.wrong(call) if draws.one(False, False, True) else call

    return strategy()


def meant(build: Any) -> st.SearchStrategy[Call]:
    """Calls as drawn."""

    @st.composite
    def strategy(draw: st.DrawFn) -> Call:
        return build(Draws(draw))  # type: ignore[no-any-return]

    return strategy()


def temperature(d: Draws) -> Any:
    """A number or a tensor; the kernel divides by it."""
    value = d.one(0.5, 1.0, 0.1, 7, 1e-3)
    return d.one(value, torch.tensor(float(value)), torch.tensor([float(value)], dtype=torch.float64))


# ------------------------------------------------------------------------------------------------------------------ prototypes


def pair(d: Draws) -> dict[str, Any]:
    B, K, D = d.size(), d.size(1, 2, 3, 17, 40), d.size(1, 2, 7, 33)
    return {"z": d.tensor(B, D), "prototypes": d.tensor(K, D), "similarity": d.one("cosine", "dot")}


def soft_assign(d: Draws) -> Call:
    arguments = pair(d) | {
        "temperature": temperature(d),
        "return_labels": d.one(False, True),
        "return_entropy": d.one(False, True),
    }
    scale = 1 / float(arguments["temperature"])
    return Call(protokernels.soft_assign, ("soft_assign",), arguments, tolerance=100 * (1 + scale),
                gradient_tolerance=200 * (1 + scale) ** 2, overflow=arguments["similarity"] == "dot")  # fmt: skip


def prototype_step(d: Draws) -> Call:
    arguments = pair(d) | {
        "temperature": temperature(d), "new_weight": d.one(0.0, 0.95, 1, 0.5), "sample": d.one(False, True),
        "skip_nonfinite": d.one(False, True), "return_entropy": d.one(False, True), "generator": d.one(None, torch.Generator()),
    }  # fmt: skip
    return Call(protokernels.prototype_step, ("prototype_step",), arguments, overflow=arguments["similarity"] == "dot")


def update(d: Draws, in_place: bool) -> Call:
    arguments = pair(d)
    del arguments["similarity"]
    B, K = len(arguments["z"]), len(arguments["prototypes"])
    labels = d.integers(-1, K, B, dtype=d.one(torch.int64, torch.int32, torch.int16, torch.int8))
    chances = d.tensor(B, K, fills=("normal",), gradient=False).abs()
    sample = d.one(False, True)
    arguments |= {
        "labels_or_assignments": chances if sample else d.one(labels, chances), "new_weight": d.one(0.0, 0.95, 1), "sample": sample,
        "skip_nonfinite": d.one(False, True), "revive": d.one(None, d.mask(K)), "generator": d.one(None, torch.Generator()),
    }  # fmt: skip
    function = protokernels.update_prototypes_ if in_place else protokernels.update_prototypes
    if in_place:
        x = arguments["prototypes"]
        arguments["prototypes"] = x.detach().clone() if 0 in x.stride() or d.one(False, True) else x.detach()
    tolerance = 0 if sample or arguments["revive"] is not None else 4
    return Call(
        function, ("update_prototypes",), arguments, frozenset({"prototypes"} if in_place else ()), tolerance=tolerance
    )


# -------------------------------------------------------------------------------------------------------------------- sinkhorn


def masses(d: Draws, B: int, N: int, M: int) -> dict[str, Any]:
    """Problems of which all is well: equal totals, everybody with a partner."""
    arguments: dict[str, Any] = {
        "epsilon": d.one(0.05, 0.5, 1, torch.tensor(0.3), torch.full((B,), 0.2, dtype=torch.float64).requires_grad_())
    }
    if d.one(False, True):
        arguments |= {"row_mask": d.mask(*d.one((B, N), (N,))), "column_mask": d.mask(*d.one((B, M), (M,)))}
    elif d.one(False, True):
        a, b = torch.rand(B, N, generator=d.generator).double(), torch.rand(B, M, generator=d.generator).double()
        arguments |= {"a": (a / a.sum(1, keepdim=True)).requires_grad_(), "b": b / b.sum(1, keepdim=True)}
    return arguments


def options(d: Draws) -> dict[str, Any]:
    return {
        "num_iters": d.one(1, 2, 7, 30), "tol": d.one(0.0, 0, 1e-2), "annealing": d.one(None, None, 0.5, 0.1),
        "marginal_penalty": d.one(None, None, None, 1.0, (0.5, None)),
    }  # fmt: skip


def sinkhorn(d: Draws) -> Call:
    B, N, M = d.size(1, 2, 3, 0), d.size(1, 2, 5, 17, 33), d.size(1, 2, 7, 16, 40)
    arguments = {"cost": d.tensor(B, N, M)} | masses(d, B, N, M) | options(d)
    arguments["gradient"] = d.one(
        "unrolled", "envelope", *(("implicit",) if arguments["marginal_penalty"] is None else ())
    )
    if d.one(False, True):
        arguments["init"] = d.tensor(B, M, gradient=False)
    exact = arguments["tol"] == 0 and arguments["gradient"] != "implicit"
    return Call(protokernels.sinkhorn, ("sinkhorn",), arguments, tolerance=2e4 * exact, kept=("init",), overflow=d.huge)


def features(d: Draws) -> dict[str, Any]:
    B, N, M, D = d.size(1, 2, 3, 0), d.size(1, 2, 5, 17, 33), d.size(1, 2, 7, 16, 40), d.size(1, 2, 9, 33)
    return {"x": d.tensor(B, N, D), "y": d.tensor(B, M, D), "cost": d.one("cosine", "sqeuclidean")} | masses(d, B, N, M)


def sinkhorn_features(d: Draws) -> Call:
    arguments = features(d) | options(d) | {"gradient": "envelope", "precision": d.one("highest", "high", "medium")}
    if d.one(False, False, True):
        arguments["init"] = d.tensor(*arguments["y"].shape[:2], gradient=False)
    exact = arguments["tol"] == 0 and arguments["cost"] == "cosine"
    return Call(protokernels.sinkhorn_features, ("sinkhorn_features",), arguments, tolerance=2e4 * exact, kept=("init",),
                overflow=arguments["cost"] != "cosine" or d.huge)  # fmt: skip


def sinkhorn_divergence(d: Draws) -> Call:
    arguments = features(d) | {"num_iters": d.one(1, 7), "tol": d.one(0.0, 1e-2), "precision": d.one("highest", "high")}
    exact = arguments["tol"] == 0 and arguments["cost"] == "cosine"
    return Call(protokernels.sinkhorn_divergence, ("sinkhorn_divergence",), arguments, tolerance=2e4 * exact,
                overflow=arguments["cost"] != "cosine")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- contrastive


def contrast(d: Draws) -> dict[str, Any]:
    return {
        "temperature": d.one(0.1, 0.5, 1, 0.01),
        "normalize": d.one(True, True, False),
        "precision": d.one("highest", "high", "medium"),
    }


def scaled(function: Any, name: str, arguments: dict[str, Any], **more: Any) -> Call:
    scale = (1 + 1 / arguments["temperature"]) * (1 if arguments["normalize"] else 60)
    return Call(
        function,
        (name,),
        arguments,
        tolerance=40 * scale,
        gradient_tolerance=40 * scale**2,
        overflow=not arguments["normalize"],
        **more,
    )


def local_contrastive_loss(d: Draws) -> Call:
    N, C = d.size(2, 1, 4, 0), d.size(1, 3, 8)
    sides = [d.size(1, 2, 3, 5, 8, 0) for _ in range(d.one(2, 2, 3))]
    labels = d.integers(0, 4, N, *sides, dtype=d.one(torch.int64, torch.uint8, torch.int32))
    edges = d.one(
        {},
        {"block_size": d.one(1, 2, 4, 100, 2**31, 2**63 - 1, [2] * len(sides))},
        {"stride": d.one(1, 2, 3, 100, 2**63 - 1)},
    )
    arguments = contrast(d) | edges | {
        "features": d.tensor(N, C, *sides), "labels": labels if N % 2 else d.one(labels, None), "form": d.one(*FORMS),
        "reduction": d.one("group", "anchor", "image", "none"), "background": d.one(0, None, 7), "drop_remainder": d.one(False, True),
    }  # fmt: skip
    if arguments["labels"] is not None:
        arguments |= {"scope": d.one("group", "image"), "ignore_index": d.one(None, 1, -100)}
    return scaled(protokernels.local_contrastive_loss, "local_contrastive_loss", arguments)


def supcon_loss(d: Draws) -> Call:
    N, D = d.size(), d.size(1, 2, 9, 33)
    arguments = contrast(d) | {
        "embeddings": d.tensor(N, D), "labels": d.integers(0, 4, N), "form": d.one(*FORMS), "reduction": d.one("mean", "none"),
        "ignore_index": d.one(None, 1),
    }  # fmt: skip
    return scaled(protokernels.supcon_loss, "supcon_loss", arguments)


def views(d: Draws, function: Any, name: str) -> Call:
    N, D = d.size(), d.size(1, 2, 9, 33)
    arguments = contrast(d) | {
        "first": d.tensor(N, D),
        "second": d.tensor(N, D),
        "denominator": d.one("all", "negatives"),
    }
    if name == "cross_view_loss":
        arguments["symmetric"] = d.one(False, True)
    return scaled(function, name, arguments)


# ------------------------------------------------------------------------------------------------------------------------ warp


def images(d: Draws, volumes: bool = True) -> Tensor:
    sides = [d.size(1, 2, 3, 5, 8, 17, 0) for _ in range(d.one(2, 2, 3) if volumes else 2)]
    return d.tensor(d.size(1, 2, 3, 0), d.size(1, 2, 3), *sides)


def each(d: Draws, x: Tensor, *values: float) -> Any:
    """A parameter as a number, one for all or one for each sample."""
    value = d.one(*values)
    many = torch.full((len(x),), float(value), dtype=d.one(torch.float32, torch.float64))
    return d.one(value, torch.tensor(float(value)), many, many.clone().requires_grad_())


def gaussian_blur(d: Draws) -> Call:
    x = images(d)
    arguments = {"images": x, "sigma": each(d, x, 0, 0.5, 1.5, 1e-4, -2, 1e30, 1e-30, 40.0), "radius": d.one(0, 1, 6, 64),
                 "padding": d.one("reflect", "replicate", "zeros")}  # fmt: skip
    return Call(protokernels.gaussian_blur, ("gaussian_blur",), arguments, tolerance=200)


def gaussian_noise(d: Draws) -> Call:
    x = images(d)
    limits = (-(2**63), 2**63 - 1)
    arguments = {
        "images": x,
        "std": each(d, x, 0, 1, -0.5, 1e-30),
        "seed": torch.randint(*limits, (len(x),), generator=d.generator),
    }
    drawn = seeds_of_a_generator(d, arguments)
    return Call(protokernels.gaussian_noise, ("gaussian_noise",), arguments, tolerance=0 if drawn else 200)


def seeds_of_a_generator(d: Draws, arguments: dict[str, Any]) -> bool:
    """Now and then a generator in the place of ``seed``: no two calls give the same then."""
    drawn = bool(d.one(False, False, True))
    if drawn:
        del arguments["seed"]
        arguments["generator"] = torch.Generator()
    return drawn


def soft_crop(d: Draws) -> Call:
    x = images(d)
    axes = x.dim() - 2
    arguments = {"images": x, "center": d.one([0.5] * axes, (0, 1, 2)[:axes], d.tensor(len(x), axes), d.tensor(axes)),
                 "size": d.one(0.25, 1, 0, 1e30), "sharpness": d.one(1, 0.1, 1e30, 1e-30)}  # fmt: skip
    moderate = arguments["size"] < 1e3 and 1e-3 < arguments["sharpness"] < 1e3
    return Call(protokernels.soft_crop, ("soft_crop",), arguments, tolerance=400 * moderate)


def blend_flip(d: Draws) -> Call:
    x = images(d)
    arguments = {
        "images": x,
        "weight": each(d, x, 0, 1, 0.25, -3.0, 1e-30),
        "dim": d.one("horizontal", "vertical", *("depth",) * (x.dim() == 5)),
    }
    return Call(protokernels.blend_flip, ("blend_flip",), arguments, tolerance=40)


def rotate(d: Draws) -> Call:
    x = images(d)
    arguments = {"images": x, "angle": each(d, x, 0, 1, 0.3, -3.0, 1e30, 1e-30, 1.5707963), "padding_mode": d.one(*PADDINGS),
                 "axis": d.one("depth", *("vertical", "horizontal") * (x.dim() == 5))}  # fmt: skip
    moderate = float(torch.as_tensor(arguments["angle"]).detach().max() if len(x) else 0) < 1e3
    return Call(protokernels.rotate, ("rotate",), arguments, tolerance=2e3 * moderate)


def affine_warp(d: Draws) -> Call:
    x = images(d)
    axes = x.dim() - 2
    size = None if 0 in x.shape[2:] else d.one(None, [3] * axes, (1,) * axes, [0] * axes)
    arguments = {
        "images": x,
        "matrix": d.tensor(len(x), axes, axes + 1),
        "size": size,
        "padding_mode": d.one(*PADDINGS),
    }
    half = arguments["matrix"].dtype in (torch.float16, torch.bfloat16)
    return Call(protokernels.affine_warp, ("affine_warp",), arguments, tolerance=0 if half else 4e3)


def transform(d: Draws) -> Call:
    x = images(d, volumes=False)
    stages = ("blur", "noise", "crop", "hflip", "vflip", "rotate")
    arguments = {
        "images": x, "params": d.tensor(len(x), 7), "order": d.draw(st.permutations(stages))[: d.size(0, 1, 3, 6)],
        "enabled": d.one(None, d.mask(len(x), 6), ["crop", "noise"], ()), "sigma_max": d.one(2.0, 0, 1), "noise_std": d.one(0.1, 0),
        "crop_size": d.one(0.25, 1), "sharpness": d.one(1, 0.3), "radius": d.one(6, 0, 1, 40), "blur_padding": d.one("reflect", "zeros"),
        "seed": torch.arange(len(x)),
    }  # fmt: skip
    drawn = seeds_of_a_generator(d, arguments)
    half = arguments["params"].dtype in (torch.float16, torch.bfloat16)  # an angle of that many turns
    return Call(protokernels.transform, ("transform",), arguments, tolerance=0 if drawn or half else 4e3)


# --------------------------------------------------------------------------------------------------------------------- nearest


def nearest(d: Draws) -> Call:
    N, M, D = d.size(), d.size(1, 2, 5, 40, 200), d.size(1, 2, 7, 33, 0)
    arguments = {
        "queries": d.tensor(N, D),
        "bank": d.tensor(M, D),
        "k": min(M, d.one(1, 2, 5, 100)),
        "metric": d.one("sqeuclidean", "cosine"),
    }
    return Call(
        protokernels.nearest, ("nearest",), arguments, tolerance=8, overflow=arguments["metric"] == "sqeuclidean"
    )


CALLS = {
    "soft_assign": soft_assign,
    "prototype_step": prototype_step,
    "update_prototypes": lambda d: update(d, False),
    "update_prototypes_": lambda d: update(d, True),
    "sinkhorn": sinkhorn,
    "sinkhorn_features": sinkhorn_features,
    "sinkhorn_divergence": sinkhorn_divergence,
    "local_contrastive_loss": local_contrastive_loss,
    "supcon_loss": supcon_loss,
    "nt_xent_loss": lambda d: views(d, protokernels.nt_xent_loss, "nt_xent_loss"),
    "cross_view_loss": lambda d: views(d, protokernels.cross_view_loss, "cross_view_loss"),
    "gaussian_blur": gaussian_blur,
    "gaussian_noise": gaussian_noise,
    "soft_crop": soft_crop,
    "blend_flip": blend_flip,
    "rotate": rotate,
    "affine_warp": affine_warp,
    "transform": transform,
    "nearest": nearest,
}
