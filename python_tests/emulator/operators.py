# SPDX-License-Identifier: MIT
"""The operators on CPU tensors, by launches of emulated CUDA kernels: what `as_cuda.py` registers.

What stands between an operator and its launch in `csrc/ops/*.cpp` is written here once more, without the checks. Results have the
shapes of the operators' fake kernels, and start as NaN.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protokernels.ops import _prototypes_autograd, nearest
from protokernels.reference import nearest as nearest_reference

from .build import load

KINDS = {torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16"}
CONTRASTIVE_BOUND = 80.0  # of csrc/ops/contrastive.h

OPERATORS: dict[str, Callable[..., Any]] = {}
LAUNCHES: Counter[str] = Counter()
"""How often each launch function ran, by names such as `warp_forward`."""
device = SimpleNamespace(seed=1, architecture="sm_80")


def on_cuda(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The operator of this name."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        OPERATORS[name] = function
        return function

    return decorate


def launch(op: str, name: str, types: tuple[Tensor, ...], *arguments: Any) -> None:
    """Runs `name` of the op's emulator module, as compiled for the types of these tensors."""
    LAUNCHES[f"{op}_{name}"] += 1
    emulator = load(op)
    emulator.configure(seed=device.seed, architecture=device.architecture)
    function = getattr(emulator, "_".join([name, *(KINDS[x.dtype] for x in types)]))
    function(*(as_array(x) if isinstance(x, Tensor) else x for x in arguments))


def as_array(x: Tensor) -> Any:
    """The memory of a tensor if it is contiguous, as results are; else of a copy."""
    x = x.detach().contiguous()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def results(name: str, *arguments: Any) -> Any:
    """What the operator returns, allocated."""
    operator = getattr(torch.ops.protokernels, name)
    shapes = operator(*(x.to("meta") if isinstance(x, Tensor) else x for x in arguments))
    return poisoned(shapes) if isinstance(shapes, Tensor) else tuple(map(poisoned, shapes))


def poisoned(like: Tensor) -> Tensor:
    """What a kernel forgets to write stays NaN, or -1."""
    x = torch.empty(like.shape, dtype=like.dtype)
    x.reshape(-1).view(torch.uint8).fill_(0 if x.dtype == torch.bool else 255)
    return x


def asked(x: Tensor, wanted: bool) -> Tensor | None:
    return x if wanted else None


def with_dense_rows(x: Tensor) -> tuple[Tensor, int, int]:  # x: [N, D]
    """All the memory of the matrix, how many rows there are, and how far apart they lie."""
    x = x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()
    (N, D), stride = x.shape, x.stride(0)
    return x.as_strided(((N - 1) * stride + D if N else 0,), (1,)), N, stride


# ------------------------------------------------------------------------------------------------------------- prototypes


@on_cuda("prototypes_forward")
def prototypes_forward(*arguments: Any) -> Any:
    z, prototypes, temperature_tensor, temperature, cosine, uniform, with_labels, with_entropy, with_update = arguments[
        :9
    ]
    new_weight, skip_nonfinite = arguments[9:]
    out = assignment, labels, entropy, sums, counts, updated = results("prototypes_forward", *arguments)
    wide = torch.float64 in (z.dtype, prototypes.dtype)
    z, taken = (z.double(), prototypes.double()) if wide else (z, prototypes.float())
    blended = updated if updated.dtype == taken.dtype else torch.empty_like(taken[: len(updated)])
    memory, B, stride = with_dense_rows(z)
    launch(
        "prototypes",
        "forward",
        (z,),
        *(memory, B, stride, taken, temperature_tensor, temperature, cosine, uniform, skip_nonfinite, assignment),
        asked(labels, with_labels or with_update),
        asked(entropy, with_entropy),
        *(asked(x, with_update) for x in (sums, counts)),
        new_weight,
        asked(blended, with_update),
    )
    if with_update and blended is not updated:  # the emulator's module blends in the type it computes in
        launch("prototypes", "blend", (updated,), prototypes, sums, counts, new_weight, updated)
    return out


@on_cuda("prototypes_backward_resident")
def prototypes_backward(*arguments: Any) -> Any:
    grad_assignment, grad_entropy, assignment, z, prototypes, temperature_tensor, temperature, cosine, wanted = (
        arguments
    )
    out = grad_z, grad_prototypes, grad_temperature = results("prototypes_backward", *arguments)
    by_prototypes = poisoned(prototypes.float())
    temperature = temperature if temperature_tensor is None else float(temperature_tensor)
    launch(
        "prototypes",
        "backward",
        (z,),
        *(grad_assignment, grad_entropy, assignment, *with_dense_rows(z), prototypes.float(), temperature, cosine),
        *(grad_z, asked(by_prototypes, wanted), grad_temperature.view(1)),
    )
    if wanted:
        grad_prototypes.copy_(by_prototypes)
    return out


on_cuda("prototypes_backward")(_prototypes_autograd._backward_on_cuda)


@on_cuda("prototypes_accumulate")
def prototypes_accumulate(z: Tensor, labels: Tensor, num_prototypes: int, skip_nonfinite: bool) -> Any:
    out = results("prototypes_accumulate", z, labels, num_prototypes, skip_nonfinite)
    memory, _, stride = with_dense_rows(z)
    launch("prototypes", "accumulate", (z,), memory, labels, stride, z.shape[1], skip_nonfinite, *out)
    return out


@on_cuda("prototypes_blend")
def prototypes_blend(*arguments: Any) -> Any:
    updated = results("prototypes_blend", *arguments)
    launch("prototypes", "blend", (updated,), *arguments, updated)
    return updated


# --------------------------------------------------------------------------------------------------------------- sinkhorn


@on_cuda("sinkhorn_forward")
def sinkhorn_forward(*arguments: Any) -> Any:
    *problem, save_history = arguments
    *out, history = results("sinkhorn_forward", *arguments)
    launch("sinkhorn", "forward", arguments[:1], *problem, *out, asked(history, save_history))
    return *out, history


@on_cuda("sinkhorn_backward")
def sinkhorn_backward(*arguments: Any) -> Any:
    problem, history, gradients, (implicit, *rho) = arguments[:8], arguments[8], arguments[9:13], arguments[13:]
    out = results("sinkhorn_backward", *arguments)
    kept = (None, 0) if implicit else (history, history.shape[1])
    launch("sinkhorn", "backward", arguments[:1], *problem, *kept, *gradients, implicit, *rho, *out)
    return out


def of_potentials(operator: str, name: str) -> None:
    @on_cuda(operator)
    def function(*arguments: Any) -> Any:
        out = results(operator, *arguments)
        launch("sinkhorn", name, arguments[:1], *arguments, *([out] if isinstance(out, Tensor) else out))
        return out


of_potentials("sinkhorn_plan", "plan")
of_potentials("sinkhorn_plan_backward", "plan_backward")
of_potentials("sinkhorn_envelope_backward", "envelope")
of_potentials("sinkhorn_features_backward", "features_backward")


@on_cuda("sinkhorn_features_forward")
def sinkhorn_features_forward(*arguments: Any) -> Any:
    out = results("sinkhorn_features_forward", *arguments)
    launch("sinkhorn", "features", arguments[:1], *arguments[:-1], *out)  # the precision is Hopper's kernels'
    return out


# ------------------------------------------------------------------------------------------------------------ contrastive


@on_cuda("contrastive_plan")
def contrastive_plan(*arguments: Any) -> Any:
    labels, block, stride, per_image, drop_remainder, background, ignored, form, reduction = arguments
    out = results("contrastive_plan", *arguments)
    special = ([] if label is None else [label] for label in (background, ignored))
    launch("contrastive", "plan", (), labels, block, stride, per_image, drop_remainder, *special, form, reduction, *out)
    return out


@on_cuda("contrastive_views")
def contrastive_views(*arguments: Any) -> Any:
    out = results("contrastive_views", *arguments)
    launch("contrastive", "views", (), *arguments[1:], *out)
    return out


@on_cuda("contrastive_pack")
def contrastive_pack(x: Tensor, order: Tensor, normalize: bool) -> Any:  # x: [N, C, P], any strides
    out = results("contrastive_pack", x, order, normalize)
    reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
    place = x.as_strided((reach,), (1,)), 0, list(x.shape), list(x.stride())
    launch("contrastive", "pack", (x,), *place, order, normalize, *out)
    return out


@on_cuda("contrastive_unpack")
def contrastive_unpack(
    grad_packed: Tensor,
    packed: Tensor,
    norms: Tensor,
    order: Tensor,
    like: Tensor,
    normalize: bool,
    channels_last: bool,
) -> Tensor:  # like: [N, C, P]
    N, C, P = like.shape
    memory = poisoned(like.new_empty((N, P, C) if channels_last else like.shape))
    if len(order) != N * P:
        memory.zero_()
    grad = memory.transpose(1, 2) if channels_last else memory
    place = list(like.shape), list(grad.stride())
    launch("contrastive", "unpack", (like,), grad_packed, packed, norms, order, *place, normalize, 0, memory)
    return grad


@on_cuda("contrastive_forward")
def contrastive_forward(*arguments: Any) -> Any:
    rows, columns, groups, ranges, weights, channels, temperature, unit, form, precision = arguments
    out = total, losses, statistics = results("contrastive_forward", *arguments)
    if weights is None:
        total.zero_()
    problem = rows, columns, groups, ranges, weights, channels, temperature, is_bounded(unit, temperature)
    launch("contrastive", "forward", (rows,), *problem, form, precision, losses, statistics, total)
    return out


@on_cuda("contrastive_backward")
def contrastive_backward(*arguments: Any) -> Any:
    *problem, channels, temperature, unit, precision = arguments
    out = results("contrastive_backward", *arguments)
    settings = channels, temperature, is_bounded(unit, temperature), precision
    launch("contrastive", "backward", (out,), *problem, *settings, out)
    return out


def is_bounded(unit: bool, temperature: float) -> bool:
    return unit and 2 / temperature < CONTRASTIVE_BOUND


@on_cuda("contrastive_losses")
def contrastive_losses(x: Tensor, second: Tensor | None, order: Tensor, *rest: Any) -> Any:
    groups, ranges, weights, temperature, normalize, form, precision = rest
    vectors = as_vectors(x if second is None else torch.cat([x, second]))
    packed, norms = contrastive_pack(vectors, order, normalize)
    settings = vectors.shape[1], temperature, normalize, form, precision
    total, losses, statistics = contrastive_forward(packed, None, groups, ranges, weights, *settings)
    return total, losses, packed, norms, statistics


@on_cuda("contrastive_losses_backward")
def contrastive_losses_backward(grad_total: Tensor | None, grad_losses: Tensor | None, *rest: Any) -> Tensor:
    (
        packed,
        norms,
        order,
        groups,
        ranges,
        weights,
        statistics,
        like,
        _,
        temperature,
        normalize,
        form,
        precision,
        last,
    ) = rest
    if grad_losses is not None and grad_total is not None:  # the emulator's module takes one of them
        grad_losses, grad_total = grad_losses + (grad_total.double() * weights).to(grad_losses.dtype), None
    by_loss, weights = (grad_losses, None) if grad_total is None else (grad_total.view(1), weights)
    coefficients = poisoned(statistics)
    launch(
        "contrastive", "coefficients", (statistics,), by_loss, statistics, groups, ranges, form, coefficients, weights
    )
    vectors, of_rows = as_vectors(like), (statistics, coefficients)
    settings = vectors.shape[1], temperature, normalize, precision
    grad_rows = contrastive_backward(packed, None, groups, ranges, *of_rows, *of_rows, *settings)
    return contrastive_unpack(grad_rows, packed, norms, order, vectors, normalize, last).view(like.shape)


def as_vectors(x: Tensor) -> Tensor:  # [N, C, ...] -> [N, C, P]
    return x.unsqueeze(2) if x.dim() == 2 else x.flatten(2)


# ------------------------------------------------------------------------------------------------------------------- warp


def chain(images: Tensor, params: Tensor, enabled: Tensor | None, seed: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    order, radius, sigma_max, noise_std, crop_size, sharpness, padding = rest
    half = [side * crop_size / 2 for side in images.shape[2:]]
    options = load("warp").Options(order, radius, sigma_max, noise_std, half, sharpness, padding)
    nothing = np.zeros(0, np.int32), np.zeros(0, np.int64)
    return images, params, nothing[0] if enabled is None else enabled, nothing[1] if seed is None else seed, options


@on_cuda("warp_forward")
def warp_forward(*arguments: Any) -> Any:
    out = results("warp_forward", *arguments)
    if out.numel() > 0:
        launch("warp", "forward", (out,), *chain(*arguments), out)
    return out


@on_cuda("warp_backward")
def warp_backward(grad: Tensor, *arguments: Any) -> Any:
    *problem, need_images, need_params = arguments
    out = grad_images, grad_params = results("warp_backward", grad, *arguments)
    if grad.numel() == 0:
        grad_params.zero_()
    elif need_images or need_params:
        wanted = asked(grad_images, need_images), asked(grad_params, need_params)
        launch("warp", "backward", (grad,), grad, *chain(*problem), *wanted)
    return out


@on_cuda("warp_affine_forward")
def warp_affine_forward(images: Tensor, matrix: Tensor, size: list[int], padding: int) -> Any:
    out = results("warp_affine_forward", images, matrix, size, padding)
    if images.numel() == 0 or out.numel() == 0:
        return out.zero_()
    launch("warp", "affine_forward", (out,), images, matrix, list(size), padding, out)
    return out


@on_cuda("warp_affine_backward")
def warp_affine_backward(*arguments: Any) -> Any:
    grad, images, matrix, padding, need_images, need_matrix = arguments
    out = results("warp_affine_backward", *arguments)
    if images.numel() == 0 or grad.numel() == 0:
        return tuple(x.zero_() for x in out)
    if need_images or need_matrix:
        wanted = asked(out[0], need_images), asked(out[1], need_matrix)
        launch("warp", "affine_backward", (grad,), grad, images, matrix, list(grad.shape[2:]), padding, *wanted)
    return out


# ---------------------------------------------------------------------------------------------------------------- nearest


@on_cuda("nearest_search")
def nearest_search(queries: Tensor, bank: Tensor, k: int, cosine: bool) -> Any:
    if k > nearest.MOST_CUDA:  # as `nearest` does on CUDA
        return tuple(nearest_reference.nearest(queries, bank, k, "cosine" if cosine else "sqeuclidean"))
    out = results("nearest_search", queries, bank, k, cosine)
    launch("nearest", "search", (queries, bank), queries, bank, queries.shape[1], k, cosine, *out)
    return out


on_cuda("nearest_assign")(nearest._assign_in_torch)
on_cuda("nearest_seed")(nearest_reference.closer_to_candidates)
