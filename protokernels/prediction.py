# SPDX-License-Identifier: MIT
"""The command ``predict``: label volumes for NIfTI volumes, from the checkpoint of a run."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from .commands import name_unknown, plain_warnings
from .data.nifti import SUFFIXES, check_nifti, without_suffix
from .inference import segment_file
from .training.files import check_target
from .training.screen import print_line

SEGMENTERS = ("local-contrast",)
"""Papers whose module has ``load_segmenter(path) -> (model, config)``; ``config.image_size`` is the side of its slices."""


@dataclass(frozen=True)
class PredictOptions:
    """What to segment, and with what."""

    volumes: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """NIfTI files (.nii, .nii.gz), one volume each, of the same kind of scan and field of view as in training."""
    checkpoint: Path
    """Folder of a run, or a file of weights in it."""
    out: Path | None = None
    """Label file for one volume, or a folder; default: NAME_prediction.nii.gz beside each volume."""
    overwrite: bool = False
    """Replace label files that exist."""
    batch_size: int = 16
    """Slices at a time."""
    device: Literal["auto", "cpu"] = "auto"
    """Where to compute; auto: the GPU where there is one."""


def predict(words: list[str]) -> int:
    """``protokernels predict PAPER --checkpoint RUN VOLUME ... [options]``."""
    words = [words[0].replace("_", "-"), *words[1:]] if words else words
    if not words or words[0] in ("-h", "--help") or words[0] not in SEGMENTERS:
        name_unknown("predict", words, "paper that segments", SEGMENTERS)
        print(
            f"protokernels predict PAPER --checkpoint RUN VOLUME ... [options]\n\npapers: {', '.join(SEGMENTERS)}\n"
            "`protokernels predict PAPER --help` lists the options."
        )
        return 0 if words and words[0] in ("-h", "--help") else 2
    options = tyro.cli(
        PredictOptions,
        args=words[1:],
        prog=f"protokernels predict {words[0]}",
        description="Writes a label volume, with the geometry of its input, for every NIfTI volume.",
    )
    plain_warnings()
    targets = label_paths(options)
    for path in options.volumes:  # all of them before the first is segmented
        check_nifti(path)
    paper: Any = importlib.import_module(f"protokernels.papers.{words[0].replace('-', '_')}")
    model, config = paper.load_segmenter(options.checkpoint)
    device = "cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu"
    model.to(device)
    for path, target in zip(options.volumes, targets, strict=True):
        segment_file(model, path, target, image_size=config.image_size, batch_size=options.batch_size, device=device)
        print_line(f"label    {target}")
    return 0


def label_paths(options: PredictOptions) -> list[Path]:
    """Where the label of each volume goes.

    Raises:
        ValueError: no volume, a batch size below 1, one file for several volumes, two labels of one name, a file that
            exists and may not be replaced, or cannot be made.
    """
    if not options.volumes or options.batch_size < 1:
        raise ValueError(
            f"predict: expected at least one volume and a batch size of at least 1; got {len(options.volumes)} volumes "
            f"and {options.batch_size}"
        )
    out = options.out
    if out is not None and out.is_file() and not out.name.endswith(SUFFIXES):
        raise ValueError(
            f"predict: {out} is a file; pass a folder as --out, or a label file that ends in .nii or .nii.gz"
        )
    if out is not None and out.name.endswith(SUFFIXES) and not out.is_dir():
        if len(options.volumes) > 1:
            raise ValueError(f"predict: {out} is one file for {len(options.volumes)} volumes; pass a folder as --out")
        targets = [out]
    else:
        targets = [
            (path.parent if out is None else out) / f"{without_suffix(path)}_prediction.nii.gz"
            for path in options.volumes
        ]
    for index, target in enumerate(targets):
        if target in targets[:index]:
            raise ValueError(f"predict: two volumes would be labelled in {target}; give their files different names")
        check_target(target, makes_folder=True)
        if target.exists() and not options.overwrite:
            raise ValueError(f"predict: {target} exists; pass --overwrite to replace it, or another --out")
    return targets
