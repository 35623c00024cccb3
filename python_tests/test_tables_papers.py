# SPDX-License-Identifier: MIT
"""The tables of the papers: rows, order, and what stands beside and below them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tyro", reason="the commands need the extra protokernels[train]")

from protokernels.cli import main
from protokernels.commands import find_paper
from protokernels.evaluation import EvaluationConfig, Representation, evaluate_representation
from protokernels.papers import PAPERS
from protokernels.papers._local_contrast_config import METHODS, PAPER_RESULTS
from protokernels.papers._local_contrast_report import percent
from protokernels.papers._local_contrast_table import SCORES
from protokernels.papers._optimized_views_table import OURS
from protokernels.papers._vaesim_published import PAPER, PUBLISHED
from protokernels.papers._vaesim_table import PRESETS, PROTOCOLS, joined, summary
from protokernels.papers.optimized_views import STRATEGIES
from protokernels.results import FinishedRun, Job, Outcome, ResultRow, rendered
from protokernels.results.fields import as_record
from protokernels.results.jobs import check_folders
from protokernels.results.tables import as_json
from protokernels.tables import TableOptions, chosen_values, job_of, table_of, train_missing
from protokernels.training import RunFolderError
from protokernels.training.report import results_table
from protokernels.training.summary import summarize_runs

from .run_folders import Run, table_command, transfer_splits, vaesim_splits, write_run


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`protokernels table ...` -> status, output, errors."""
    return table_command(capsys)


def collected(paper: str, *folders: Path) -> list[ResultRow]:
    return table_of(paper).collect(folders)


def markdown(paper: str, rows: list[ResultRow]) -> str:
    return rendered(table_of(paper).tables(rows), "markdown")


class TestVAESim:
    def row(self, seeds: list[int], accuracies: list[float], **changes: Any) -> dict[str, Any]:
        splits = {"test": {**{protocol: summary(accuracies) for protocol in PROTOCOLS}, "majority_rate": 0.6}}
        return {
            "data": "made", "preset": "paper", "config": {"data": "made", "epochs": 3}, "protocol": {"knn_k": 5},
            "images": {"test": 10}, "seconds": [1.0] * len(seeds), "collapsed": [], "precision": "bf16", "precisions": ["bf16"],
            "processors": ["AVX2"], "commits": ["a"],
            "backends": ["auto"], "seeds": seeds, "splits": splits, "environment": {"cpu_capability": "AVX2"}, **changes,
        }  # fmt: skip

    def older(self, before: dict[str, Any]) -> dict[str, Any]:
        """As files without single values have it."""
        splits = {
            "test": {
                name: {k: v for k, v in value.items() if k != "values"} if isinstance(value, dict) else value
                for name, value in before["splits"]["test"].items()
            }
        }
        return {
            key: value for key, value in {**before, "splits": splits}.items() if key not in ("precisions", "processors")
        }

    @pytest.mark.parametrize("accuracies", [[0.7], [0.7, 0.9]])
    @pytest.mark.parametrize("old", [True, False])
    def test_seeds_join(self, accuracies: list[float], old: bool) -> None:
        before = self.row(list(range(len(accuracies))), accuracies)
        now = self.row([5, 6], [0.8, 0.6], precisions=["fp32"], commits=["b"])
        both = joined(self.older(before) if old else before, now)
        assert both["seeds"] == [*range(len(accuracies)), 5, 6]
        assert both["precisions"] == ["bf16", "fp32"] and both["commits"] == ["a", "b"]
        everyone = [*accuracies, 0.8, 0.6]
        for protocol in PROTOCOLS:
            entry = both["splits"]["test"][protocol]
            assert entry["mean"] == pytest.approx(statistics.fmean(everyone))
            assert entry["std"] == pytest.approx(statistics.stdev(everyone))

    def test_what_does_not_belong_together_is_refused(self) -> None:
        before = self.row([0, 1, 2], [0.7, 0.8, 0.9])
        with pytest.raises(ValueError, match=r"the file has seeds \[2\] already"):
            joined(before, self.row([2], [0.5]))
        with pytest.raises(ValueError, match="config differs"):
            joined(before, self.row([3], [0.5], config={"data": "made", "epochs": 4}))
        with pytest.raises(ValueError, match="3 seeds cannot be told"):
            joined(self.older(before), self.row([3], [0.5]))

    def test_new_seeds_join_the_file(self, run: Run, tmp_path: Path) -> None:
        for seed in (0, 1):
            write_run(tmp_path / str(seed), "vaesim", {}, vaesim_splits(0.5 + seed / 10), seed=seed)
        results = tmp_path / "r.json"
        assert run("vaesim", tmp_path / "0", "--results", results)[0] == 0
        assert run("vaesim", tmp_path / "1", "--results", results, "--add")[0] == 0
        (row,) = json.loads(results.read_text())
        assert row["seeds"] == [0, 1] and row["splits"]["test"]["knn"]["values"] == [0.5, 0.6]
        status, _, err = run("vaesim", tmp_path / "1", "--results", results, "--add")
        assert status == 1 and "the file has seeds [1] already" in err

    def test_a_field_that_came_later_does_not_separate_seeds(self) -> None:
        before, config = self.row([0], [0.7]), {"data": "made", "epochs": 3}
        both = joined(before, self.row([1], [0.8], config={**config, "augment": False}))
        assert both["seeds"] == [0, 1] and both["seconds"] == [1.0, 1.0]
        with pytest.raises(ValueError, match="made vaesim paper: config differs"):
            joined(before, self.row([1], [0.8], config={**config, "augment": True}))

    def test_rows_are_told_apart_by_method(self) -> None:
        merge = table_of("vaesim").merge
        old, vade = self.row([0], [0.7]), self.row([0], [0.6], method="vade", paper="vade")
        newer = self.row([1], [0.9], method="vaesim", paper="vaesim")
        assert merge([old], [vade]) == [old, vade] and merge([old, vade], [newer]) == [newer, vade]

    def test_a_supervised_network_has_no_clusters(self, tmp_path: Path) -> None:
        splits = vaesim_splits(0.8)
        splits["test"]["supervised"] = splits["test"].pop("statistical")
        for name, weights in (("a", ""), ("b", "w.pth")):
            config = {"depth": 50, "initial_weights": weights, "preset_name": name}
            write_run(tmp_path / name, "resnet_transfer", config, splits)
        first, second = collected("vaesim", tmp_path)
        assert set(first["splits"]["test"]) == {"knn", "linear", "supervised", "majority_rate"}
        assert {first["method"], second["method"]} == {"resnet50_random_init", "resnet50_imagenet"}

    def test_what_was_published_what_was_logged_and_the_larger_class(self) -> None:
        split = {
            **{key: summary([0.7, 0.8]) for key in PROTOCOLS},
            "majority_rate": 0.625,
            "clusters_used": summary([9, 10]),
        }
        config = {"data": "pneumoniamnist", "epochs": 300, "pretraining_epochs": 50}
        vade = {"data": "pneumoniamnist", "method": "vade", "paper": "vade", "preset": "pytorch", "config": config}
        network = {"knn": summary([0.8]), "supervised": summary([0.85]), "majority_rate": 0.625}
        random = {"data": "pneumoniamnist", "method": "resnet50_random_init", "paper": "resnet_transfer"}
        splits = {"test": split, "val": {**split, "majority_rate": 0.742}}
        rows = [
            self.row([0, 1], [0.5]) | vade | {"splits": splits},
            self.row([0], [0.5]) | vade | {"preset": "fair", "collapsed": [0], "splits": {"test": split}},
            self.row([0], [0.5]) | random | {"splits": {"test": network}},
        ]
        lines = markdown("vaesim", rows).splitlines()
        assert "| the larger class | | test | 0.625 | 0.625 | | | 0.625 | | | |" in lines
        assert "| the larger class | | val | 0.742 | 0.742 | | | 0.742 | | | |" in lines
        assert (
            "| vade | *paper, Table 1* | test | | 0.625 ± 0.001 | 0.747 ± 0.012 | 0.590 ± 0.116 | | | 10 | |" in lines
        )
        assert "| vade | *authors' logs* | test | | 0.625 | 0.747 | 0.590 | | | | |" in lines
        mean = "0.750 ± 0.071"
        assert f"| vade | `pytorch` | val | 0.742 | {mean} | {mean} | {mean} | | 9.5 | 2 | 50 + 300 |" in lines
        assert any("9.5 (collapsed: 1)" in line and "`fair`" in line for line in lines)
        assert lines.count("| resnet_transfer | *paper, Table 1* | test | | | | | 0.850 | | | |") == 1
        not_run = "| gmvae | *paper, Table 1* | test | | 0.625 ± 0.001 | 0.627 ± 0.041 | 0.429 ± 0.061 | | | 10 | |"
        assert not_run in lines
        assert any(
            line.startswith("| resnet50_random_init | `paper` | test | 0.625 | | 0.800 | | 0.850 |") for line in lines
        )

    def test_majority_is_the_same_at_the_end_of_a_run_and_in_the_table(self, run: Run, tmp_path: Path) -> None:
        """Where the largest class of the training set is not the largest of the scored set."""
        y, test = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
        train, scored = (Representation(labels[:, None].float(), labels) for labels in (y, test))
        splits = {"test": evaluate_representation(train, scored, num_classes=2, config=EvaluationConfig(knn_k=1))}
        assert splits["test"]["majority"]["accuracy"] == 0.25
        write_run(tmp_path / "run", "vaesim", {"data": "x"}, splits)
        (table,) = json.loads(run("vaesim", tmp_path / "run", "--format", "json")[1])
        assert {row["cells"]["majority"]["mean"] for row in table["rows"]} == {0.75}
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        shown = results_table({**results, "splits": summarize_runs([splits]), "number_of_runs": 1}, {})
        assert list(shown.columns[-1].cells) == ["0.750"] and shown.columns[-1].header == "majority"

    def test_every_preset_can_be_run_and_published_numbers_belong_to_methods(self, tmp_path: Path) -> None:
        described, options = table_of("vaesim"), TableOptions(data=("pneumoniamnist",))
        combinations = described.combinations(chosen_values(described, options))
        jobs = [job_of(described, values, 0, tmp_path, options) for values in combinations]
        names = {job.folder.parent.name for job in jobs if job is not None}
        assert names == {f"{method}-pneumoniamnist-{preset}" for method, known in PRESETS.items() for preset in known}
        for data, published in PUBLISHED.items():
            assert {row.method for row in published} == set(PRESETS)
            for row in published:
                if row.source == PAPER and "knn" in row.accuracies:
                    assert find_paper(row.method).PAPER_RESULTS[data] == (row.split, row.accuracies)


class TestSeveralData:
    @pytest.mark.parametrize("paper", PAPERS)
    def test_every_run_has_a_folder_of_its_own(self, paper: str, tmp_path: Path) -> None:
        """And is called as in a table of one data set, where a row has the folder's name; runs of the paper's own data stay."""
        described = table_of(paper)
        own, preset = described.axes["data"][0], described.axes["preset"][0]
        options = TableOptions(data=(own, "mmwhs" if paper == "local_contrast" else "digits"), preset=(preset, "paper"))
        combinations = described.combinations(chosen_values(described, options))
        jobs = [job for values in combinations if (job := job_of(described, values, 1, tmp_path, options)) is not None]
        check_folders(jobs)
        records = [{"paper": job.paper, "config": as_record(job.config), "seed": 1, "splits": {}} for job in jobs]
        found = [FinishedRun(job.folder, record) for job, record in zip(jobs, records, strict=True)]
        keys = [described.key(described.identity(run)) for run in found]
        assert len(set(keys)) == len(jobs) >= 4
        if paper in ("optiml", "optimized_views"):
            names = {job.folder.parent.name for job in jobs}
            assert {
                job.folder.parent for job in jobs if job.config.data == own and job.config.preset_name == preset
            } == {tmp_path / name for name in names}

    @pytest.mark.parametrize("keep", [False, True])
    def test_computed_rows_of_one_name_are_refused(self, keep: bool, tmp_path: Path) -> None:
        described = table_of("vaesim")
        options = TableOptions(data=("a/mine.npz", "b/mine.npz"), preset=("pixels",), keep=keep)
        with pytest.raises(
            RunFolderError, match=r"rows of a/mine\.npz and of b/mine\.npz would both be .*mine-pixels\.json"
        ):
            train_missing(described, tmp_path, chosen_values(described, options), options)


class TestOPTiML:
    def test_the_better_one_is_first(self, tmp_path: Path) -> None:
        for name, score in (("optiml", 0.6), ("simclr", 0.7), ("supervised", 0.65)):
            write_run(tmp_path / name, name, {}, transfer_splits(score), protocol={"transfer": "fair"})
        text = markdown("optiml", collected("optiml", tmp_path))
        order = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ") and "0." in line]
        assert order == ["simclr", "supervised (has seen all labels)", "**optiml**"]
        assert "| 1% (7) |" in text and text.endswith("Hernia.") and "Protocol: transfer fair" in text

    def test_empty_cells_have_a_reason(self, tmp_path: Path) -> None:
        row = {"images": 7, "auroc": {}, "left_out": ["Hernia", "Mass"]}
        for name in ("optiml", "byol"):
            splits = {"test": {"targets": {"probe": {"1%": row}, "fine_tune": {}}}}
            write_run(tmp_path / name, name, {"epochs": 3}, splits, protocol={"transfer": "fair"})
        text = markdown("optiml", collected("optiml", tmp_path))
        assert "| byol | | | 1 | 3 |" in text and text.endswith("where no image has them or all: Hernia, Mass.")

    def test_the_note_says_what_was_chosen_for_each_row(self, tmp_path: Path) -> None:
        adamw = {"transfer": "sister", "probe": "adamw", "probe_adamw": {"weight_decay": 0.01}}
        for name, ways in (("optiml", adamw), ("byol", adamw), ("simclr", {"transfer": "fair", "probe": "lbfgs"})):
            write_run(tmp_path / name, name, {}, transfer_splits(0.6), protocol=ways)
        mixed = collected("optiml", tmp_path)
        text = markdown("optiml", mixed)
        sister = "transfer sister, areas under the ROC curve as means over classes; the probe by adamw, with weight decay 0.01, its epoch"
        assert f"{sister} chosen on the validation set." in text
        fair = "Protocol of simclr: transfer fair, areas under the ROC curve as means over classes; the probe by lbfgs, its weight decay"
        assert f"{fair} chosen on the validation set." in text
        assert f"Protocol of optiml, byol: {sister}" in text or f"Protocol of byol, optiml: {sister}" in text
        alone = markdown("optiml", [row for row in mixed if row["method"] != "simclr"])
        assert f"Protocol: {sister}" in alone and "its weight decay" not in alone

    def test_a_row_and_the_name_of_an_ablation(self, tmp_path: Path) -> None:
        for seed, complete in ((0, True), (1, True), (2, False)):
            folder = tmp_path / "byol" / f"seed-{seed}"
            write_run(folder, "byol", {}, transfer_splits(0.5 + 0.1 * seed), seed=seed, complete=complete)
        write_run(tmp_path / "optiml-mse", "optiml", {}, transfer_splits(0.6))
        row, ablation = collected("optiml", tmp_path)
        assert row["method"] == "byol" and row["seeds"] == [0, 1] and row["pretraining_seconds"] == [2.0, 2.0]
        value = row["splits"]["test"]["targets"]["probe"]["1%"]["macro_auroc"]
        assert value["mean"] == pytest.approx(0.55) and value["runs"] == 2 and row["left_out"] == {"test": ["Hernia"]}
        assert ablation["method"] == "optiml-mse"


class TestOptimizedViews:
    def write(self, folder: Path, strategy: str, score: float, **more: Any) -> None:
        probe = {"images": 7, "macro_auroc": score - 0.1, "left_out": []}
        splits = {"test": {"hold_out": {"auc": score, "sets": {}}, "untrained": {"auc": 0.6}, "probe": {"10%": probe}}}
        lines = ({"epoch": 1, "seconds": 2.0}, {"epoch": 2, "seconds": 2.0, "auc": score})
        images = {"train": 70, "labelled": 7}
        config = {"strategy": strategy, "data": more.pop("data", "made")}
        write_run(folder, "optimized_views", config, splits, metrics=lines, images=images, **more)

    def test_the_better_one_is_first_and_differences_are_by_seed(self, tmp_path: Path) -> None:
        for seed, (ours, other) in enumerate([(0.8, 0.9), (0.7, 0.75)]):
            self.write(tmp_path / OURS / f"seed-{seed}", OURS, ours, seed=seed)
            self.write(tmp_path / "simclr" / f"seed-{seed}", "simclr", other, seed=seed)
        rows = collected("optimized_views", tmp_path)
        text = markdown("optimized_views", rows)
        order = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ") and "0." in line]
        assert order == ["simclr", f"**{OURS}**"]
        assert f"- {OURS} minus simclr: -0.075 ± 0.035 (by seed: -0.100, -0.050)" in text
        assert "Untrained encoder, hold-out: 0.600" in text
        ours = next(row for row in rows if row["name"] == OURS)
        assert ours["curves"] == [[[2, 0.8]], [[2, 0.7]]] and ours["by_seed"] == {"0": 0.8, "1": 0.7}
        assert ours["pretraining_seconds"] == [4.0, 4.0]

    def test_names_of_folders_and_data_are_shown_as_they_are_spelt(self, tmp_path: Path) -> None:
        self.write(tmp_path / "my*run|`", OURS, 0.8, data="my*data.npz")
        (table,) = table_of("optimized_views").tables(collected("optimized_views", tmp_path))
        text, read = rendered([table], "text"), as_json(table)
        assert "my*run|` " in text and "my*data.npz, preset fair, test: AUC" in text
        assert read["rows"][0]["name"] == "my*run|`" and read["group"] == "my*data.npz, preset fair, test: AUC"
        assert r"| my\*run\|\` | 7 | 0.800 |" in rendered([table], "markdown")

    def test_the_papers_numbers_stand_below(self, tmp_path: Path) -> None:
        self.write(tmp_path / OURS, OURS, 0.8, data="brats")
        text = markdown("optimized_views", collected("optimized_views", tmp_path))
        assert "The paper has 0.884 ± 0.042 for self-supervised+supervision with alphas 1, 10, 1, 1, 1." in text

    def test_every_strategy_is_run_one_seed_after_the_other(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        jobs: list[Job] = []
        monkeypatch.setattr("protokernels.tables.run_jobs", lambda work, **_: jobs.extend(work) or Outcome())
        described = table_of("optimized_views")
        train_missing(described, tmp_path, {}, TableOptions(runs=2, data=("brain_tumor",)))
        assert sorted({job.config.strategy for job in jobs}) == sorted(STRATEGIES) and len(jobs) == 2 * len(STRATEGIES)
        assert [job.settings.seed for job in jobs] == [0] * len(STRATEGIES) + [1] * len(STRATEGIES)
        assert jobs[0].folder == tmp_path / "self-supervised+supervision" / "seed-0"


class TestLocalContrast:
    def row(self, method: str, fold: int, dice: float, seed: int = 0) -> dict[str, Any]:
        score = {"mean": dice, "classes": {}}
        return {
            "data": "hippocampus",
            "preset": "fair",
            "labelled": 0.05,
            "method": method,
            "fold": fold,
            "seed": seed,
            "volumes": {"labelled": 7},
            "splits": {"test": {key: score for key in SCORES} | {"unit": "mm"}},
            "stages": {"fine_tune": {"epochs": 4, "steps": 100, "batch_size": 8}},
            "config": {"width": 16, "depth": 3, "image_size": 64, "keep": "best", "split": "paper", "labelled": 0.05},
            "data_warnings": [],
        }

    def test_the_papers_numbers_stand_beside_ours(self) -> None:
        rows = [self.row("random", 0, 0.7), self.row("random", 1, 0.8), self.row("global+local-block", 0, 0.75)]
        described = table_of("local_contrast")
        text = markdown("local_contrast", described.merge([], rows))
        assert "| Random | 0.750 ± 0.071 | 0.788 | 0.750 ± 0.071 | 0.75 ± 0.07 | 2 |" in text
        assert "| Global+local(block) | 0.750 | 0.824 | 0.750 | 0.75 | 1 |" in text
        assert "Global+local(block) minus Random, Dice fold by fold: +0.050 (folds: 1)" in text  # on the same fold
        assert "Not run here; the paper has: Global 0.817" in text and "4 epochs = 100 steps of 8" in text
        again = described.merge(rows, [self.row("random", 1, 0.9)])
        assert len(again) == 3 and "0.800 ± 0.141" in markdown("local_contrast", again)
        assert [row["method"] for row in described.merge(rows[2:], rows[:1])] == ["random", "global+local-block"]

    def test_seeds_of_one_fold_are_called_seeds(self) -> None:
        rows = [self.row("random", 0, 0.7), self.row("random", 0, 0.8, seed=1), self.row("global", 0, 0.85, seed=1)]
        text = markdown("local_contrast", rows)
        assert "mean ± standard deviation over seeds" in text and "| folds | seeds |" in text
        assert "| Random | 0.750 ± 0.071 | 0.788 | 0.750 ± 0.071 | 0.75 ± 0.07 | 1 | 2 |" in text
        assert "Global minus Random, Dice seed by seed: +0.050 (seeds: 1)" in text
        text = markdown("local_contrast", [*rows, self.row("random", 1, 0.9)])
        assert "over folds and seeds" in text and "0.75 ± 0.07" not in text and "| 2 | 2 |" in text
        assert "Global minus Random, Dice run by run: +0.050 (runs: 1)" in text

    def test_methods_share_stages_and_nothing_is_done_twice(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("protokernels.figures.local_contrast.PIXELS_PER_CLASS", 20)
        small = {"image_size": 16, "width": 2, "depth": 2, "global_steps": 4, "local_steps": 4, "fine_tune_steps": 4}
        words = ("local-contrast", "--data", "phantoms", "--device", "cpu", "--quiet", "--folder", tmp_path, "--set")
        words += tuple(f"{name}={value}" for name, value in small.items())
        two = (*words, "--only", "labelled=0.3", "fold=0,1", "method=random,global")
        assert run(*two)[0] == 0
        assert run(*words, "--only", "labelled=0.3", "fold=0", "method=global,tcsm,local-stride")[0] == 0
        stages = sorted(path.name.split("-")[0] for path in (tmp_path / "stages").iterdir() if path.is_dir())
        assert stages == ["global", "global", "local"]  # of two folds; of "stride"
        results = {path: path.read_bytes() for path in tmp_path.glob("phantoms-fair/fold-*/30%/*/results.json")}
        assert len(results) == 6
        assert run(*two, "--results", tmp_path / "r.json")[0] == 0
        assert all(path.read_bytes() == content for path, content in results.items())
        rows = json.loads((tmp_path / "r.json").read_text())
        assert [(row["method"], row["fold"]) for row in rows] == [
            ("random", 0),
            ("random", 1),
            ("global", 0),
            ("global", 1),
        ]
        assert all(row["stages"]["fine_tune"]["steps"] >= 4 for row in rows)
        chosen = (
            "local-contrast",
            tmp_path / "phantoms-fair" / "fold-0",
            "--only",
            "method=random,tcsm",
            "--format",
            "markdown",
        )
        status, text, err = run(*chosen, "--figures", tmp_path / "figures")
        assert (
            status == 0
            and "| phantoms, 30 % labelled | Dice |" in text
            and "| TCSM |" in text
            and "| Global |" not in text
        )
        for name in ("features_tcsm", "overlays", "validation"):
            path = tmp_path / "figures" / "30" / f"{name}.png"
            assert path.stat().st_size > 5000 and str(path) in err

    @pytest.mark.parametrize("data", PAPER_RESULTS)
    def test_the_shares_are_those_of_the_papers_table(self, data: str) -> None:
        described = table_of("local_contrast")
        combinations = described.combinations({"data": [data]})
        assert list(dict.fromkeys(percent(values["labelled"]) for values in combinations)) == list(PAPER_RESULTS[data])
        assert len(combinations) == 4 * 3 * len(METHODS) and all(values["data"] == data for values in combinations)
        both = described.combinations({"data": ["hippocampus", "mmwhs"], "fold": [2]})
        assert sum(values["data"] == data for values in both) == 3 * len(METHODS)
        asked = described.combinations({"data": [data], "labelled": [0.3]})
        assert {values["labelled"] for values in asked} == {0.3}

    def test_help_names_the_shares_of_other_data(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["table", "local-contrast", "--help"])
        assert "of mmwhs, labelled: 0.1, 0.2, 0.4" in " ".join(capsys.readouterr().out.replace("│", " ").split())

    def test_other_seeds_lie_beside_the_first(self, tmp_path: Path) -> None:
        described, options = table_of("local_contrast"), TableOptions(data=("phantoms",))
        values = described.combinations(chosen_values(described, options))[0]
        first, second = (job_of(described, values, seed, tmp_path, options) for seed in (0, 1))
        assert first is not None and first.folder == tmp_path / "phantoms-fair" / "fold-0" / "5%" / "random"
        assert second is not None and second.folder == first.folder.with_name("random-seed-1")
        assert first.config.stages == str(tmp_path / "stages")


class TestContrastiveAutoencoder:
    def test_an_untrained_encoder_is_a_row_of_its_own(self, tmp_path: Path, run: Run) -> None:
        scores = {"macro_precision": 0.5, "macro_recall": 0.5, "weighted_precision": 0.5}
        for name, warmup, accuracy in (("fair", 6, 0.8), ("untrained", 0, 0.6)):
            splits = {"test": {method: {"accuracy": accuracy, **scores} for method in ("majority", "knn")}}
            config = {"warmup_epochs": warmup, "epochs": 7}
            write_run(tmp_path / "runs" / name, "contrastive_autoencoder", config, splits)
        file = tmp_path / "results.json"
        status, shown, _ = run("contrastive_autoencoder", tmp_path / "runs", "--results", file, "--format", "markdown")
        assert status == 0
        assert "| kNN on h, `fair` | 0.800 |" in shown and "| kNN on h, `untrained` | 0.600 |" in shown
        assert [row["preset"] for row in json.loads(file.read_text())] == ["fair", "untrained"]
