# SPDX-License-Identifier: MIT
"""The handwritten digits inside scikit-learn: real data without a download."""

from __future__ import annotations

import hashlib

import numpy as np

from .types import ImageDataset, Split

SEED = 0
TEST_SHARE, VAL_SHARE = 0.2, 0.1


def load() -> ImageDataset:
    """1,797 digits of 8 x 8 pixels, their levels 0..16 scaled to 0..255.

    The images are the test part of UCI's "Optical Recognition of Handwritten Digits". scikit-learn has no split of
    them. Here each class is put in a fixed random order; its first 20 % go to test, the next 10 % to val, the rest to
    train: 1,259 / 179 / 359 images. The order comes from the raw stream of PCG64, which numpy keeps stable over
    versions. Nothing tells which of the 13 writers wrote a digit, so the same hands appear in all splits and scores are
    higher than they would be on unseen writers.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits data set needs scikit-learn: pip install "protokernels[train]"') from error
    source = load_digits()
    images = np.rint(source.images * (255.0 / 16.0)).astype(np.uint8)
    labels = source.target.astype(np.int64)
    train, val, test = _stratified_order(labels)
    return ImageDataset(
        name="digits",
        train=Split(images[train], labels[train]),
        val=Split(images[val], labels[val]),
        test=Split(images[test], labels[test]),
        class_names=tuple(str(digit) for digit in range(10)),
        provenance={
            "source": "sklearn.datasets.load_digits",
            "files": [],
            "md5s": {"images": hashlib.md5(images.tobytes(), usedforsecurity=False).hexdigest()},
            "published_md5s": {},
            "warnings": [],
        },
    )


def _stratified_order(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of train, val and test, each in ascending order."""
    keys = np.random.PCG64(SEED).random_raw(len(labels))
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(keys[members], kind="stable")]
        test_end = round(TEST_SHARE * len(members))
        val_end = test_end + round(VAL_SHARE * len(members))
        for part, chosen in zip(parts, (members[val_end:], members[test_end:val_end], members[:test_end]), strict=True):
            part.extend(chosen.tolist())
    train, val, test = (np.sort(np.asarray(part, dtype=np.int64)) for part in parts)
    return train, val, test
