# SPDX-License-Identifier: MIT
"""How the papers judge a representation: cluster mapping, nearest neighbours, linear probe, clustering scores, t-SNE, transfer
to few labels; and label maps by Dice and Hausdorff distance.

Whatever is fitted is fitted on the training split; the labels of the test split are used for scoring only. The one exception says so
in its name: :mod:`.hold_out` fits inside a hold-out set.
"""

from .classifier import AdamWProtocol, Fitted, Labelled
from .evaluate import EvaluationConfig, evaluate_representation
from .fractions import label_subsets
from .hold_out import cross_validated_auc, hold_out_sets, linear_evaluation
from .knn import knn_predict
from .linear import GradientProtocol, LinearProbe, LinearProtocol, linear_probe
from .mapping import statistical_mapping
from .roc import Auroc, auroc
from .scores import classification_scores, clustering_scores
from .segmentation import DiceCounter, segmentation_scores
from .transfer import TRANSFER_PROTOCOLS, TransferConfig, TransferProtocol, evaluate_transfer, fine_tune
from .tsne import TsneMap, tsne_embedding
from .types import Representation

__all__ = [
    "TRANSFER_PROTOCOLS",
    "AdamWProtocol",
    "Auroc",
    "DiceCounter",
    "EvaluationConfig",
    "Fitted",
    "GradientProtocol",
    "Labelled",
    "LinearProbe",
    "LinearProtocol",
    "Representation",
    "TransferConfig",
    "TransferProtocol",
    "TsneMap",
    "auroc",
    "classification_scores",
    "clustering_scores",
    "cross_validated_auc",
    "evaluate_representation",
    "evaluate_transfer",
    "fine_tune",
    "hold_out_sets",
    "knn_predict",
    "label_subsets",
    "linear_evaluation",
    "linear_probe",
    "segmentation_scores",
    "statistical_mapping",
    "tsne_embedding",
]
