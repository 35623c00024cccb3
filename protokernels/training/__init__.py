# SPDX-License-Identifier: MIT
"""What the papers' training loops share: run folders, checkpoints, randomness, devices and processes, progress,
summaries over runs."""

from .checkpoints import CheckpointError, CheckpointStore
from .distributed import gather_batch, own_rows, process_count, synchronize_batch_norm, whole_batch
from .files import WriteError
from .lost_processes import ProcessLostError
from .randomness import derived_generator, epoch_order, seed_everything
from .run_folder import RunFolder, RunFolderError, next_free_folder
from .session import Interrupted, Plan, Session, Step, make_accelerator, preferred_layout
from .summary import summarize_runs

__all__ = [
    "CheckpointError",
    "CheckpointStore",
    "Interrupted",
    "Plan",
    "ProcessLostError",
    "RunFolder",
    "RunFolderError",
    "Session",
    "Step",
    "WriteError",
    "derived_generator",
    "epoch_order",
    "gather_batch",
    "make_accelerator",
    "next_free_folder",
    "own_rows",
    "preferred_layout",
    "process_count",
    "seed_everything",
    "summarize_runs",
    "synchronize_batch_norm",
    "whole_batch",
]
