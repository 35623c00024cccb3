# SPDX-License-Identifier: MIT
"""uint8 images to float tensors."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2048  # images converted at a time, so that the peak memory stays near the size of the result


def to_tensor(
    images: np.ndarray | Tensor,  # [N, H, W] or [N, H, W, 3] uint8
    *,
    size: int | None = 32,
) -> Tensor:  # [N, C, size, size] float32
    """Scales uint8 images to [0, 1] and resizes them to ``size`` x ``size`` pixels.

    Bilinear without antialiasing, pixel centres at i + 0.5 (``align_corners=False``), as the released code of the
    papers resizes tensors. Images that are not square are squeezed to a square. Equivalent per image:
    ``F.interpolate(image / 255, (size, size), mode="bilinear", align_corners=False)``.

    Args:
        images: grey [N, H, W] or colour [N, H, W, 3].
        size: side in pixels; None keeps H and W.

    Returns:
        A contiguous float32 tensor [N, C, size, size] on the CPU with values in [0, 1]; C is 1 or 3.

    Raises:
        ValueError: for another dtype or shape.

    Example:
        >>> import numpy as np
        >>> from protokernels.data import to_tensor
        >>> to_tensor(np.full((2, 8, 8), 255, np.uint8), size=4)[0, 0, 0].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.dtype != np.uint8 or not (array.ndim == 3 or (array.ndim == 4 and array.shape[3] == 3)):
        raise ValueError(
            f"to_tensor: images must be uint8 of shape [N, H, W] or [N, H, W, 3]; got {array.dtype} "
            f"{list(array.shape)}; pass image[None] for one grey image"
        )
    if size is not None and size < 1:
        raise ValueError(f"to_tensor: size must be at least 1 pixel, or None to keep the images' own; got {size}")
    count, height, width = array.shape[:3]
    channels = 1 if array.ndim == 3 else 3
    if 0 in (height, width):
        raise ValueError(f"to_tensor: images must have at least one pixel; got {list(array.shape)}")
    target = (height, width) if size is None else (size, size)
    result = torch.empty((count, channels, *target), dtype=torch.float32)
    for start in range(0, count, CHUNK):
        chunk = np.array(array[start : start + CHUNK])  # a copy: the source may be read-only
        chunk = chunk.reshape(-1, height, width, channels)
        scaled = torch.from_numpy(chunk).permute(0, 3, 1, 2).to(torch.float32) / 255.0
        if target != (height, width):
            scaled = F.interpolate(scaled, target, mode="bilinear", align_corners=False, antialias=False)
            scaled = scaled.clamp_(0.0, 1.0)  # the four weights may add up to 1 + 1 ulp
        result[start : start + CHUNK] = scaled
    return result
