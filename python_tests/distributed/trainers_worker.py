# SPDX-License-Identifier: MIT
"""What test_trainers_distributed.py runs in every process: ``trainers_worker.py FOLDER [RANK PROCESSES PORT]``."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from protokernels.evaluation import TRANSFER_PROTOCOLS, AdamWProtocol, TransferConfig
from protokernels.papers import local_contrast, optimized_views, optiml

THIRD_STAGE = {"data": "phantoms", "labelled": 0.5, "image_size": 16, "width": 2, "fine_tune_batch_size": 5, "fine_tune_steps": 4,
               "fine_tune_learning_rate": 0.1}  # fmt: skip
TINY: dict[str, tuple[Any, dict[str, Any]]] = {
    "optiml": (
        optiml,
        {"data": "digits", "epochs": 1, "warmup_epochs": 0, "batch_size": 203, "width": 2, "image_size": 32, "expander_dim": 16,
         "num_heads": 2, "head_dim": 4, "num_iters": 5, "optimizer": "adamw", "learning_rate": 1e-5, "transfer": "fair"},
    ),
    "optimized_views": (
        optimized_views,
        {"data": "digits", "strategy": "self-supervised+supervision", "epochs": 1, "batch_size": 203, "width": 2, "m_width": 2,
         "image_size": 16},
    ),
    "local_contrast": (
        local_contrast,
        {"data": "phantoms", "method": "global+local-block", "labelled": 0.5, "image_size": 16, "width": 2, "block_size": 8,
         "global_batch_size": 13, "global_steps": 6, "local_batch_size": 5, "local_steps": 4, "fine_tune_batch_size": 5,
         "fine_tune_steps": 4},
    ),
    "local_contrast-mixup": (local_contrast, {"method": "mixup", **THIRD_STAGE}),
    "local_contrast-tcsm": (local_contrast, {"method": "tcsm", **THIRD_STAGE}),
}  # fmt: skip


def main(folder: Path) -> None:
    """A few steps of each, in batches that processes cannot share evenly. Then the main process fine-tunes the encoder of the first while
    the others wait.

    Adam divides by the gradient's own size: where that is all but zero, rounding alone decides a step of full length. A larger
    epsilon takes this out of the comparison.
    """
    for name in ("Adam", "AdamW"):
        setattr(torch.optim, name, functools.partial(getattr(torch.optim, name), eps=1.0))
    once = AdamWProtocol(learning_rate=1e-3, epochs=1, patience=1, batch_size=32)
    TRANSFER_PROTOCOLS["fair"] = TransferConfig(fractions=(0.1,), fine_tune_fractions=(0.1,), fine_tune=once)
    for name, (paper, changes) in TINY.items():
        config = paper.CONFIG.preset("fair", **changes)
        paper.train(config, folder / name, figures=False, quiet=True, device="cpu")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 2:
        for name, value in zip(("RANK", "WORLD_SIZE", "MASTER_PORT"), sys.argv[2:], strict=True):
            os.environ[name] = value
        os.environ.update(LOCAL_RANK=os.environ["RANK"], MASTER_ADDR="127.0.0.1")
    main(Path(sys.argv[1]))
