# SPDX-License-Identifier: MIT
"""Small NIfTI files and folders of them, for the tests of volumes and of prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

nibabel = pytest.importorskip("nibabel", reason="NIfTI files need the extra protokernels[train]")

SHAPE = (6, 5, 4)
BRATS_SHAPE = (10, 8, 6)
BRATS_SEQUENCES = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}


def write_nifti(path: Path, values: np.ndarray, affine: np.ndarray | None = None, **header: Any) -> Path:
    """A NIfTI file; ``header`` sets fields of its header after the rest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine)
    image.header.set_xyzt_units("mm")
    for key, value in header.items():
        image.header[key] = value
    nibabel.save(image, path)
    return path


def write_decathlon(folder: Path, count: int = 8, *, labels: Any = None) -> dict[str, np.ndarray]:
    """A small Decathlon folder with the classes 0, 1, 2; returns the label maps by name."""
    generator = np.random.default_rng(0)
    maps = {}
    for index in range(count):
        name = f"organ_{index:03d}"
        maps[name] = generator.integers(0, 3, SHAPE, dtype=np.uint8)
        write_nifti(folder / "imagesTr" / f"{name}.nii.gz", generator.normal(size=SHAPE).astype(np.float32))
        # The published labels are of both kinds.
        write_nifti(folder / "labelsTr" / f"{name}.nii.gz", maps[name].astype(np.float32 if index % 2 else np.uint8))
    description = {"labels": labels or {"0": "background", "1": "front", "2": "back"}}
    (folder / "dataset.json").write_text(json.dumps(description))
    return maps


def write_brats(folder: Path, patients: int = 5, *, description: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
    """Volumes [X, Y, Z, 4]: slice z of FLAIR has z + 3 bright rows of Y, other sequences are noise; tumour in slices 3 and 5."""
    generator = np.random.default_rng(0)
    volumes = {}
    for index in range(patients):
        name = f"BRATS_{index:03d}"
        volume = generator.random((*BRATS_SHAPE, 4)).astype(np.float32) + 1
        flair = np.zeros(BRATS_SHAPE, np.float32)
        for z in range(BRATS_SHAPE[2]):
            flair[:, : z + 1, z] = 100 * (index + 1) + np.arange(BRATS_SHAPE[0])[:, None]
        volume[..., 0] = flair
        label = np.zeros(BRATS_SHAPE, np.uint8)
        label[2, 1, 3], label[5, 2, 5] = 1, 3
        write_nifti(folder / "imagesTr" / f"{name}.nii.gz", volume)
        write_nifti(folder / "labelsTr" / f"{name}.nii.gz", label)
        volumes[name] = flair
    described = (
        {"modality": BRATS_SEQUENCES, "labels": {str(k): f"part {k}" for k in range(4)}}
        if description is None
        else description
    )
    (folder / "dataset.json").write_text(json.dumps(described))
    return volumes
