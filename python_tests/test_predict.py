# SPDX-License-Identifier: MIT
"""Prediction on volumes: arrays, files, and the command. The network is a threshold, so every label is known."""

from __future__ import annotations

import gzip
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("tyro", reason="the commands need the extra protokernels[train]")

from protokernels.cli import main
from protokernels.data import DataError
from protokernels.inference import segment_file, segment_volume
from python_tests.nifti_files import nibabel, write_nifti
from python_tests.test_data_nifti import TURNS, turned_affine

SHAPE = (9, 7, 5)
VALUES = np.random.default_rng(0).integers(-500, 1500, SHAPE).astype(np.int16)


class Threshold(nn.Module):
    """Class 1 above the middle of the volume's range, class 2 above three quarters of it. Remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.modes: list[bool] = []

    def forward(self, slices: Tensor) -> Tensor:
        self.seen.append(slices)
        self.modes.append(self.training)
        return torch.cat([0.5 - slices, slices - 0.5, 3 * (slices - 0.5) - 0.5], dim=1)


def expected(values: np.ndarray) -> np.ndarray:
    share = (values - values.min()) / (values.max() - values.min())
    return (share > 0.5).astype(np.uint8) + (share > 0.75)


class TestArray:
    def test_every_voxel_and_every_batch(self) -> None:
        square = VALUES[:7]
        for batch_size in (1, 2, 5, 100):
            model = Threshold()
            label = segment_volume(model, square, image_size=7, batch_size=batch_size)
            assert label.dtype == np.uint8
            np.testing.assert_array_equal(label, expected(square))
            assert [len(part) for part in model.seen] == [batch_size] * (5 // batch_size) + [5 % batch_size] * (
                0 < 5 % batch_size < batch_size
            )

    def test_the_network_sees_what_it_saw_in_training(self) -> None:
        from protokernels.data.slicing import image_slices

        model = Threshold()
        segment_volume(model, VALUES, image_size=12)
        np.testing.assert_array_equal(torch.cat(model.seen)[:, 0], image_slices(VALUES, 12))

    def test_logits_are_resized_and_not_decisions(self) -> None:
        """On a ramp the border lies where the ramp is 1/2, to half a voxel, although the network's pixels are four
        voxels wide."""
        ramp = np.clip(np.arange(64, dtype=np.float32) - 22.0, -20, 20)[:, None, None].repeat(64, 1).repeat(2, 2)
        model = Threshold()
        label = segment_volume(model, ramp, image_size=16)
        assert (np.abs((label > 0).argmax(axis=0) - 22.5) <= 0.5).all()
        decisions = model.seen[0] > 0.5
        coarse = nn.functional.interpolate(decisions.float(), (64, 64), mode="nearest-exact")[0, 0].numpy()
        assert (np.abs(coarse.argmax(axis=0) - 22.5) > 0.5).all(), "resized decisions would have passed as well"

    def test_the_mode_is_put_back_also_after_an_error(self) -> None:
        model = Threshold().train()
        segment_volume(model, VALUES, image_size=4)
        assert model.training and model.modes == [False]
        with pytest.raises(ValueError, match="must return logits"):
            segment_volume(nn.Sequential(model, nn.Flatten()).train(), VALUES, image_size=4)
        assert model.training

    def test_parts_keep_modes_of_their_own(self) -> None:
        """Batch normalisation with frozen statistics, in a network that is trained, does not begin to learn them."""
        network = nn.Sequential(nn.BatchNorm2d(1).eval(), Threshold())
        segment_volume(network, VALUES, image_size=4)
        assert network.training and network[1].training and not network[0].training

    def test_no_gradient_and_the_image_stays(self) -> None:
        before = VALUES.copy()
        model = nn.Conv2d(1, 3, 1)
        segment_volume(model, VALUES, image_size=8)
        assert model.weight.grad is None
        np.testing.assert_array_equal(VALUES, before)

    def test_a_constant_volume(self) -> None:
        assert segment_volume(Threshold(), np.full(SHAPE, 7), image_size=8).max() == 0

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (np.zeros((4, 4)), r"expected a volume \[X, Y, Z\] of real numbers; got float64 \[4, 4\]"),
            (np.zeros((4, 4, 4, 2)), r"got float64 \[4, 4, 4, 2\]"),
            (np.zeros((4, 0, 4)), r"got float64 \[4, 0, 4\]"),
            (np.zeros((4, 4, 4), complex), "got complex128"),
            (np.full((4, 4, 4), np.nan), "64 of 64 voxels are NaN"),
        ],
    )
    def test_odd_images(self, image: np.ndarray, message: str) -> None:
        with pytest.raises(DataError, match=message):
            segment_volume(Threshold(), image, image_size=4)

    @pytest.mark.parametrize("batch_size", [0, -1])
    def test_batches_of_nothing(self, batch_size: int) -> None:
        """They would leave the label what the memory held."""
        with pytest.raises(ValueError, match=f"batch_size must be at least 1; got {batch_size}"):
            segment_volume(Threshold(), VALUES, image_size=4, batch_size=batch_size)

    def test_odd_logits(self) -> None:
        class Diverged(nn.Module):
            def forward(self, slices: Tensor) -> Tensor:
                return torch.cat([slices, slices * torch.nan], dim=1)

        for model, message in ((nn.Identity(), r"logits \[5, K, h, w\] of 2 to 256 classes"), (Diverged(), "NaN")):
            with pytest.raises(ValueError, match=message):
                segment_volume(model, VALUES, image_size=4)


class TestFile:
    @pytest.mark.parametrize(("order", "signs"), TURNS[::5])
    def test_the_label_lies_where_its_volume_lies(
        self, tmp_path: Path, order: tuple[int, ...], signs: tuple[float, ...]
    ) -> None:
        """In every orientation: shape, affine, sform, qform, their codes and units agree exactly."""
        cube = VALUES[:5, :5]
        path = write_nifti(
            tmp_path / "v.nii.gz", cube, turned_affine(order, signs, tilt=0.3), qform_code=1, sform_code=2
        )
        out = segment_file(Threshold(), path, tmp_path / "new" / "label.nii.gz", image_size=5)
        one, two = nibabel.load(path), nibabel.load(out)
        assert two.shape == one.shape and two.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(two.affine, one.affine)
        for name in ("srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "pixdim", "dim"):
            np.testing.assert_array_equal(two.header[name], one.header[name])
        for name in ("qform_code", "sform_code", "xyzt_units"):
            assert two.header[name] == one.header[name]
        np.testing.assert_array_equal(np.asarray(two.dataobj), expected(cube))

    def test_the_orientation_of_the_file_does_not_matter(self, tmp_path: Path) -> None:
        """A network that does tell left from right: the same body, stored in two ways, gets the same labels."""

        class Side(nn.Module):
            def forward(self, slices: Tensor) -> Tensor:  # rows of a slice run to the right
                ramp = torch.linspace(-1, 1, slices.shape[2])[:, None].expand_as(slices)
                return torch.cat([torch.zeros_like(slices), ramp], dim=1)

        plain = write_nifti(tmp_path / "a.nii.gz", VALUES, np.eye(4))
        mirrored = np.diag([-1.0, 1.0, 1.0, 1.0])
        mirrored[0, 3] = SHAPE[0] - 1
        backwards = write_nifti(tmp_path / "b.nii.gz", VALUES[::-1], mirrored)
        one, two = (
            np.asarray(nibabel.load(segment_file(Side(), path, tmp_path / f"l{path.name}", image_size=9)).dataobj)
            for path in (plain, backwards)
        )
        assert one[-1].all() and not one[0].any()
        np.testing.assert_array_equal(one, two[::-1])

    def test_the_same_volume_gives_the_same_bytes_and_nothing_private(self, tmp_path: Path) -> None:
        path = write_nifti(tmp_path / "v.nii.gz", VALUES, descrip=b"Jane Doe")
        out = [segment_file(Threshold(), path, tmp_path / f"{n}.nii.gz", image_size=9).read_bytes() for n in "ab"]
        assert out[0] == out[1] and b"Jane" not in gzip.decompress(out[0])
        plain = segment_file(Threshold(), path, tmp_path / "c.nii", image_size=9).read_bytes()
        assert plain == gzip.decompress(out[0])

    def test_refusals(self, tmp_path: Path) -> None:
        path = write_nifti(tmp_path / "v.nii", VALUES)
        before = path.read_bytes()
        with pytest.raises(DataError, match="would replace the volume itself"):
            segment_file(Threshold(), path, tmp_path / "." / "v.nii", image_size=9)
        with pytest.raises(DataError, match=r"must end in \.nii"):
            segment_file(Threshold(), path, tmp_path / "v.png", image_size=9)
        bad = write_nifti(tmp_path / "w.nii", np.full(SHAPE, np.inf, np.float32))
        with pytest.raises(DataError, match=r"w\.nii: 315 of 315 voxels are NaN or infinite"):
            segment_file(Threshold(), bad, tmp_path / "x.nii", image_size=9)
        assert path.read_bytes() == before and not (tmp_path / "x.nii").exists()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """In place of the paper: `load_segmenter` returns the threshold; yields the checkpoints it was asked for."""
    asked: list[Path] = []

    def load_segmenter(path: Path) -> tuple[nn.Module, SimpleNamespace]:
        asked.append(path)
        if not path.exists():
            raise FileNotFoundError(f"{path} holds no checkpoint")
        return Threshold(), SimpleNamespace(image_size=9)

    module = ModuleType("protokernels.papers.local_contrast")
    module.load_segmenter = load_segmenter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield asked


class TestCommand:
    words = ("predict", "local-contrast", "--device", "cpu", "--checkpoint")

    def test_several_volumes(self, tmp_path: Path, stand_in: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
        square = VALUES[:, :, :5][:7]
        paths = [write_nifti(tmp_path / f"{name}.nii.gz", square) for name in ("a", "b.c")]
        assert main([*self.words, str(tmp_path), *map(str, paths)]) == 0
        labels = [tmp_path / "a_prediction.nii.gz", tmp_path / "b.c_prediction.nii.gz"]
        assert capsys.readouterr().out.split() == ["label", str(labels[0]), "label", str(labels[1])]
        assert stand_in == [tmp_path]
        for label in labels:
            assert nibabel.load(label).shape == square.shape

    def test_out_is_a_file_or_a_folder(self, tmp_path: Path, stand_in: list[Path]) -> None:
        path = write_nifti(tmp_path / "a.nii", VALUES)
        for out, made in (("x/label.nii", "x/label.nii"), ("y", "y/a_prediction.nii.gz")):
            assert main([*self.words, str(tmp_path), str(path), "--out", str(tmp_path / out)]) == 0
            assert (tmp_path / made).is_file()

    def test_files_are_kept_unless_told(
        self, tmp_path: Path, stand_in: list[Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        path, out = write_nifti(tmp_path / "a.nii", VALUES), tmp_path / "mine.nii"
        out.write_bytes(b"mine")
        words = [*self.words, str(tmp_path), str(path), "--out", str(out)]
        assert main(words) == 1
        assert "pass --overwrite" in capsys.readouterr().err and out.read_bytes() == b"mine"
        assert main([*words, "--overwrite"]) == 0
        assert out.stat().st_size > 352

    def test_all_volumes_are_checked_before_the_first_is_segmented(
        self, tmp_path: Path, stand_in: list[Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        good = write_nifti(tmp_path / "a.nii", VALUES)
        write_nifti(tmp_path / "series.nii.gz", np.zeros((4, 4, 4, 3), np.float32))
        (tmp_path / "text.nii").write_bytes(b"hello world")
        (tmp_path / "scan.dcm").write_bytes(b"x")
        for name, message in (
            ("series.nii.gz", "expected one volume [X, Y, Z]"),
            ("text.nii", "is not a NIfTI file"),
            ("scan.dcm", "dcm2niix"),
            ("absent.nii", "does not exist"),
        ):
            assert main([*self.words, str(tmp_path), str(good), str(tmp_path / name)]) == 1
            captured = capsys.readouterr()
            assert message in captured.err and name in captured.err and captured.err.count("\n") == 1
            assert captured.out == "" and not (tmp_path / "a_prediction.nii.gz").exists()
        assert stand_in == []

    def test_a_warning_is_one_line(
        self, tmp_path: Path, stand_in: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        paper = sys.modules["protokernels.papers.local_contrast"]
        loads = paper.load_segmenter

        def warns(path: Path) -> object:
            warnings.warn("checkpoint is damaged", RuntimeWarning, stacklevel=1)
            return loads(path)

        monkeypatch.setattr(paper, "load_segmenter", warns)
        with warnings.catch_warnings():  # puts back how they are shown
            warnings.simplefilter("always")
            assert main([*self.words, str(tmp_path), str(write_nifti(tmp_path / "a.nii", VALUES))]) == 0
        assert "warning: checkpoint is damaged\n" in capsys.readouterr().err

    def test_odd_words(self, tmp_path: Path, stand_in: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
        path = write_nifti(tmp_path / "a.nii", VALUES)
        other = write_nifti(tmp_path / "b" / "a.nii", VALUES)
        text = tmp_path / "config.json"
        text.write_text("{}")
        for words, message in (
            ([str(tmp_path)], "expected at least one volume"),
            ([str(tmp_path), str(path), "--batch-size", "0"], "batch size of at least 1"),
            ([str(tmp_path), str(path), str(other), "--out", "x.nii"], "one file for 2 volumes"),
            ([str(tmp_path), str(path), str(other), "--out", "x"], "different names"),
            ([str(tmp_path), str(path), "--out", str(other / "x.nii")], "is a file; pass a name in a folder"),
            (
                [str(tmp_path), str(path), "--out", str(text)],
                "config.json is a file; pass a folder as --out, or a label",
            ),
            ([str(tmp_path / "nothing"), str(path)], "holds no checkpoint"),
        ):
            assert main([*self.words, *words]) == 1, words
            assert message in capsys.readouterr().err
        for words in ([], ["fly"]):
            assert main(["predict", *words]) == 2
        assert main(["predict", "--help"]) == 0
        assert "local-contrast" in capsys.readouterr().out

    def test_a_missing_nibabel_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stand_in: list[Path]
    ) -> None:
        path = write_nifti(tmp_path / "a.nii", VALUES)
        monkeypatch.setitem(sys.modules, "nibabel", None)
        assert main([*self.words, str(tmp_path), str(path)]) == 1
        assert 'pip install "protokernels[train]"' in capsys.readouterr().err
