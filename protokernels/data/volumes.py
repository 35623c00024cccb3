# SPDX-License-Identifier: MIT
"""Labelled volumes for segmentation, split by patient: ``load_segmentation``, and what is made of the volumes.

>>> from protokernels.data.volumes import load_segmentation, slices_of
>>> phantoms = load_segmentation("phantoms", split="paper")
>>> images, labels, _, _ = slices_of(phantoms.train)
>>> images.shape, labels.dtype
(torch.Size([96, 1, 32, 32]), torch.int64)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from . import acdc, nifti_folders, phantoms
from .datasets import data_root
from .errors import DataError
from .volume_types import LabelledVolume, SegmentationDataset

__all__ = [
    "LabelledVolume",
    "SegmentationDataset",
    "Slices",
    "labelled_subset",
    "load_segmentation",
    "patient_split",
    "slices_of",
]

SplitProtocol = Literal["paper", "official"]
RATIOS = {"mmwhs": (2, 1, 1)}  # of the paper
USUAL_RATIO = (3, 1, 1)
OWN_SIZES = {"hippocampus": 64, "mmwhs": 160}  # of the paper
SEED = 0
Item = TypeVar("Item")


class Slices(NamedTuple):
    """All slices of some volumes, one after the other."""

    images: Tensor  # [N, 1, H, W] float32 in [0, 1]
    labels: Tensor  # [N, H, W] int64
    volumes: Tensor  # [N] int64, which of the volumes
    positions: Tensor  # [N] float32 in [0, 1): number of the slice over the number of slices of its volume


def load_segmentation(
    name: str | Path,
    root: str | Path | None = None,
    *,
    image_size: int | None = None,
    fold: int = 0,
    folds: int = 5,
    split: SplitProtocol,
) -> SegmentationDataset:
    """Loads labelled volumes, cuts them into slices and splits them by patient.

    Every volume is scaled to [0, 1] by its smallest and largest value; slices are resized to ``image_size`` x
    ``image_size`` pixels, images bilinearly, labels by the nearest pixel. Slices run along the third axis after NIfTI
    volumes were turned to right, anterior, superior (:mod:`protokernels.data.nifti_folders`).

    Args:
        name: ``"hippocampus"``, or the name or path of any folder in the layout of the Medical Segmentation Decathlon;
            ``"mmwhs"``, or the path of a folder with its pairs; ``"acdc"`` (:mod:`protokernels.data.acdc`);
            ``"phantoms"``, which need no file.
        root: folder of the data; default: the environment variable ``PROTOKERNELS_DATA``, else
            ``~/.cache/protokernels``.
        image_size: side of the slices in pixels; default: 64 for hippocampus and 160 for mmwhs as in Hu et al., the
            stored 128 for acdc, 32 for phantoms. Another folder has no default.
        fold: which split, 0 to ``folds`` - 1.
        folds: how many are in use.
        split: ``"paper"``: 3:1:1 (mmwhs 2:1:1), cross-validation; ``"official"``: 50 / 25 / 25 %, drawn anew for every
            fold, as in the released code (see :func:`patient_split`). acdc has a split of its own: fold 0 under either
            name.

    Raises:
        DataError: unknown name; a file that is missing, truncated, damaged or not what it should be; too few patients.
        ImportError: nibabel is not installed and the data are NIfTI files.

    Example:
        >>> from protokernels.data import load_segmentation
        >>> phantoms = load_segmentation("phantoms", split="official", fold=3)
        >>> len(phantoms.train), len(phantoms.val), len(phantoms.test), phantoms.num_classes
        (10, 5, 5, 3)
    """
    name = os.fspath(name)
    if split not in ("paper", "official"):
        raise DataError(f'{name}: split must be "paper" or "official"; got {split!r}')
    if not 0 <= fold < folds:
        raise DataError(f"{name}: fold must lie in 0..{folds - 1} ({folds} folds); got {fold}")
    if image_size is not None and image_size < 1:
        raise DataError(f"{name}: image_size must be at least 1 pixel; got {image_size}")
    folder, key = data_root(root), name.lower()
    if key == "acdc":
        return _acdc(folder, image_size, fold)
    class_names: tuple[str, ...]
    if key == "phantoms":
        volumes, class_names, provenance = phantoms.make(image_size), phantoms.CLASSES, phantoms.provenance()
    else:
        described = _describe(name, folder)
        size = image_size if image_size is not None else OWN_SIZES.get(_kind(key, described))
        if size is None:
            raise DataError(f"{name}: its slices have no usual size; pass image_size, 128 say")
        provenance = described.provenance()
        volumes = [nifti_folders.read_pair(pair, described, size, provenance["warnings"]) for pair in described.pairs]
        class_names = described.class_names or _numbered_classes(name, volumes)
        key = _kind(key, described)
    groups = [volume.group for volume in volumes]
    ratio = RATIOS.get(key, USUAL_RATIO)
    try:
        chosen = patient_split(groups, fold, split=split, ratio=ratio)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    train, val, test = (tuple(volumes[index] for index in indices) for indices in chosen)
    patients = [len({volume.group for volume in part}) for part in (train, val, test)]
    provenance["split"] = {"protocol": split, "fold": fold, "patients": patients}
    return SegmentationDataset(name, train, val, test, class_names, provenance)


def patient_split(
    groups: Sequence[str], fold: int, *, split: SplitProtocol, ratio: tuple[int, int, int] = USUAL_RATIO
) -> tuple[list[int], list[int], list[int]]:
    """Indices of the training, validation and test volumes of a fold; no patient is in two of them.

    ``"paper"``: the patients, in a random order, are cut into a + b + c parts of equal size for the ratio a:b:c = a:1:1;
    fold k tests on part k and validates on the next one, so that every patient is tested once in a + 2 folds. Later
    folds start over with another order. (The paper splits "four times independently", where test sets overlap; sets that do not
    make the spread over folds the more telling.)

    ``"official"``: for every fold its own random order; of n patients int(n / 2) train, int(n / 4) validate, int(n / 4)
    test and the rest, which the released code leaves out, train as well.

    Either way the training list is in a random order that differs from fold to fold, so that its beginning is a fair
    sample; the others are in the order of ``groups``. A patient's volumes stay together.

    Args:
        groups: patient of each volume.
        fold: number of the split, from 0.
        split: see above.
        ratio: of the paper's split.

    Raises:
        DataError: fewer patients than parts, another split or ratio.
    """
    if split not in ("paper", "official"):
        raise DataError(f'split must be "paper" or "official"; got {split!r}')
    if ratio[0] < 1 or tuple(ratio[1:]) != (1, 1):
        raise DataError(f"ratio must be (a, 1, 1) with a at least 1: a part validates and a part tests; got {ratio}")
    patients = sorted(set(groups))
    parts = sum(ratio) if split == "paper" else 4
    if len(patients) < parts:
        raise DataError(f"a split into {parts} parts needs at least {parts} patients; got {len(patients)}")
    if split == "paper":
        cut = np.array_split(np.array(_shuffled(patients, 0, fold // parts)), parts)
        held = [cut[(fold + step) % parts].tolist() for step in (1, 0)]  # val, test
    else:
        order, quarter = _shuffled(patients, 1, fold), len(patients) // 4
        held = [order[-2 * quarter : -quarter], order[-quarter:]]
    train = [patient for patient in _shuffled(patients, 2, fold) if patient not in {*held[0], *held[1]}]
    members: dict[str, list[int]] = {patient: [] for patient in patients}
    for index, group in enumerate(groups):
        members[group].append(index)
    val, test = ([index for index, group in enumerate(groups) if group in set(part)] for part in held)
    return [index for patient in train for index in members[patient]], val, test


def labelled_subset(volumes: Sequence[LabelledVolume], fraction: float) -> tuple[LabelledVolume, ...]:
    """The first int(fraction * len(volumes)) volumes, at least one: those that count as labelled (Hu et al. 2021).

    Of 156 training volumes 5, 10 and 20 % are 7, 15 and 31.

    Raises:
        ValueError: a fraction outside (0, 1], no volume.
    """
    if not 0 < fraction <= 1 or not volumes:
        raise ValueError(
            f"labelled_subset: expected a fraction in (0, 1] of at least one volume; got {fraction} of {len(volumes)}"
        )
    count = int(fraction * len(volumes) + 1e-9)  # 0.29 * 100 is a little less than 29
    return tuple(volumes[: max(1, count)])


def slices_of(volumes: Sequence[LabelledVolume]) -> Slices:
    """All slices of the volumes as tensors, in the order of the volumes.

    Raises:
        ValueError: no volume, or slices of different sizes.
    """
    if len({volume.image.shape[1:] for volume in volumes}) != 1:
        sizes = sorted({volume.image.shape[1:] for volume in volumes})
        raise ValueError(f"slices_of: at least one volume, and slices of one size, are needed; got sizes {sizes}")
    lengths = torch.tensor([len(volume) for volume in volumes])
    owner = torch.repeat_interleave(torch.arange(len(volumes)), lengths)
    place = torch.cat([torch.arange(len(volume), dtype=torch.float32) / len(volume) for volume in volumes])
    images = torch.from_numpy(np.concatenate([volume.image for volume in volumes]))[:, None]
    labels = torch.from_numpy(np.concatenate([volume.label for volume in volumes])).to(torch.int64)
    return Slices(images, labels, owner, place)


def _acdc(root: Path, size: int | None, fold: int) -> SegmentationDataset:
    if fold != 0:
        raise DataError(f"acdc: the file has one split of its own, so there is fold 0 only; got fold {fold}")
    data = acdc.load(root, size)
    # ACDC numbers its patients by disease: the beginning of the sorted list would be one disease only.
    order = _shuffled(sorted({volume.group for volume in data.train}), 2, fold)
    train = tuple(volume for patient in order for volume in data.train if volume.group == patient)
    patients = [len({volume.group for volume in volumes}) for volumes in data.splits.values()]
    split = {"protocol": "the file's own", "fold": fold, "patients": patients}
    return replace(data, train=train, provenance=data.provenance | {"split": split})


def _describe(name: str, root: Path) -> nifti_folders.VolumeFolder:
    candidates = [Path(os.path.expanduser(name)), root / name, root / name.lower()]
    folder = next((path for path in candidates if path.is_dir()), None)
    if folder is None and (file := next((path for path in candidates if path.is_file()), None)) is not None:
        raise DataError(
            f"{file} is a file; labelled volumes lie in a folder, in the layout of the Medical Segmentation Decathlon (imagesTr, "
            "labelsTr) or as MMWHS has them; images with one label each are load_dataset's"
        )
    if folder is None:
        raise DataError(
            f"no data set {name!r}: no folder {candidates[0]}, nor {candidates[1]}; name the folder that holds it by --data-root "
            "or PROTOKERNELS_DATA; expected hippocampus or another folder in the layout of the Medical Segmentation Decathlon "
            "(imagesTr, labelsTr), mmwhs, acdc, or phantoms"
        )
    if (folder / "imagesTr").is_dir():
        return nifti_folders.decathlon_folder(folder)
    if not any(folder.glob("*_label.nii*")) and (folder / "ct_train").is_dir():
        folder = folder / "ct_train"  # as the archive unpacks
    if name.lower() == "mmwhs" or any(folder.glob("*_label.nii*")):
        return nifti_folders.mmwhs_folder(folder)
    raise DataError(f"{folder} holds neither imagesTr and labelsTr (Decathlon) nor pairs *_image, *_label (MMWHS)")


def _numbered_classes(name: str, volumes: Sequence[LabelledVolume]) -> tuple[str, ...]:
    """Names for as many classes as the labels show. A gap is more likely a mask of 0 and 255 than classes that nobody has."""
    present = {label for volume in volumes for label in np.unique(volume.label).tolist()} | {0}
    if len(present) <= (highest := max(present)):
        raise DataError(
            f"{name}: no dataset.json names the classes, so labels must be 0, 1, ... without a gap; got "
            f"{', '.join(map(str, sorted(present)))}; number them so, or name all classes in dataset.json"
        )
    return ("background", *(f"class {index}" for index in range(1, max(highest, 1) + 1)))


def _kind(key: str, described: nifti_folders.VolumeFolder) -> str:
    """``hippocampus`` and ``mmwhs`` by what the folder holds, whatever it is called."""
    if described.source == "MMWHS":
        return "mmwhs"
    return "hippocampus" if described.pairs[0].name.startswith("hippocampus") else key


def _shuffled(items: Sequence[Item], purpose: int, number: int) -> list[Item]:
    """A fixed random order: numpy keeps the raw stream of PCG64 stable over versions."""
    keys = np.random.PCG64([SEED, purpose, number]).random_raw(len(items))
    return [items[index] for index in np.argsort(keys, kind="stable")]
