# SPDX-License-Identifier: MIT
"""How the papers judge a representation: cluster mapping, nearest neighbours, linear probe, clustering scores, t-SNE.

Whatever is fitted is fitted on the training split; the labels of the test split are used for scoring only.
"""

from .evaluate import EvaluationConfig, evaluate_representation
from .knn import knn_predict
from .linear import LinearProbe, LinearProtocol, linear_probe
from .mapping import statistical_mapping
from .scores import classification_scores, clustering_scores
from .tsne import TsneMap, tsne_embedding
from .types import Representation

__all__ = [
    "EvaluationConfig",
    "LinearProbe",
    "LinearProtocol",
    "Representation",
    "TsneMap",
    "classification_scores",
    "clustering_scores",
    "evaluate_representation",
    "knn_predict",
    "linear_probe",
    "statistical_mapping",
    "tsne_embedding",
]
