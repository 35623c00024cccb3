# SPDX-License-Identifier: MIT
"""What makes R processes with B / R images each train like one with B: batch normalisation, sums and losses over the images of all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SumOverProcesses(torch.autograd.Function):
    """Sum over processes; every process gets the sum, and its gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(_context: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class _WholeBatch(torch.autograd.Function):
    """:func:`gather_batch` with a gradient: what all processes' losses say of this process's rows."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        context.rows = len(value)
        return gather_batch(value)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        mine = own_rows(total)
        assert len(mine) == context.rows
        return mine


class SynchronizedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation with the mean and variance over all processes, on any device (torch's own needs a GPU).

    Statistics are taken in float32 under autocast. Processes may hold different numbers of images.

    Shape: [B, C, ...] -> [B, C, ...].
    """

    def forward(self, images: Tensor) -> Tensor:
        if not self.training or process_count() == 1:
            return super().forward(images)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        values = images.float()
        others = [dim for dim in range(values.dim()) if dim != 1]
        shape = (-1,) + (1,) * (values.dim() - 2)
        count = values.new_tensor([float(values.numel() // values.shape[1])])
        totals = summed(torch.cat([values.sum(dim=others), count]))
        total_count = totals[-1].detach()
        mean = totals[:-1] / total_count
        centred = values - mean.view(shape)
        squares = summed(centred.square().sum(dim=others))
        variance = squares / total_count
        if self.track_running_stats:
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(squares / (total_count - 1).clamp_min(1), self.momentum)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        result = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            result = result * self.weight.view(shape) + self.bias.view(shape)
        return result.to(images.dtype)


class SynchronizedBatchNorm1d(SynchronizedBatchNorm, nn.BatchNorm1d):
    """:class:`SynchronizedBatchNorm` of vectors."""


class SynchronizedBatchNorm2d(SynchronizedBatchNorm, nn.BatchNorm2d):
    """:class:`SynchronizedBatchNorm` of images."""


def synchronize_batch_norm(model: nn.Module) -> nn.Module:
    """Makes every ``BatchNorm1d`` and ``BatchNorm2d`` inside ``model`` use the statistics of all processes; parameters and buffers stay
    the same objects."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.__class__ = SynchronizedBatchNorm1d
        elif isinstance(module, nn.BatchNorm2d):
            module.__class__ = SynchronizedBatchNorm2d
    return model


def ordinary_batch_norm(model: nn.Module) -> nn.Module:
    """Undoes :func:`synchronize_batch_norm`, for a copy that one process trains alone: it would wait for the others' statistics for
    ever."""
    ordinary: dict[type[nn.Module], type[nn.Module]] = {
        SynchronizedBatchNorm1d: nn.BatchNorm1d,
        SynchronizedBatchNorm2d: nn.BatchNorm2d,
    }
    for module in model.modules():
        module.__class__ = ordinary.get(type(module), type(module))
    return model


def process_count() -> int:
    """Number of processes that train together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def whole_batch(value: Tensor) -> Tensor:  # [b, ...] -> [B, ...]
    """The rows of all processes in the order of the batch, for a loss that is no mean over images: computed by every process on the
    whole batch it is the one-process loss, and ``Session.optimise`` makes its gradient that of one process. ``value`` itself where there
    is one process.
    """
    if process_count() == 1:
        return value
    gathered: Tensor = _WholeBatch.apply(value) if value.requires_grad else gather_batch(value)
    return gathered


def own_rows(value: Tensor) -> Tensor:  # [B, ...] -> [b, ...]
    """The rows of a batch that this process holds."""
    return value[dist.get_rank() :: process_count()] if process_count() > 1 else value


def summed(value: Tensor) -> Tensor:
    """The sum over processes with its gradient; ``value`` itself where there is one process."""
    if process_count() == 1:
        return value
    total: Tensor = _SumOverProcesses.apply(value)
    return total


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum over processes without a gradient; ``value`` itself where there is one process."""
    if process_count() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def average_gradients(model: nn.Module) -> None:
    """Replaces every gradient by its mean over processes; all processes must have gradients for the same parameters."""
    if process_count() > 1:
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(process_count())


def largest_over_processes(value: int, device: torch.device) -> int:
    """The largest ``value`` of all processes."""
    if process_count() == 1:
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


@torch.no_grad()
def gather_batch(value: Tensor) -> Tensor:  # [b, ...] -> [B, ...]
    """The rows of all processes in the order of the batch, of which process r holds rows r, r + R, r + 2R, ... (see
    ``Session.steps``)."""
    processes = process_count()
    if processes == 1:
        return value
    total = int(sum_over_processes(torch.tensor(len(value), device=value.device)))
    longest = -(-total // processes)
    padded = torch.cat([value, value.new_zeros(longest - len(value), *value.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(processes)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]
