# SPDX-License-Identifier: MIT
"""ACDC, short-axis MR slices of the heart at the ends of diastole and systole (O. Bernard et al., IEEE TMI 37, 2018), from
one ``.npz`` file.

``acdc_slices_128.npz``
    ``{train,val,test}_images`` uint8 [N, H, W]; ``_masks`` uint8 [N, H, W], 0 background, 1 right ventricle, 2
    myocardium, 3 left ventricle; ``_patient_ids``, ``_frame`` and ``_slice``, whole numbers [N]: a volume is what has
    one patient and one frame, its slices in the order of their numbers.

The file has its own split by patients and does not keep the distance of pixels, so distances are in pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .download import file_md5, find_file, searched
from .errors import DataError
from .npz import NpzFile
from .slicing import image_slices, label_slices
from .volume_types import LabelledVolume, SegmentationDataset

FILE = "acdc_slices_128.npz"
CLASSES = ("background", "right ventricle", "myocardium", "left ventricle")
MAX_SIDE = 4096  # pixels


def load(root: Path, size: int | None) -> SegmentationDataset:
    """Loads the file; ``DataError`` where it is missing or is not what the module's docstring says."""
    path = find_file(root, (FILE,))
    if path is None:
        raise DataError(
            f"acdc: no file {FILE} in {searched(root)}. It is not published in this form: make it from ACDC's volumes "
            "with the arrays that protokernels.data.acdc describes"
        )
    archive = NpzFile(path)
    splits = {split: _read_split(archive, split, size) for split in ("train", "val", "test")}
    provenance = {
        "source": "ACDC",
        "files": [FILE],
        "md5s": {FILE: file_md5(path)},
        "slice_axis": "short axis of the heart, as stored",
        "warnings": [],
    }
    try:
        return SegmentationDataset("acdc", splits["train"], splits["val"], splits["test"], CLASSES, provenance)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _read_split(archive: NpzFile, split: str, size: int | None) -> tuple[LabelledVolume, ...]:
    images = _checked(archive, f"{split}_images", 3)
    masks = _checked(archive, f"{split}_masks", 3)
    patients, frames, places = (_checked(archive, f"{split}_{key}", 1) for key in ("patient_ids", "frame", "slice"))
    if masks.shape != images.shape or not len(images) == len(patients) == len(frames) == len(places):
        raise DataError(
            f"{archive.path}: {split}_masks must have the shape {list(images.shape)} of {split}_images, and one patient, "
            f"frame and slice each; got {list(masks.shape)}, {len(patients)}, {len(frames)}, {len(places)}"
        )
    volumes = []
    for patient, frame in np.unique(np.stack([patients, frames], axis=1), axis=0):
        chosen = np.flatnonzero((patients == patient) & (frames == frame))
        chosen = chosen[np.argsort(places[chosen], kind="stable")]
        name = f"patient{int(patient):03d}_frame{int(frame):02d}"
        if len(np.unique(places[chosen])) != len(chosen):
            raise DataError(f"{archive.path}: two {split} slices of {name} have one number; numbers must differ")
        image, mask = (array[chosen].transpose(1, 2, 0) for array in (images, masks))
        volumes.append(
            LabelledVolume(name, f"patient{int(patient):03d}", image_slices(image, size), label_slices(mask, size))
        )
    return tuple(volumes)


def _checked(archive: NpzFile, name: str, dimensions: int) -> np.ndarray:
    if name not in archive:
        raise DataError(f"{archive.path}: no array {name}; it holds {', '.join(archive.names) or 'nothing'}")
    header = archive.header(name)
    kinds = "uint8 of shape [N, H, W]" if dimensions == 3 else "whole numbers of shape [N]"
    fits = header.dtype == np.uint8 if dimensions == 3 else header.dtype.kind in "iu"
    sides = header.shape[1:]
    if not fits or len(header.shape) != dimensions or not all(1 <= side <= MAX_SIDE for side in sides):
        raise DataError(f"{archive.path}: {name} must be {kinds}; got {header.dtype} {list(header.shape)}")
    values = archive.read(name)
    return values if dimensions == 3 else values.astype(np.int64)
