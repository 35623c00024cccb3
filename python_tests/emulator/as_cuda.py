# SPDX-License-Identifier: MIT
"""A pytest plugin: the operators on CPU tensors run the CUDA kernels, in the emulator. Tests of the public functions test the kernels.

    python -m pytest -p python_tests.emulator.as_cuda python_tests/test_warp.py

`--emulator-seed` is the order of threads (any gives the same bits), `--emulator-architecture` the GPU (sm_89 has less shared memory,
and other kernels where that is too little). A launch takes milliseconds and more: choose files, or tests with -k.

Where the package asks for the device it takes CUDA's way; the reference backend is as it was. What the torch side of `csrc/ops` does for
CUDA is not run but written once more in `operators.py`: a mistake there does not show.

Tests in `OTHERWISE` are skipped. Others may fail beyond the files of the five ops: those that count operators, or compare with another
process, which starts without the plugin (two of test_callers.py).
"""

from __future__ import annotations

import importlib
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from protokernels import _native

from .build import missing_tools
from .operators import LAUNCHES, OPERATORS, device

SHARED_KILOBYTES = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227}
STATISTICS = 3  # CONTRASTIVE_STATISTICS_CUDA of csrc/ops/contrastive.h
UNSEEN = "on CUDA masses, epsilons, probabilities and labels are not looked at"
ROUNDED = "float32 on CUDA is rounded more where scores, potentials, penalties or embeddings are huge"
UNCHECKED = "the operators' own checks are not run in the emulator"
OTHERWISE = {
    "test_contrastive_scores.py::TestGradient::test_of_one_set": ROUNDED,
    "test_contrastive_scores.py::TestGradient::test_of_two_views": ROUNDED,
    "test_contrastive_scores.py::TestValue::test_vectors_that_coincide_have_the_entropy_as_loss_at_any_temperature": ROUNDED,
    "test_contrastive_torch.py::TestContract::test_views_of_different_types_are_an_error_of_the_operator": UNCHECKED,
    "test_nearest_assign.py::TestContract::test_what_would_reach_beyond_memory_is_refused": UNCHECKED,
    "test_nearest_seed.py::TestContract::test_what_would_reach_beyond_memory_is_refused": UNCHECKED,
    "test_nearest_seed.py::TestValue::test_the_kernel_gives_the_definitions_bits": "there is no CUDA kernel: torch rounds",
    "test_prototypes_edges.py::TestValue::test_gradients_beside_the_longest_vectors": ROUNDED,
    "test_prototypes_update.py::TestContract::test_a_label_of_k_or_more_is_an_error": UNSEEN,
    "test_prototypes_update.py::TestSampling::test_what_cannot_be_drawn_from_is_refused": UNSEEN,
    "test_sinkhorn.py::TestContract::test_more_memory_than_there_is": UNCHECKED,
    "test_sinkhorn.py::TestContract::test_wrong_arguments_are_named": UNSEEN,
    "test_sinkhorn.py::TestValue::test_a_large_penalty_is_no_noise": ROUNDED,
    "test_sinkhorn_edges.py::TestValue::test_masses_that_differ_are_flagged_where_they_are_not_looked_at": UNSEEN,
    "test_sinkhorn_features.py::TestContract::test_wrong_arguments_are_named": UNSEEN,
    "test_sinkhorn_range.py::TestGradient::test_large_potentials": ROUNDED,
    "test_warp_edges.py::TestContract::test_images_of_nearly_the_most_pixels": UNCHECKED,
    "test_warp_noise.py::TestValue::test_far_numbers_exist": "the emulated device has 256 MiB",
}
"""Tests of what is otherwise on CUDA, or in the emulator."""

_library = torch.library.Library("protokernels", "IMPL")  # held, or its kernels would go


def install(seed: int = 1, architecture: str = "sm_80") -> None:
    """From now on operators on CPU tensors run emulated CUDA kernels, in this process."""
    device.seed, device.architecture = seed, architecture
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name, function in OPERATORS.items():
            _library.impl(name, function, "CPU", allow_override=True)
    take_the_way_of_cuda()


def take_the_way_of_cuda() -> None:
    """Where Python asks whether a tensor is on the CPU, or what the GPU has."""
    of_gpu = SimpleNamespace(shared_memory_per_block_optin=1024 * SHARED_KILOBYTES[device.architecture])
    for module, name, answer in (
        ("protokernels.ops._contrastive_autograd", "numbers_kept", lambda x: STATISTICS),
        ("protokernels.ops._contrastive_distributed", "numbers_kept", lambda x: STATISTICS),
        ("protokernels.ops._prototypes_checks", "check_weights", lambda *arguments: None),
        ("protokernels.ops._sinkhorn_features", "_readable", lambda x, mass: without_absent(x, mass[:, :, None])),
        ("protokernels.ops._sinkhorn_problem", "values_are_at_hand", lambda like: False),
        ("protokernels.ops.sinkhorn", "_readable", lambda x, a, b: without_absent(x, a[:, :, None], b[:, None])),
        ("torch.cuda", "get_device_properties", lambda device: of_gpu),
    ):
        place = importlib.import_module(module)
        assert hasattr(place, name), f"{module} has no {name} any more"
        setattr(place, name, answer)


def without_absent(x: Tensor, *masses: Tensor) -> Tensor:
    for mass in masses:
        x = torch.where(mass == 0, 0.0, x)
    return x


# ----------------------------------------------------------------------------------------------------------------- pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("emulated CUDA kernels")
    group.addoption("--emulator-seed", type=int, default=1, help="order of threads; 0: the natural one")
    group.addoption("--emulator-architecture", choices=list(SHARED_KILOBYTES), default="sm_80")


def pytest_configure(config: pytest.Config) -> None:
    missing = missing_tools()
    if _native.LIBRARY is None:
        missing = f"the native library is not built: {_native.PROBLEM}"
    if missing:
        raise pytest.UsageError(missing)
    install(config.getoption("--emulator-seed"), config.getoption("--emulator-architecture"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if reason := OTHERWISE.get(f"{item.path.name}{item.nodeid.partition('[')[0].partition('.py')[2]}"):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if LAUNCHES:  # of this process
        launches = ", ".join(f"{count} {name}" for name, count in sorted(LAUNCHES.items()))
        terminalreporter.write_line(f"launches of emulated CUDA kernels: {launches}")
