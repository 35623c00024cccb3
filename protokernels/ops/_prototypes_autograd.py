# SPDX-License-Identifier: MIT
"""Fake kernels (shapes for torch.compile and torch.export) and the autograd formula of the native prototype operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference import prototypes as reference
from ..reference._precision import without_autocast
from . import _calls


def _fake_forward(
    z: Tensor,
    prototypes: Tensor,
    temperature_tensor: Tensor | None,
    temperature: float,
    cosine: bool,
    uniform: Tensor | None,
    with_labels: bool,
    with_entropy: bool,
    with_update: bool,
    new_weight: float,
    skip_nonfinite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, D), K = z.shape, prototypes.shape[0]
    dtype = reference.compute_dtype(z, prototypes)
    updates = K if with_update else 0
    return (
        z.new_empty(B, K, dtype=dtype),
        z.new_empty(B if with_labels or with_update else 0, dtype=torch.int64),
        z.new_empty(B if with_entropy else 0, dtype=dtype),
        z.new_empty(updates, D, dtype=torch.float64),
        z.new_empty(updates, dtype=torch.int64),
        prototypes.new_empty(updates, D),
    )


def _fake_backward(
    grad_assignment: Tensor,
    grad_entropy: Tensor | None,
    assignment: Tensor,
    z: Tensor,
    prototypes: Tensor,
    temperature_tensor: Tensor | None,
    temperature: float,
    cosine: bool,
    with_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        z.new_empty(z.shape),
        prototypes.new_empty(prototypes.shape if with_prototypes else (0, prototypes.shape[1])),
        assignment.new_empty(()),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, prototypes, temperature_tensor, temperature, cosine = inputs[:5]
    assignment, labels, _, sums, counts, updated = output
    ctx.mark_non_differentiable(labels, sums, counts, updated)
    ctx.save_for_backward(z, prototypes, temperature_tensor, assignment)
    ctx.temperature, ctx.cosine, ctx.with_entropy = temperature, cosine, inputs[7]
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_assignment: Tensor | None, _labels: None, grad_entropy: Tensor | None, *_rest: None
) -> tuple[Tensor | None, ...]:
    z, prototypes, temperature_tensor, assignment = ctx.saved_tensors
    needs_z, needs_prototypes, needs_temperature = ctx.needs_input_grad[:3]
    if not ctx.with_entropy:
        grad_entropy = None  # of an output that was not asked for and is empty
    if grad_assignment is None and grad_entropy is None:
        return (None,) * 11
    if grad_assignment is None:
        grad_assignment = torch.zeros_like(assignment)
    grad_z, grad_prototypes, grad_temperature = _calls.call(
        "prototypes_backward",
        grad_assignment,
        grad_entropy,
        assignment,
        z,
        prototypes,
        temperature_tensor,
        ctx.temperature,
        ctx.cosine,
        needs_prototypes,
    )
    return (
        grad_z if needs_z else None,
        grad_prototypes if needs_prototypes else None,
        grad_temperature.reshape(temperature_tensor.shape) if needs_temperature else None,
        *(None,) * 8,
    )


def _backward_on_cuda(
    grad_assignment: Tensor,  # [B, K]
    grad_entropy: Tensor | None,  # [B]
    assignment: Tensor,  # [B, K]
    z: Tensor,  # [B, D]
    prototypes: Tensor,  # [K, D]
    temperature_tensor: Tensor | None,  # [1]
    temperature: float,
    cosine: bool,
    with_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """prototypes_backward for CUDA: our kernel where all prototypes fit into a multiprocessor, else plain torch."""
    arguments = (grad_assignment, grad_entropy, assignment, z, prototypes, temperature_tensor, temperature, cosine)
    if _resident(assignment, z):
        gradients: tuple[Tensor, Tensor, Tensor] = _calls.call(
            "prototypes_backward_resident", *arguments, with_prototypes
        )
        return gradients
    with without_autocast(z.device.type):  # a backward pass may run within it
        return _backward_in_torch(*arguments, with_prototypes)


def _resident(assignment: Tensor, z: Tensor) -> bool:
    K, D = assignment.shape[1], z.shape[1]
    if assignment.dtype != torch.float32 or K > 256 or D > 128:
        return False
    room: int = getattr(torch.cuda.get_device_properties(z.device), "shared_memory_per_block_optin", 0)
    return K <= 64 or room >= 160 * 1024


def _backward_in_torch(
    grad_assignment: Tensor,  # [B, K]
    grad_entropy: Tensor | None,  # [B]
    assignment: Tensor,  # [B, K]
    z: Tensor,
    prototypes: Tensor,
    temperature_tensor: Tensor | None,
    temperature: float,
    cosine: bool,
    with_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Any sizes and types: the equations of csrc/ops/prototypes.h as two cuBLAS products and element-wise kernels."""
    dtype = assignment.dtype
    inverse_t = 1.0 / (temperature if temperature_tensor is None else temperature_tensor.reshape(()))
    ds = assignment * (grad_assignment - (grad_assignment * assignment).sum(-1, keepdim=True))
    if grad_entropy is not None:
        log_c = torch.where(assignment > 0, assignment, 1.0).log()
        entropy = -(assignment * log_c).sum(-1, keepdim=True)
        ds = ds - grad_entropy.unsqueeze(-1) * assignment * (log_c + entropy)
    unit_z, scale_z = _unit_and_scale(z.to(dtype), cosine)
    unit_q, scale_q = _unit_and_scale(prototypes.to(dtype), cosine)
    t = ds @ unit_q * inverse_t
    along = (unit_z * t).sum(-1, keepdim=True)  # = <ds, s>
    grad_temperature = -(along.sum() * inverse_t)
    grad_z = ((t - unit_z * along) if cosine else t) * scale_z
    if not with_prototypes:
        return grad_z.to(z.dtype), prototypes.new_empty(0, prototypes.shape[1]), grad_temperature
    t = ds.T @ unit_z * inverse_t
    grad_prototypes = ((t - unit_q * (unit_q * t).sum(-1, keepdim=True)) if cosine else t) * scale_q
    return grad_z.to(z.dtype), grad_prototypes.to(prototypes.dtype), grad_temperature


def _unit_and_scale(
    x: Tensor, cosine: bool
) -> tuple[Tensor, Tensor | float]:  # [N, D], [N, 1] = 1 / |x|, 0 for a zero vector
    if not cosine:
        return x, 1.0
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)  # widened as it is read: no copy
    scale = torch.where(norm <= reference.NORM_FLOOR, 0.0, norm.reciprocal()).to(x.dtype)
    return x * scale, scale


def kept(prototypes: Tensor) -> Tensor:  # [K, D]
    """A copy that stays what it is when ``prototypes`` are overwritten, compiled as well: there ``clone`` does not do, since torch's
    compiler leaves it out as a copy of an argument and saves the argument for the backward pass, which then sees it overwritten."""
    if not torch.compiler.is_compiling():
        return prototypes.clone()
    copied: Tensor = torch.ops.protokernels.prototypes_kept.default(prototypes)
    return copied


def _no_second_derivative(ctx: Any, *_grads: Tensor) -> tuple[None, ...]:
    raise NotImplementedError(
        "soft_assign: the native kernels have no second derivative; "
        "use `with protokernels.backend.use('reference')` around the forward pass"
    )


def _fake_accumulate(z: Tensor, labels: Tensor, num_prototypes: int, skip_nonfinite: bool) -> tuple[Tensor, Tensor]:
    sums = z.new_empty(num_prototypes, z.shape[1], dtype=torch.float64)
    return sums, z.new_empty(num_prototypes, dtype=torch.int64)


def _fake_blend(prototypes: Tensor, sums: Tensor, counts: Tensor, new_weight: float) -> Tensor:
    return prototypes.new_empty(prototypes.shape)


torch.library.define("protokernels::prototypes_kept", "(Tensor prototypes) -> Tensor")
torch.library.impl("protokernels::prototypes_kept", "CompositeExplicitAutograd")(Tensor.clone)
torch.library.register_fake("protokernels::prototypes_kept")(torch.empty_like)
torch.library.register_autograd("protokernels::prototypes_kept", lambda _ctx, grad: grad)
if _native.LIBRARY is not None:
    torch.library.impl("protokernels::prototypes_backward", "CUDA")(_backward_on_cuda)
_calls.register("prototypes_forward", _fake_forward, setup=_setup_context, backward=_backward)
_calls.register("prototypes_backward", _fake_backward, backward=_no_second_derivative)
_calls.register("prototypes_backward_resident", _fake_backward)
_calls.register("prototypes_accumulate", _fake_accumulate)
_calls.register("prototypes_blend", _fake_blend)
