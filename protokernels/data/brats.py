# SPDX-License-Identifier: MIT
"""Axial slices of BraTS, with or without tumour, from the volumes of the Medical Segmentation Decathlon's
``Task01_BrainTumour`` (B. Menze et al., IEEE TMI 34, 2015; M. Antonelli et al., Nature Communications 13, 2022).

``imagesTr/NAME.nii.gz`` holds four sequences, of which FLAIR is taken (by ``modality`` in ``dataset.json``; else the first);
``labelsTr/NAME.nii.gz`` the parts of the tumour. As in Ruppli et al. 2022, slices of which 80 % or more are black are left out and the
question is whether a slice shows any tumour. Our choices, where that text is silent: the sequence; every slice is scaled by its
own smallest and largest value to 0..255; a volume is a patient. In a fixed random order a tenth of the patients, at least one, tests,
as many validate and the rest train; that differs from the paper, whose test data are three hold-out sets of 1000 slices each:
ours are the three parts into which the evaluation cuts the slices of that tenth. Rows run from anterior to posterior, columns from
the patient's left to right.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .errors import DataError
from .nifti import read_nifti, whole_labels
from .nifti_folders import VolumeFolder, decathlon_folder, same_place
from .types import ImageDataset, Split

NAMES = ("brats",)
FOLDERS = ("Task01_BrainTumour", "brats")
CLASSES = ("no tumour", "tumour")
SEQUENCE = "FLAIR"
BLACK = 0.8  # a slice with this share of black pixels, or more, is left out
HELD = 10  # one patient in so many tests, one validates
SEED = 0


def load(root: Path) -> ImageDataset:
    """Loads all slices into memory, a byte a pixel, and of validation and test set the tumours, another byte.

    Raises:
        DataError: no folder, fewer than three patients, files that are missing or damaged, volumes of different sizes.
    """
    folder = next((root / name for name in FOLDERS if (root / name).is_dir()), None)
    if folder is None:
        raise DataError(
            f"brats: no folder {' or '.join(str(root / name) for name in FOLDERS)}; unpack Task01_BrainTumour of the Medical "
            "Segmentation Decathlon there (imagesTr, labelsTr, dataset.json)"
        )
    described = decathlon_folder(folder)
    channel = described.channel(SEQUENCE)
    parts: dict[str, list[Split]] = {"train": [], "val": [], "test": []}
    for (_, split), pair in zip(assigned(described), described.pairs, strict=True):
        image, label = read_nifti(pair.image, channel=channel), read_nifti(pair.label)
        same_place(image, label)
        try:
            slices, masks = kept_slices(image.values, whole_labels(label))
        except DataError as error:
            raise DataError(f"{pair.name}: {error}") from error
        shown = np.any(masks, axis=(1, 2)).astype(np.int64)
        held = None if split == "train" else masks  # for figures, which show images that were held out
        parts[split].append(Split(slices, shown, groups=np.full(len(shown), pair.group), masks=held))
    sizes = sorted({one.images.shape[1:] for split in parts.values() for one in split})
    if len(sizes) > 1:
        raise DataError(f"{folder}: all volumes must have slices of one size; got {', '.join(map(str, sizes))}")
    provenance = described.provenance()
    provenance |= {"sequence": SEQUENCE, "patients": {name: len(split) for name, split in parts.items()}}
    try:
        train, val, test = (_joined(split) for split in parts.values())
        return ImageDataset("brats", train, val, test, CLASSES, provenance)
    except DataError as error:
        raise DataError(f"{folder}: {error}") from error


def assigned(folder: VolumeFolder) -> list[tuple[str, str]]:
    """Patient and split (``"train"``, ``"val"``, ``"test"``) of every volume; the same every time."""
    patients = sorted({pair.group for pair in folder.pairs})
    if len(patients) < 3:
        raise DataError(f"{folder.folder}: three splits need at least 3 patients; got {len(patients)}")
    keys = np.random.PCG64(SEED).random_raw(len(patients))  # a stream that numpy keeps stable over versions
    order = [patients[index] for index in np.argsort(keys, kind="stable")]
    held = max(1, len(order) // HELD)
    names = {
        patient: "test" if rank < held else "val" if rank < 2 * held else "train" for rank, patient in enumerate(order)
    }
    return [(pair.group, names[pair.group]) for pair in folder.pairs]


def kept_slices(
    volume: np.ndarray,  # [X, Y, Z], right, anterior, superior
    labels: np.ndarray,  # [X, Y, Z] whole numbers, 0 is no tumour
) -> tuple[np.ndarray, np.ndarray]:  # [N, Y, X] uint8, [N, Y, X] bool
    """The slices that are not mostly black, scaled one by one, and where each shows tumour.

    Raises:
        DataError: NaN or infinity.
    """
    if not np.isfinite(volume).all():
        raise DataError(f"{int((~np.isfinite(volume)).sum()):,} voxels of a volume are NaN or infinite; replace them")
    stacked, marked = (array.transpose(2, 1, 0)[:, ::-1] for array in (volume, labels))
    kept = (stacked <= 0).mean(axis=(1, 2)) < BLACK
    slices = stacked[kept].astype(np.float32)
    low, high = slices.min(axis=(1, 2), keepdims=True), slices.max(axis=(1, 2), keepdims=True)
    scaled = (slices - low) / np.where(high > low, high - low, 1)
    return np.rint(255 * scaled).astype(np.uint8), marked[kept] > 0


def _joined(parts: list[Split]) -> Split:
    names = ("images", "labels", "targets", "groups", "masks")
    columns = {name: [getattr(part, name) for part in parts] for name in names}
    return Split(**{name: np.concatenate(values) for name, values in columns.items() if values[0] is not None})
