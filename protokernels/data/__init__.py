# SPDX-License-Identifier: MIT
"""Labelled images from standard files: the digits inside scikit-learn, MNIST idx files, MedMNIST ``.npz`` files, chest
X-rays, slices of brain MRI; and labelled volumes.

>>> from protokernels.data import load_dataset, to_tensor
>>> digits = load_dataset("digits")
>>> to_tensor(digits.train.images, size=32).shape[1:]
torch.Size([1, 32, 32])
"""

from .datasets import available_datasets, load_dataset
from .errors import DataError
from .tensors import to_tensor
from .types import ImageDataset, Split
from .volumes import LabelledVolume, SegmentationDataset, load_segmentation

__all__ = [
    "DataError",
    "ImageDataset",
    "LabelledVolume",
    "SegmentationDataset",
    "Split",
    "available_datasets",
    "load_dataset",
    "load_segmentation",
    "to_tensor",
]
