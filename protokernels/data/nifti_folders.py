# SPDX-License-Identifier: MIT
"""Labelled volumes in folders of NIfTI files.

Medical Segmentation Decathlon
    ``imagesTr/NAME.nii.gz`` and ``labelsTr/NAME.nii.gz``, with class names in ``dataset.json``
    (M. Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 13, 2022).
MMWHS
    pairs ``*_image.nii.gz`` and ``*_label.nii.gz`` (X. Zhuang and J. Shen, Multi-scale patch and multi-modality atlases
    for whole heart segmentation, Medical Image Analysis 31, 2016).

All volumes are turned to right, anterior, superior and cut along the third axis: slices are axial where the scan's axes
are near the body's. The released code of Hu et al. cuts along the third axis of the file, which is the same for
Hippocampus, all of whose 260 files are in that order.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .download import file_md5
from .errors import DataError
from .nifti import SUFFIXES, NiftiVolume, read_nifti, whole_labels, without_suffix
from .slicing import image_slices, label_slices
from .volume_types import MAX_CLASSES, LabelledVolume

SLICE_AXIS = "third axis after turning to right, anterior, superior: from inferior to superior"
MMWHS_CLASSES = {
    500: "left ventricle",
    600: "right ventricle",
    420: "left atrium",
    550: "right atrium",
    205: "myocardium",
    820: "ascending aorta",
    850: "pulmonary artery",
}
HIPPOCAMPUS_WARNING = (
    "hippocampus: the files are numbered without naming people, and the Decathlon has more volumes than the 195 adults "
    "it describes; the splits share no file, but perhaps a person"
)


@dataclass(frozen=True)
class Pair:
    """The files of one volume."""

    name: str
    group: str
    image: Path
    label: Path


@dataclass(frozen=True)
class VolumeFolder:
    """What a folder holds, before any voxel is read.

    Attributes:
        folder: where they are.
        pairs: in the order of their names.
        class_names: with the background; empty: as many as the labels show.
        values: label values in the files, by class; empty: the class itself.
        source: for the provenance.
        warnings: for the provenance.
        sequences: names of the volumes in one image, in their order; empty: not told.
    """

    folder: Path
    pairs: tuple[Pair, ...]
    class_names: tuple[str, ...]
    values: tuple[int, ...]
    source: str
    warnings: tuple[str, ...] = ()
    sequences: tuple[str, ...] = ()

    def channel(self, sequence: str) -> int:
        """Where ``sequence`` lies on the fourth axis of the images; 0 where the folder does not tell.

        Raises:
            DataError: the folder names sequences, and this is none of them.
        """
        if not self.sequences:
            return 0
        names = [name.casefold() for name in self.sequences]
        if sequence.casefold() not in names:
            raise DataError(f"{self.folder}: no sequence {sequence}; dataset.json names {', '.join(self.sequences)}")
        return names.index(sequence.casefold())

    def provenance(self) -> dict[str, Any]:
        """Source, names of the files within the folder, and one md5 over the names and contents of all of them."""
        files = {str(path.relative_to(self.folder)): path for pair in self.pairs for path in (pair.image, pair.label)}
        digest = hashlib.md5(usedforsecurity=False)
        for name, path in sorted(files.items()):
            digest.update(f"{file_md5(path)}  {name}\n".encode())
        return {
            "source": self.source,
            "files": sorted(files),
            "md5": digest.hexdigest(),
            "slice_axis": SLICE_AXIS,
            "warnings": list(self.warnings),
        }


def decathlon_folder(folder: Path) -> VolumeFolder:
    """The volumes of a Decathlon folder.

    The list ``training`` of ``dataset.json`` is used where there is one, without its folders; else all files, each of
    which must then have its partner.

    Raises:
        DataError: a folder or a partner is missing, ``dataset.json`` is not what it should be.
    """
    images, labels = (_files(folder / part) for part in ("imagesTr", "labelsTr"))
    described = _description(folder / "dataset.json")
    listed = described.get("training")
    if listed is None:
        names = sorted({*images, *labels})
    else:
        try:
            names = sorted({_base(entry["image"] if isinstance(entry, dict) else entry) for entry in listed})
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{folder / 'dataset.json'}: training must be a list of {{image, label}} with file names; got "
                f"{str(listed)[:80]}"
            ) from error
    for name in names:
        for part, found in (("imagesTr", images), ("labelsTr", labels)):
            if name not in found:
                raise DataError(
                    f"{folder}: no file {part}/{name}.nii.gz; fetch it, or take {name} out of the other folder and out of "
                    "dataset.json"
                )
    if not names:
        raise DataError(f"{folder}: imagesTr and labelsTr hold no .nii.gz files")
    hippocampus = any(name.startswith("hippocampus") for name in names)
    return VolumeFolder(
        folder,
        pairs=tuple(Pair(name, name, images[name], labels[name]) for name in names),
        class_names=_decathlon_classes(folder / "dataset.json", described.get("labels")),
        values=(),
        source="Medical Segmentation Decathlon layout",
        warnings=(HIPPOCAMPUS_WARNING,) if hippocampus else (),
        sequences=_sequences(folder / "dataset.json", described.get("modality")),
    )


def mmwhs_folder(folder: Path) -> VolumeFolder:
    """The pairs of an MMWHS folder; the patient is the number in the file's name."""
    files = _files(folder)
    names = sorted(name.removesuffix("_image") for name in files if name.endswith("_image"))
    if not names:
        raise DataError(f"{folder}: no files *_image.nii.gz; expected pairs *_image.nii.gz and *_label.nii.gz of MMWHS")
    for name in names:
        if f"{name}_label" not in files:
            raise DataError(
                f"{folder}: no file {name}_label.nii.gz beside {name}_image.nii.gz; fetch or remove the pair"
            )
    return VolumeFolder(
        folder,
        pairs=tuple(
            Pair(name, name.rpartition("_")[2], files[f"{name}_image"], files[f"{name}_label"]) for name in names
        ),
        class_names=("background", *MMWHS_CLASSES.values()),
        values=(0, *MMWHS_CLASSES),
        source="MMWHS",
    )


def read_pair(pair: Pair, folder: VolumeFolder, size: int | None, warnings: list[str]) -> LabelledVolume:
    """Reads, checks and cuts one volume; adds to ``warnings`` what was not as it should be.

    Raises:
        DataError: image and label differ in shape or place, a label value is none of the classes'.
    """
    image, label = read_nifti(pair.image), read_nifti(pair.label)
    same_place(image, label)
    classes = _classes(whole_labels(label), label.path, folder, warnings)
    try:
        slices = image_slices(image.values, size)
    except DataError as error:
        raise DataError(f"{image.path}: {error}") from error
    height, width = slices.shape[1:]
    across, along, up = image.spacing
    spacing = (up, across * image.values.shape[0] / height, along * image.values.shape[1] / width)
    return LabelledVolume(pair.name, pair.group, slices, label_slices(classes, size), spacing, spacing_known=True)


def same_place(image: NiftiVolume, label: NiftiVolume) -> None:
    """``DataError`` where a label map has not the shape and place of its image."""
    if image.values.shape != label.values.shape:
        raise DataError(
            f"{label.path} has the shape {list(label.values.shape)}, its image {image.path.name} "
            f"{list(image.values.shape)}; a label map needs the shape of its image"
        )
    if not image.same_place(label):
        raise DataError(
            f"{label.path} lies elsewhere than its image {image.path.name}: their affines differ by more than a tenth of a "
            "voxel; resample the label map onto the image"
        )


def _classes(labels: np.ndarray, path: Path, folder: VolumeFolder, warnings: list[str]) -> np.ndarray:  # uint8
    values = folder.values or tuple(range(len(folder.class_names) or MAX_CLASSES))
    present, counts = np.unique(labels, return_counts=True)
    unknown = {int(value): int(count) for value, count in zip(present, counts, strict=True) if value not in values}
    if unknown and (not folder.values or not set(present.tolist()) & set(values[1:])):
        raise DataError(
            f"{path}: label values must be among {', '.join(map(str, values[:20]))}; got {', '.join(map(str, unknown))}"
        )
    if unknown:
        listed = ", ".join(f"{value} ({count:,} voxels)" for value, count in unknown.items())
        warnings.append(f"{path.name}: label values that stand for no class count as background: {listed}")
    classes = np.zeros(labels.shape, np.uint8)
    for index, value in enumerate(values[: len(folder.class_names) or int(present.max()) + 1]):
        classes[labels == value] = index
    return classes


def _files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; unpack the data set there")
    paths = (path for path in folder.iterdir() if path.name.endswith(SUFFIXES) and not path.name.startswith("."))
    return {without_suffix(path): path for path in sorted(paths)}


def _description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); fetch it again, or remove it") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold an object with labels and training; got {type(value).__name__}")
    return value


def _decathlon_classes(path: Path, labels: Any) -> tuple[str, ...]:
    """Names by class: the Decathlon writes {"0": "background"}, its successors {"background": 0}."""
    if labels is None:
        return ()
    try:
        pairs = {int(key): str(name) for key, name in labels.items()}
    except (TypeError, ValueError, AttributeError):
        try:
            pairs = {int(value): str(key) for key, value in labels.items()}
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: labels must name classes by number; got {str(labels)[:80]}") from error
    if sorted(pairs) != list(range(len(pairs))) or not 2 <= len(pairs) <= MAX_CLASSES:
        raise DataError(f"{path}: labels must be the numbers 0, 1, ... without a gap; got {sorted(pairs)}")
    return tuple(pairs[index] for index in range(len(pairs)))


def _sequences(path: Path, modality: Any) -> tuple[str, ...]:
    """The Decathlon writes {"0": "FLAIR", "1": "T1w", ...}."""
    if not isinstance(modality, dict):
        return ()
    try:
        names = {int(key): str(name) for key, name in modality.items()}
    except ValueError as error:
        raise DataError(f"{path}: modality must name sequences by number; got {str(modality)[:80]}") from error
    if sorted(names) != list(range(len(names))):
        raise DataError(f"{path}: modality must be the numbers 0, 1, ... without a gap; got {sorted(names)}")
    return tuple(names[index] for index in range(len(names)))


def _base(entry: str) -> str:
    return without_suffix(Path(entry.replace("\\", "/")))
