# SPDX-License-Identifier: MIT
"""What trainings of a segmentation network share: stages that runs share, notes about an epoch, prediction, locks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("accelerate", reason="training needs the extra protokernels[train]")

from protokernels.data.volumes import LabelledVolume
from protokernels.training import RunFolder, Session, make_accelerator
from protokernels.training.files import exclusive
from protokernels.training.runs import RunSettings
from protokernels.training.segmentation import Stages, StageSettings, predict_volumes

SETTINGS = StageSettings(epochs=3, steps=0, batch_size=4, learning_rate=0.1, weight_decay=0.0)


def stages(folder: Path, seed: int = 0) -> Stages:
    settings = RunSettings(device="cpu", quiet=True)
    return Stages(RunFolder(folder / "run"), folder / "stages", seed, make_accelerator("cpu"), settings)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(2, 1)


def fit(session: Session) -> None:
    values = torch.arange(16.0).view(8, 2)
    for epoch in session.epochs():
        for step in session.steps():
            loss = session.model(values[step.indices]).square().mean()
            session.optimise(loss, step)
            session.record(step, loss=loss)
        if epoch == 1:
            session.note(score=0.5)


def never(session: Session) -> None:
    for _ in session.epochs():
        raise AssertionError("this stage is trained already")


class TestStages:
    def test_a_stage_is_trained_once_and_found_by_others(self, tmp_path: Path) -> None:
        first, second = model(), model()
        before = {name: value.clone() for name, value in first.state_dict().items()}
        summary = stages(tmp_path).before("global", {"width": 2}, first, 8, SETTINGS, fit)
        assert (summary["epochs"], summary["steps"], summary["images"], summary["batch_size"]) == (3, 6, 8, 4)
        assert stages(tmp_path).before("global", {"width": 2}, second, 8, SETTINGS, never) == summary
        for name, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[name]) and not torch.equal(value, before[name])

    @pytest.mark.parametrize("changed", ["record", "seed", "name"])
    def test_what_differs_is_another_stage(self, changed: str, tmp_path: Path) -> None:
        stages(tmp_path).before("global", {"width": 2}, model(), 8, SETTINGS, fit)
        record = {"width": 3 if changed == "record" else 2}
        name = "local" if changed == "name" else "global"
        stages(tmp_path, int(changed == "seed")).before(name, record, model(), 8, SETTINGS, fit)
        assert len([path for path in (tmp_path / "stages").iterdir() if path.is_dir()]) == 2

    def test_the_order_of_slices_differs_between_stages(self) -> None:
        plans = [SETTINGS.plan(8, 0, name) for name in ("global", "local")]
        assert plans[0].seed != plans[1].seed and plans[0].drop_last

    def test_a_note_stands_in_its_epoch_only(self, tmp_path: Path) -> None:
        RunFolder.create(tmp_path / "run", {})
        summary = stages(tmp_path).last("fine_tune", model(), 8, SETTINGS, fit)
        scores = [line.get("score") for line in RunFolder(tmp_path / "run").metrics()]
        assert scores == [None, 0.5, None] and "folder" not in summary
        assert "score" not in summary["last_epoch"] and "seconds" not in summary["last_epoch"]

    def test_fewer_slices_than_a_batch(self) -> None:
        assert SETTINGS.plan(3, 0, "").batch_size == 3
        assert replace(SETTINGS, steps=7).plan(3, 0, "").epochs == 7


class Shift(nn.Module):
    """Class 1 where a pixel is above the middle; behaves otherwise in training."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        middle = 2.0 if self.training else 0.5
        return torch.cat([torch.zeros_like(images), images - middle], dim=1)


class TestPrediction:
    def test_volumes_keep_their_shapes(self) -> None:
        random = np.random.default_rng(0)
        images = [random.random((slices, 4, 6), dtype=np.float32) for slices in (5, 1)]
        volumes = [
            LabelledVolume(str(i), str(i), image, np.zeros(image.shape, np.uint8)) for i, image in enumerate(images)
        ]
        network = Shift().train()
        predictions = predict_volumes(network, volumes, batch_size=2)
        assert network.training and network.sizes == [2, 2, 1, 1]
        for prediction, image in zip(predictions, images, strict=True):
            assert prediction.dtype == np.uint8 and np.array_equal(prediction, image > 0.5)


@pytest.mark.skipif(os.name != "posix", reason="locks of files are POSIX's")
class TestExclusive:
    HOLDER = (
        "import sys, time\nfrom pathlib import Path\nfrom protokernels.training.files import exclusive\n"
        "with exclusive(Path(sys.argv[1])):\n    print('inside', flush=True)\n    time.sleep(60)\n"
    )

    def test_a_killed_process_leaves_it(self, tmp_path: Path) -> None:
        lock = tmp_path / "lock"
        holder = subprocess.Popen([sys.executable, "-c", self.HOLDER, str(lock)], stdout=subprocess.PIPE, text=True)
        try:
            assert holder.stdout is not None and holder.stdout.readline().strip() == "inside"
            with exclusive(lock, wait=False) as free:
                assert not free
            with exclusive(lock, wanted=False, wait=False) as free:
                assert free
        finally:
            holder.kill()
            holder.wait()
        start = time.monotonic()
        with exclusive(lock) as free:
            assert free and time.monotonic() - start < 30
        with exclusive(lock, wait=False) as free:
            assert free

    @pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])  # NFS, Lustre
    def test_a_file_system_without_locks_keeps_nobody_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        def refuse(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("fcntl.flock", refuse)
        with exclusive(tmp_path / "lock", wait=False) as free:
            assert free
