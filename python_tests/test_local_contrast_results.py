# SPDX-License-Identifier: MIT
"""The table of local contrast over folds, shares and methods: what is shared, what is left alone, what stands beside what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="local contrast needs the extra protokernels[train]")

from benchmarks import local_contrast_results
from protokernels.training.files import exclusive

SMALL = {"image_size": 16, "width": 2, "depth": 2, "global_steps": 4, "local_steps": 4, "fine_tune_steps": 4}
OPTIONS = ("run", "--data", "phantoms", "--labelled", "0.3", "--device", "cpu")


class TestTable:
    def test_methods_share_stages_and_nothing_is_done_twice(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("protokernels.figures.local_contrast.PIXELS_PER_CLASS", 20)
        out = tmp_path / "table"
        changes = [f"{name}={value}" for name, value in SMALL.items()]
        words = [*OPTIONS, "--out", str(out), "--set", *changes]
        assert local_contrast_results.main([*words, "--folds", "0", "1", "--methods", "random", "global"]) == 0
        others = ("global", "global+local-self", "mixup", "tcsm", "local-stride")
        assert local_contrast_results.main([*words, "--folds", "0", "--methods", *others]) == 0
        stages = sorted(path.name.split("-")[0] for path in (out / "stages").iterdir() if path.is_dir())
        assert stages == ["global", "global", "local", "local"]  # of two folds; of "self" and "stride"
        results = {path: path.read_bytes() for path in out.glob("fold-*/30%/*/results.json")}
        assert len(results) == 8
        assert local_contrast_results.main([*words, "--folds", "0", "1", "--methods", "random", "global"]) == 0
        assert all(path.read_bytes() == content for path, content in results.items())

        capsys.readouterr()
        assert local_contrast_results.main(["collect", str(out), "--out", str(tmp_path / "table.json")]) == 0
        text = capsys.readouterr().out
        rows = json.loads((tmp_path / "table.json").read_text())
        assert [(row["method"], row["fold"]) for row in rows[:5]] == [
            ("random", 0),
            ("random", 1),
            ("global", 0),
            ("global", 1),
            ("global+local-self", 0),
        ]
        assert len(rows) == 8 and "30% (3 volumes)" in text and "epochs = " in text
        assert all(row["stages"]["fine_tune"]["steps"] >= 4 for row in rows)
        assert local_contrast_results.main(["figures", str(out), "--labelled", "0.3"]) == 0
        for name in ("features_tcsm", "overlays", "validation"):
            assert (out / "figures" / f"{name}.png").stat().st_size > 5000, name

    def test_the_papers_numbers_stand_beside_ours(self) -> None:
        def row(method: str, fold: int, dice: float) -> dict[str, Any]:
            score = {"mean": dice, "classes": {}}
            return {
                "data": "hippocampus",
                "preset": "fair",
                "labelled": 0.05,
                "method": method,
                "fold": fold,
                "seed": 0,
                "volumes": {"labelled": 7},
                "splits": {"test": {key: score for key, _ in local_contrast_results.SCORES} | {"unit": "mm"}},
                "stages": {"fine_tune": {"epochs": 4, "steps": 100, "batch_size": 8}},
                "config": {"width": 16, "depth": 3, "image_size": 64, "keep": "best"},
                "data_warnings": [],
            }

        rows = [row("random", 0, 0.7), row("random", 1, 0.8), row("global+local-block", 0, 0.75)]
        text = local_contrast_results.tables(local_contrast_results.merged([], rows))
        assert "| Random | 0.750 ± 0.071 | 0.788 |  | 2 |" in text
        assert "| Global+local(block) | 0.750 | 0.824 | 0.050 | 1 |" in text  # against Random on the same fold
        again = local_contrast_results.merged(rows, [row("random", 1, 0.9)])
        assert len(again) == 3 and "0.800 ± 0.141" in local_contrast_results.tables(again)

    def test_a_run_that_another_process_is_at_is_left_to_it(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = local_contrast_results.run_folder(tmp_path, 0, 0.3, "random")
        folder.parent.mkdir(parents=True)
        words = [*OPTIONS, "--folds", "0", "--methods", "random", "--out", str(tmp_path)]
        with exclusive(folder.with_name("random.lock")):
            assert local_contrast_results.main(words) == 0
        assert "left to another process" in capsys.readouterr().err and not folder.exists()
