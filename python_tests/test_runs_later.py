# SPDX-License-Identifier: MIT
"""What is done with run folders later: evaluated with a damaged checkpoint, continued on other data, read before all seeds are done."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("accelerate", reason="training needs the extra protokernels[train]")

from protokernels.data import load_dataset
from protokernels.papers import contrastive_autoencoder, vaesim
from protokernels.papers.vaesim import VAESimConfig
from protokernels.sweeps import SUMMARY, note
from protokernels.training import RunFolder, RunFolderError, next_free_folder
from protokernels.training.report import results_table
from protokernels.training.runs import RunSettings, load_runs, read_summary
from python_tests.data_files import save

SETTINGS = RunSettings(quiet=True, device="cpu")


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    counts = {"train": 60, "val": 12, "test": 12}
    images = {
        f"{split}_images": generator.integers(0, 256, (count, 16, 16), dtype=np.uint8)
        for split, count in counts.items()
    }
    labels = {f"{split}_labels": (np.arange(count) % 2).astype(np.uint8)[:, None] for split, count in counts.items()}
    return images | labels


@pytest.fixture
def config(tmp_path: Path) -> VAESimConfig:
    data = str(save(tmp_path / "made.npz", arrays()))
    return VAESimConfig.preset(
        "fair", data=data, image_size=16, latent_dim=4, num_prototypes=5, batch_size=30, epochs=3, networks="small"
    )


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"runs": 0}, {"seed": 2**32}, {"runs": 2**70}])
def test_seeds_are_numbers_that_a_generator_takes(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"runs must be at least 1, and every seed at least 0 and below 2\*\*32"):
        RunSettings(**wrong)  # type: ignore[arg-type]


class TestEvaluation:
    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            (
                "results.json",
                '{"complete": tr',
                r"results.json is not valid JSON: .*; remove it, and `protokernels evaluate`",
            ),
            ("results.json", "[1]", "results.json: expected an object with the results of a run; got list; remove it"),
            ("results.json", "[" * 100_000, "results.json is not valid JSON"),
            (
                "environment.json",
                "[1]",
                "environment.json: expected an object with versions and data; got list; remove it",
            ),
            ("metrics.jsonl", "5\n", "metrics.jsonl, line 1: expected an object with an epoch; take the line out"),
            ("metrics.jsonl", "{}\n", "metrics.jsonl, line 1: expected an object with an epoch; take the line out"),
        ],
    )
    def test_a_broken_file_is_named(
        self, file: str, content: str, message: str, config: VAESimConfig, tmp_path: Path
    ) -> None:
        run = RunFolder.create(tmp_path / "run", {"paper": "vaesim", "config": config.record(), "seed": 0})
        run.checkpoints.save({"model": vaesim.VAESim(config, channels=1).state_dict(), "epoch": 1}, epoch=1)
        (run.path / file).write_text(content)
        with pytest.raises(ValueError, match=message):
            vaesim.evaluate(run.path)

    @pytest.mark.parametrize(
        "content", [{"complete": True}, {"complete": True, "paper": "", "config": {}, "splits": 1}]
    )
    def test_results_that_lack_something_are_named(
        self, content: dict[str, Any], config: VAESimConfig, tmp_path: Path
    ) -> None:
        config = replace(config, epochs=1)
        before = vaesim.train(config, tmp_path / "run", figures=False, settings=SETTINGS)
        (tmp_path / "run" / "results.json").write_text(json.dumps(content))
        with pytest.raises(RunFolderError, match=r"results\.json: expected the .* got complete.*; remove it, and "):
            vaesim.train(config, tmp_path / "run", figures=False, settings=replace(SETTINGS, resume=True))
        (tmp_path / "run" / "results.json").unlink()  # as it says
        assert vaesim.evaluate(tmp_path / "run")["splits"] == before["splits"]

    def test_scores_of_an_earlier_epoch_do_not_replace_those_of_the_last(
        self, config: VAESimConfig, tmp_path: Path
    ) -> None:
        vaesim.train(config, tmp_path / "run", figures=False, settings=SETTINGS)
        before = results_of(tmp_path / "run")
        newest = max((tmp_path / "run" / "checkpoints").glob("*.pt"))
        newest.write_bytes(newest.read_bytes()[:1000])
        with (
            pytest.warns(RuntimeWarning, match="in its place"),
            pytest.raises(RunFolderError, match=r"are of epoch 3, .* is of epoch 2; the results stay as they are"),
        ):
            vaesim.evaluate(tmp_path / "run")
        assert results_of(tmp_path / "run") == before

    def test_an_epoch_without_its_checkpoint_is_not_counted(self, config: VAESimConfig, tmp_path: Path) -> None:
        """As after a kill between the line of the metrics and the checkpoint."""
        vaesim.train(config, tmp_path / "run", figures=False, settings=SETTINGS)
        (tmp_path / "run" / "results.json").unlink()
        max((tmp_path / "run" / "checkpoints").glob("*.pt")).unlink()
        results = vaesim.evaluate(tmp_path / "run")
        assert not results["complete"] and results["last_epoch"]["epoch"] == 2


class TestOtherData:
    def test_a_run_is_not_continued_nor_scored_on_it(self, config: VAESimConfig, tmp_path: Path) -> None:
        vaesim.train(config, tmp_path / "run", figures=False, settings=SETTINGS)
        (tmp_path / "run" / "results.json").unlink()  # as if it had been stopped before
        environment = (tmp_path / "run" / "environment.json").read_bytes()
        save(tmp_path / "made.npz", arrays(seed=1))
        for work in (
            lambda: vaesim.train(config, tmp_path / "run", settings=replace(SETTINGS, resume=True)),
            lambda: vaesim.evaluate(tmp_path / "run"),
        ):
            with pytest.raises(RunFolderError, match=r"was begun with other data: made\.npz has md5 .*, then "):
                work()
        assert (tmp_path / "run" / "environment.json").read_bytes() == environment
        save(tmp_path / "made.npz", arrays())
        assert vaesim.evaluate(tmp_path / "run")["complete"]

    def test_a_finished_run_is_not_shown_nor_drawn_on_it(self, config: VAESimConfig, tmp_path: Path) -> None:
        vaesim.train(config, tmp_path / "run", figures=False, settings=SETTINGS)
        save(tmp_path / "made.npz", arrays(seed=1))
        for work in (
            lambda: vaesim.train(config, tmp_path / "run", figures=False, settings=replace(SETTINGS, resume=True)),
            lambda: vaesim.draw_figures(tmp_path / "run"),
        ):
            with pytest.raises(RunFolderError, match=r"was begun with other data: made\.npz has md5 .*, then "):
                work()
        assert not (tmp_path / "run" / "figures").exists()
        save(tmp_path / "made.npz", arrays())
        assert vaesim.draw_figures(tmp_path / "run")


class TestSeeds:
    def test_those_that_are_done_can_be_read(self, config: VAESimConfig, tmp_path: Path) -> None:
        short = replace(config, epochs=1)
        vaesim.train(short, tmp_path / "run", figures=False, settings=replace(SETTINGS, runs=3))
        for name in ("seed-2", "seed-1"):  # one that has just been begun, one that has not
            folder = tmp_path / "run" / name
            for path in sorted(folder.rglob("*"), reverse=True):
                if path.name != "config.json" or name == "seed-2":
                    path.rmdir() if path.is_dir() else path.unlink()
        (tmp_path / "run" / "seed-2").rmdir()
        assert [run.path.name for run in load_runs(tmp_path / "run")] == ["seed-0", "seed-1"]
        for results in (read_summary(tmp_path / "run"), vaesim.evaluate(tmp_path / "run")):
            assert results["seeds"] == [0] and results["number_of_runs"] == 1 and not results["complete"]
            shown = str(results_table(results, {}).caption)
            assert shown.endswith("NOT FINISHED: 2 of 3 runs: those of seeds 1, 2") and "epoch" not in shown
        assert vaesim.draw_figures(tmp_path / "run")
        results = vaesim.train(short, tmp_path / "run", figures=False, settings=replace(SETTINGS, runs=3, resume=True))
        assert results["complete"] and "NOT FINISHED" not in str(results_table(results, {}).caption)

    def test_none_has_been_begun(self, config: VAESimConfig, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"paper": "vaesim", "seeds": [0, 1]}))
        with pytest.raises(RunFolderError, match="none of its seeds has been begun; continue the run with --resume"):
            load_runs(tmp_path)


class TestFolders:
    def test_a_gap_is_neither_filled_nor_the_end(self, tmp_path: Path) -> None:
        for name in ("run", "run-3", "run-12", "run-x", "run-05", "other-20", "run-1"):
            (tmp_path / name).mkdir()
        assert next_free_folder(tmp_path / "run") == tmp_path / "run-13"
        assert next_free_folder(tmp_path / "run", resume=True) == tmp_path / "run-12"
        (tmp_path / "run[1]").mkdir()
        assert next_free_folder(tmp_path / "run[1]") == tmp_path / "run[1]-2"


class TestSweeps:
    def test_a_point_of_a_list_is_found_again(self, config: VAESimConfig, tmp_path: Path) -> None:
        head = {"paper": "vaesim", "config": json.loads(json.dumps(config.record())), "precision": "fp32"}
        for score in (1, 2):
            points = [{"values": {"order": ("blur", "rotate"), "rate": 0.5}, "score": score, "seeds": [0]}]
            note(tmp_path, VAESimConfig, head, [0], points)
        assert [point["score"] for point in json.loads((tmp_path / SUMMARY).read_text())["points"]] == [2]


class TestChecks:
    def test_too_few_images_are_named_before_a_folder_is_made(self, config: VAESimConfig, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"num_prototypes must not exceed the images of the first batch.*; got 61 and 60 images"
        ):
            vaesim.train(replace(config, num_prototypes=61, batch_size=100), tmp_path / "run", settings=SETTINGS)
        few = contrastive_autoencoder.CONFIG.preset(
            "fair", data=config.data, most_clusters=61, batch_size=30, image_size=32
        )
        with pytest.raises(
            ValueError, match=r"most_clusters must not exceed what is clustered; got 61 and 60 vectors of 60"
        ):
            contrastive_autoencoder.train(few, tmp_path / "run", settings=SETTINGS)
        assert not (tmp_path / "run").exists()
        assert len(load_dataset(config.data).train) == 60
