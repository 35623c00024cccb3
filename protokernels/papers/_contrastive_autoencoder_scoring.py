# SPDX-License-Identifier: MIT
"""How the contrastive autoencoder is judged (section 3): cluster map, neighbours, linear layer; and the table of the scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from ..data import ImageDataset, Split, to_tensor
from ..evaluation import (
    Representation,
    classification_scores,
    clustering_scores,
    knn_predict,
    label_subsets,
    linear_probe,
    statistical_mapping,
)
from ..training import derived_generator
from ..training.randomness import derived_seed
from ..training.scoring import evaluation_splits
from ._contrastive_autoencoder_config import ContrastiveAutoencoderConfig

if TYPE_CHECKING:
    from .contrastive_autoencoder import ContrastiveAutoencoder

# Key of the results -> its row in tables. The paper has the first three.
METHODS = {
    "statistical": "statistical",
    "knn": "kNN on h",
    "linear": "linear on z",
    "knn_z": "kNN on z",
    "linear_h": "linear on h",
}


class Embeddings(NamedTuple):
    """What the model makes of a split, in evaluation mode; on the CPU."""

    h: Tensor  # [N, D]
    z: Tensor  # [N, P]
    labels: Tensor  # [N] int64
    clusters: Tensor | None  # [N] int64; None before the second phase

    def take(self, indices: Tensor) -> Embeddings:  # [n] int64
        return Embeddings(*(None if value is None else value[indices] for value in self))  # type: ignore[arg-type]

    @property
    def on_h(self) -> Representation:
        """For the shared figures and protocols."""
        return Representation(self.h, self.labels, self.clusters)


def subset(count: int, size: int, seed: int) -> Tensor:  # [n] int64, ascending
    """The training images that KMeans, the cluster map and the neighbours see: ``size`` at random, or all if 0."""
    if size == 0 or size >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=derived_generator(seed, "subset"))[:size].sort().values


@torch.no_grad()
def represent(model: ContrastiveAutoencoder, split: Split) -> Embeddings:
    """h, z, labels and clusters of a split. An image's cluster is the prototype it is most similar to."""
    model.eval()
    device = model.inertias.device
    parts_h, parts_z = [], []
    for images in torch.as_tensor(split.images).split(1000):
        h = model.encode(to_tensor(images.numpy(), size=model.config.image_size).to(device))
        parts_h.append(h)
        parts_z.append(model.projector(h).float())
    h = torch.cat(parts_h)
    clusters = None if model.prototypes is None else model.assign(h).argmax(dim=1).cpu()
    return Embeddings(h.cpu(), torch.cat(parts_z).cpu(), torch.as_tensor(split.labels), clusters)


def score_model(
    model: ContrastiveAutoencoder, dataset: ImageDataset, config: ContrastiveAutoencoderConfig, seed: int
) -> dict[str, Any]:
    """All scores on every set of the data.

    Returns:
        ``"splits"``: set -> method -> score -> number, with the methods of :data:`METHODS`, ``"majority"`` (always the most frequent
        training class) and ``"clustering"``; ``"images"``: set -> number of images; ``"protocol"``; ``"prototypes"``: their number,
        and where an elbow was looked for, the candidates and KMeans' inertias.
    """
    train, tests = evaluation_splits(dataset, config.selection)
    everything, classes = represent(model, train), dataset.num_classes
    bank = everything.take(subset(len(train), config.subset, seed))
    labelled = everything.take(
        label_subsets(
            everything.labels,
            [config.label_share],
            num_classes=classes,
            seed=derived_seed(seed, "labels") % 2**32,
        )[config.label_share]
    )
    probes = {
        key: linear_probe(x, labelled.labels, num_classes=classes, protocol=config.linear_protocol, seed=seed)
        for key, x in (("linear", labelled.z), ("linear_h", labelled.h))
    }
    majority = torch.bincount(everything.labels, minlength=classes).argmax()
    splits: dict[str, dict[str, dict[str, float]]] = {}
    for name, split in tests.items():
        test = represent(model, split)
        predictions = {}
        if bank.clusters is not None and test.clusters is not None and model.prototypes is not None:
            predictions["statistical"] = statistical_mapping(bank.on_h, classes, len(model.prototypes))[test.clusters]
        for key, x, queries in (("knn", bank.h, test.h), ("knn_z", bank.z, test.z)):
            predictions[key] = knn_predict(x, bank.labels, queries, k=config.knn_k, num_classes=classes)
        predictions["linear"] = probes["linear"].predict(test.z)
        predictions["linear_h"] = probes["linear_h"].predict(test.h)
        predictions["majority"] = majority.expand(len(test.labels))
        splits[name] = {key: classification_scores(value, test.labels, classes) for key, value in predictions.items()}
        if test.clusters is not None:
            splits[name]["clustering"] = clustering_scores(test.clusters, test.labels)
    protocol = {
        "bank": len(bank.labels),
        "labels": len(labelled.labels),
        "knn_k": config.knn_k,
        "linear_protocol": config.linear_protocol,
    }
    images = {name: len(split) for name, split in {"train": train, **tests}.items()}
    return {"splits": splits, "images": images, "protocol": protocol, "prototypes": _about_prototypes(model)}


def _about_prototypes(model: ContrastiveAutoencoder) -> dict[str, Any]:
    config = model.config
    number = 0 if model.prototypes is None else len(model.prototypes)
    about: dict[str, Any] = {"number": number}
    if len(model.inertias) and number:
        tried = list(range(config.least_clusters, config.most_clusters + 1))
        about |= {"candidates": tried, "inertias": model.inertias.tolist(), "elbow_found": bool(model.elbow_found)}
    return about


def results_table(results: Mapping[str, Any], paper: Mapping[str, Any]) -> Table:
    """Table 1: accuracy, precision and recall on every scored set, beside the paper's where it has the set.

    Args:
        results: what ``train`` and ``evaluate`` return.
        paper: data set -> scored set -> method -> (accuracy, precision, recall).
    """
    config = results["config"]
    notes = [f"protocol: {', '.join(f'{name} {value}' for name, value in results['protocol'].items())}"]
    if number := results.get("prototypes", {}).get("number"):
        notes.insert(0, f"prototypes of the first run: {number}")
    if not results["complete"]:
        notes.append(f"NOT FINISHED: after epoch {results['last_epoch'].get('epoch', 0)} of {config['epochs']}")
    table = Table(
        title=f"{results['paper']}, preset {config['preset_name']}, {config['data']}, runs: {results['number_of_runs']}",
        caption="\n".join(notes),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    headings = ("scored on", "method", "accuracy", "precision", "recall", "precision", "recall", "paper")
    for column, heading in enumerate(headings):
        kind = {3: " (macro)", 4: " (macro)", 5: " (weighted)", 6: " (weighted)", 7: ": acc, prec, rec"}.get(column, "")
        table.add_column(heading + kind, justify="left" if column < 2 else "right")
    keys = ("accuracy", "macro_precision", "macro_recall", "weighted_precision", "weighted_recall")
    for split, scores in results["splits"].items():
        known = paper.get(str(config["data"]), {}).get(split, {})
        table.add_section()
        for method, title in {"majority": "most frequent class", **METHODS}.items():
            if method in scores:
                cells = [cell(scores[method][key]) for key in keys]
                theirs = ", ".join(f"{value:.3g}" for value in known.get(method, ()))
                name = f"{split} ({results['images'][split]})" if method == "majority" else ""
                table.add_row(name, title, *cells, theirs)
    return table


def cell(value: Mapping[str, Any]) -> str:
    """Mean and standard deviation over runs."""
    return f"{value['mean']:.3f}" + ("" if value["std"] is None else f" ±{value['std']:.3f}".replace("±0.", "±."))
