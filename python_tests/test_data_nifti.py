# SPDX-License-Identifier: MIT
"""NIfTI files: orientation there and back, and files that lie, are damaged or hold something else."""

from __future__ import annotations

import gzip
import itertools
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protokernels.data import DataError
from protokernels.data.nifti import check_nifti, read_nifti, whole_labels
from python_tests.nifti_files import SHAPE, nibabel, write_nifti

VALUES = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
TURNS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1.0, -1.0), repeat=3)
]


def turned_affine(order: tuple[int, ...], signs: tuple[float, ...], tilt: float = 0.0) -> np.ndarray:
    """The file's axis a runs along axis ``order[a]`` of the body, forwards or backwards, slightly tilted."""
    matrix = np.zeros((3, 3))
    for axis, (target, sign) in enumerate(zip(order, signs, strict=True)):
        matrix[target, axis] = sign * (1.0, 1.5, 3.0)[axis]
    turn = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ matrix, (-11.0, 7.5, 3.25)
    return affine


class TestOrientation:
    @pytest.mark.parametrize(("order", "signs"), TURNS)
    def test_as_nibabel_turns_it_and_back(
        self, tmp_path: Path, order: tuple[int, ...], signs: tuple[float, ...]
    ) -> None:
        path = write_nifti(tmp_path / "v.nii", VALUES, turned_affine(order, signs, tilt=0.2))
        volume = read_nifti(path)
        expected = nibabel.as_closest_canonical(nibabel.load(path))
        np.testing.assert_array_equal(volume.values, expected.get_fdata(dtype=np.float32))
        np.testing.assert_allclose(volume.spacing, nibabel.affines.voxel_sizes(expected.affine), rtol=1e-6)
        label = (volume.values > 0).astype(np.uint8)
        written = nibabel.Nifti1Image.from_bytes(volume.label_file(label))
        np.testing.assert_array_equal(np.asarray(written.dataobj), VALUES > 0)
        np.testing.assert_array_equal(written.affine, nibabel.load(path).affine)

    def test_same_place(self, tmp_path: Path) -> None:
        one = read_nifti(write_nifti(tmp_path / "a.nii", VALUES, np.diag([2.0, 3.0, 4.0, 1.0])))
        affine = np.diag([-2.0, 3.0, 4.0, 1.0])
        affine[0, 3] = 2 * (SHAPE[0] - 1)
        assert one.same_place(read_nifti(write_nifti(tmp_path / "b.nii", VALUES, affine)))
        affine[0, 3] += 0.19  # a tenth of the smallest step is 0.2
        assert one.same_place(read_nifti(write_nifti(tmp_path / "c.nii", VALUES, affine)))
        affine[0, 3] += 0.02
        assert not one.same_place(read_nifti(write_nifti(tmp_path / "d.nii", VALUES, affine)))

    @pytest.mark.parametrize(("unit", "factor"), [("mm", 1.0), ("unknown", 1.0), ("meter", 1000.0), ("micron", 0.001)])
    def test_spacing_is_in_millimetres(self, tmp_path: Path, unit: str, factor: float) -> None:
        image = nibabel.Nifti1Image(VALUES, np.diag([2.0, 3.0, 4.0, 1.0]))
        image.header.set_xyzt_units(unit)
        nibabel.save(image, tmp_path / "a.nii")
        np.testing.assert_allclose(read_nifti(tmp_path / "a.nii").spacing, np.array([2, 3, 4]) * factor)


class TestValues:
    @pytest.mark.parametrize("kind", ["u1", "i1", "i2", "u2", "i4", "f4", "f8", ">i2", ">f4"])
    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    def test_kinds_of_voxels(self, tmp_path: Path, kind: str, suffix: str) -> None:
        values = np.arange(120).reshape(SHAPE).astype(kind)
        header = nibabel.Nifti1Header(endianness=">" if kind.startswith(">") else "<")
        image = nibabel.Nifti1Image(values, np.eye(4), header, dtype=np.dtype(kind).newbyteorder("="))
        nibabel.save(image, tmp_path / f"v{suffix}")
        volume = read_nifti(tmp_path / f"v{suffix}")
        np.testing.assert_array_equal(volume.values, np.arange(120).reshape(SHAPE))
        np.testing.assert_array_equal(whole_labels(volume), np.arange(120).reshape(SHAPE))

    def test_slope_and_intercept(self, tmp_path: Path) -> None:
        image = nibabel.Nifti1Image(np.arange(120, dtype=np.int16).reshape(SHAPE), np.eye(4))
        image.header.set_slope_inter(0.5, -20)
        nibabel.save(image, tmp_path / "v.nii.gz")
        expected = nibabel.load(tmp_path / "v.nii.gz").get_fdata()
        volume = read_nifti(tmp_path / "v.nii.gz")
        np.testing.assert_allclose(volume.values, expected, rtol=1e-6)
        label = (volume.values > 0).astype(np.uint8)  # is not scaled, whatever its image is
        written = nibabel.Nifti1Image.from_bytes(volume.label_file(label))
        np.testing.assert_array_equal(written.get_fdata(), label)

    @pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (6, 5, 4, 1), (6, 5, 4, 1, 1)])
    def test_axes_of_length_one(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        path = write_nifti(tmp_path / "v.nii", np.zeros(shape, np.float32))
        volume = read_nifti(path)
        assert volume.values.shape == (*shape, 1)[:3]
        written = nibabel.Nifti1Image.from_bytes(volume.label_file(np.zeros(volume.values.shape, np.uint8)))
        assert written.shape == nibabel.load(path).shape

    def test_nifti_2(self, tmp_path: Path) -> None:
        nibabel.save(nibabel.Nifti2Image(VALUES, np.eye(4)), tmp_path / "v.nii.gz")
        volume = read_nifti(tmp_path / "v.nii.gz")
        np.testing.assert_array_equal(volume.values, VALUES)
        written = nibabel.Nifti2Image.from_bytes(volume.label_file(np.ones(SHAPE, np.uint8)))
        assert written.shape == SHAPE


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("v.nii.gz", b"", "is empty"),
            ("v.nii", b"<!DOCTYPE html>", "not a NIfTI file: it starts with b'<!DO'"),
            ("v.nii.gz", b"<!DOCTYPE html>", "is not gzipped although its name ends in"),
            ("v.nii", gzip.compress(b"x", mtime=0), "is gzipped, so its name must end in"),
            ("v.nii.gz", gzip.compress(b"hello world", mtime=0), "not a NIfTI file: it starts with b'hell'"),
            ("v.nii", struct.pack("<i", 348) + b"\0" * 100, "truncated: 104 bytes, a header has 348"),
            ("v.nii", struct.pack("<i", 348) + b"\0" * 344, "its magic number is"),
            ("v.nii.gz", gzip.compress(struct.pack("<i", 348) + bytes(400), mtime=0)[:14], "truncated or damaged"),
            ("v.mha", b"ObjectType = Image", "must end in .nii or .nii.gz"),
            ("v.dcm", b"x", "DICOM: with dcm2niix"),
        ],
    )
    def test_other_files(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        for read in (read_nifti, check_nifti):
            with pytest.raises(DataError, match=message) as caught:
                read(tmp_path / name)
            assert name in str(caught.value)

    def test_missing_and_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"x\.nii does not exist"):
            read_nifti(tmp_path / "x.nii")
        (tmp_path / "y.nii").mkdir()
        with pytest.raises(DataError, match=r"y\.nii is a folder"):
            read_nifti(tmp_path / "y.nii")

    def test_a_series(self, tmp_path: Path) -> None:
        path = write_nifti(tmp_path / "v.nii", np.zeros((6, 5, 4, 3), np.float32))
        with pytest.raises(DataError, match=r"\[6, 5, 4, 3\]; expected one volume"):
            check_nifti(path)

    @pytest.mark.parametrize("dtype", [np.complex64, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])])
    def test_voxels_that_are_no_real_numbers(self, tmp_path: Path, dtype: Any) -> None:
        nibabel.save(nibabel.Nifti1Image(np.zeros(SHAPE, dtype), np.eye(4)), tmp_path / "v.nii")
        with pytest.raises(DataError, match="expected real numbers"):
            read_nifti(tmp_path / "v.nii")

    def test_a_pair_of_files(self, tmp_path: Path) -> None:
        nibabel.save(nibabel.Nifti1Pair(VALUES, np.eye(4)), tmp_path / "v.hdr")
        (tmp_path / "v.hdr").rename(tmp_path / "v.nii")
        with pytest.raises(DataError, match="its data lie in another file"):
            read_nifti(tmp_path / "v.nii")

    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    @pytest.mark.parametrize("keep", [0.5, 0.99])
    def test_truncated_data(self, tmp_path: Path, suffix: str, keep: float) -> None:
        path = write_nifti(tmp_path / f"v{suffix}", VALUES)
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
        with pytest.raises(DataError, match="truncated or damaged"):
            read_nifti(path)

    def test_a_changed_voxel_in_a_gzipped_file(self, tmp_path: Path) -> None:
        """Stored without compression, so that only the checksum tells."""
        raw = write_nifti(tmp_path / "v.nii", VALUES).read_bytes()
        content = bytearray(gzip.compress(raw, compresslevel=0))
        content[-100] ^= 1
        (tmp_path / "v.nii.gz").write_bytes(content)
        with pytest.raises(DataError, match="truncated or damaged"):
            read_nifti(tmp_path / "v.nii.gz")

    def test_claims_of_a_header_cost_no_memory(self, tmp_path: Path) -> None:
        path = write_nifti(tmp_path / "v.nii", VALUES)
        content = bytearray(path.read_bytes())
        content[42:48] = struct.pack("<3h", 32000, 32000, 3000)
        path.write_bytes(content)
        with pytest.raises(DataError, match="the file is damaged or too large"):
            read_nifti(path)
        content[42:48] = struct.pack("<3h", 900, 900, 300)  # 972 MB: allowed, but not there
        path.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(DataError, match="promises 972,000,352 bytes, 832 are there"):
            read_nifti(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 64 << 20

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("dim", [3, -6, 5, 4, 1, 1, 1, 1], "claims a volume of shape"),
            ("dim", [3, 0, 5, 4, 1, 1, 1, 1], "claims a volume of shape"),
            ("dim", [9, 6, 5, 4, 1, 1, 1, 1], "header is damaged"),
            ("dim", [0, 6, 5, 4, 1, 1, 1, 1], "claims a volume of shape"),
            ("datatype", 3, "header is damaged"),
            ("vox_offset", 0, "from byte 0 on"),
            ("vox_offset", np.nan, "from byte nan on"),
            ("vox_offset", 1e9, "from byte 1e"),
            ("srow_x", [np.nan, 0, 0, 0], "affine is singular or not finite"),
            ("srow_x", [0, 0, 0, 0], "affine is singular or not finite"),
            ("srow_y", [1, 0, 0, 0], "affine is singular or not finite"),
        ],
    )
    def test_odd_headers(self, tmp_path: Path, field: str, value: Any, message: str) -> None:
        path = write_nifti(tmp_path / "v.nii", VALUES)
        content = bytearray(path.read_bytes())
        header = nibabel.Nifti1Header(bytes(content[:348]), check=False)
        header[field] = value
        content[:348] = header.binaryblock
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_nifti(path)

    def test_random_damage_is_refused_or_harmless(self, tmp_path: Path) -> None:
        content, refused = write_nifti(tmp_path / "v.nii", VALUES).read_bytes(), 0
        generator = np.random.default_rng(0)
        for _ in range(300):
            damaged = bytearray(content)
            for place in generator.integers(0, 352, 3):
                damaged[place] = generator.integers(256)
            (tmp_path / "d.nii").write_bytes(damaged)
            try:
                assert read_nifti(tmp_path / "d.nii").values.ndim == 3
            except DataError as error:
                assert "d.nii" in str(error)
                refused += 1
        assert 30 < refused < 300

    def test_labels_that_do_not_fit(self, tmp_path: Path) -> None:
        volume = read_nifti(write_nifti(tmp_path / "v.nii", VALUES))
        for label in (np.zeros(SHAPE, np.int64), np.zeros((6, 5, 3), np.uint8)):
            with pytest.raises(DataError, match=r"its label must be uint8 of shape \[6, 5, 4\]"):
                volume.label_file(label)
