# SPDX-License-Identifier: MIT
"""What test_contrastive_autoencoder_runs.py runs under torchrun and alone: ``contrastive_autoencoder_worker.py FOLDER``."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from protokernels.papers import contrastive_autoencoder as paper


def main(folder: str) -> None:
    """Both phases on digits, in batches of odd size, with prototypes that the second phase refreshes."""
    config = paper.CONFIG.preset(
        "official", "digits", epochs=3, warmup_epochs=2, ramp_epochs=1, batch_size=401, image_size=16, latent_dim=8,
        encoder_widths=(4, 8, 8), decoder_widths=(8, 4), num_prototypes=4, subset=200, condition="concatenated",
    )  # fmt: skip
    paper.train(config, folder, figures=False, quiet=True, device="cpu")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
