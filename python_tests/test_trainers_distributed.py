# SPDX-License-Identifier: MIT
"""Trainers in several processes give what one gives, up to rounding. VAESim is in test_training.py, the contrastive autoencoder in
test_contrastive_autoencoder_runs.py."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="training needs the extra protokernels[train]")

import torch

from protokernels.training import RunFolder
from python_tests.distributed import trainers_worker as worker
from python_tests.forks import run_ranks

SIZES = [
    2,
    pytest.param(
        4,
        marks=pytest.mark.skipif(
            os.environ.get("PROTOKERNELS_LARGE") != "1", reason="four processes: set PROTOKERNELS_LARGE=1"
        ),
    ),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(worker.__file__, folder, [[folder / "runs"]])
    return folder / "runs"


@pytest.mark.parametrize("processes", SIZES)
def test_they_train_like_one(processes: int, alone: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_ranks(worker.__file__, tmp_path, [[tmp_path / "runs", rank, processes, port] for rank in range(processes)])
    for name in worker.TINY:
        one, several = RunFolder(alone / name), RunFolder(tmp_path / "runs" / name)
        assert several.config()["processes"] == processes
        first, second = one.metrics(), several.metrics()
        assert len(first) == len(second) >= 1
        for a, b in zip(first, second, strict=True):
            # An AUC counts pairs: two images that change places by rounding move it by a step.
            skipped = ("seconds", "auc", "auc_std")
            compared = {key for key, value in a.items() if isinstance(value, float) and key not in skipped}
            assert "loss" in compared
            for key in compared:
                assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-5), (name, key)
        if name == "optiml":
            before, after = ((run.results() or {})["splits"]["test"]["labels"] for run in (one, several))
            for way in ("probe", "fine_tune"):
                area = before[way]["10%"]["macro_auroc"]
                assert after[way]["10%"]["macro_auroc"] == pytest.approx(area, abs=0.02), way
        expected, found = one.checkpoint()["model"], several.checkpoint()["model"]
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4, msg=f"{name}: {key}")
