# SPDX-License-Identifier: MIT
"""What test_training.py runs under torchrun: ``two_processes.py [batch-norm] train FOLDER [--resume] | interrupt FOLDER``."""

from __future__ import annotations

import functools
import os
import signal
import sys
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from protokernels.papers import vaesim
from protokernels.training import (
    Interrupted,
    Session,
    Step,
    distributed,
    gather_batch,
    synchronize_batch_norm,
    whole_batch,
)
from protokernels.training.distributed import average_gradients
from protokernels.training.segmentation import soft_dice_loss


def check_batch_norm() -> None:
    """SynchronizedBatchNorm2d on uneven shares against BatchNorm2d on everything. The training after it keeps the group."""
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    images = torch.randn(7, 5, 6, 6, dtype=torch.float32) * 3 + 1
    weights = torch.randn_like(images)
    whole, shared = nn.BatchNorm2d(5), synchronize_batch_norm(nn.Sequential(nn.BatchNorm2d(5)))[0]
    with torch.no_grad():
        for norm in (whole, shared):
            norm.weight.copy_(torch.linspace(0.5, 2, 5))
            norm.bias.copy_(torch.linspace(-1, 1, 5))
    x, mine = images.clone().requires_grad_(), images[rank::processes].clone().requires_grad_()
    for _ in range(2):
        expected, actual = whole(x), shared(mine)
    (expected * weights).sum().backward()
    (actual * weights[rank::processes]).sum().backward()
    assert x.grad is not None and mine.grad is not None and shared.weight.grad is not None
    torch.testing.assert_close(actual, expected[rank::processes], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.grad, x.grad[rank::processes], rtol=1e-4, atol=1e-5)
    dist.all_reduce(shared.weight.grad)
    torch.testing.assert_close(shared.weight.grad, whole.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shared.running_mean, whole.running_mean)
    torch.testing.assert_close(shared.running_var, whole.running_var)
    before = shared.running_mean.clone()
    shared.track_running_stats = False  # still the statistics of the batch, but none are kept
    torch.testing.assert_close(shared(images[rank::processes]), actual)
    assert torch.equal(shared.running_mean, before)
    shared.track_running_stats = True
    layer = nn.Linear(2, 1)
    layer.weight.grad = torch.tensor([[1.0, 4.0]]) * (rank + 1)  # the bias has none, in no process
    average_gradients(layer)
    assert layer.weight.grad.tolist() == [[1.5, 6.0]] and layer.bias.grad is None
    shared.eval(), whole.eval()
    torch.testing.assert_close(shared(images), whole(images))
    assert torch.equal(gather_batch(images[rank::processes].flatten(1)), images.flatten(1))
    check_losses_of_the_whole_batch(rank, processes)
    print("batch-norm ok", flush=True)


def check_losses_of_the_whole_batch(rank: int, processes: int) -> None:
    """Gradients of losses that are no mean over images, weighed and averaged as ``Session.optimise`` does, on uneven shares."""
    x = torch.randn(7, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(28).view(7, 2, 2) % 3

    def vectors(z: torch.Tensor) -> torch.Tensor:
        z = whole_batch(z).flatten(1)
        return (z.T @ z).square().sum() / z.std(dim=0).sum()

    for loss in (vectors, soft_dice_loss):
        results = []
        for rows in (slice(None), slice(rank, None, processes)):
            part = x[rows].clone().requires_grad_()
            alone = rows == slice(None)
            arguments = (part,) if loss is vectors else (part, labels[rows])
            with mock.patch.object(distributed, "process_count", lambda alone=alone: 1 if alone else processes):
                value = loss(*arguments)
                (value if alone else value * len(part) * processes / len(x) / processes).backward()
            results.append((value.detach(), part.grad))
        (expected, whole), (found, own) = results
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own, whole[rank::processes], rtol=1e-4, atol=1e-6)


def train(folder: str, *, resume: bool) -> None:
    """A few steps of VAESim on digits with batches of odd size.

    Adam divides by the gradient's own size: where that is all but zero, rounding alone decides a step of full length.
    A larger epsilon takes this out of the comparison.
    """
    torch.optim.Adam = functools.partial(torch.optim.Adam, eps=1.0)  # type: ignore[assignment, misc]
    config = vaesim.VAESimConfig.preset(
        "fair", "digits", epochs=2, batch_size=401, image_size=16, num_prototypes=12, latent_dim=8, learning_rate=1e-4
    )
    vaesim.train(config, folder, figures=False, resume=resume, quiet=True, device="cpu")
    if dist.is_initialized():
        dist.destroy_process_group()


def interrupt(folder: str) -> None:
    """The same, but process 1 alone gets a signal in the middle of the second epoch."""
    optimise = Session.optimise

    def optimise_then_signal(self: Session, loss: torch.Tensor, step: Step) -> None:
        optimise(self, loss, step)
        if step.epoch == 1 and step.index == 1 and step.rank == 1:
            os.kill(os.getpid(), signal.SIGINT)

    Session.optimise = optimise_then_signal  # type: ignore[method-assign]
    try:
        train(folder, resume=False)
    except Interrupted as stop:
        print(f"interrupted at {str(stop).split(';')[0]}", flush=True)
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    words = sys.argv[1:]
    if words[0] == "batch-norm":
        check_batch_norm()
        words = words[1:]
    if words[0] == "interrupt":
        interrupt(words[1])
    else:
        train(words[1], resume="--resume" in words)
