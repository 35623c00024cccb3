# SPDX-License-Identifier: MIT
"""Contrastive losses over pixels and embeddings, exact, with memory linear in their number.

Sources: Hu et al., MICCAI 2021 (local contrast with block division, Eq. 1 and 2); Khosla et al. 2020 (SupCon); Chen et al. 2020
(NT-Xent); Ruppli et al. 2022, Eq. 2 (cross-view). The native kernels stand in ``csrc/ops/contrastive.h``.

The four forms, and which vectors are anchors: :func:`local_contrastive_loss`.

In float32 a score is rounded to about 1e-7 of the product of its vectors' lengths, over the temperature; from 1e5 on, vectors that nearly
tie therefore share their weight in a gradient to 1 % only. On a CPU weights sum to 1 at any score; on a GPU, which keeps p and n in
float32, they do up to a relative error of 1e-7 |s|: keep scores below 1e5 there, or pass float64.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import backend
from ..reference import contrastive as reference
from ..reference._derivatives import without_gradient
from . import _calls, _checks, _contrastive_autograd, _contrastive_distributed  # noqa: F401  (the third registers shapes and gradients)
from . import _contrastive_checks as checks
from ._contrastive_checks import PRECISIONS, Denominator, Form, Gather, Precision, Reduction, Scope, Size
from ._contrastive_plan import REDUCTIONS, Plan, crossing_plan, pairs_plan


def local_contrastive_loss(
    features: Tensor,  # [N, C, H, W] or [N, C, D, H, W]
    labels: Tensor | None,  # [N, H, W] or [N, D, H, W]
    *,
    temperature: float = 0.1,
    block_size: Size | None = None,
    stride: Size | None = None,
    form: Form = "supcon",
    scope: Scope = "group",
    reduction: Reduction = "group",
    background: int | None = 0,
    ignore_index: int | None = None,
    normalize: bool = True,
    drop_remainder: bool = False,
    precision: Precision = "highest",
) -> Tensor:
    """Supervised local contrastive loss: pixels of one class attract, pixels of different classes repel (Hu et al. 2021, Eq. 2 and 3).

    Anchors are the pixels that are not background; positives and negatives come from all N maps (images and views), the background among
    the negatives. Block division lets a pixel meet the pixels of its own block only, in all maps; a stride thins the maps out instead.

    Four forms, for an anchor i with positives P (its class) and negatives N (the others) among the vectors it meets, itself left out,
    s_ij = <f_i, f_j> / temperature, p = log sum_P exp s, n = log sum_N exp s:

        ``"supcon"``   logaddexp(p, n) - mean_P s       Khosla's L_out, the released code of Hu et al.
        ``"in"``       logaddexp(p, n) - p + log |P|    Khosla's L_in
        ``"paper"``    (n - p) / |P|                    Hu et al., Eq. 2 as printed
        ``"negout"``   n - mean_P s                     positives left out of the denominator

    No anchor is a vector without positives or, for ``"paper"`` and ``"negout"``, without negatives; where nothing is left the loss is an
    exact 0 with a zero gradient. Unit vectors (``normalize=True``): a vector no longer than 1e-12 counts as zero and gets no gradient.

    In plain PyTorch, for one block with features f [S, C] and labels y [S]: these losses from ``f @ f.T / temperature`` and the masks
    ``y[:, None] == y`` and its opposite. Here no S x S matrix exists: memory grows with the number of pixels.

    Without labels (``labels=None``) the maps are two views of N / 2 images, stacked: the positive of a pixel is the same pixel of the
    other view, and every pixel is an anchor; ``background`` has no meaning, ``scope`` and ``ignore_index`` stay as they are by default.

    Args:
        features: maps of both views, stacked along N; float32, float64, bfloat16 or float16 (computed in float32), any strides.
        labels: class of every pixel, an integer dtype; ``None``: see above.
        temperature: positive. Above 1/40 no maximum has to be kept (unit vectors), which is faster.
        block_size: edge of a block in pixels, one number or one for each axis; what remains at the border is a smaller block.
        stride: every ``stride``-th pixel of each axis takes part. Neither: all pixels meet all (dense).
        form: see above.
        scope: ``"group"``: a pixel meets the pixels of all maps; ``"image"``: of its own map.
        reduction: ``"group"``: mean over the anchors of a block, then over the blocks that have any; ``"anchor"``: over all anchors;
            ``"image"``: over the anchors of a map, then over the maps that have any (Eq. 3); ``"none"``: the loss of every pixel, 0
            where there is no anchor.
        background: class without anchors; ``None``: every class has anchors.
        ignore_index: pixels of this class take no part at all.
        normalize: compare directions (cosine); otherwise inner products.
        drop_remainder: leave out blocks that are not whole, as the released code does.
        precision: of products on a GPU: ``"highest"`` as float32; ``"high"`` and ``"medium"`` with 11 bits for unit vectors, TF32 and
            bfloat16 for others; a CPU always computes in float32.

    Returns:
        The loss, a scalar of float32 (float64 for float64 features); [N, H, W] or [N, D, H, W] for ``reduction="none"``. Differentiable
        in the features, once.

    Raises:
        TypeError: features or labels are no tensors of the dtypes above, or an option is of another type.
        ValueError: shapes, devices or values do not fit.

    Example:
        >>> import torch, protokernels
        >>> features = torch.randn(4, 8, 32, 32, requires_grad=True)
        >>> labels = torch.randint(0, 3, (4, 32, 32))
        >>> loss = protokernels.local_contrastive_loss(features, labels, temperature=0.1, block_size=16)
        >>> loss.backward()
        >>> protokernels.local_contrastive_loss(features, torch.zeros_like(labels)).item()  # background only
        0.0
    """
    op = "local_contrastive_loss"
    checks.check_features(op, features)
    size = features.shape[2:]
    labels, background = checks.pixel_labels(op, features, labels, background, scope, ignore_index)
    checks.check_local(op, temperature, block_size, stride, form, scope, reduction, precision)
    _checks.check_flag(op, "normalize", normalize)
    _checks.check_flag(op, "drop_remainder", drop_remainder)
    leading = (1,) * (3 - len(size))
    block = [*leading, *checks.sizes(op, "block_size", block_size, len(size), 0)]
    steps = [*leading, *checks.sizes(op, "stride", stride, len(size), 1)]
    shape = (features.shape[0], *leading, *size)
    grid = labels.reshape(shape)
    if ignore_index is not None:  # a NaN there is none of the loss's
        features = without_gradient(features, (labels == ignore_index).unsqueeze(1))
    if not backend.native_serves(features.device):
        loss = reference.local_contrastive_loss(
            features.reshape(shape[0], features.shape[1], *shape[1:]),
            grid,
            temperature=temperature,
            block=block,
            stride=steps,
            per_image=scope == "image",
            drop_remainder=drop_remainder,
            background=background,
            ignore_index=ignore_index,
            form=form,
            reduction=reduction,
            normalize=normalize,
        )
        return loss.view(labels.shape) if reduction == "none" else loss
    plan = Plan(
        *_calls.call(
            "contrastive_plan",
            grid,
            block,
            steps,
            scope == "image",
            drop_remainder,
            background,
            ignore_index,
            reference.FORMS.index(form),
            REDUCTIONS.index(reduction) if reduction != "none" else 0,
        )
    )
    total, losses = _native_losses(plan, temperature, form, normalize, precision, features)
    if reduction != "none":
        return total
    return losses.new_zeros(labels.numel()).index_put((plan.order,), losses).view(labels.shape)


def supcon_loss(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    *,
    temperature: float = 0.1,
    form: Form = "supcon",
    reduction: Literal["mean", "none"] = "mean",
    ignore_index: int | None = None,
    normalize: bool = True,
    gather: Gather = False,
    precision: Precision = "highest",
) -> Tensor:
    """Supervised contrastive loss of embeddings: those of one class attract (Khosla et al. 2020).

    Every embedding with a partner of its class is an anchor and meets all others. For several views, stack embeddings and labels along N.

    Args:
        embeddings: [N, D], any floating-point dtype, any strides.
        labels: class of every embedding, an integer dtype.
        temperature: positive.
        form: ``"supcon"``, ``"in"``, ``"paper"`` or ``"negout"``: see :func:`local_contrastive_loss`.
        reduction: ``"mean"`` over anchors, or ``"none"``: [N], 0 where there is no anchor.
        ignore_index: embeddings of this class take no part.
        normalize: compare directions (cosine); otherwise inner products.
        gather: also meet the embeddings of all ranks of ``torch.distributed``. ``True``: they are gathered; ``"ring"``: they are passed
            round, one rank's at a time, so that memory does not grow with the number of ranks. Every rank gets the mean over its own
            anchors and the gradient of the SUM of all ranks' losses by its own embeddings, so that data-parallel training, which
            averages over ranks, follows the mean of the ranks' losses. All ranks must call forward and backward; their N may differ.
        precision: see :func:`local_contrastive_loss`.

    Returns:
        The loss, float32 (float64 for float64 embeddings), differentiable once.

    Raises:
        TypeError, ValueError: arguments do not fit. RuntimeError: ``gather`` without an initialised process group.

    Example:
        >>> import torch, protokernels
        >>> embeddings = torch.eye(4).repeat(2, 1)  # two views of four classes
        >>> loss = protokernels.supcon_loss(embeddings, torch.arange(4).repeat(2), temperature=1.0)
        >>> round(loss.item(), 4)  # log(e + 6) - 1
        1.1654
    """
    op = "supcon_loss"
    _checks.check_matrix(op, "embeddings", embeddings, "[N, D]")
    if embeddings.shape[1] == 0:
        raise ValueError(f"{op}: embeddings must have shape [N, D] with D at least 1; got {list(embeddings.shape)}")
    labels = checks.class_labels(op, labels, embeddings.shape[:1], "[N]", "embeddings", embeddings)
    checks.check_choices(op, temperature, form, precision, gather)
    _checks.check_choice(op, "reduction", reduction, ("mean", "none"))
    checks.check_class(op, "ignore_index", ignore_index)
    _checks.check_flag(op, "normalize", normalize)
    if ignore_index is not None:
        embeddings = without_gradient(embeddings, (labels == ignore_index).unsqueeze(1))
    if gather:
        losses, anchors = _contrastive_distributed.gathered_losses(
            op, embeddings, labels, temperature, form, ignore_index, normalize, gather == "ring", precision
        )
        return losses if reduction == "none" else losses.sum() / anchors.sum().clamp(min=1)
    if not backend.native_serves(embeddings.device):
        return reference.supcon_loss(
            embeddings,
            labels,
            temperature=temperature,
            ignore_index=ignore_index,
            form=form,
            normalize=normalize,
            reduction=reduction,
        )
    plan = Plan(
        *_calls.call(
            "contrastive_plan",
            labels.view(-1, 1, 1, 1),
            [0, 0, 0],
            [1, 1, 1],
            False,
            False,
            None,
            ignore_index,
            reference.FORMS.index(form),
            REDUCTIONS.index("anchor"),
        )
    )
    total, losses = _native_losses(plan, temperature, form, normalize, precision, embeddings)
    return total if reduction == "mean" else losses.new_zeros(labels.shape[0]).index_put((plan.order,), losses)


def nt_xent_loss(
    first: Tensor,  # [N, D]
    second: Tensor,  # [N, D]
    *,
    temperature: float = 0.5,
    denominator: Denominator = "all",
    normalize: bool = True,
    gather: Gather = False,
    precision: Precision = "highest",
) -> Tensor:
    """NT-Xent: the two views of an image attract, all other views of the batch repel (Chen et al. 2020, Eq. 1; Hu et al. 2021, Eq. 1).

        l_i = -log( exp(s_i,p(i)) / sum_{k != i} exp(s_ik) ),   mean over the 2N views

    In plain PyTorch: ``cross_entropy(masked scores of cat([first, second]), partner)``.

    Args:
        first, second: embeddings of the two views, [N, D] each.
        temperature: positive.
        denominator: ``"all"`` others, as above, or the ``"negatives"`` alone (Ferrante et al. 2022, Eq. 1; the loss may be negative).
        normalize: compare directions (cosine); otherwise inner products.
        gather: negatives of all ranks too, see :func:`supcon_loss`.
        precision: see :func:`local_contrastive_loss`.

    Returns:
        The loss, float32 (float64 for float64 embeddings), differentiable once. One image has no negatives: 0.

    Raises:
        TypeError, ValueError: arguments do not fit. RuntimeError: ``gather`` without an initialised process group.

    Example:
        >>> import torch, protokernels
        >>> round(protokernels.nt_xent_loss(torch.eye(2), torch.eye(2), temperature=1.0).item(), 4)  # log(e + 2) - 1
        0.5514
    """
    op = "nt_xent_loss"
    count = checks.check_views(op, first, second)
    form = checks.form_of(op, denominator)
    checks.check_choices(op, temperature, form, precision, gather)
    _checks.check_flag(op, "normalize", normalize)
    if first.dtype != second.dtype:
        first, second = _in_one_dtype(first, second)
    if not gather and backend.native_serves(first.device):
        plan = _views_plan(first, count, False, True)
        return _native_losses(plan, temperature, form, normalize, precision, first, second)[0]
    stacked = torch.cat([first, second])
    pairs = torch.arange(count, device=first.device).repeat(2)
    if gather:
        losses, anchors = _contrastive_distributed.gathered_losses(
            op, stacked, pairs, temperature, form, None, normalize, gather == "ring", precision, labels_are_local=True
        )
        return losses.sum() / anchors.sum().clamp(min=1)
    return reference.supcon_loss(
        stacked, pairs, temperature=temperature, ignore_index=None, form=form, normalize=normalize, reduction="mean"
    )


def cross_view_loss(
    first: Tensor,  # [N, D]
    second: Tensor,  # [N, D]
    *,
    temperature: float = 1.0,
    denominator: Denominator = "all",
    symmetric: bool = True,
    normalize: bool = True,
    gather: Gather = False,
    precision: Precision = "highest",
) -> Tensor:
    """InfoNCE between two views: row i of the one and row i of the other attract, rows of the same view do not meet.

        l_i = -log( exp(s_ii) / sum_j exp(s_ij) ),   s_ij = <first_i, second_j> / temperature

    In plain PyTorch: ``cross_entropy(first @ second.T / temperature, arange(N))``, and its mean with the other direction if
    ``symmetric``.

    Args:
        first, second: [N, D] each.
        temperature: positive.
        denominator: ``"all"`` columns, or only the ``"negatives"`` j != i (Ruppli et al. 2022, Eq. 2, with ``symmetric=False,
            normalize=False``).
        symmetric: also from the second view to the first, and the mean of both.
        normalize: compare directions (cosine); otherwise inner products.
        gather: the other view's rows of all ranks too, see :func:`supcon_loss`.
        precision: see :func:`local_contrastive_loss`.

    Returns:
        The loss, float32 (float64 for float64 embeddings), differentiable once. A single pair: 0.

    Raises:
        TypeError, ValueError: arguments do not fit. RuntimeError: ``gather`` without an initialised process group.

    Example:
        >>> import torch, protokernels
        >>> round(protokernels.cross_view_loss(torch.eye(2), torch.eye(2)).item(), 4)  # log(e + 1) - 1
        0.3133
    """
    op = "cross_view_loss"
    count = checks.check_views(op, first, second)
    form = checks.form_of(op, denominator)
    checks.check_choices(op, temperature, form, precision, gather)
    _checks.check_flag(op, "symmetric", symmetric)
    _checks.check_flag(op, "normalize", normalize)
    if first.dtype != second.dtype:
        first, second = _in_one_dtype(first, second)
    if gather:
        return _contrastive_distributed.gathered_cross_view_loss(
            op, first, second, temperature, form, symmetric, normalize, gather == "ring", precision
        )
    if backend.native_serves(first.device):
        plan = _views_plan(first, count, True, symmetric)
        return _native_losses(plan, temperature, form, normalize, precision, first, second)[0]
    dtype = reference.compute_dtype(first)  # the gradients of both ways are added before they are rounded
    first, second = first.to(dtype), second.to(dtype)
    ways = [(first, second), (second, first)] if symmetric else [(first, second)]
    losses = [
        reference.cross_view_loss(own, other, temperature=temperature, form=form, normalize=normalize)
        for own, other in ways
    ]
    return losses[0] if len(losses) == 1 else (losses[0] + losses[1]) / 2


# ------------------------------------------------------------------------------------------------------------------- helpers


def _native_losses(
    plan: Plan,
    temperature: float,
    form: Form,
    normalize: bool,
    precision: Precision,
    x: Tensor,
    second: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # [N, C] or [N, C, ...], or both views [N, C] -> [], [R] in the order of the plan
    settings = temperature, normalize, reference.FORMS.index(form), PRECISIONS.index(precision)
    total, losses, *_ = _calls.call("contrastive_losses", x, second, *plan, *settings)
    return total, losses


def _views_plan(first: Tensor, count: int, crossing: bool, symmetric: bool) -> Plan:
    if torch.compiler.is_compiling():  # the operator takes a number, and would be compiled anew for every one
        return crossing_plan(count, symmetric, first.device) if crossing else pairs_plan(count, first.device)
    return Plan(*_calls.call("contrastive_views", first.detach(), count, crossing, symmetric))


def _in_one_dtype(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(first.dtype, second.dtype)
    return first.to(dtype), second.to(dtype)
