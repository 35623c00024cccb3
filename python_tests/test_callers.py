# SPDX-License-Identifier: MIT
"""Every op as real programs call it: from threads at once, under changing thread counts, in worker processes, transformed, many times."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

import protokernels
from protokernels import backend, cluster
from protokernels import nn as modules
from python_tests.places import needs_native
from python_tests.test_lockstep import OPERATORS

CALLS = int(os.environ.get("PROTOKERNELS_CALLS", "150"))
"""Calls of every op in the test of memory; 10000 for a long run."""
ON_CUDA_ALONE = {"prototypes_backward_resident"}
"""Operators that only CUDA tensors reach: what `prototypes_backward` calls on a GPU."""
BETWEEN_RANKS = {"contrastive_pack", "contrastive_unpack", "contrastive_forward", "contrastive_backward"}
"""Operators that only vectors of other ranks reach (test_contrastive_distributed.py); `contrastive_losses` calls the same functions."""


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def total(*values: Tensor | None) -> Tensor:
    return torch.stack([value.double().square().sum() for value in values if value is not None]).sum()


def _prototypes() -> Tensor:
    step = protokernels.prototype_step(draw(150, 7), draw(5, 7), temperature=0.2, new_weight=0.9, return_entropy=True)
    soft = protokernels.soft_assign(draw(150, 7), draw(5, 7), temperature=0.2)
    return total(step.assignment, step.entropy, step.prototypes, soft)  # type: ignore[arg-type]


def _update() -> Tensor:
    labels, in_place = torch.arange(150) % 5, draw(5, 7).detach()
    protokernels.update_prototypes_(in_place, draw(150, 7), labels, new_weight=0.9)
    updated = protokernels.update_prototypes(draw(5, 7), draw(150, 7), labels, new_weight=0.9)
    return total(updated.prototypes, in_place, draw(2))


def _sinkhorn(gradient: str) -> Callable[[], Tensor]:
    def run() -> Tensor:
        result = protokernels.sinkhorn(draw(2, 19, 23), epsilon=0.5, num_iters=12, gradient=gradient)  # type: ignore[arg-type]
        return total(result.entropic_value) if gradient == "envelope" else total(result.entropic_value, result.plan)

    return run


def _features() -> Tensor:
    a, b = torch.full((19,), 1 / 19), torch.full((23,), 1 / 23)
    result = protokernels.sinkhorn_features(draw(19, 8), draw(23, 8), a, b, epsilon=1.0, num_iters=12)
    return result.entropic_value.double() + total(
        protokernels.sinkhorn_divergence(draw(2, 19, 8), draw(2, 23, 8), epsilon=1.0, num_iters=12)
    )


def _local() -> Tensor:
    labels = torch.arange(2 * 12 * 12).view(2, 12, 12) % 3
    return total(protokernels.local_contrastive_loss(draw(2, 6, 12, 12), labels, block_size=4))


def _supcon() -> Tensor:
    return total(protokernels.supcon_loss(draw(70, 9), torch.arange(70) % 4))


def _views() -> Tensor:
    first, second = draw(70, 9), draw(70, 9)
    return total(protokernels.nt_xent_loss(first, second), protokernels.cross_view_loss(first, second))


def _transform() -> Tensor:
    return total(protokernels.transform(draw(3, 2, 21, 18), draw(3, 7), seed=torch.arange(3)))


def _parts() -> Tensor:
    images = protokernels.soft_crop(protokernels.blend_flip(draw(3, 2, 21, 18), 0.3), (0.1, 0.1))
    return total(protokernels.gaussian_noise(images, 0.2, seed=torch.arange(3)))


def _affine() -> Tensor:
    volumes = protokernels.gaussian_blur(draw(2, 1, 5, 9, 7), 0.8)
    return total(protokernels.affine_warp(draw(3, 2, 21, 18), draw(3, 2, 3)), protokernels.rotate(volumes, 0.3))


def _nearest() -> Tensor:
    queries, bank = draw(40, 9), draw(300, 9)
    few, many = (protokernels.nearest(queries, bank, k) for k in (5, 50))
    return total(few.distances, few.indices, many.distances, many.indices, draw(2))


def _kmeans() -> Tensor:
    rows = draw(300, 9)
    model = cluster.KMeans(4, n_init=1, max_iter=3, random_state=0).fit(rows.detach())
    return total(rows, model.cluster_centers_, model.predict(rows.detach()))


WORK: dict[str, Callable[[], Tensor]] = {
    "prototype_step": _prototypes,
    "update_prototypes": _update,
    "sinkhorn, unrolled": _sinkhorn("unrolled"),
    "sinkhorn, implicit": _sinkhorn("implicit"),
    "sinkhorn, envelope": _sinkhorn("envelope"),
    "sinkhorn_divergence": _features,
    "local_contrastive_loss": _local,
    "supcon_loss": _supcon,
    "nt_xent_loss and cross_view_loss": _views,
    "transform": _transform,
    "soft_crop, blend_flip and gaussian_noise": _parts,
    "affine_warp": _affine,
    "nearest": _nearest,
    "KMeans": _kmeans,
}


def value_of(name: str) -> float:
    """Forward and backward; the same bits whenever the work is the same."""
    result = WORK[name]()
    result.backward()
    return result.item()


class _Operators(TorchDispatchMode):
    """Notes the native operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "protokernels":
            self.seen.add(func.name().split("::")[1])
        return func(*args, **(kwargs or {}))


@needs_native
def test_every_operator_is_at_work() -> None:
    with backend.use("native"), _Operators() as operators:
        for name in WORK:
            value_of(name)
    wanted = set(OPERATORS) - ON_CUDA_ALONE - BETWEEN_RANKS
    assert operators.seen == wanted, "add a call of what is missing to WORK"


class TestThreads:
    def test_two_python_threads_and_changing_thread_counts_disturb_nothing(self) -> None:
        expected = {name: value_of(name) for name in WORK}
        wrong: list[str] = []

        def work(shift: int) -> None:
            names = [*WORK][shift:] + [*WORK][:shift]
            for _ in range(3):
                wrong.extend(name for name in names if value_of(name) != expected[name])

        before = torch.get_num_threads()
        threads = [threading.Thread(target=work, args=(shift,)) for shift in (0, 5)]
        try:
            for thread in threads:
                thread.start()
            count = 0
            while any(thread.is_alive() for thread in threads):
                count += 1
                torch.set_num_threads(1 + count % 3)
                threads[count % 2].join(0.01)
        finally:
            torch.set_num_threads(before)
        assert wrong == []


class Values(Dataset[tuple[str, float]]):
    """Every item is computed by an op, where the data are loaded."""

    def __len__(self) -> int:
        return len(WORK)

    def __getitem__(self, index: int) -> tuple[str, float]:
        name = [*WORK][index]
        return name, value_of(name)


class TestWorkers:
    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_data_loader_workers_compute_the_same(self, method: str) -> None:
        expected = dict(Values()[index] for index in range(len(WORK)))  # this process has used its threads before
        loader = DataLoader(Values(), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=120)
        assert {name: float(value) for name, value in loader} == expected


def all_modules() -> Iterator[tuple[nn.Module, tuple[Tensor, ...]]]:
    two, maps = (draw(12, 6).detach(), draw(6, 12).detach().T), torch.arange(2 * 4 * 4).view(2, 4, 4) % 3
    yield modules.Prototypes(3, 6, temperature=modules.LinearTemperature(), generator=torch.Generator()), two[:1]
    yield modules.SinkhornLoss(), two
    yield modules.SinkhornAssignment(), two[:1]
    yield modules.LocalContrastiveLoss(block_size=2), (draw(2, 3, 4, 4).detach(), maps)
    yield modules.SupConLoss(), (two[0], torch.arange(12) % 3)
    yield modules.NTXentLoss(), two
    yield modules.CrossViewLoss(), two
    yield modules.DifferentiableTransform(order=("blur", "rotate")), (draw(2, 1, 8, 8).detach(), draw(2, 7).detach())
    yield modules.RandomViews(5, modules.ViewStrength(noise=1.0)), (draw(2, 1, 8, 8).detach(),)


class TestCopies:
    def test_every_module_is_copied_and_pickled(self) -> None:
        kinds = {getattr(modules, name) for name in modules.__all__}
        kinds = {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, nn.Module)}
        assert {type(module) for module, _ in all_modules()} == kinds
        for module, inputs in all_modules():
            for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                results = []
                for one in (copy.deepcopy(module), twin):
                    torch.manual_seed(0)
                    found = one(*inputs)
                    results.append(found if isinstance(found, tuple) else (found,))
                for a, b in zip(*results, strict=True):
                    assert torch.equal(a, b), type(module).__name__
                assert one.state_dict().keys() == module.state_dict().keys()

    def test_kmeans_is_copied_and_pickled(self) -> None:
        x = draw(40, 3).detach()
        model = cluster.KMeans(3, n_init=1).fit(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin.predict(x), model.predict(x)) and twin.inertia_ == model.inertia_


PROTOTYPES = draw(4, 5).detach()
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "soft_assign": (lambda x: protokernels.soft_assign(x, PROTOTYPES, temperature=0.5), (6, 5)),  # type: ignore[dict-item]
    "prototype_step": (lambda x: total(*protokernels.prototype_step(x, PROTOTYPES, temperature=0.5, new_weight=0.9)[:3:2]), (6, 5)),
    "sinkhorn": (lambda x: protokernels.sinkhorn(x, epsilon=0.5, num_iters=4).plan, (3, 4, 5)),
    "sinkhorn_divergence": (lambda x: protokernels.sinkhorn_divergence(x, x.flip(-2), epsilon=1.0, num_iters=4), (3, 4, 5)),
    "supcon_loss": (lambda x: protokernels.supcon_loss(x, torch.arange(6) % 2), (6, 5)),
    "nt_xent_loss": (lambda x: protokernels.nt_xent_loss(x, x.flip(-1)), (6, 5)),
    "transform": (lambda x: protokernels.transform(x, torch.full((2, 7), 0.3), seed=torch.arange(2)), (2, 1, 6, 5)),
    "affine_warp": (lambda x: protokernels.affine_warp(x, torch.eye(2, 3).expand(2, 2, 3)), (2, 1, 6, 5)),
}  # fmt: skip


class TestTransforms:
    @pytest.mark.parametrize("chosen", ["auto", "reference"])
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_grad_and_vmap_agree_with_autograd_and_a_loop(self, name: str, chosen: Any) -> None:
        with backend.use(chosen):
            self._compare(*FUNCTIONS[name])

    @staticmethod
    def _compare(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
        x = draw(3, *shape).detach()

        def loss(one: Tensor) -> Tensor:
            return function(one).square().sum()

        one = x[0].clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(one), one)
        torch.testing.assert_close(torch.func.grad(loss)(x[0]), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            torch.func.vmap(loss)(x), torch.stack([loss(one) for one in x]), rtol=1e-5, atol=1e-6
        )
        slopes = torch.func.vmap(torch.func.grad(loss))(x)
        torch.testing.assert_close(slopes[0], expected, rtol=1e-5, atol=1e-6)

    @needs_native
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_autocast_computes_in_float32_as_without(self, name: str) -> None:
        function, shape = FUNCTIONS[name]
        x = draw(*shape).detach()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = function(x)
        torch.testing.assert_close(found, function(x), rtol=1e-6, atol=1e-7)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@needs_native
class TestMemory:
    @pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
    @pytest.mark.parametrize("name", WORK)
    def test_many_calls_do_not_grow_the_process(self, name: str) -> None:
        with backend.use("native"):
            for _ in range(CALLS // 3):  # allocators and caches fill
                value_of(name)
            gc.collect()
            before = resident()
            for _ in range(CALLS):
                value_of(name)
            gc.collect()
        growth = resident() - before
        print(f"{name}: {growth:,} bytes after {CALLS:,} calls")  # shown by -rP
        # a kept tensor is larger; pages come and go
        assert growth < 2**21 + 400 * CALLS, f"{name} grew the process by {growth:,} bytes in {CALLS:,} calls"
