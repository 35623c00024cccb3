# SPDX-License-Identifier: MIT
"""`benchmarks/gallery.py`: the pictures that the README shows are there, small, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="pictures need the extra protokernels[train]")

from PIL import Image

from benchmarks import gallery
from protokernels.cli import main


@pytest.mark.parametrize("shown", gallery.GALLERY, ids=lambda shown: shown.paper)
def test_pictures_are_there_and_small(shown: gallery.Shown) -> None:
    for name in shown.figures:
        path = gallery.PICTURES / shown.picture(name)
        assert path.stat().st_size < 150_000
        with Image.open(path) as picture:
            assert picture.width <= gallery.WIDTH and picture.height <= 2 * gallery.WIDTH


def test_no_other_pictures() -> None:
    wanted = {shown.picture(name) for shown in gallery.GALLERY for name in shown.figures}
    assert {path.name for path in gallery.PICTURES.iterdir()} == wanted


@pytest.mark.parametrize(
    "shown", [shown for shown in gallery.GALLERY if shown.make is None], ids=lambda shown: shown.paper
)
def test_commands_exist(shown: gallery.Shown, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*shown.command.split()[1:], "--help"])
    assert f"--preset fair --data {shown.data}" in " ".join(capsys.readouterr().out.split())


def test_finished_runs_are_shrunk_and_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = gallery.GALLERY[0]
    figures = tmp_path / "runs" / shown.paper / "figures"
    figures.mkdir(parents=True)
    for name in shown.figures:
        Image.new("RGB", (1440, 360), "red").save(figures / f"{name}.png")
    monkeypatch.setattr(gallery, "PICTURES", tmp_path / "pictures")
    assert gallery.main(["--only", shown.paper, "--folder", str(tmp_path / "runs")]) == 0
    made = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in made] == sorted(shown.picture(name) for name in shown.figures)
    with Image.open(made[0]) as picture:
        assert picture.size == (720, 180)
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
