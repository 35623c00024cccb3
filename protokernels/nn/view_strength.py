# SPDX-License-Identifier: MIT
"""How strong the transformations of a random view are: what :class:`~protokernels.nn.RandomViews` draws from."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ..ops import _warp_checks as checks
from ..ops._checks import check_interval, check_real

Range = tuple[float, float]


@dataclass(frozen=True)
class ViewStrength:
    """How one view comes about: for every transformation its probability, and the range that its strength is drawn from, uniformly.

    Attributes:
        crop: probability of a resized crop ...
        crop_scale: ... with an area in this range, as a share of the image's; above 1 the view shows what lies around it, ...
        crop_ratio: ... with a width / height in this range, in pixels of the image, uniform in its logarithm. Sides longer than the
            image are cut to it unless the area exceeds 1.
        hflip: probability that left and right change places.
        vflip: probability that top and bottom do.
        rotate: probability of a rotation of the view, resized and flipped before, about its centre ...
        rotation: ... by an angle in this range, in radians, counter-clockwise.
        jitter: probability that ...
        brightness: ... the image is multiplied by a factor in [1 - brightness, 1 + brightness] ...
        contrast: ... and its distance from its mean by one in [1 - contrast, 1 + contrast].
        offset: probability that a number is added, normally distributed ...
        offset_normal: ... with this mean and standard deviation.
        gamma: probability that an image, each channel scaled to [0, 1] and back, is raised to a power ...
        gamma_range: ... whose logarithm is uniform between those of these two.
        blur: probability of a Gaussian blur ...
        blur_sigma: ... with a standard deviation in this range, in pixels of the view.
        blur_radius: the blur reaches this many pixels to either side, 2 for five taps; None: three of the largest standard deviations.
        noise: probability of normal noise ...
        noise_std: ... with a standard deviation in this range.
        solarise: probability that pixels in the upper half of ``limits`` are mirrored into the lower one.

    Example:
        >>> from protokernels.nn import ViewStrength
        >>> ViewStrength(blur=1.0, noise=0.5).crop_scale
        (0.2, 1.0)
    """

    crop: float = 1.0
    crop_scale: Range = (0.2, 1.0)
    crop_ratio: Range = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    rotate: float = 0.0
    rotation: Range = (-math.pi / 6, math.pi / 6)
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    offset: float = 0.0
    offset_normal: Range = (0.0, 1.0)
    gamma: float = 0.0
    gamma_range: Range = (0.5, 2.0)
    blur: float = 0.5
    blur_sigma: Range = (0.1, 2.0)
    noise: float = 0.0
    noise_std: Range = (0.0, 0.1)
    solarise: float = 0.0
    blur_radius: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "blur_radius":
                check = check_real if isinstance(field.default, float) else check_interval
                check("ViewStrength", field.name, getattr(self, field.name))
        if self.blur_radius is not None:
            checks.check_radius("ViewStrength", self.blur_radius, "blur_radius")
        for name in ("crop", "hflip", "vflip", "rotate", "jitter", "offset", "gamma", "blur", "noise", "solarise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"ViewStrength: {name} must be a probability, in [0, 1]; got {getattr(self, name)}")
        for name in ("crop_scale", "crop_ratio", "gamma_range"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise ValueError(f"ViewStrength: {name} must be a range of positive numbers; got {(low, high)}")
        for name in ("blur_sigma", "noise_std"):
            low, high = getattr(self, name)
            if not 0 <= low <= high < math.inf:
                raise ValueError(f"ViewStrength: {name} must be a range of numbers not below 0; got {(low, high)}")
        if not -math.inf < self.rotation[0] <= self.rotation[1] < math.inf:
            raise ValueError(f"ViewStrength: rotation must be a range (low, high) in radians; got {self.rotation}")
        if not 0 <= self.brightness <= 1 or not 0 <= self.contrast <= 1:
            raise ValueError(
                f"ViewStrength: brightness and contrast must lie in [0, 1]; got {self.brightness} and {self.contrast}"
            )
        if not math.isfinite(self.offset_normal[0]) or not 0 <= self.offset_normal[1] < math.inf:
            raise ValueError(
                f"ViewStrength: offset_normal must be a mean and a standard deviation; got {self.offset_normal}"
            )
