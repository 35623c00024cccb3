# SPDX-License-Identifier: MIT
"""`protokernels sweep`: which configurations are run, what is refused, continued, written and drawn."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tyro", reason="the commands need the extra protokernels[train]")

from matplotlib.image import imread

from protokernels.ablations import run_ablations
from protokernels.cli import main
from protokernels.figures.sweeps import Panel, sweep_figure
from protokernels.papers import vaesim
from protokernels.papers.contrastive_autoencoder import ContrastiveAutoencoderConfig
from protokernels.papers.optimized_views import OptimizedViewsConfig
from protokernels.papers.vaesim import VAESimConfig
from protokernels.results import rendered
from protokernels.results.scores import main_scores
from protokernels.sweeps import (
    SweepOptions,
    asked_values,
    default_points,
    draw_sweep,
    filled_points,
    folder_of,
    points_of,
    sweep_tables,
)
from protokernels.tables import table_of
from protokernels.training import RunFolderError
from protokernels.training.files import exclusive
from protokernels.training.runs import RunSettings

CONFIG = VAESimConfig.preset("fair", data="digits")
SMALL = ("--epochs", "1", "--image-size", "16", "--batch-size", "200", "--num-prototypes", "12")
WORDS = ("sweep", "vaesim", *SMALL, "--device", "cpu", "--quiet")


class TestPoints:
    def test_one_field_at_a_time(self) -> None:
        points = points_of(CONFIG, asked_values(CONFIG, ["latent_dim=8,32", "prototypes=10"]), grid=False)
        assert [(dict(point.values), point.folder) for point in points] == [
            ({"latent_dim": 8}, "latent_dim-8"),
            ({"latent_dim": 32}, "base"),  # the preset's own
            ({"num_prototypes": 10}, "num_prototypes-10"),
        ]
        assert points[0].config.latent_dim == 8 and points[2].config.num_prototypes == 10

    def test_a_grid(self) -> None:
        points = points_of(CONFIG, {"latent_dim": [8, 32], "similarity": ["dot", "cosine"]}, grid=True)
        assert [point.folder for point in points] == [
            "latent_dim-8,similarity-dot",
            "latent_dim-8,similarity-cosine",
            "latent_dim-32,similarity-dot",
            "base",
        ]

    def test_every_point_has_a_folder_of_its_own(self) -> None:
        config = OptimizedViewsConfig.preset("fair")
        given: dict[str, list[Any]] = {
            "initial_weights": ["a/b.pth", "a_b.pth", "a b.pth", "ab.pth", "/a/b.pth"],
            "alphas": [(1.0, 0, 0, 0, 0), None],
        }
        folders = [folder_of(values) for name in given for values in ({name: value} for value in given[name])]
        assert len(set(folders)) == len(folders) and not any("/" in folder or " " in folder for folder in folders)
        assert folder_of({"initial_weights": "a/b.pth"}) == folders[0]  # also in another sweep
        assert [folders[1], *folders[5:]] == ["initial_weights-a_b.pth", "alphas-(1.0,0,0,0,0)", "alphas-None"]
        densenet = replace(config, encoder="densenet121", image_size=32)
        points = points_of(densenet, asked_values(densenet, ["initial_weights=a/b.pth,a_b.pth"]), grid=False)
        assert len({point.folder for point in points}) == 2

    def test_the_papers_own_values_where_the_configuration_has_them(self, capsys: pytest.CaptureFixture[str]) -> None:
        described = table_of("vaesim")
        points = default_points(CONFIG, described.sweep, grid=False, check=described.check)
        fields = [next(iter(point.values)) for point in points]
        assert {name: fields.count(name) for name in fields} == {"latent_dim": 7, "num_prototypes": 5, "batch_size": 6}
        error = capsys.readouterr().err
        assert error.startswith("left out: num_prototypes=160: ") and error.count("\n") == 1  # batches have 100 images

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["laten_dim=3"], "has no field 'laten_dim'; did you mean latent_dim"),
            (["latent_dim=2,x"], "latent_dim takes a whole number; got 'x'"),
            (["latent_dim=4,0"], "latent_dim=0: VAESimConfig: latent_dim must be positive; got 0"),
            (["batch_size=8"], "batch_size=8: VAESimConfig: prototypes start as samples of the first batch"),
            (["image_size=16,12"], "image_size=12: networks with 3 convolutions"),  # found by building the networks
            (["latent_dim=2,2"], "latent_dim has a value twice"),
            (["prototypes=12", "num_prototypes=14"], "num_prototypes has a value twice"),
            (["latent_dim"], "--over takes name=value,value"),
            (["--over"], "--over takes FIELD=VALUE,VALUE ...; got nothing"),
        ],
    )
    def test_what_is_wrong_is_named_before_anything_is_trained(
        self, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*WORDS, "--out", str(tmp_path / "s"), "--over", "prior_std=0.9", *words]) == 1
        assert message in capsys.readouterr().err and not (tmp_path / "s").exists()

    def test_a_batch_that_the_images_cannot_fill_is_left_out(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Otherwise all of them would train one and the same run: the digits have 1259 training images."""
        points = points_of(CONFIG, {"batch_size": [100, 1259, 1260, 4096], "latent_dim": [2]}, grid=False)
        kept = filled_points(vaesim, CONFIG, points, SweepOptions())
        assert [dict(point.values) for point in kept] == [{"batch_size": 100}, {"batch_size": 1259}, {"latent_dim": 2}]
        assert capsys.readouterr().err.splitlines() == [
            f"left out: batch_size={size}: there are 1259 training images" for size in (1260, 4096)
        ]
        grid = points_of(CONFIG, {"batch_size": [100, 4096], "latent_dim": [2]}, grid=True)
        assert [point.folder for point in filled_points(vaesim, CONFIG, grid, SweepOptions())] == [grid[0].folder]

    def test_a_sweep_needs_a_batch_that_can_be_filled(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([*WORDS, "--out", str(tmp_path / "s"), "--over", "batch_size=2048,4096"]) == 1
        error = capsys.readouterr().err
        assert error.count("left out") == 2 and "give smaller ones" in error and not (tmp_path / "s").exists()

    @pytest.mark.parametrize(
        ("config", "word", "values"),
        [
            (
                OptimizedViewsConfig(),
                'order=["blur","noise"],["noise", "blur"]',
                [("blur", "noise"), ("noise", "blur")],
            ),
            (OptimizedViewsConfig(), "alphas=[1,0,0.5,0,0],none", [(1, 0, 0.5, 0, 0), None]),
            (ContrastiveAutoencoderConfig(), "encoder_widths=[8,8],[4]", [(8, 8), (4,)]),
            (OptimizedViewsConfig(), "initial_weights=a,[b,c],d", ["a", "[b,c]", "d"]),
        ],
    )
    def test_lists(self, config: Any, word: str, values: list[Any]) -> None:
        assert asked_values(config, [word]) == {word.partition("=")[0]: values}

    @pytest.mark.parametrize(
        ("config", "word", "message"),
        [
            (OptimizedViewsConfig(), "order=[[1]]", r"order takes a JSON list of texts; got '\[\[1\]\]'"),
            (OptimizedViewsConfig(), "order=[1]", r"order takes a JSON list of texts; got '\[1\]'"),
            (OptimizedViewsConfig(), "order=[blur,noise]", r"order takes a JSON list of texts; got '\[blur,noise\]'"),
            (OptimizedViewsConfig(), 'order=["blur"', r"""order takes a JSON list of texts; got '\["blur"'"""),
            (OptimizedViewsConfig(), "order=" + "[" * 5000, "order takes a JSON list of texts"),
            (OptimizedViewsConfig(), "alphas=[1,2]", "alphas takes a JSON list of 5 numbers or none; got"),
            (OptimizedViewsConfig(), "alphas=[NaN,0,0,0,0]", "alphas takes a JSON list of 5 numbers or none; got"),
            (
                ContrastiveAutoencoderConfig(),
                'encoder_widths=["a"]',
                "encoder_widths takes a JSON list of whole numbers",
            ),
            (
                ContrastiveAutoencoderConfig(),
                "encoder_widths=[1.5]",
                "encoder_widths takes a JSON list of whole numbers",
            ),
            (CONFIG, "latent_dim=1" + "0" * 400, r"latent_dim takes a whole number; got '1000.*\(401 characters\)'"),
            (CONFIG, "latent_dim=1" + "0" * 5000, "latent_dim takes a whole number; got '1000"),
            (CONFIG, "beta=1e400", "beta takes a number; got '1e400'"),
        ],
    )
    def test_values_of_another_kind(self, config: Any, word: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            asked_values(config, [word])

    def test_words(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["sweep", "fly"]) == 2
        assert "unknown paper or baseline 'fly'; expected one of vaesim, " in capsys.readouterr().err
        assert main(["sweep"]) == 2 and main(["sweep", "--help"]) == 0
        with pytest.raises(SystemExit):
            main(["sweep", "vaesim", "--help"])
        text = capsys.readouterr().out
        assert "latent_dim=2,4,8,16,32,64,128" in text and "--grid" in text
        assert main(["sweep", "simclr", "--out", str(tmp_path / "s")]) == 1
        assert "say what to sweep" in capsys.readouterr().err


class TestFolders:
    @pytest.mark.parametrize("command", [[*WORDS, "--over", "latent_dim=2"], ["ablate", "optiml"]])
    @pytest.mark.parametrize("more", [[], ["--resume"]])
    def test_a_runs_own_folder_and_a_file_are_refused(
        self, command: list[str], more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text("{}")
        for place, message in (
            ("run", "run is the folder of a run, which can hold no others; pass another --out"),
            ("run/config.json", "config.json is a file, where a folder is needed; pass another --out"),
            ("run/config.json/below", "config.json is a file, where a folder is needed"),
        ):
            assert main([*command, *more, "--out", str(tmp_path / place)]) == 1
            assert message in capsys.readouterr().err
        assert [path.name for path in tmp_path.rglob("*")] == ["run", "config.json"]


class TestRuns:
    """On the smallest real runs."""

    def test_one_command_that_continues(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = [*WORDS, "--out", str(tmp_path), "--over", "latent_dim=2,32", "prototypes=12,20"]
        with exclusive(tmp_path / "num_prototypes-20.lock"):
            assert main([*words, "--no-figures"]) == 0
        captured = capsys.readouterr()
        assert "left to another process: num_prototypes-20" in captured.err
        assert "statistical" in captured.out and captured.out.count(" 32 ") == 3  # on three sets
        content = json.loads((tmp_path / "sweep.json").read_text())
        assert [(point["values"], point["folder"]) for point in content["points"]] == [
            ({"latent_dim": 2}, "latent_dim-2"),
            ({"latent_dim": 32}, "base"),
            ({"num_prototypes": 12}, "base"),
        ]
        assert all(point["complete"] and point["seeds"] == [0] for point in content["points"])
        assert main(words) == 1 and "--resume" in capsys.readouterr().err
        before = {path: path.read_bytes() for path in tmp_path.glob("*/results.json")}
        assert len(before) == 2
        assert main([*words, "--resume", "--format", "markdown"]) == 0
        text = capsys.readouterr().out
        assert "### vaesim, digits, preset `fair`, test" in text and "| **12** | 0." in text and "| 20 | 0." in text
        assert all(path.read_bytes() == content for path, content in before.items())
        for name in ("test", "val", "val_test"):
            assert imread(tmp_path / "figures" / f"sweep_{name}.png").std() > 0.01

        other = [*WORDS, "--epochs", "2", "--out", str(tmp_path), "--over", "latent_dim=4", "--resume"]
        assert main(other) == 1
        assert "starts from another configuration (epochs: 1 there, 2 now)" in capsys.readouterr().err
        assert not (tmp_path / "latent_dim-4").exists()
        for point in (words[-2:], ["latent_dim=4"]):  # the same points, and another one beside them
            seeds = ["--seed", "5", "--runs", "2"]
            assert main([*WORDS, *seeds, "--out", str(tmp_path), "--resume", "--over", *point]) == 1
            assert "(seeds: [0] there, [5, 6] now)" in capsys.readouterr().err
        assert not (tmp_path / "latent_dim-4").exists()

    def test_a_point_that_fails_is_named_and_the_others_are_shown(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trained = vaesim.train

        def train(config: VAESimConfig, *others: Any, **more: Any) -> dict[str, Any]:
            if config.latent_dim == 2:
                raise FloatingPointError("the loss is nan")
            return trained(config, *others, **more)

        monkeypatch.setattr(vaesim, "train", train)
        words = [*WORDS, "--out", str(tmp_path), "--over", "latent_dim=2,3", "--no-figures"]
        assert main(words) == 1
        captured = capsys.readouterr()
        assert "not finished: latent_dim-2: the loss is nan" in captured.err and "\n 3 " in captured.out
        monkeypatch.undo()
        assert main([*words, "--resume"]) == 0 and "\n 2 " in capsys.readouterr().out


class TestAblations:
    class Paper:
        """Trains nothing, or fails where the configuration says so."""

        ABLATIONS = {"wide": {"latent_dim": 64}, "bad": {"beta": 9.0}, "full": {}}  # noqa: RUF012
        EXPERIMENT = vaesim.EXPERIMENT

        def train(self, config: VAESimConfig, out: Path, **_: Any) -> dict[str, Any]:
            if config.beta == 9:
                raise FloatingPointError("the loss is nan")
            return {"splits": {}, "seeds": [0], "complete": True, "latent_dim": config.latent_dim}

    def test_they_go_on_after_a_failure(self, tmp_path: Path) -> None:
        results, folder, outcome = run_ablations(
            self.Paper(), "vaesim", CONFIG, tmp_path, figures=False, settings=RunSettings()
        )
        assert {name: result["latent_dim"] for name, result in results.items()} == {"wide": 64, "full": 32}
        assert outcome.failed == {"bad": "the loss is nan"}
        assert set(json.loads((folder / "ablations.json").read_text())) == {"wide", "full"}

    @pytest.mark.parametrize("older", [False, True])
    def test_those_of_another_configuration_are_not_joined(self, older: bool, tmp_path: Path) -> None:
        def ablate(config: VAESimConfig, only: str, **more: Any) -> None:
            settings = RunSettings(resume=True, **more)
            run_ablations(self.Paper(), "vaesim", config, tmp_path, only=[only], figures=False, settings=settings)

        ablate(CONFIG, "full")
        path = tmp_path / "ablations.json"
        if older:  # the run alone tells its configuration
            entry = json.loads(path.read_text())["full"]
            (tmp_path / "full").mkdir()
            (tmp_path / "full" / "config.json").write_text(json.dumps({**entry, "paper": "vaesim", "seed": 0}))
            path.write_text(json.dumps({"full": {key: entry[key] for key in ("splits", "seeds", "complete")}}))
        before = path.read_bytes()
        for changes, more, message in (
            ({"epochs": 7}, {}, "epochs: 40 there, 7 now"),
            ({}, {"runs": 2}, r"seeds: \[0\] there, \[0, 1\] now"),
            ({}, {"precision": "bf16"}, "precision: 'fp32' there, 'bf16' now"),
        ):
            with pytest.raises(RunFolderError, match=rf"ablations.json holds full of another .*\({message}\)"):
                ablate(replace(CONFIG, **changes), "wide", **more)
        assert path.read_bytes() == before
        ablate(CONFIG, "wide")
        assert set(json.loads(path.read_text())) == {"full", "wide"}


def score(mean: float, std: float | None = None) -> dict[str, Any]:
    return {"accuracy": {"mean": mean, "std": std, "runs": 1 if std is None else 2}}


def content(*points: tuple[dict[str, Any], float, float | None]) -> dict[str, Any]:
    return {
        "paper": "vaesim",
        "data": "digits",
        "preset": "fair",
        "points": [
            {"values": values, "folder": "x", "seeds": [0], "splits": {"test": {"knn": score(mean, std)}}}
            for values, mean, std in points
        ],
    }


class TestTablesAndFigures:
    def test_values_are_in_their_order(self) -> None:
        swept = content(
            ({"k": 40}, 0.4, None), ({"k": 5}, 0.5, None), ({"s": "dot"}, 0.3, 0.1), ({"s": "cosine"}, 0.2, None)
        )
        by_number, by_name = sweep_tables(swept, main_scores)
        assert [row.name for row in by_number.rows] == ["5", "40"] and by_number.columns == ("k", "knn", "seeds")
        assert [row.name for row in by_name.rows] == ["cosine", "dot"] and str(
            by_name.rows[1].cells[0]
        ) == "0.300 ± 0.100"

    def test_values_are_shown_as_they_are_spelt(self) -> None:
        (table,) = sweep_tables(content(({"path": "my*weights.pt", "k": 2}, 0.5, None)), main_scores)
        assert rendered([table], "text").splitlines()[-1].split()[0] == "my*weights.pt"

    def test_a_grid_has_one_table(self) -> None:
        swept = content(*(({"k": k, "d": d}, k / 10, None) for k in (2, 1) for d in (3, 4)))
        (table,) = sweep_tables(swept, main_scores)
        assert table.columns == ("k", "d", "knn", "seeds")
        assert [(row.name, row.cells[0]) for row in table.rows] == [("1", "3"), ("1", "4"), ("2", "3"), ("2", "4")]

    def test_a_panel_per_field_and_of_a_grid_a_line_per_value(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn: list[Panel] = []

        def keep(panels: list[Panel], *, title: str) -> Any:
            drawn.extend(panels)
            return sweep_figure(panels, title=title)

        monkeypatch.setattr("protokernels.figures.sweeps.sweep_figure", keep)
        single = (({"k": 5}, 0.5, 0.1), ({"k": 40}, 0.4, None), ({"s": "dot"}, 0.3, None))
        grid = tuple(({"k": k, "d": d}, k / 10, None) for k, d in ((1, 3), (2, 3), (1, 4)))
        (path,) = draw_sweep(content(*single, *grid), main_scores, tmp_path)
        assert imread(path).std() > 0.01 and path.name == "sweep_test.png"
        by_k, by_s, both = drawn
        assert (by_k.label, list(by_k.values), by_k.means, by_k.deviations) == (
            "k",
            [5, 40],
            {"knn": [0.5, 0.4]},
            {"knn": [0.1, 0.0]},
        )
        assert by_s.values == ["dot"] and by_s.deviations == {}
        assert both.score == "knn" and both.means["d 3"] == [0.1, 0.2]
        assert both.means["d 4"][0] == 0.1 and math.isnan(both.means["d 4"][1])

    def test_lists_have_places(self, tmp_path: Path) -> None:
        """As JSON gives them back: nothing can be kept under a list."""
        swept = content(*(({"order": order, "d": 1}, 0.5, None) for order in (["blur", "noise"], ["noise"], [])))
        (path,) = draw_sweep(swept, main_scores, tmp_path)
        assert imread(path).std() > 0.01
        assert swept["points"][0]["values"]["order"] == ["blur", "noise"]


class TestPanels:
    def test_lines_and_bars(self) -> None:
        means = {"block": [0.8, 0.9, 0.7], "stride": [0.5, float("nan"), 0.6]}
        figure = sweep_figure([Panel("size", "Dice", [16, 64, 4], means, {"block": [0.1, 0.2, 0.3]})], title="t")
        (axes,) = figure.axes
        block, stride = axes.containers
        np.testing.assert_array_equal(block.lines[0].get_xydata(), [[4, 0.7], [16, 0.8], [64, 0.9]])
        assert block.has_yerr and not stride.has_yerr
        assert axes.get_xscale() == "log" and [text.get_text() for text in axes.get_xticklabels()] == ["4", "16", "64"]
        assert axes.get_xlabel() == "size" and axes.get_ylabel() == "Dice"

    def test_few_values_are_drawn_evenly_and_names_side_by_side(self) -> None:
        few = Panel("share", "Dice", [0.0, 0.1], {"x": [1, 2]}, {})
        names = Panel("form", "Dice", ["in", "paper", True], {"x": [1, 2, 3]}, {})
        first, second = sweep_figure([few, names], title="t").axes
        assert first.get_xscale() == "linear" and first.get_legend() is None
        assert [text.get_text() for text in second.get_xticklabels()] == ["in", "paper", "True"]

    @pytest.mark.parametrize(
        ("means", "deviations"), [({}, {}), ({"a": [1.0]}, {}), ({"a": [1.0, 2.0]}, {"b": [1.0, 2.0]})]
    )
    def test_refusals(self, means: dict[str, list[float]], deviations: dict[str, list[float]]) -> None:
        with pytest.raises(ValueError, match="one mean per value"):
            sweep_figure([Panel("x", "y", [1, 2], means, deviations)], title="t")
        with pytest.raises(ValueError, match="at least one panel"):
            sweep_figure([], title="t")
