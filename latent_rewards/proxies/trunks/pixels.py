"""The pixels trunk: what a network sees in small frames, whole and through a window that follows their content.

The window is centred on the content's centre of mass, content being whatever differs from the background, which is the
median colour of a frame; so what moves stands still for the network, which then needs few labels to know it. The window
shows finely how much each place differs from the background, and coarsely in which colours. Beside it a frame is
described by a coarse view of all of it, by where the window is and how fast it moves, and by how much it differs from
the one before.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from latent_rewards.proxies.trunks.tiny_decoder import CHANNELS, drawing_scale

WINDOW = 9
"""Samples a side of the window, which covers 9/16 of the shorter side of a frame."""

_SHARE = 9 / 16
_COARSE, _COARSE_WINDOW = 4, 3
_CONTRAST_FLOOR = 0.02
_WINDOW_VALUES = WINDOW**2 + CHANNELS * _COARSE_WINDOW**2
_FRAME_VALUES = CHANNELS * _COARSE**2 + 5


def difference(frames: Tensor) -> Tensor:
    """Return how much each pixel of frames ``[N, 3, h, w]`` differs from the background, squared, ``[N, 1, h, w]``.

    The background is the median, channel by channel, over every other row and column. The mean would not do: content
    shifts it, every pixel of the ground then differs a little, and together they draw the centre to the middle.
    """
    ground = _median(frames.detach()[:, :, ::2, ::2].flatten(2))
    return (frames - ground[:, :, None, None]).square().sum(dim=1, keepdim=True)


def _median(values: Tensor) -> Tensor:
    """Return the lower median over the last dimension."""
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        return values.median(dim=-1).values
    middle = (values.shape[-1] - 1) // 2
    # The same numbers in an eighth of the time.
    return torch.from_numpy(np.partition(values.numpy(), middle, axis=-1)[..., middle])


def _pool(x: Tensor, side: int) -> Tensor:
    """Return the means ``[N, C side^2]`` of ``side x side`` parts of ``[N, C, h, w]``."""
    height, width = x.shape[2:]
    if height % side or width % side:
        return functional.adaptive_avg_pool2d(x, side).flatten(1)
    return functional.avg_pool2d(x, (height // side, width // side)).flatten(1)


def centre_of_mass(weight: Tensor) -> Tensor:
    """Return the centre ``[N, 2]`` (x, y in pixels) of weights ``[N, 1, h, w]``, the middle where all are zero."""
    weight = weight[:, 0] + 1e-8
    weight = weight / weight.sum(dim=(1, 2), keepdim=True)
    height, width = weight.shape[1:]
    x = (weight.sum(dim=1) * (torch.arange(width).to(weight) + 0.5)).sum(dim=1)
    y = (weight.sum(dim=2) * (torch.arange(height).to(weight) + 0.5)).sum(dim=1)
    return torch.stack([x, y], dim=1)


def cut_window(frames: Tensor, centres: Tensor) -> Tensor:
    """Return the square window ``[N, C, 9, 9]`` around ``centres`` ``[N, 2]`` of ``[N, C, h, w]``, zero beyond it."""
    height, width = frames.shape[2:]
    side = _SHARE * min(height, width)
    steps = ((torch.arange(WINDOW).to(frames) + 0.5) / WINDOW - 0.5) * side
    x = ((centres[:, :1] + steps) * 2 / width - 1)[:, None, :].expand(-1, WINDOW, -1)
    y = ((centres[:, 1:] + steps) * 2 / height - 1)[:, :, None].expand(-1, -1, WINDOW)
    return functional.grid_sample(frames, torch.stack([x, y], dim=3), align_corners=False)


def _contrast(x: Tensor) -> Tensor:
    centred = x - x.mean(dim=(1, 2, 3), keepdim=True)
    return centred / (centred.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() + _CONTRAST_FLOOR)


def look(frames: Tensor) -> Tensor:
    """Return what there is to see ``[B, T, 161]`` in frames ``[B, T, 3, h, w]``; nothing in it is learned.

    The first 108 values are the window: the difference from the background, less its own contrast, and the colours of
    3 x 3 parts; the rest describes the frame: a coarse view, the place of the window, how that changes and how the
    frame does, each of a size near one.
    """
    count, length = frames.shape[:2]
    flat = frames.flatten(0, 1)
    squared = difference(flat)
    centres = centre_of_mass(squared)
    # A square root has no gradient at zero.
    shown = cut_window(torch.cat([(squared + 1e-8).sqrt(), flat], dim=1), centres)
    colours = 2 * _pool(shown[:, 1:], _COARSE_WINDOW)
    window = torch.cat([_contrast(shown[:, :1]).flatten(1), colours], dim=1)
    size = torch.tensor([frames.shape[4], frames.shape[3]]).to(frames)
    place = (2 * centres / size - 1).unflatten(0, (count, length))
    speed = functional.pad(place.diff(dim=1), (0, 0, 1, 0))
    change = functional.pad(frames.diff(dim=1).abs().mean(dim=(2, 3, 4)), (1, 0))[..., None]
    coarse = _pool(flat, _COARSE)
    window, coarse = (part.unflatten(0, (count, length)) for part in (window, coarse))
    return torch.cat([window, 2 * coarse, place, 8 * speed, 10 * change], dim=2)


class PixelTrunk(nn.Module):
    """What :func:`look` sees ``[B, T, 161]`` -> features ``[B, T, 2 width + width / 4]``.

    Args:
        latent_shape: ``(C, F, H, W)`` of the latents the frames are drawn from.
        width: half of the hidden units.
        depth: layers of the network that sees the window.
        condition_width: is not looked at; the head knows the prompt.
    """

    def __init__(self, latent_shape: tuple[int, ...], width: int, depth: int, condition_width: int) -> None:
        super().__init__()
        sizes = [_WINDOW_VALUES, *[2 * width] * depth]
        layers = [layer for pair in zip(sizes[:-1], sizes[1:], strict=True) for layer in (nn.Linear(*pair), nn.GELU())]
        self.window = nn.Sequential(*layers)
        # Few, or the head learns clips by where they are and forgets what they show.
        self.frame = nn.Linear(_FRAME_VALUES, width // 4)
        self.num_features = sizes[-1] + width // 4
        self.smallest_side = drawing_scale(latent_shape[2], latent_shape[3])[0]

    def forward(self, seen: Tensor, condition: Tensor | None) -> Tensor:
        """Return ``[B, T, 2 width + width / 4]``."""
        window, frame = seen.split([_WINDOW_VALUES, _FRAME_VALUES], dim=2)
        return torch.cat([self.window(window), functional.gelu(self.frame(frame))], dim=2)
