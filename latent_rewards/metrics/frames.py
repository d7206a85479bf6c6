"""Frames as the networks of CLIP's family take them, each prepared the way one published metric does it.

The published metrics of this family differ less in their networks than in what happens to a frame before the network
sees it: who resizes it, whether it is smoothed while it shrinks, whether it is rounded to 8 bits on the way, and which
pixel the crop begins at. :class:`FrameTransform` spells these out, so that each metric can do what its original does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from latent_rewards.contracts import ConfigError, unknown_name

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of R, G and B in [0, 1], the statistics that every CLIP of OpenAI and LAION is fed with (openai/CLIP)."""

RESIZES = ("pillow", "antialias", "plain")
CROPS = ("torchvision", "transformers")
_FIXED_POINT = 2.0**22
"""Pillow's scale of its integer weights, for images of 8 bits."""


@dataclass(frozen=True)
class FrameTransform:
    """How frames become what a tower takes: rounded to 8 bits, resized (bicubic), cropped and normalised.

    The originals read 8-bit images, so frames are rounded to 256 levels first: a clip scores the same from memory as
    from a lossless file. A gradient passes every rounding unchanged.

    Attributes:
        size: side of the square, pixels; the shorter side is resized to it and the centre of the longer one kept.
        resize: ``"pillow"`` rounds to 8 bits after the horizontal and again after the vertical pass, as Pillow up to
            version 12 does (13 may begin with the vertical one); ``"antialias"`` smooths but does not round or clamp,
            and ``"plain"`` does not smooth either, as torchvision does with floating-point tensors.
        crop: where an odd margin is split: ``"torchvision"`` rounds half of it to even, ``"transformers"`` down.
    """

    size: int
    resize: str = "pillow"
    crop: str = "torchvision"

    def __post_init__(self) -> None:
        """Raise ConfigError for a size that is no number of pixels, or a way to resize or crop that is not known."""
        if not isinstance(self.size, int) or self.size < 1:
            raise ConfigError(f"frames are resized to a square of a whole number of pixels; got {self.size!r}")
        for kind, value, known in (("resize", self.resize, RESIZES), ("crop", self.crop, CROPS)):
            if value not in known:
                raise ConfigError(unknown_name(kind, value, known))

    def __call__(self, frames: Tensor) -> Tensor:
        """``[N, C, H, W]`` in [0, 1], C of 1 or 3 -> normalised ``[N, 3, size, size]``; grey is repeated."""
        levels = _eight_bit(255 * frames)
        height, width = levels.shape[-2:]
        # The longer side is rounded down, as in all of the originals.
        shorter = min(height, width)
        levels = self._resized(levels, self.size * height // shorter, self.size * width // shorter)
        top, left = (self._margin(side) for side in levels.shape[-2:])
        cropped = levels[..., top : top + self.size, left : left + self.size]
        # A grey frame becomes three channels here.
        mean, std = (torch.tensor(values).to(cropped)[:, None, None] for values in (MEAN, STD))
        return (cropped / 255 - mean) / std

    def _resized(self, levels: Tensor, height: int, width: int) -> Tensor:
        if levels.shape[-2:] == (height, width):
            return levels
        if self.resize != "pillow":
            return interpolate(levels, (height, width), mode="bicubic", antialias=self.resize == "antialias")
        across = _pillow_pass(levels, width)
        return _pillow_pass(across.transpose(-1, -2), height).transpose(-1, -2)

    def _margin(self, side: int) -> int:
        spare = side - self.size
        return spare // 2 if self.crop == "transformers" else round(spare / 2)


def _pillow_pass(levels: Tensor, size: int) -> Tensor:
    """Resize the last dimension as Pillow does, to the bit: its integer weights, and a rounding of halves upwards."""
    if levels.shape[-1] == size:
        return levels
    weights = _pillow_weights(levels.shape[-1], size).to(levels.device)
    # Whole numbers below 2^53 are exact in float64, so this is Pillow's integer arithmetic in a form with a gradient;
    # frame by frame, for float64 takes twice the room.
    return torch.stack([_eight_bit(frame.double() @ weights / _FIXED_POINT).to(levels.dtype) for frame in levels])


def _pillow_weights(length: int, size: int) -> Tensor:
    """Return the bicubic weights times 2^22 with which ``length`` pixels make ``size``, float64 ``[length, size]``."""
    scale = length / size
    stretch = max(scale, 1.0)
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    first, last = ((centres + reach * stretch + 0.5).trunc().clamp(0, length) for reach in (-2, 2))
    positions = torch.arange(length, dtype=torch.float64)[:, None]
    weights = _bicubic((positions - centres + 0.5) / stretch).where((positions >= first) & (positions < last), 0.0)
    weights = weights / weights.sum(dim=0)
    away = torch.where(weights < 0, -0.5, 0.5)
    return (weights * _FIXED_POINT + away).trunc()


def _bicubic(x: Tensor) -> Tensor:
    """Keys' (1981) kernel with a = -1/2, which Pillow uses."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x**2 + 1
    return near.where(x < 1, (((x - 5) * x + 8) * x - 4).where(x < 2, 0.0) * -0.5)


def _eight_bit(levels: Tensor) -> Tensor:
    """Round to whole levels of 0 to 255, halves upwards; the gradient is that of doing nothing."""
    rounded = (levels.detach() + 0.5).floor().clamp(0, 255)
    # The bracket is exactly zero, so the sum is exactly the rounded level.
    return rounded + (levels - levels.detach())
