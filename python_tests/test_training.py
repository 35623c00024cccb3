# SPDX-License-Identifier: MIT
"""Randomness, the training session, summaries and several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate", reason="training needs the extra protokernels[train]")

from protokernels.training import (
    CheckpointStore,
    Interrupted,
    Plan,
    RunFolder,
    Session,
    derived_generator,
    epoch_order,
    make_accelerator,
    summarize_runs,
)
from protokernels.training.randomness import random_state, set_random_state
from python_tests import forks
from python_tests.distributed import two_processes


class Toy(nn.Module):
    """Regression with dropout, so that the global generator's state matters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y


def train_toy(
    folder: Path, *, epochs: int = 4, stop_at: int | None = None, resume: bool = False, batch_size: int = 7
) -> dict[str, Any]:
    """Trains the toy and returns its newest checkpoint; sends itself Ctrl-C before step ``stop_at``."""
    torch.manual_seed(0)
    model = Toy()
    data = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    run = RunFolder.create(folder, {"toy": True}, resume=resume)
    plan = Plan(count=len(data), epochs=epochs, batch_size=batch_size, seed=3)
    session = Session(run, make_accelerator("cpu"), model, optimizer, scheduler, plan, resume, quiet=True)
    done = 0
    for _ in session.epochs():
        for step in session.steps():
            if done == stop_at:
                os.kill(os.getpid(), signal.SIGINT)
            x = data[step.indices]
            loss = (session.model(x + 0.1 * step.normal(4)) - x.sum(dim=1, keepdim=True)).square().mean()
            session.optimise(loss, step)
            session.record(step, loss=loss)
            done += 1
    state = run.checkpoints.load()
    assert state is not None
    return state


def assert_same_bits(first: Any, second: Any, where: str = "state") -> None:
    """Equality of nested containers, bit for bit in tensors; wall-clock seconds are left out."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second), where
    elif isinstance(first, dict):
        assert list(first) == list(second), where
        for key in first:
            if key != "seconds":
                assert_same_bits(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same_bits(*pair, f"{where}[{index}]")
    else:
        assert first == second, where


class TestRandomness:
    def test_epoch_order(self) -> None:
        order = epoch_order(100, 0, 0)
        assert torch.equal(order.sort().values, torch.arange(100))
        assert torch.equal(order, epoch_order(100, 0, 0))
        assert not torch.equal(order, epoch_order(100, 0, 1)) and not torch.equal(order, epoch_order(100, 1, 0))

    def test_derived_generators_do_not_touch_the_global_one(self) -> None:
        before = torch.get_rng_state()
        first = torch.randn(5, generator=derived_generator(0, "noise", 1))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(first, torch.randn(5, generator=derived_generator(0, "noise", 1)))
        assert not torch.equal(first, torch.randn(5, generator=derived_generator(0, "noise", 2)))

    def test_state_goes_through_a_checkpoint(self, tmp_path: Path) -> None:
        import random

        store = CheckpointStore(tmp_path)
        store.save(random_state(), epoch=0)
        expected = (torch.rand(3), random.random())
        torch.rand(17), random.random()
        state = store.load()
        assert state is not None
        set_random_state(state)
        assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]


class TestSession:
    def test_visits_every_image_once_per_epoch_in_the_seeded_order(self, tmp_path: Path) -> None:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        run = RunFolder.create(tmp_path, {})
        plan = Plan(count=10, epochs=2, batch_size=4, seed=5)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        session = Session(run, make_accelerator("cpu"), model, optimizer, scheduler, plan, quiet=True)
        seen: list[list[int]] = []
        progress = []
        for epoch in session.epochs():
            seen.append([])
            for step in session.steps():
                seen[epoch] += step.indices.tolist()
                progress.append(step.progress)
                session.optimise(session.model(torch.ones(1, 1)).sum(), step)
                session.record(step, value=step.indices.double().mean())
        assert seen == [epoch_order(10, 5, 0).tolist(), epoch_order(10, 5, 1).tolist()]
        assert progress == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
        assert [line["value"] for line in run.metrics()] == pytest.approx([4.5, 4.5])  # a mean over images, not batches

    @pytest.mark.parametrize("stop_at", [0, 3, 5, 6, 11, 23])
    def test_ctrl_c_then_resume_ends_with_the_same_bits(self, tmp_path: Path, stop_at: int) -> None:
        expected = train_toy(tmp_path / "whole")
        with pytest.raises(Interrupted, match="--resume continues") as stop:
            train_toy(tmp_path / "stopped", stop_at=stop_at)
        assert stop.value.exit_code == 130
        state = train_toy(tmp_path / "stopped", resume=True)
        assert_same_bits(expected, state)
        kept = [
            [line | {"seconds": 0} for line in RunFolder(tmp_path / name).metrics()] for name in ("whole", "stopped")
        ]
        assert kept[0] == kept[1]

    def test_a_batch_of_more_images_than_there_are_is_named(self, tmp_path: Path) -> None:
        with pytest.warns(RuntimeWarning, match="batch_size is 50, but there are 40 training images") as caught:
            capped = train_toy(tmp_path / "capped", epochs=1, batch_size=50)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            whole = train_toy(tmp_path / "whole", epochs=1, batch_size=40)
        assert_same_bits(capped["model"], whole["model"])

    def test_signal_handlers_are_put_back(self, tmp_path: Path) -> None:
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        train_toy(tmp_path, epochs=1)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

    def test_kill_9_at_any_moment_then_resume_ends_with_the_same_bits(self, tmp_path: Path) -> None:
        expected = train_toy(tmp_path / "whole", epochs=60)
        code = (
            "import pathlib, sys\n"
            f"sys.path.append({str(Path(__file__).resolve().parents[1])!r})\n"
            "from python_tests.test_training import train_toy\n"
            "print('started', flush=True)\n"
            f"train_toy(pathlib.Path({str(tmp_path / 'killed')!r}), epochs=60, resume=True)\n"
        )
        kills = 0
        for delay in (0.05, 0.15, 0.3, 0.4):
            fork = forks.Fork(code, tmp_path, os.environ, name=str(delay))
            fork.wait_for("started\n", seconds=120)
            time.sleep(delay)
            kills += fork.finish(seconds=0).returncode == -signal.SIGKILL
        assert kills >= 2, "training was too fast for the kills to mean anything"
        state = train_toy(tmp_path / "killed", epochs=60, resume=True)
        assert_same_bits(expected, state)
        assert [line["epoch"] for line in RunFolder(tmp_path / "killed").metrics()] == list(range(1, 61))

    def test_divergence_is_reported_and_the_last_sound_checkpoint_stays(self, tmp_path: Path) -> None:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        run = RunFolder.create(tmp_path, {})
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        plan = Plan(count=4, epochs=3, batch_size=4, seed=0)
        session = Session(run, make_accelerator("cpu"), model, optimizer, scheduler, plan, quiet=True)
        with pytest.raises(FloatingPointError, match="epoch 2: loss is not finite"):
            for epoch in session.epochs():
                for step in session.steps():
                    session.optimise(session.model(torch.ones(1, 1)).sum(), step)
                    session.record(step, loss=float("nan") if epoch == 1 else 1.0)
        assert [file.epoch for file in run.checkpoints.files()] == [1]

    def test_fp16_needs_a_gpu(self) -> None:
        with pytest.raises(ValueError, match="bf16"):
            make_accelerator("cpu", "fp16")

    @pytest.mark.parametrize("field", ["count", "epochs", "batch_size"])
    def test_plan_checks(self, field: str) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            Plan(**({"count": 1, "epochs": 1, "batch_size": 1, "seed": 0} | {field: 0}))


class TestSummary:
    def test_mean_deviation_and_number(self) -> None:
        runs = [{"knn": {"accuracy": value}, "unit": "mm", "name": str(value)} for value in (0.5, 0.6, 0.9)]
        summary = summarize_runs(runs)
        assert summary["knn"]["accuracy"]["mean"] == pytest.approx(2 / 3)
        assert summary["knn"]["accuracy"]["std"] == pytest.approx(0.2081666)  # denominator n - 1
        assert summary["knn"]["accuracy"]["runs"] == 3
        assert summary["unit"] == "mm" and "name" not in summary  # a text in which runs differ says nothing of all
        assert summarize_runs(runs[:1])["knn"]["accuracy"]["std"] is None

    def test_a_score_that_one_run_has_none_of_is_that_of_the_others(self) -> None:
        """No distance of a class that one seed's network predicts nowhere."""
        runs = [{"hausdorff95": {"mean": None}}, {"hausdorff95": {"mean": 3.0}}, {"hausdorff95": {"mean": 5.0}}]
        assert summarize_runs(runs)["hausdorff95"]["mean"] == {"mean": 4.0, "std": pytest.approx(2**0.5), "runs": 2}
        assert summarize_runs(runs[:1]) == {"hausdorff95": {}}


def torchrun(tmp_path: Path, *arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Runs the helper script in ``processes`` gloo processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*command, str(two_processes.__file__), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )


def initial_state(run: RunFolder) -> dict[str, torch.Tensor]:
    """The state of a VAESim run before its first step."""
    from protokernels.papers import vaesim
    from protokernels.training import seed_everything

    seed_everything(run.config()["seed"])
    return vaesim.VAESim(vaesim.VAESimConfig.from_dict(run.config()["config"]), channels=1).state_dict()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One start of two processes for all tests of an undisturbed run: they check batch normalisation, then train."""
    folder = tmp_path_factory.mktemp("pair")
    return torchrun(folder, "batch-norm", "train", str(folder / "run")), folder / "run"


class TestTwoProcesses:
    def test_batch_norm_and_gather(self, pair: tuple[subprocess.CompletedProcess[str], Path]) -> None:
        """Value, gradient and running statistics equal those of one process with all images; the shares are uneven."""
        result, _ = pair
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("batch-norm ok") == 2

    def test_two_processes_train_like_one(
        self, pair: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """VAESim on digits, batches of odd size: same losses and parameters up to rounding, and one run folder."""
        result, folder = pair
        assert result.returncode == 0, result.stderr
        self._compare(folder, 2, tmp_path, monkeypatch)

    @pytest.mark.skipif(os.environ.get("PROTOKERNELS_LARGE") != "1", reason="four processes: set PROTOKERNELS_LARGE=1")
    def test_four_processes_train_like_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        forks.run_ranks(two_processes.__file__, tmp_path, [["train", tmp_path / "four"]] * 4)
        self._compare(tmp_path / "four", 4, tmp_path, monkeypatch)

    @staticmethod
    def _compare(folder: Path, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.optim, "Adam", torch.optim.Adam)  # taken back at the end: the worker replaces it
        two_processes.train(str(tmp_path / "one"), resume=False)
        one, two = RunFolder(tmp_path / "one"), RunFolder(folder)
        assert two.config()["processes"] == processes
        assert len(one.metrics()) == len(two.metrics()) == 2
        for first, second in zip(one.metrics(), two.metrics(), strict=True):
            for name in ("loss", "reconstruction", "kl"):
                assert first[name] == pytest.approx(second[name], rel=1e-4), name
        states = [run.checkpoints.load() for run in (one, two)]
        assert states[0] is not None and states[1] is not None
        start = initial_state(one)
        for name, value in states[0]["model"].items():
            if name in ("decoder.layers.0.bias", "decoder.layers.3.bias", "decoder.layers.6.bias"):
                continue  # the batch normalisation behind them takes their gradient away but for rounding
            if value.is_floating_point():
                way, difference = value - start[name], states[1]["model"][name] - value
                assert difference.norm() <= 1e-2 * way.norm(), (name, float(difference.norm() / way.norm()))
            else:
                assert torch.equal(states[1]["model"][name], value), name

    def test_interrupted_together_and_resumed(
        self, pair: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path
    ) -> None:
        """A signal that reaches one process only stops both after the same step; resuming ends as if never stopped."""
        stopped = torchrun(tmp_path, "interrupt", str(tmp_path / "run"))
        assert stopped.returncode != 0
        assert stopped.stdout.count("interrupted at") == 2 and len(set(stopped.stdout.split("\n")) - {""}) == 1
        forks.run_ranks(two_processes.__file__, tmp_path, [["train", tmp_path / "run", "--resume"]] * 2)
        whole, folder = pair
        assert whole.returncode == 0, whole.stderr
        states = [RunFolder(path).checkpoints.load() for path in (tmp_path / "run", folder)]
        assert states[0] is not None and states[1] is not None
        assert_same_bits(states[0]["model"], states[1]["model"])
