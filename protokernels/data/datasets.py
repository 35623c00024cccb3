# SPDX-License-Identifier: MIT
"""The door to all data sets: ``load_dataset``."""

from __future__ import annotations

import os
from pathlib import Path

from . import brain, brats, chest, digits, idx, medmnist
from .errors import DataError
from .types import ImageDataset

ROOT_VARIABLE = "PROTOKERNELS_DATA"
DEFAULT_ROOT = "~/.cache/protokernels"
_VOLUMES = ("hippocampus", "mmwhs", "acdc", "phantoms")  # of load_segmentation
_NAMES = ("digits", "mnist", *chest.NAMES, *brain.NAMES, *brats.NAMES)


def load_dataset(name: str | Path, root: str | Path | None = None, *, download: bool = False) -> ImageDataset:
    """Loads a data set into memory, but for large images that stay on the disk.

    Image arrays of 256 MB or more stay on the disk, and may be larger than memory, if they lie in a folder or in an ``.npz`` file
    saved by ``numpy.savez`` (not ``savez_compressed``): an ``np.memmap`` that cannot be written to or, of several files, a
    :class:`~protokernels.data.sharded.ShardedArray`. They are read through for checksums. Training and scoring take a batch of them at
    a time; :meth:`Split.take` of single images and :meth:`Split.join` copy what they give, so validation and test images are in memory
    together while they are scored, and training images where a part of them is held out for want of a validation split. The files must
    not change while the data set is in use: its values would, and where one is cut short the process can end.

    Args:
        name: ``"digits"`` (inside scikit-learn, needs no file); ``"mnist"`` (four idx files, ``.gz`` or unzipped); a
            MedMNIST flag such as ``"pneumoniamnist"``, ``"bloodmnist"`` or, for larger images, ``"pneumoniamnist_64"``,
            ``"_128"``, ``"_224"``, and ``"chestmnist"``, whose images have 14 findings each; ``"chest_nih"``,
            ``"chest_kermany"`` or ``"chest_kermany_subtype"`` (chest X-rays, see :mod:`protokernels.data.chest`);
            ``"brain_tumor"`` or ``"brain_tumor_types"`` (slices of brain MRI, see :mod:`protokernels.data.brain`);
            ``"brats"`` (see :mod:`protokernels.data.brats`); or the path of an ``.npz`` file with MedMNIST's arrays
            ``{train,val,test}_{images,labels}`` (``val`` may be absent), as text or ``Path``, taken as it stands or below ``root``;
            ``class_names`` and ``{train,val,test}_patient_ids``, both text, are read where they are there; or the path of a folder
            (``"./mnist"`` where its name is one of those above) of the same arrays: a file ``train_images.npy``, or a folder
            ``train_images`` of any number of ``.npy`` files, in the order of their names, numbers in them by value (``2.npy`` before
            ``10.npy``), and so on. An unpacked ``.npz`` is such a folder.
        root: folder of the files; default: the environment variable ``PROTOKERNELS_DATA``, else
            ``~/.cache/protokernels``. Files are looked for in ``root`` itself and in its folders ``mnist``,
            ``medmnist``, ``MNIST/raw``, ``chest_nih``, ``chest_kermany`` and ``brain_tumor_4class``.
        download: fetch a missing file into ``root`` and check its md5; without it a missing file is an error that says
            where to get it.

    Returns:
        The data set. A file whose md5 is not the published one is used, with a ``UserWarning`` that also stands in
        ``provenance["warnings"]``.

    Raises:
        DataError: unknown name, missing, truncated, damaged or pickled file, several labels per image, volumes instead
        of images.
        ImportError: scikit-learn (digits) or medmnist (flags) is not installed.

    Example:
        >>> from protokernels.data import load_dataset
        >>> load_dataset("digits").num_classes
        10
    """
    folder, name = data_root(root), os.fspath(name)
    if name.lower().endswith(".npz"):
        return medmnist.load_file(_existing_file(name, folder), data_title(name))
    key = name.lower()
    if key == "digits":
        return digits.load()
    if key == "mnist":
        return idx.load_mnist(folder, download=download)
    if key in chest.NAMES:
        return chest.load(key, folder)
    if key in brain.NAMES:
        return brain.load(key, folder)
    if key in brats.NAMES:
        return brats.load(folder)
    if medmnist.is_flag(key):
        return medmnist.load_flag(key, folder, download=download)
    if key in _VOLUMES:
        raise DataError(f"{name} holds labelled volumes; load them with protokernels.data.load_segmentation")
    if name and (found := next((path for path in _places(name, folder) if path.is_dir()), None)):
        return medmnist.load_file(found, data_title(name))
    raise DataError(
        f"unknown data set {name!r}; expected one of {', '.join(available_datasets())}, or the path of an .npz file or a folder"
    )


def available_datasets() -> tuple[str, ...]:
    """Names that :func:`load_dataset` knows.

    MedMNIST flags are listed where medmnist is installed; each also takes ``_64``, ``_128``, ``_224``.
    """
    return (*_NAMES, *medmnist.available_flags())


def data_name(name: str | Path) -> str:
    """``name`` as presets and results have it, whose capitals make no difference here: a known name in small letters, anything else
    (the path of a file or folder) as it is.

    >>> data_name("PneumoniaMNIST"), data_name("Data/Mine.npz")
    ('pneumoniamnist', 'Data/Mine.npz')
    """
    name = str(name)
    small = name.lower()
    return small if small in (*_NAMES, *_VOLUMES) or medmnist.is_flag(small) else name


def data_title(name: str | Path) -> str:
    """A data set in titles and names of folders: of a path the last part, of ``.`` that of the folder, without ``.npz``.

    >>> data_title("mnist"), data_title("Data/Mine.npz"), data_title("scans.v2/")
    ('mnist', 'Mine', 'scans.v2')
    """
    path = Path(os.path.abspath(name)) if Path(name).name in ("", "..") else Path(name)
    return path.stem if path.suffix.lower() == ".npz" else path.name


def data_root(root: str | Path | None) -> Path:
    chosen = root if root is not None else os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT
    return Path(os.path.expanduser(chosen))


def _places(name: str, root: Path) -> tuple[Path, Path]:
    return Path(os.path.expanduser(name)), root / name


def _existing_file(name: str, root: Path) -> Path:
    first, second = _places(name, root)
    for path in (first, second):
        if path.is_file():
            return path
    raise DataError(
        f"no file {first}, nor {second}; give the path of an existing .npz file, or the folder it lies in as data root"
    )
