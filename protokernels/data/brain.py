# SPDX-License-Identifier: MIT
"""Slices of brain MRI with and without a tumour, from an ``.npz`` file with MedMNIST's arrays and one more.

``brain_tumor_4class_128.npz``
    ``{train,val,test}_images`` uint8 [N, H, W]; ``_labels`` [N, 1], 0 no tumour, 1 glioma, 2 meningioma, 3 pituitary
    tumour (S. Bhuvaji et al., Brain Tumor Classification (MRI), 2020, whose tumours are those of J. Cheng, figshare 2017);
    ``_near_dup_group`` [N], whole numbers: images that nearly repeat one another have one number.

``"brain_tumor"`` asks whether there is a tumour, ``"brain_tumor_types"`` which class it is. The source names no patients. Groups
of near repetitions stand in their place, so slices of one head may still occur in two splits, and images without a tumour come
from other sources than those with one: what tells the sources apart helps with the classes. Both stand among the warnings.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .download import file_md5, find_file, searched
from .errors import DataError
from .medmnist import check_headers
from .npz import NpzFile
from .types import ImageDataset, Split

NAMES = ("brain_tumor", "brain_tumor_types")
FILE = "brain_tumor_4class_128.npz"
CLASSES = ("no tumour", "glioma", "meningioma", "pituitary tumour")
WARNINGS = (
    "brain_tumor: the source names no patients; the splits share no group of near repetitions, but perhaps a head",
    "brain_tumor: images without a tumour come from other sources than those with one, so a score may show the source",
)


def load(name: str, root: Path) -> ImageDataset:
    """Loads one of :data:`NAMES`; ``DataError`` where the file is missing or is not what the module's docstring says."""
    path = find_file(root, (FILE,))
    if path is None:
        raise DataError(
            f"{name}: no file {FILE} in {searched(root)}. It is not published in this form: make it from the original "
            "images with the arrays that protokernels.data.brain describes"
        )
    archive = NpzFile(path)
    binary = name == "brain_tumor"
    splits = {split: _read_split(archive, split, binary) for split in ("train", "val", "test")}
    seen: set[str] = set()
    for split, part in splits.items():
        assert part.groups is not None
        groups = set(part.groups.tolist())
        if shared := sorted(seen & groups):
            raise DataError(f"{path}: {len(shared)} groups of {split} occur in a split before it, {shared[0]} say")
        seen |= groups
    provenance = {
        "source": "Brain Tumor Classification (MRI)",
        "files": [FILE],
        "md5s": {FILE: file_md5(path)},
        "published_md5s": {},
        "warnings": list(WARNINGS),
    }
    names = ("no tumour", "tumour") if binary else CLASSES
    try:
        return ImageDataset(name, splits["train"], splits["val"], splits["test"], names, provenance)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _read_split(archive: NpzFile, split: str, binary: bool) -> Split:
    wanted = [f"{split}_images", f"{split}_labels", f"{split}_near_dup_group"]
    if missing := [name for name in wanted if name not in archive]:
        raise DataError(
            f"{archive.path}: no array {', '.join(missing)}; it holds {', '.join(archive.names) or 'nothing'}"
        )
    check_headers(archive, split)
    count = archive.header(wanted[0]).shape[0]
    header = archive.header(wanted[2])
    if header.dtype.kind not in "iu" or header.shape != (count,):
        raise DataError(
            f"{archive.path}: {wanted[2]} must be whole numbers of shape [{count}]; got {header.dtype} {list(header.shape)}"
        )
    labels = archive.read(wanted[1]).reshape(-1)
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= len(CLASSES):
        raise DataError(f"{archive.path}: {wanted[1]} must lie in 0..{len(CLASSES) - 1}; got {lowest}..{highest}")
    classes = (labels > 0 if binary else labels).astype(np.int64)
    images, groups = archive.read_or_map(wanted[0]), archive.read(wanted[2]).astype(str)
    try:
        return Split(images, classes, groups=groups)
    except DataError as error:
        raise DataError(f"{archive.path}, {split}: {error}") from error
