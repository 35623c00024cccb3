# SPDX-License-Identifier: MIT
"""MedMNIST and files made like it: ``{train,val,test}_images`` uint8 [N, H, W] or [N, H, W, 3] and
``{train,val,test}_labels`` [N, 1] in one ``.npz``, or as the files of a folder; ChestMNIST has [N, 14], one column per finding.

Only medmnist's table of names, addresses and md5s is used. Its own loader needs torchvision to download and trusts what
a file claims.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from .array_folder import ArrayFolder, Arrays, open_arrays
from .download import fetch, find_file, searched
from .errors import DataError
from .npz import NpzFile
from .sharded import ShardedArray
from .types import ImageArray, ImageDataset, Split

FLAG = re.compile(r"([a-z]+mnist(?:3d)?)(?:_(28|64|128|224))?")
MAX_SIDE = 4096  # pixels
MAX_CLASSES = 10_000


def is_flag(name: str) -> bool:
    """Whether ``name`` has the form of a MedMNIST flag, such as ``bloodmnist`` or ``bloodmnist_64``."""
    return FLAG.fullmatch(name) is not None


def available_flags() -> tuple[str, ...]:
    """The 2-D sets; empty where medmnist is not installed."""
    try:
        table = _table()
    except ImportError:
        return ()
    return tuple(flag for flag, info in table.items() if _unsupported(flag, info) is None)


def load_flag(name: str, root: Path, *, download: bool) -> ImageDataset:
    """Loads a published set by its flag; class names, address and md5 come from ``medmnist.INFO``."""
    match = FLAG.fullmatch(name)
    assert match is not None
    flag, size = match[1], int(match[2] or 28)
    table = _table()
    if flag not in table:
        raise DataError(f"unknown MedMNIST set {flag!r}; expected one of {', '.join(available_flags())}")
    info = table[flag]
    if (reason := _unsupported(flag, info)) is not None:
        raise DataError(reason)
    suffix = "" if size == 28 else f"_{size}"
    if f"url{suffix}" not in info:
        raise DataError(
            f"{flag} is not published at {size} pixels in the installed medmnist; upgrade medmnist or take {flag}"
        )
    url, md5 = info[f"url{suffix}"], info[f"MD5{suffix}"]
    filename = f"{flag}{suffix}.npz"
    path = find_file(root, (filename,))
    if path is None:
        path = root / "medmnist" / filename
        if not download:
            raise DataError(
                f"{name}: no file {filename} in {searched(root)}; pass --download (download=True), or fetch {url} "
                f"(md5 {md5}) and put it at {path}"
            )
        fetch((url,), path, md5)
    labels = tuple(info["label"][str(label)] for label in range(len(info["label"])))
    target_names = labels if info["task"].startswith("multi-label") else ()
    archive = NpzFile(path)
    splits, _ = _read_splits(archive, targets=len(target_names))
    shape = splits["train"].images.shape[1:]
    expected = (size, size) if info["n_channels"] == 1 else (size, size, 3)
    if shape != expected or "val" not in splits:
        raise DataError(
            f"{path} is not {name}: expected the splits train, val, test with images {list(expected)}; got "
            f"{', '.join(splits)} with {list(shape)}"
        )
    provenance = _provenance(archive)
    found = provenance["md5s"][filename]
    provenance.update(source="MedMNIST", url=url, license=info["license"])
    provenance["published_md5s"][filename] = md5
    if found != md5:
        counts = {split: len(value) for split, value in splits.items()}
        note = "" if counts == info["n_samples"] else f"; it holds {counts} images, published {info['n_samples']}"
        message = f"{filename} is not the published file: md5 {found}, expected {md5}{note}; it is used as it is"
        provenance["warnings"].append(message)
        warnings.warn(message, UserWarning, stacklevel=3)
    class_names = ("no finding", "any finding") if target_names else labels
    return _dataset(path, name, splits, class_names, provenance, target_names)


def load_file(path: Path, name: str) -> ImageDataset:
    """Loads any ``.npz``, or any folder of ``.npy`` files, with MedMNIST's arrays, under a name; works without medmnist.

    Class names come from an array ``class_names`` where there is one; otherwise the classes are 0 to the largest label
    and are named ``"class 0"``, ``"class 1"``, ... ``{train,val,test}_patient_ids``, text [N], say whose image it is; patients
    who occur in two splits are counted in a warning.
    """
    archive = open_arrays(path)
    splits, class_names = _read_splits(archive)
    if class_names is None:
        highest = max(int(split.labels.max(initial=0)) for split in splits.values())
        if highest >= MAX_CLASSES:
            raise DataError(
                f"{path}: labels go up to {highest}; expected class numbers from 0 to fewer than {MAX_CLASSES:,}"
            )
        class_names = tuple(f"class {label}" for label in range(highest + 1))
    provenance = _provenance(archive)
    provenance["warnings"] += shared_patients(path.name, splits)
    for message in provenance["warnings"]:
        warnings.warn(message, UserWarning, stacklevel=3)
    return _dataset(path, name, splits, class_names, provenance)


def _table() -> dict[str, dict[str, Any]]:
    try:
        from medmnist.info import INFO
    except ImportError as error:
        raise ImportError(
            'MedMNIST flags need medmnist: pip install "protokernels[train]"; the path of an .npz file works without it'
        ) from error
    table: dict[str, dict[str, Any]] = INFO
    return table


def _unsupported(flag: str, info: dict[str, Any]) -> str | None:
    if flag.endswith("3d"):
        return f"{flag} holds volumes; expected images, as in pneumoniamnist"
    return None


def _read_splits(archive: Arrays, *, targets: int = 0) -> tuple[dict[str, Split], tuple[str, ...] | None]:
    """The splits of a file or folder, and its class names where it tells them.

    With ``targets``, the labels are that many columns of findings; the one label is then whether there is any.
    """
    splits: dict[str, Split] = {}
    for split in ("train", "val", "test"):
        present = [kind for kind in ("images", "labels") if f"{split}_{kind}" in archive]
        if split == "val" and not present:
            continue
        if len(present) < 2:
            raise DataError(
                f"{archive.path}: expected the arrays {split}_images and {split}_labels; it holds "
                f"{', '.join(archive.names) or 'nothing'}"
            )
        if isinstance(archive, ArrayFolder):
            archive.check_parts(f"{split}_images", f"{split}_labels", f"{split}_patient_ids")
        check_headers(archive, split, targets=targets)
        images = archive.read_or_map(f"{split}_images")
        if images.ndim == 4 and images.shape[3] == 1:
            images = images.squeeze(3) if isinstance(images, ShardedArray) else images[..., 0]
        if targets:
            splits[split] = multi_label(archive, f"{split}_labels", images)
            continue
        labels = archive.read(f"{split}_labels").reshape(-1)
        if labels.size and (int(labels.min()) < 0 or int(labels.max()) > np.iinfo(np.int64).max):
            raise DataError(
                f"{archive.path}: {split}_labels must not be negative; got {int(labels.min())}..{int(labels.max())}"
            )
        splits[split] = Split(images, labels.astype(np.int64), groups=read_patients(archive, split, len(images)))
    return splits, _class_names(archive)


def multi_label(archive: Arrays, name: str, images: ImageArray) -> Split:
    """A split whose targets are the columns of ``name``; its label is 1 where there is any finding."""
    values = archive.read(name)
    if values.size and (values.min() < 0 or values.max() > 1):
        raise DataError(f"{archive.path}: {name} must be 0 or 1; got {int(values.min())}..{int(values.max())}")
    return Split(images, np.any(values, axis=1).astype(np.int64), values.astype(np.uint8))


def check_headers(archive: Arrays, split: str, *, targets: int = 0) -> None:
    """Refuses what is not a list of small images with one label (or ``targets`` findings) each, before any pixel is
    read."""
    images, labels = archive.header(f"{split}_images"), archive.header(f"{split}_labels")
    where = f"{archive.path}: {split}_images"
    got = f"got {images.dtype} {list(images.shape)}"
    if images.dtype != np.uint8:
        raise DataError(f"{where} must be uint8, 0..255; {got}; scale all images of the file alike and round them")
    if len(images.shape) == 4 and images.shape[3] not in (1, 3):
        hint = "; move the channels to the end" if images.shape[1] in (1, 3) else "; volumes are not supported"
        raise DataError(f"{where} must have the shape [N, H, W] or [N, H, W, 3]; {got}{hint}")
    if len(images.shape) not in (3, 4):
        raise DataError(f"{where} must have the shape [N, H, W] or [N, H, W, 3]; {got}")
    if not all(1 <= side <= MAX_SIDE for side in images.shape[1:3]):
        raise DataError(f"{where} must have sides of 1 to {MAX_SIDE} pixels; {got}")
    where, got = f"{archive.path}: {split}_labels", f"got {labels.dtype} {list(labels.shape)}"
    if labels.dtype.kind not in "iu":
        raise DataError(
            f"{where} must be whole numbers; {got}; number the classes from 0 on, their names are class_names, text [K]"
        )
    if targets:
        if labels.shape != (images.shape[0], targets) or 0 in labels.shape:
            raise DataError(
                f"{where} must have the shape [{images.shape[0]}, {targets}], one column per finding; {got}"
            )
        return
    if len(labels.shape) == 2 and labels.shape[1] > 1:
        raise DataError(f"{where} has {labels.shape[1]} labels per image; expected one, shape [N] or [N, 1]; {got}")
    if len(labels.shape) not in (1, 2) or labels.shape[0] != images.shape[0] or 0 in labels.shape:
        raise DataError(
            f"{where} must have the shape [N] or [N, 1] with N = {images.shape[0]} as the images, at least one; {got}"
        )


def read_patients(archive: Arrays, split: str, count: int) -> np.ndarray | None:  # [count] text
    """Whose the images of a split are, where the file tells."""
    if (name := f"{split}_patient_ids") not in archive:
        return None
    header = archive.header(name)
    if header.dtype.kind != "U" or header.shape != (count,):
        raise DataError(
            f"{archive.path}: {name} must be text of shape [{count}]; got {header.dtype} {list(header.shape)}; save "
            "ids.astype(str)"
        )
    return archive.read(name)


def shared_patients(filename: str, splits: dict[str, Split]) -> list[str]:
    """A sentence for every two splits that have patients in common."""
    messages = []
    names = list(splits)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            one, two = splits[first].groups, splits[second].groups
            shared = 0 if one is None or two is None else len(np.intersect1d(one, two))
            if shared:
                messages.append(f"{filename}: {shared} patients occur in {first} and in {second}")
    return messages


def _class_names(archive: Arrays) -> tuple[str, ...] | None:
    if "class_names" not in archive:
        return None
    header = archive.header("class_names")
    if header.dtype.kind != "U" or len(header.shape) != 1 or not 1 <= header.shape[0] <= MAX_CLASSES:
        raise DataError(
            f"{archive.path}: class_names must be text of shape [K]; got {header.dtype} {list(header.shape)}"
        )
    return tuple(str(name) for name in archive.read("class_names"))


def _provenance(archive: Arrays) -> dict[str, Any]:
    md5s = archive.md5s()
    return {"source": archive.source, "files": list(md5s), "md5s": md5s, "published_md5s": {}, "warnings": []}


def _dataset(
    path: Path,
    name: str,
    splits: dict[str, Split],
    class_names: tuple[str, ...],
    provenance: dict[str, Any],
    target_names: tuple[str, ...] = (),
) -> ImageDataset:
    train, val, test = splits["train"], splits.get("val"), splits["test"]
    try:
        return ImageDataset(name, train, val, test, class_names, provenance, target_names)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
