# SPDX-License-Identifier: MIT
"""Prototypes: soft assignment of embeddings to prototype vectors and the moving-average update, fused into one pass over the embeddings.

Source: VAESim (Ferrante et al., Image and Vision Computing 2023), Eq. 1 and Algorithm 2. The native kernels stand in
``csrc/ops/prototypes.h``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from .. import backend
from ..reference import prototypes as reference
from . import _calls, _checks, _prototypes_autograd  # noqa: F401  (the last registers shapes and gradients)
from . import _prototypes_checks as checks

Similarity = Literal["cosine", "dot"]


class SoftAssignment(NamedTuple):
    """What :func:`soft_assign` returns when labels or entropy are asked for; a field that was not asked for is ``None``."""

    assignment: Tensor  # [B, K]
    labels: Tensor | None  # [B] int64
    entropy: Tensor | None  # [B], nats


class PrototypeUpdate(NamedTuple):
    """What :func:`update_prototypes` returns."""

    prototypes: Tensor  # [K, D]
    counts: Tensor  # [K] int64, samples that entered each cluster


class PrototypeStep(NamedTuple):
    """What :func:`prototype_step` returns. ``sums`` and ``counts`` are what ranks add up before they blend."""

    assignment: Tensor  # [B, K], differentiable
    labels: Tensor  # [B] int64; -1 for a row that was skipped
    prototypes: Tensor  # [K, D], updated; the argument is left as it was
    counts: Tensor  # [K] int64
    sums: Tensor  # [K, D] float64
    entropy: Tensor | None  # [B], nats, differentiable


@overload
def soft_assign(
    z: Tensor,  # [B, D]
    prototypes: Tensor,  # [K, D]
    *,
    temperature: float | Tensor,
    similarity: Similarity = "cosine",
    return_labels: Literal[False] = False,
    return_entropy: Literal[False] = False,
) -> Tensor: ...


@overload
def soft_assign(
    z: Tensor,  # [B, D]
    prototypes: Tensor,  # [K, D]
    *,
    temperature: float | Tensor,
    similarity: Similarity = "cosine",
    return_labels: bool = False,
    return_entropy: bool = False,
) -> SoftAssignment: ...


def soft_assign(
    z: Tensor,  # [B, D]
    prototypes: Tensor,  # [K, D]
    *,
    temperature: float | Tensor,
    similarity: Similarity = "cosine",
    return_labels: bool = False,
    return_entropy: bool = False,
) -> Tensor | SoftAssignment:
    """Soft assignment of every embedding to every prototype.

        c_ik = softmax_k(s_ik),   s_ik = <z_i, q_k> / temperature        (VAESim, Eq. 1)

    with unit vectors for ``similarity="cosine"``. In plain PyTorch:
    ``softmax(normalize(z) @ normalize(prototypes).T / temperature, -1)``.

    Differentiable in ``z``, ``prototypes`` and, if it is a tensor, ``temperature``; not twice. A zero vector is at the same distance from
    everything: uniform assignment, zero gradient. Half-precision inputs are computed in float32; the result has the wider dtype.

    Args:
        z: embeddings [B, D], float32, float64, bfloat16 or float16, any strides; B may be 0.
        prototypes: [K, D] with K >= 1, on the device of ``z``; may have another floating-point dtype.
        temperature: positive number, or a one-element tensor on the device of ``z`` (its value is not checked: that
        would wait for the GPU).
        similarity: ``"cosine"`` or ``"dot"``.
        return_labels: also return the most similar prototype of each row (ties: lowest index), from the same pass.
        return_entropy: also return the entropy of each row in nats, differentiable, from the same pass.

    Returns:
        The assignment [B, K], rows sum to 1; a :class:`SoftAssignment` if labels or entropy are asked for.

    Raises:
        TypeError: an argument is no floating-point tensor or number.
        ValueError: shapes, devices or values do not fit.

    Example:
        >>> import torch, protokernels
        >>> z = torch.tensor([[2.0, 0.0], [0.0, 3.0]], requires_grad=True)
        >>> c = protokernels.soft_assign(z, torch.eye(2), temperature=0.5)
        >>> [[round(v, 3) for v in row] for row in c.tolist()]
        [[0.881, 0.119], [0.119, 0.881]]
    """
    checks.check_pair("soft_assign", z, prototypes, similarity)
    _checks.check_temperature("soft_assign", temperature, z.device)
    _checks.check_flag("soft_assign", "return_labels", return_labels)
    _checks.check_flag("soft_assign", "return_entropy", return_entropy)
    dtype = torch.promote_types(z.dtype, prototypes.dtype)
    if backend.native_serves(z.device):
        number, tensor = _split_temperature(temperature, z, reference.compute_dtype(z, prototypes))
        outputs: tuple[Tensor, ...] = _calls.call(
            "prototypes_forward",
            z,
            prototypes,
            tensor,
            number,
            similarity == "cosine",
            None,
            return_labels,
            return_entropy,
            False,
            0.0,
            False,
        )
        assignment, labels, entropy = outputs[:3]
    else:
        assignment, labels, entropy = reference.soft_assign(z, prototypes, temperature, similarity)
    if assignment.dtype != dtype:
        assignment = assignment.to(dtype)
    if not (return_labels or return_entropy):
        return assignment
    return SoftAssignment(assignment, labels if return_labels else None, entropy.to(dtype) if return_entropy else None)


def update_prototypes(
    prototypes: Tensor,  # [K, D]
    z: Tensor,  # [B, D]
    labels_or_assignments: Tensor,  # [B] integers, or [B, K] probabilities
    *,
    new_weight: float,
    sample: bool = False,
    generator: torch.Generator | None = None,
    skip_nonfinite: bool = False,
    revive: Tensor | None = None,  # [K] bool
) -> PrototypeUpdate:
    """Moves every prototype towards the mean of its members.

        q_k <- new_weight * mean{z_i : label_i = k} + (1 - new_weight) * q_k        (VAESim, Algorithm 2)

    ``new_weight`` is the weight of the NEW mean: VAESim uses 0.95, the opposite of a usual "decay". A cluster without members keeps its
    prototype bit for bit. No gradient flows. Sums run in float64 in a fixed order, so the result is the same for any number of threads.

    Args:
        prototypes: [K, D]; not modified (see :func:`update_prototypes_`).
        z: embeddings [B, D].
        labels_or_assignments: cluster of each row [B] (an integer dtype; negative: the row is ignored), or probabilities [B, K], of
            which the largest counts (ties: lowest index) or, with ``sample=True``, one is drawn.
        new_weight: in [0, 1]; 1 gives the class means.
        sample: draw labels from the rows of the probabilities (VAESim's "multinomial"); needs probabilities. On the CPU a row that holds
            NaN, infinity or a negative number, or zeros only, is an error; on CUDA, where to look would wait for the device, and in
            compiled code its label is any.
        generator: source of the random numbers of ``sample`` and ``revive``; default: torch's global one.
        skip_nonfinite: ignore rows that hold NaN or infinity; otherwise such a row spoils its own cluster, and only that.
        revive: prototypes marked here that also got no member in this call are replaced by distinct random finite rows of ``z``
            (if there are more of them than rows, the last ones stay dead).

    Returns:
        The new prototypes, same dtype, and the number of members of each cluster in this call.

    Raises:
        TypeError, ValueError: arguments do not fit. IndexError: a label is K or more (on CUDA: a device-side trap, as in torch).

    Example:
        >>> import torch, protokernels
        >>> z, labels = torch.tensor([[1.0], [3.0]]), torch.tensor([1, 1])
        >>> new, counts = protokernels.update_prototypes(torch.zeros(2, 1), z, labels, new_weight=0.5)
        >>> new.tolist(), counts.tolist()
        ([[0.0], [1.0]], [0, 2])
    """
    op = "update_prototypes"
    checks.check_pair(op, z, prototypes, "dot")
    new_weight = _checks.check_unit_interval(op, "new_weight", new_weight)
    checks.check_drawing(op, sample, generator, skip_nonfinite)
    checks.check_labels(op, z, prototypes, labels_or_assignments, sample)
    if sample:
        checks.check_weights(op, z, labels_or_assignments, skip_nonfinite)
    if revive is not None:
        checks.check_revive(op, z, prototypes, revive)
    labels = _labels(z, labels_or_assignments, sample, generator)
    sums, counts = _accumulate(z, labels, prototypes.shape[0], skip_nonfinite)
    updated = _blend(prototypes, sums, counts, new_weight)
    if revive is not None:
        updated = revive_prototypes(updated, z, revive & (counts == 0), generator=generator)
    return PrototypeUpdate(updated, counts)


def update_prototypes_(
    prototypes: Tensor,  # [K, D]
    z: Tensor,  # [B, D]
    labels_or_assignments: Tensor,  # [B] or [B, K]
    *,
    new_weight: float,
    sample: bool = False,
    generator: torch.Generator | None = None,
    skip_nonfinite: bool = False,
    revive: Tensor | None = None,  # [K] bool
) -> PrototypeUpdate:
    """:func:`update_prototypes` in place: ``prototypes`` is overwritten and returned. Same arguments, same errors; also
    ``ValueError`` where rows or columns share their memory.

    Example:
        >>> import torch, protokernels
        >>> q = torch.zeros(2, 1)
        >>> _ = protokernels.update_prototypes_(q, torch.tensor([[1.0], [3.0]]), torch.tensor([1, 1]), new_weight=1.0)
        >>> q.tolist()
        [[0.0], [2.0]]
    """
    checks.check_written("update_prototypes_", prototypes)
    updated, counts = update_prototypes(
        prototypes,
        z,
        labels_or_assignments,
        new_weight=new_weight,
        sample=sample,
        generator=generator,
        skip_nonfinite=skip_nonfinite,
        revive=revive,
    )
    with torch.no_grad():
        prototypes.copy_(updated)
    return PrototypeUpdate(prototypes, counts)


def prototype_step(
    z: Tensor,  # [B, D]
    prototypes: Tensor,  # [K, D]
    *,
    temperature: float | Tensor,
    new_weight: float,
    similarity: Similarity = "cosine",
    sample: bool = False,
    generator: torch.Generator | None = None,
    skip_nonfinite: bool = False,
    return_entropy: bool = False,
) -> PrototypeStep:
    """:func:`soft_assign` and :func:`update_prototypes` in one pass over ``z``: the inner step of VAESim.

    The assignment is computed with the prototypes as given and is differentiable; the updated ones come back beside it. Equal to::

        c, labels, _ = soft_assign(z, prototypes, temperature=temperature, similarity=similarity, return_labels=True)
        updated, counts = update_prototypes(prototypes, z, labels, new_weight=new_weight)      # or c and sample=True

    With ``sample=True`` and half precision throughout that holds up to rounding: here labels are drawn from the assignment in float32,
    there from what ``soft_assign`` returned, rounded to the half type, so that a few may differ. Nor are probabilities looked at here.

    ``labels`` are the clusters that the rows have gone to: with ``sample=True`` the ones drawn, -1 where ``skip_nonfinite`` left a row out.

    Arguments and errors are those of the two functions. ``sums`` [K, D], float64, and ``counts`` are returned for data-parallel
    training: add them up over the ranks, then blend (``protokernels.nn.Prototypes`` does).

    Example:
        >>> import torch, protokernels
        >>> z = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 5.0]])
        >>> step = protokernels.prototype_step(z, torch.eye(2), temperature=0.1, new_weight=1.0)
        >>> step.prototypes.tolist(), step.counts.tolist()
        ([[2.0, 0.0], [0.0, 4.0]], [1, 2])
    """
    op = "prototype_step"
    checks.check_pair(op, z, prototypes, similarity)
    _checks.check_temperature(op, temperature, z.device)
    new_weight = _checks.check_unit_interval(op, "new_weight", new_weight)
    checks.check_drawing(op, sample, generator, skip_nonfinite)
    _checks.check_flag(op, "return_entropy", return_entropy)
    dtype = torch.promote_types(z.dtype, prototypes.dtype)
    uniform = _uniform(z.shape[0], z.device, generator) if sample else None
    if backend.native_serves(z.device):
        number, tensor = _split_temperature(temperature, z, reference.compute_dtype(z, prototypes))
        c, labels, entropy, sums, counts, updated = _calls.call(
            "prototypes_forward",
            z,
            prototypes,
            tensor,
            number,
            similarity == "cosine",
            uniform,
            True,
            return_entropy,
            True,
            0.0 if torch.compiler.is_compiling() else new_weight,
            skip_nonfinite,
        )
        if torch.compiler.is_compiling():  # the operator would hold the weight as a constant
            updated = _blend(prototypes, sums, counts, new_weight)
    else:
        c, labels, entropy = reference.soft_assign(z, prototypes, temperature, similarity)
        if uniform is not None:
            labels = reference.sample_labels(c.detach(), uniform)
        if skip_nonfinite:
            labels = torch.where(z.isfinite().all(-1), labels, -1)
        sums, counts = reference.sums_and_counts(z, labels, prototypes.shape[0], False)
        updated = reference.blend(prototypes, sums, counts, new_weight)
    return PrototypeStep(
        c.to(dtype), labels, updated.detach(), counts, sums.detach(), entropy.to(dtype) if return_entropy else None
    )


def blend_prototypes(
    prototypes: Tensor,  # [K, D]
    sums: Tensor,  # [K, D] float64
    counts: Tensor,  # [K] int64
    *,
    new_weight: float,
) -> Tensor:  # [K, D]
    """The last half of :func:`update_prototypes`, from sums and counts that were added up elsewhere (over ranks, over micro-batches)."""
    op = "blend_prototypes"
    checks.check_sums(op, prototypes, sums, counts)
    return _blend(prototypes, sums, counts, _checks.check_unit_interval(op, "new_weight", new_weight))


def revive_prototypes(
    prototypes: Tensor,  # [K, D]
    z: Tensor,  # [B, D]
    dead: Tensor,  # [K] bool
    *,
    generator: torch.Generator | None = None,
) -> Tensor:  # [K, D]
    """Replaces the prototypes marked ``dead`` by distinct random rows of ``z`` without NaN or infinity.

    If there are more of them than such rows, the last ones stay. Nothing is read back from the device and the argument is left as it was.
    """
    if z.shape[0] == 0:
        return prototypes.clone()
    device = generator.device if generator is not None else z.device
    order = torch.randperm(z.shape[0], device=device, generator=generator).to(z.device)
    finite = z.detach().isfinite().all(-1)
    order = order[(~finite)[order].to(torch.int8).argsort(stable=True)]  # finite rows first, still in random order
    rank = dead.cumsum(0) - 1  # the r-th dead prototype takes the r-th row of that order
    row = order[rank.clamp(0, z.shape[0] - 1)]
    replaced = dead & (rank < finite.sum())
    return torch.where(replaced.unsqueeze(-1), z.detach()[row].to(prototypes.dtype), prototypes)


# ------------------------------------------------------------------------------------------------------------------- helpers


def _split_temperature(temperature: float | Tensor, like: Tensor, dtype: torch.dtype) -> tuple[float, Tensor | None]:
    if isinstance(temperature, Tensor):
        return 1.0, temperature.to(dtype)
    if torch.compiler.is_compiling():
        return 1.0, _calls.filled(like, (), temperature, dtype)
    return temperature, None


def _uniform(count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:  # [B] float32 in [0, 1)
    source = generator.device if generator is not None else device
    return torch.rand(count, dtype=torch.float32, device=source, **_checks.drawn_by(generator)).to(device)


def _labels(
    z: Tensor, given: Tensor, sample: bool, generator: torch.Generator | None
) -> Tensor:  # [B] or [B, K] -> [B] int64
    if given.dtype not in _checks.FLOATING:
        return given.to(torch.int64)
    if sample:
        return reference.sample_labels(given.detach(), _uniform(z.shape[0], z.device, generator))
    return given.detach().argmax(-1)


def _accumulate(z: Tensor, labels: Tensor, num_prototypes: int, skip_nonfinite: bool) -> tuple[Tensor, Tensor]:
    if not backend.native_serves(z.device):
        return reference.accumulate(z, labels, num_prototypes, skip_nonfinite)
    try:
        sums, counts = _calls.call("prototypes_accumulate", z.detach(), labels, num_prototypes, skip_nonfinite)
    except RuntimeError as error:
        if "a label is not below" not in str(error):
            raise
        raise IndexError(
            f"update_prototypes: labels must be below K = {num_prototypes}; got {int(labels.max())}; "
            "negative labels are ignored, larger ones need more prototypes"
        ) from None
    return sums, counts


def _blend(prototypes: Tensor, sums: Tensor, counts: Tensor, new_weight: float) -> Tensor:
    """Compiled, the operator would hold the weight as a constant: see ``_calls.filled``."""
    if backend.native_serves(prototypes.device) and not torch.compiler.is_compiling():
        updated: Tensor = _calls.call("prototypes_blend", prototypes.detach(), sums, counts, new_weight)
        return updated
    return reference.blend(prototypes, sums, counts, new_weight)
