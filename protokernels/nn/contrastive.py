# SPDX-License-Identifier: MIT
"""The contrastive losses as modules: what a function takes by name is chosen once, tensors are given at every call."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ..ops import _contrastive_checks as checks
from ..ops import contrastive as ops
from ..ops._checks import check_choice


class LocalContrastiveLoss(nn.Module):
    """Local contrastive loss of pixels, with block division or a stride (Hu et al. 2021): :func:`protokernels.local_contrastive_loss`.

    Args:
        temperature, block_size, stride, form, scope, reduction, background, ignore_index, normalize, drop_remainder, precision: as there.

    Shape: features [N, C, H, W] (or [N, C, D, H, W]), labels [N, H, W] or None for two stacked views without labels -> []; [N, H, W] for
    ``reduction="none"``.

    Example:
        >>> import torch
        >>> from protokernels.nn import LocalContrastiveLoss
        >>> loss = LocalContrastiveLoss(block_size=16)
        >>> features = torch.randn(4, 8, 32, 32, requires_grad=True)
        >>> loss(features, torch.randint(0, 3, (4, 32, 32))).backward()
        >>> loss(features).shape  # the same pixel of the other view attracts
        torch.Size([])
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        block_size: checks.Size | None = None,
        stride: checks.Size | None = None,
        form: checks.Form = "supcon",
        scope: checks.Scope = "group",
        reduction: checks.Reduction = "group",
        background: int | None = 0,
        ignore_index: int | None = None,
        normalize: bool = True,
        drop_remainder: bool = False,
        precision: checks.Precision = "highest",
    ) -> None:
        super().__init__()
        checks.check_local("LocalContrastiveLoss", temperature, block_size, stride, form, scope, reduction, precision)
        self.temperature = temperature
        self.block_size = block_size
        self.stride = stride
        self.form: checks.Form = form
        self.scope: checks.Scope = scope
        self.reduction: checks.Reduction = reduction
        self.background = background
        self.ignore_index = ignore_index
        self.normalize = normalize
        self.drop_remainder = drop_remainder
        self.precision: checks.Precision = precision

    def forward(
        self,
        features: Tensor,  # [N, C, H, W] or [N, C, D, H, W]
        labels: Tensor | None = None,  # [N, H, W] or [N, D, H, W]
    ) -> Tensor:
        return ops.local_contrastive_loss(
            features,
            labels,
            temperature=self.temperature,
            block_size=self.block_size,
            stride=self.stride,
            form=self.form,
            scope=self.scope,
            reduction=self.reduction,
            background=self.background,
            ignore_index=self.ignore_index,
            normalize=self.normalize,
            drop_remainder=self.drop_remainder,
            precision=self.precision,
        )

    def extra_repr(self) -> str:
        places = (
            "dense"
            if self.block_size is None and self.stride is None
            else f"block_size={self.block_size}, stride={self.stride}"
        )
        return f"temperature={self.temperature}, {places}, form={self.form!r}, reduction={self.reduction!r}"


class SupConLoss(nn.Module):
    """Supervised contrastive loss of embeddings (Khosla et al. 2020): :func:`protokernels.supcon_loss`.

    Args:
        temperature, form, reduction, ignore_index, normalize, gather, precision: as there.

    Shape: embeddings [N, D], labels [N] -> [], or [N] for ``reduction="none"``.

    Example:
        >>> import torch
        >>> from protokernels.nn import SupConLoss
        >>> SupConLoss(temperature=0.1)(torch.randn(8, 16), torch.arange(8) % 4).shape
        torch.Size([])
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        form: checks.Form = "supcon",
        reduction: Literal["mean", "none"] = "mean",
        ignore_index: int | None = None,
        normalize: bool = True,
        gather: checks.Gather = False,
        precision: checks.Precision = "highest",
    ) -> None:
        super().__init__()
        checks.check_choices("SupConLoss", temperature, form, precision, gather)
        check_choice("SupConLoss", "reduction", reduction, ("mean", "none"))
        self.temperature = temperature
        self.form: checks.Form = form
        self.reduction: Literal["mean", "none"] = reduction
        self.ignore_index = ignore_index
        self.normalize = normalize
        self.gather: checks.Gather = gather
        self.precision: checks.Precision = precision

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:  # [N, D], [N] -> []
        return ops.supcon_loss(
            embeddings,
            labels,
            temperature=self.temperature,
            form=self.form,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            normalize=self.normalize,
            gather=self.gather,
            precision=self.precision,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, form={self.form!r}, gather={self.gather!r}"


class NTXentLoss(nn.Module):
    """NT-Xent, the loss of SimCLR (Chen et al. 2020): :func:`protokernels.nt_xent_loss`.

    Args:
        temperature, denominator, normalize, gather, precision: as there.

    Shape: two views, [N, D] each -> [].

    Example:
        >>> import torch
        >>> from protokernels.nn import NTXentLoss
        >>> NTXentLoss(temperature=0.5)(torch.randn(8, 16), torch.randn(8, 16)).shape
        torch.Size([])
    """

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        denominator: checks.Denominator = "all",
        normalize: bool = True,
        gather: checks.Gather = False,
        precision: checks.Precision = "highest",
    ) -> None:
        super().__init__()
        checks.check_choices("NTXentLoss", temperature, checks.form_of("NTXentLoss", denominator), precision, gather)
        self.temperature = temperature
        self.denominator: checks.Denominator = denominator
        self.normalize = normalize
        self.gather: checks.Gather = gather
        self.precision: checks.Precision = precision

    def forward(self, first: Tensor, second: Tensor) -> Tensor:  # [N, D], [N, D] -> []
        return ops.nt_xent_loss(
            first,
            second,
            temperature=self.temperature,
            denominator=self.denominator,
            normalize=self.normalize,
            gather=self.gather,
            precision=self.precision,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, denominator={self.denominator!r}, gather={self.gather!r}"


class CrossViewLoss(nn.Module):
    """InfoNCE between two views, in one direction or both: :func:`protokernels.cross_view_loss`.

    Args:
        temperature, denominator, symmetric, normalize, gather, precision: as there.

    Shape: two views, [N, D] each -> [].

    Example:
        >>> import torch
        >>> from protokernels.nn import CrossViewLoss
        >>> CrossViewLoss(denominator="negatives", symmetric=False)(torch.randn(8, 16), torch.randn(8, 16)).shape
        torch.Size([])
    """

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        denominator: checks.Denominator = "all",
        symmetric: bool = True,
        normalize: bool = True,
        gather: checks.Gather = False,
        precision: checks.Precision = "highest",
    ) -> None:
        super().__init__()
        checks.check_choices(
            "CrossViewLoss", temperature, checks.form_of("CrossViewLoss", denominator), precision, gather
        )
        self.temperature = temperature
        self.denominator: checks.Denominator = denominator
        self.symmetric = symmetric
        self.normalize = normalize
        self.gather: checks.Gather = gather
        self.precision: checks.Precision = precision

    def forward(self, first: Tensor, second: Tensor) -> Tensor:  # [N, D], [N, D] -> []
        return ops.cross_view_loss(
            first,
            second,
            temperature=self.temperature,
            denominator=self.denominator,
            symmetric=self.symmetric,
            normalize=self.normalize,
            gather=self.gather,
            precision=self.precision,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, denominator={self.denominator!r}, symmetric={self.symmetric}, "
            f"gather={self.gather!r}"
        )
