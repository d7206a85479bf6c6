"""The pixels trunk: what a network sees in small frames, whole and through a window that follows their content.

The window is centred on the content's centre of mass, content being whatever differs from the background, which is the
median colour of a frame; so what moves stands still for the network, which then needs few labels to know it. The window
shows finely how much each place differs from the background, and coarsely in which colours. Beside it a frame is
described by a coarse view of all of it, by where the window is and how fast it moves, and by how much it differs from
the one before.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

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
_FLOOR = 1e-8
"""Least squared difference: so a frame of one colour has its centre in the middle, and a root its gradient."""

_WINDOW_VALUES = WINDOW**2 + CHANNELS * _COARSE_WINDOW**2
_FRAME_VALUES = CHANNELS * _COARSE**2 + 5


def difference(frames: Tensor) -> Tensor:
    """Return how much each pixel of frames ``[N, 3, h, w]`` differs from the background, squared, ``[N, 1, h, w]``.

    The background is the median, channel by channel, over every other row and column. The mean would not do: content
    shifts it, every pixel of the ground then differs a little, and together they draw the centre to the middle.
    """
    ground = _median(frames.detach()[:, :, ::2, ::2].flatten(2))
    squared = torch.full_like(frames[:, 0], _FLOOR)
    # All colours at once would take as much memory as the frames.
    for colour, level in zip(frames.unbind(dim=1), ground.unbind(dim=1), strict=True):
        apart = colour - level[:, None, None]
        squared.addcmul_(apart, apart)
        del apart
    return squared[:, None]


def _median(values: Tensor) -> Tensor:
    """Return the lower median over the last dimension."""
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        return values.median(dim=-1).values
    middle = (values.shape[-1] - 1) // 2
    # The same numbers in an eighth of the time.
    return torch.from_numpy(np.partition(values.numpy(), middle, axis=-1)[..., middle])


@dataclass(frozen=True)
class _Places:
    """What depends on the size of frames only, so that it is made once.

    Attributes:
        size: width and height ``[2]``.
        moments: ``[h w, 3]``, x and y of each pixel's middle, and 1.
        window: ``[9, 9, 2]``, x and y of the window's samples from its centre, in halves of a frame's width and height.
        coarse: ``[h w, 16]``, the share of each pixel in the mean of each part of the coarse view.
        coarse_window: ``[81, 9]``, likewise of the window's samples.
    """

    size: Tensor
    moments: Tensor
    window: Tensor
    coarse: Tensor
    coarse_window: Tensor


@lru_cache(maxsize=8)
def _places(height: int, width: int, device: torch.device, dtype: torch.dtype) -> _Places:
    # What is made in inference mode could not be part of a gradient later.
    with torch.inference_mode(False), torch.no_grad():
        rows, columns = (torch.arange(size, dtype=torch.float64) + 0.5 for size in (height, width))
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        size = torch.tensor([width, height], dtype=torch.float64)
        steps = ((torch.arange(WINDOW, dtype=torch.float64) + 0.5) / WINDOW - 0.5) * 2 * _SHARE * min(height, width)
        step_y, step_x = torch.meshgrid(steps, steps, indexing="ij")
        made = (
            size,
            torch.stack([x, y, torch.ones_like(x)], dim=2).flatten(0, 1),
            torch.stack([step_x, step_y], dim=2) / size,
            _shares(height, width, _COARSE),
            _shares(WINDOW, WINDOW, _COARSE_WINDOW),
        )
        return _Places(*(tensor.to(device, dtype) for tensor in made))


def _shares(height: int, width: int, side: int) -> Tensor:
    """Return ``[h w, side^2]``, the share of each pixel in the means of ``side x side`` parts of a frame."""
    rows, columns = (
        functional.adaptive_avg_pool1d(torch.eye(size, dtype=torch.float64), side) for size in (height, width)
    )
    return torch.kron(rows, columns)


def _places_of(frames: Tensor) -> _Places:
    return _places(frames.shape[-2], frames.shape[-1], frames.device, frames.dtype)


def centre_of_mass(weight: Tensor) -> Tensor:
    """Return the centre ``[N, 2]`` (x, y in pixels) of positive weights ``[N, 1, h, w]``."""
    sums = weight.flatten(1) @ _places_of(weight).moments
    return sums[:, :2] / sums[:, 2:]


def window_around(centres: Tensor, frames: Tensor) -> Tensor:
    """Return where the window around ``centres`` ``[N, 2]`` looks in ``frames``: ``[N, 9, 9, 2]``, in [-1, 1]."""
    places = _places_of(frames)
    return (2 * centres / places.size - 1)[:, None, None] + places.window


def cut_window(frames: Tensor, window: Tensor) -> Tensor:
    """Return ``[N, C, 9, 9]``, what a ``window`` ``[N, 9, 9, 2]`` shows of ``[N, C, h, w]``, zero beyond it."""
    return functional.grid_sample(frames, window, align_corners=False)


def _contrast(x: Tensor) -> Tensor:
    centred = x - x.mean(dim=(1, 2, 3), keepdim=True)
    return centred / (centred.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() + _CONTRAST_FLOOR)


def _change(frames: Tensor) -> Tensor:
    """Return how much each of frames ``[B, T, 3, h, w]`` differs from the one before, ``[B, T]``, 0 for the first."""
    change = [colour.diff(dim=1).abs().mean(dim=(2, 3)) for colour in frames.unbind(dim=2)]
    return functional.pad(torch.stack(change).mean(dim=0), (1, 0))


def look(frames: Tensor) -> Tensor:
    """Return what there is to see ``[B, T, 161]`` in frames ``[B, T, 3, h, w]``; nothing in it is learned.

    The first 108 values are the window: the difference from the background, less its own contrast, and the colours of
    3 x 3 parts; the rest describes the frame: a coarse view, the place of the window, how that changes and how the
    frame does, each of a size near one.
    """
    places, batch = _places_of(frames), frames.shape[:2]
    flat = frames.flatten(0, 1)
    squared = difference(flat)
    centres = centre_of_mass(squared)
    around = window_around(centres, flat)
    shape = _contrast(cut_window(squared.sqrt(), around))
    colours = cut_window(flat, around).flatten(2) @ places.coarse_window
    coarse = flat.flatten(2) @ places.coarse
    place = (2 * centres / places.size - 1).unflatten(0, batch)
    speed = functional.pad(place.diff(dim=1), (0, 0, 1, 0))
    views = (part.flatten(1).unflatten(0, batch) for part in (shape, 2 * colours, 2 * coarse))
    return torch.cat([*views, place, 8 * speed, 10 * _change(frames)[..., None]], dim=2)


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
