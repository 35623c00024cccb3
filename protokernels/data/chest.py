# SPDX-License-Identifier: MIT
"""Chest X-rays with labels, findings and patients, from ``.npz`` files with MedMNIST's arrays and a few more.

``chest_nih_128.npz``
    images of NIH ChestX-ray14 (X. Wang et al., ChestX-ray8, CVPR 2017): ``{train,val,test}_images`` uint8 [N, H, W];
    ``_labels`` [N, 1], 0 no finding and 1 pneumonia; ``_labels14`` [N, 14], the data set's findings, named by
    ``class_names_14`` text [14]; ``_patient_ids`` text [N].
``chest_kermany_96.npz``
    images of children (D. Kermany et al., Cell 172, 2018): ``_images``; ``_labels`` [N, 1], 0 normal and 1 pneumonia;
    ``_subtype`` [N, 1], 0 normal, 1 bacterial and 2 viral pneumonia; ``_patient_ids`` text [N].

Any size of image will do; ``_patient_ids`` may be absent. Patients who occur in two splits are counted, and the warning
stays with every result. The data set in MedMNIST's own format, with its 14 findings, is ``"chestmnist"``.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from .download import file_md5, find_file, searched
from .errors import DataError
from .medmnist import check_headers, read_patients, shared_patients
from .npz import NpzFile
from .types import ImageDataset, Split

NAMES = ("chest_nih", "chest_kermany", "chest_kermany_subtype")
MAX_TARGETS = 1000
_FILES = {"chest_nih": "chest_nih_128.npz", "chest_kermany": "chest_kermany_96.npz"}


def load(name: str, root: Path) -> ImageDataset:
    """Loads one of :data:`NAMES`; ``DataError`` where the file is missing or is not what the module's docstring says."""
    filename = _FILES[name.removesuffix("_subtype")]
    path = find_file(root, (filename,))
    if path is None:
        raise DataError(
            f"{name}: no file {filename} in {searched(root)}. It is not published in this form: make it from the "
            "original images with the arrays that protokernels.data.chest describes, or take chestmnist"
        )
    archive = NpzFile(path)
    subtype = name == "chest_kermany_subtype"
    if name == "chest_nih":
        class_names: tuple[str, ...] = ("no finding", "pneumonia")
        target_names = _target_names(archive)
    else:
        class_names = ("normal", "bacterial pneumonia", "viral pneumonia") if subtype else ("normal", "pneumonia")
        target_names = ()
    splits = {
        split: _read_split(archive, split, "subtype" if subtype else "labels", len(target_names))
        for split in ("train", "val", "test")
    }
    provenance: dict[str, Any] = {
        "source": "NIH ChestX-ray14" if name == "chest_nih" else "Kermany chest X-rays",
        "files": [filename],
        "md5s": {filename: file_md5(path)},
        "published_md5s": {},
        "warnings": shared_patients(filename, splits),
    }
    for message in provenance["warnings"]:
        warnings.warn(message, UserWarning, stacklevel=3)
    try:
        return ImageDataset(name, splits["train"], splits["val"], splits["test"], class_names, provenance, target_names)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _read_split(archive: NpzFile, split: str, labels: str, targets: int) -> Split:
    wanted = [f"{split}_images", f"{split}_labels", *([f"{split}_labels14"] if targets else [])]
    wanted += [f"{split}_{labels}"] if labels != "labels" else []
    if missing := [name for name in wanted if name not in archive]:
        raise DataError(
            f"{archive.path}: no array {', '.join(missing)}; it holds {', '.join(archive.names) or 'nothing'}"
        )
    check_headers(archive, split)
    count = archive.header(f"{split}_images").shape[0]
    classes = _integers(archive, f"{split}_{labels}", (count, 1)).reshape(-1).astype(np.int64)
    findings = _integers(archive, f"{split}_labels14", (count, targets)) if targets else None
    if findings is not None and findings.max(initial=0) > 1:
        raise DataError(f"{archive.path}: {split}_labels14 must be 0 or 1; got {int(findings.max())}")
    patients = read_patients(archive, split, count)
    images = archive.read_or_map(f"{split}_images")
    try:
        return Split(images, classes, None if findings is None else findings.astype(np.uint8), patients)
    except DataError as error:
        raise DataError(f"{archive.path}, {split}: {error}") from error


def _integers(archive: NpzFile, name: str, shape: tuple[int, int]) -> np.ndarray:
    header = archive.header(name)
    if header.dtype.kind not in "iu" or header.shape not in (shape, shape[:1] if shape[1] == 1 else shape):
        raise DataError(
            f"{archive.path}: {name} must be whole numbers of shape {list(shape)}; got {header.dtype} "
            f"{list(header.shape)}"
        )
    values = archive.read(name)
    if values.size and values.min() < 0:
        raise DataError(f"{archive.path}: {name} must not be negative; got {int(values.min())}")
    return values


def _target_names(archive: NpzFile) -> tuple[str, ...]:
    if "class_names_14" not in archive:
        raise DataError(f"{archive.path}: no array class_names_14; it holds {', '.join(archive.names) or 'nothing'}")
    header = archive.header("class_names_14")
    if header.dtype.kind != "U" or len(header.shape) != 1 or not 1 <= header.shape[0] <= MAX_TARGETS:
        raise DataError(
            f"{archive.path}: class_names_14 must be text of shape [L]; got {header.dtype} {list(header.shape)}"
        )
    return tuple(str(name) for name in archive.read("class_names_14"))
