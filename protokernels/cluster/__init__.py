# SPDX-License-Identifier: MIT
"""Clustering in scikit-learn's manner on torch tensors: k-means, and how many clusters a data set has."""

from .elbow import Elbow, choose_n_clusters, find_elbow
from .kmeans import KMeans

__all__ = ["Elbow", "KMeans", "choose_n_clusters", "find_elbow"]
