# SPDX-License-Identifier: MIT
"""Small data files in the standard formats, for the tests of `protokernels.data`."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from protokernels.data import ImageDataset, load_dataset

COUNTS = {"train": 6, "val": 3, "test": 4}


def make_arrays(side: int = 28, channels: int = 1, classes: int = 2) -> dict[str, np.ndarray]:
    """Arrays as MedMNIST stores them; every class occurs."""
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for split, count in COUNTS.items():
        shape = (count, side, side) if channels == 1 else (count, side, side, channels)
        arrays[f"{split}_images"] = generator.integers(0, 256, shape, dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % classes).astype(np.uint8)[:, None]
    return arrays


def save(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return path


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder: Path, *, packed: bool = True) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    arrays = {}
    for prefix, count in (("train", 12), ("t10k", 10)):
        arrays[f"{prefix}-images-idx3-ubyte"] = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{prefix}-labels-idx1-ubyte"] = (np.arange(count) % 10).astype(np.uint8)
    for name, array in arrays.items():
        content = idx_bytes(array)
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    return arrays


def load_quietly(name: str, root: Path) -> ImageDataset:
    """For made files, which never have the published md5."""
    with pytest.warns(UserWarning, match="not the published file"):
        return load_dataset(name, root)
