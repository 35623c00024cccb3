# SPDX-License-Identifier: MIT
"""Data that are not those a run began with: told apart wherever a run is continued, shown or passed over."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("accelerate", reason="training needs the extra protokernels[train]")

from protokernels.data import (
    DataError,
    ImageDataset,
    LabelledVolume,
    SegmentationDataset,
    Split,
    load_segmentation,
    phantoms,
)
from protokernels.data.content import content_md5
from protokernels.papers import local_contrast, optimized_views, vaesim
from protokernels.results import Job, run_jobs
from protokernels.sweeps import SweepOptions, points_of, run_sweep
from protokernels.training import RunFolder, RunFolderError
from protokernels.training.runs import RunSettings, check_same_data
from protokernels.training.scoring import evaluation_splits
from python_tests.nifti_files import write_decathlon
from python_tests.test_experiment import Brightness, Config
from python_tests.test_training_segmentation import SETTINGS as STAGE
from python_tests.test_training_segmentation import fit, model, stages

QUIET: dict[str, Any] = {"quiet": True, "device": "cpu"}


def images(seed: int = 0, count: int = 6) -> Split:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    return Split(pixels, np.arange(count) % 2, groups=np.array([f"p{index}" for index in range(count)]))


def dataset(**changes: Any) -> ImageDataset:
    return ImageDataset("mine", replace(images(), **changes), None, images(1), ("no", "yes"))


def volumes(provenance: dict[str, Any], **changes: Any) -> SegmentationDataset:
    pixels = np.linspace(0, 1, 32, dtype=np.float32).reshape(2, 4, 4)
    parts = [LabelledVolume(name, name, pixels, (pixels > 0.5).astype(np.uint8)) for name in "abc"]
    train, val, test = ((part,) for part in (replace(parts[0], **changes), *parts[1:]))
    return SegmentationDataset("mine", train, val, test, ("no", "yes"), provenance)


class TestContent:
    def test_every_value_of_images_counts(self) -> None:
        pixels = images().images.copy()
        pixels[0, 0, 0] ^= 1
        targets = np.zeros((6, 1), np.uint8)
        with_targets = ImageDataset(
            "mine",
            replace(images(), targets=targets),
            None,
            replace(images(1), targets=targets),
            ("no", "yes"),
            {},
            ("x",),
        )
        others = (
            dataset(images=pixels), dataset(labels=np.arange(6) // 3), dataset(groups=np.array(list("abcdef"))), with_targets,
            ImageDataset("mine", images(), images(1), images(1), ("no", "yes")),
        )  # fmt: skip
        found = [content_md5(other) for other in (dataset(), *others)]
        assert len(set(found)) == 6
        stored_otherwise = dataset(images=np.asfortranarray(images().images))
        assert content_md5(stored_otherwise) == content_md5(dataset()) == found[0]

    @pytest.mark.parametrize("source", [{"md5": "x"}, {"md5s": {"acdc.npz": "x"}}, phantoms.provenance()])
    def test_files_stand_for_computed_slices(self, source: dict[str, Any]) -> None:
        """Whose last bits are others on another processor, where a run may be continued."""
        other = {"image": np.zeros((2, 4, 4), np.float32)}
        assert content_md5(volumes({})) != content_md5(volumes({}, **other))
        assert content_md5(volumes(source)) == content_md5(volumes(source, **other))
        label = {"label": np.zeros((2, 4, 4), np.uint8)}
        assert content_md5(volumes(source)) != content_md5(volumes(source, **label))


class TestRuns:
    @pytest.mark.parametrize(
        ("before", "now", "message"),
        [
            ({"md5s": {"a": "1", "b": "2"}}, {"md5s": {"a": "3", "b": "2"}}, "a has md5 3, then 1"),
            ({"md5s": {"a": "1"}, "content_md5": "4"}, {"md5s": {"a": "3"}, "content_md5": "5"}, "a has md5 3, then 1"),
            ({"md5": "1"}, {"md5": "2"}, "the folder of volumes has md5 2, then 1"),
            ({"content_md5": "1"}, {"content_md5": "2"}, "the data set has md5 2, then 1"),
            ({"md5": "1"}, {"md5": "1", "content_md5": "2"}, ""),  # an older run
            ({"md5s": {"a": "1"}}, {"md5s": {"b": "2"}}, ""),
        ],
    )
    def test_files_folders_and_values_are_compared(
        self, before: dict[str, Any], now: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        run = RunFolder.create(tmp_path / "run", {})
        run.write_environment(data=before)
        if not message:
            check_same_data(run, now)
            return
        with pytest.raises(RunFolderError, match=f"run was begun with other data: {message}; put the data back"):
            check_same_data(run, now)

    def test_changed_volumes_are_noticed(self, tmp_path: Path) -> None:
        write_decathlon(tmp_path / "mine", count=5)
        run = RunFolder.create(tmp_path / "run", {})
        first = load_segmentation(tmp_path / "mine", image_size=8, split="paper")
        run.write_environment(data=first.provenance)
        image, *_ = sorted((tmp_path / "mine" / "imagesTr").iterdir())
        image.write_bytes(sorted((tmp_path / "mine" / "imagesTr").iterdir())[1].read_bytes())
        second = load_segmentation(tmp_path / "mine", image_size=8, split="paper")
        with pytest.raises(RunFolderError, match="the folder of volumes has md5"):
            check_same_data(run, second.provenance)

    def test_values_in_memory_are_told_apart(self, tmp_path: Path) -> None:
        paper, config = Brightness(), Config(epochs=1)
        paper.train(config, tmp_path / "run", dataset=dataset(), **QUIET)
        other = dataset(images=images(2).images)
        for work in (
            lambda: paper.train(config, tmp_path / "run", dataset=other, resume=True, **QUIET),
            lambda: paper.evaluate(tmp_path / "run", dataset=other),
            lambda: paper.draw_figures(tmp_path / "run", dataset=other),
        ):
            with pytest.raises(RunFolderError, match="the data set has md5"):
                work()
        paper.train(config, tmp_path / "run", dataset=dataset(), resume=True, **QUIET)

    @pytest.mark.parametrize("paper", [vaesim, optimized_views, local_contrast], ids=lambda paper: paper.__name__)
    def test_a_data_set_of_another_class_is_named(self, paper: Any, tmp_path: Path) -> None:
        segmentation = paper is local_contrast
        wrong = dataset() if segmentation else volumes({})
        needed = "SegmentationDataset; got ImageDataset" if segmentation else "ImageDataset; got SegmentationDataset"
        with pytest.raises(TypeError, match=rf"dataset must be a protokernels\.data\.{needed}"):
            paper.train(paper.CONFIG.preset("fair"), tmp_path / "run", dataset=wrong, **QUIET)
        assert not (tmp_path / "run").exists()

    def test_a_shared_stage_of_other_data_is_not_taken(self, tmp_path: Path) -> None:
        first, second = stages(tmp_path), stages(tmp_path)
        first.run.path.mkdir()
        first.run.write_environment(data={"md5": "1"})
        first.before("global", {"width": 2}, model(), 8, STAGE, fit)
        second.run.write_environment(data={"md5": "2"})
        with pytest.raises(RunFolderError, match=r"stages/global-\w+ was begun with other data"):
            second.before("global", {"width": 2}, model(), 8, STAGE, fit)


def test_classes_that_training_does_not_show_are_warned_of() -> None:
    unseen = dataset(labels=np.zeros(6, np.int64))
    paper, config = Brightness(), Config(batch_size=2)
    assert paper.provenance(config, dataset()) == {}
    assert paper.provenance(config, unseen)["warnings"] == [
        "no training image has the label yes: nothing can be learned of it, and its scores say nothing"
    ]
    nowhere = ImageDataset("mine", images(), None, images(1), ("no", "yes", "of nobody"))
    assert paper.provenance(config, nowhere) == {}


def test_slices_of_another_size_than_predictions_would_have_are_refused(tmp_path: Path) -> None:
    config = local_contrast.CONFIG.preset("fair", image_size=16)
    with pytest.raises(
        ValueError, match="slices of the data set are 4 x 4 pixels and image_size is 16, to which predictions"
    ):
        local_contrast.train(config, tmp_path / "run", dataset=volumes({}), **QUIET)
    assert not (tmp_path / "run").exists()


def test_classes_that_no_labelled_volume_has_are_warned_of() -> None:
    config = local_contrast.CONFIG.preset("fair")
    provenance = local_contrast.EXPERIMENT.provenance
    assert provenance(config, volumes({}))["warnings"] == []
    unseen = volumes({}, label=np.zeros((2, 4, 4), np.uint8))
    assert provenance(config, unseen)["warnings"] == [
        "no labelled volume has the label yes: nothing can be learned of it, and its scores say nothing"
    ]


def test_what_chooses_shares_no_patient_with_training() -> None:
    patients = np.array(["a", "b", "c"] * 2)  # the last sixth would be of c, who is in training as well
    train, scored = evaluation_splits(dataset(groups=patients), selection=True)
    held = scored["held-out"]
    assert train.groups is not None and held.groups is not None and len(train) + len(held) == 6
    assert set(train.groups).isdisjoint(held.groups) and len(held) == 2
    assert evaluation_splits(dataset(groups=None), selection=True)[1]["held-out"].images.shape == (1, 8, 8)


def test_what_chooses_has_all_classes_where_images_stand_class_by_class() -> None:
    """A file made of one folder after the other; the last sixth would be of one class."""
    labels = np.repeat([0, 1, 2], 20)
    parts = [
        Split(np.arange(60, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2), order)
        for order in (labels, labels[::-1].copy())
    ]
    for train in parts:
        train, scored = evaluation_splits(ImageDataset("made", train, None, train, ("a", "b", "c")), selection=True)
        held = scored["held-out"]
        assert (
            np.bincount(train.labels).min() >= 16
            and np.bincount(held.labels, minlength=3).min() >= 3
            and len(held) == 10
        )
        assert not set(train.images[:, 0, 0]) & set(held.images[:, 0, 0])


class TestJobs:
    """Tables, sweeps and ablations pass over what is finished."""

    class Paper(Brightness):
        """Its data is at hand, or not there any more."""

        data: ImageDataset | None = dataset()

        def load(self, config: Config, data_root: Any = None, *, download: bool = False) -> ImageDataset:
            self.loaded += 1
            if self.data is None:
                raise DataError("no such file")
            return self.data

    def jobs(self, paper: Brightness, folder: Path) -> list[Job]:
        settings = RunSettings(resume=True, quiet=True, device="cpu")
        return [Job(name, "brightness", paper, Config(epochs=1), folder / name, settings) for name in ("a", "b")]

    def test_other_data_is_noticed(self, tmp_path: Path) -> None:
        paper = self.Paper()
        assert not run_jobs(self.jobs(paper, tmp_path)).failed and paper.loaded == 1  # of both
        paper.data = dataset(images=images(2).images)
        (tmp_path / "a").rename(tmp_path / "elsewhere")
        with pytest.raises(RunFolderError, match="b was begun with other data"):
            run_jobs(self.jobs(paper, tmp_path))
        assert not (tmp_path / "a").exists()  # nothing was trained that would stand beside it
        (tmp_path / "elsewhere").rename(tmp_path / "a")
        assert not run_jobs(self.jobs(paper, tmp_path), keep_finished=True).failed
        paper.data = dataset()
        assert not run_jobs(self.jobs(paper, tmp_path)).failed

    def test_a_run_that_is_not_finished_fails_alone(self, tmp_path: Path) -> None:
        paper = self.Paper()
        run_jobs(self.jobs(paper, tmp_path)[:1])
        (tmp_path / "a" / "results.json").unlink()
        paper.data = dataset(images=images(2).images)
        outcome = run_jobs(self.jobs(paper, tmp_path))
        assert list(outcome.failed) == ["a"] and "was begun with other data" in outcome.failed["a"]

    def test_a_sweep_has_no_points_of_other_data(self, tmp_path: Path) -> None:
        paper, options = self.Paper(), SweepOptions(out=tmp_path)
        settings = RunSettings(resume=True, quiet=True, device="cpu")

        def sweep(epochs: int) -> None:
            points = points_of(Config(), {"epochs": [epochs]}, grid=False)
            run_sweep(paper, "brightness", Config(), points, options, settings)

        sweep(1)
        paper.data = dataset(images=images(2).images)
        for epochs in (1, 2):  # the same point, and another one beside it
            with pytest.raises(RunFolderError, match="epochs-1 was begun with other data"):
                sweep(epochs)
        assert not (tmp_path / "epochs-2").exists()
        paper.data = None  # not here any more: what is finished is shown
        sweep(1)

    def test_finished_runs_do_not_need_their_data(self, tmp_path: Path) -> None:
        paper = self.Paper()
        run_jobs(self.jobs(paper, tmp_path))
        paper.data = None
        seen: list[str] = []
        assert not run_jobs(self.jobs(paper, tmp_path), after=lambda job, results: seen.append(job.name)).failed
        assert seen == ["a", "b"]

    def test_what_local_contrast_loads(self) -> None:
        experiment, config = local_contrast.EXPERIMENT, local_contrast.CONFIG.preset("fair")
        keys = {
            experiment.data_key(replace(config, **change))
            for change in (
                {},
                {"fold": 1},
                {"split": "official"},
                {"image_size": 64},
                {"data": "acdc"},
                {"labelled": 0.5},
            )
        }
        assert len(keys) == 5  # the share of labels is cut later


def test_what_is_written_down(tmp_path: Path) -> None:
    Brightness().train(Config(epochs=1), tmp_path / "run", dataset=dataset(), **QUIET)
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["data"]["content_md5"] == content_md5(dataset())
