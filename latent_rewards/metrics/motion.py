"""How much and how smoothly a clip moves, by dense inverse search (DIS) optical flow, which needs no weights.

DIS (Kroeger et al. 2016) matches patches on a pyramid whose finest level is a quarter of the image. OpenCV refuses
frames below 12 pixels and leaves that pyramid for others below about 100, so small frames are enlarged by a whole
factor first and the vectors divided by it: any small size then costs the same search, a third of a millisecond per
pair. A still clip is perfectly smooth and noise moves a lot: each metric here guards the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latent_rewards.contracts import ConfigError, DataError, unknown_name
from latent_rewards.metrics.metric import require
from latent_rewards.metrics.quality import luma
from latent_rewards.metrics.registry import register_metric

SHORTER_SIDE = 128
"""Frames are enlarged by the least whole factor that brings their shorter side to this many pixels."""

TARGET_FPS = 8.0
TOP_SHARE = 0.05
THRESHOLD = 6.0 / 256.0
"""VBench's threshold of motion between two sampled frames, as a share of the shorter side."""

TEXTURE_WINDOW = 7
MIN_TEXTURE = 6.0
"""Flow counts where the 8-bit luma varies by at least so much (standard deviation over 7 x 7 pixels): on a flat
background one grey level of noise is enough for dense inverse search to see motion everywhere."""


DIRECTIONS = {"right": 0.0, "up": 90.0, "left": 180.0, "down": 270.0}
"""Degrees, anticlockwise from the right."""


def dis_flow(video: Tensor) -> np.ndarray:
    """Return the optical flow from each frame of a clip to the next.

    Args:
        video: ``[T, C, H, W]`` in [0, 1], T at least 2.

    Returns:
        float32 ``[T - 1, H, W, 2]``, (x, y) in pixels per frame: frame t at p is found in frame t + 1 at p + flow.

    Raises:
        DataError: not a clip of at least two frames.
        ImportError: OpenCV is not installed.
    """
    if video.ndim != 4 or len(video) < 2:
        raise DataError(f"dis_flow takes a clip [T, C, H, W] of at least 2 frames; got shape {tuple(video.shape)}")
    height, width = video.shape[-2:]
    frames = _enlarge(video)
    return np.stack([_pair_flow(a, b, height, width) for a, b in zip(frames[:-1], frames[1:], strict=True)])


def sampling_stride(fps: float) -> int:
    """Return how many frames lie from one to the next of VBench's dynamic degree, which samples about 8 per second.

    Raises:
        ConfigError: ``fps`` is not positive.
    """
    if not fps > 0:
        raise ConfigError(f"fps must be positive; got {fps!r}")
    return max(1, round(fps / TARGET_FPS))


def top_magnitude(flow: np.ndarray) -> float:
    """Return the mean of the largest 5 % of the magnitudes of a flow ``[H, W, 2]``, pixels."""
    magnitude = np.hypot(flow[..., 0], flow[..., 1]).ravel()
    kept = max(1, int(TOP_SHARE * magnitude.size))
    return float(np.partition(magnitude, magnitude.size - kept)[-kept:].mean())


def moves(magnitudes: Iterable[float], *, frames: int, shorter_side: int, least: int = 0) -> bool:
    """Say whether a clip moves, by VBench's rule of dynamic degree (Huang et al., arXiv 2311.17982).

    Args:
        magnitudes: :func:`top_magnitude` of each pair of neighbouring frames, pixels; no more are taken than decide.
        frames: T, the number of sampled frames.
        shorter_side: of the frames, pixels; a pair counts above 6/256 of it.
        least: how many pairs must count, if round(4 T/16) is fewer. VBench's is 0: a clip of two frames always moves.

    Returns:
        Whether at least round(4 T/16) pairs count; False for a single frame.
    """
    needed = max(least, round(4 * frames / 16))
    counted = 0
    for index, magnitude in enumerate(magnitudes):
        counted += magnitude > THRESHOLD * shorter_side
        if counted >= needed:
            return True
        if counted + (frames - 2 - index) < needed:
            return False
    return False


@register_metric(
    "motion.dynamic_degree",
    version="1",
    value_range=(0, 1),
    minimum_frames=2,
    needs_fps=True,
    requires=("cv2",),
    cheats=("noise",),
)
@dataclass(frozen=True)
class DynamicDegree:
    """VBench's dynamic degree, with DIS flow in place of RAFT: 1 for a clip that moves, 0 for one that does not.

    Frames are sub-sampled to about 8 per second of ``fps``. A pair of them counts if the mean of the largest 5 % of its
    flow magnitudes exceeds 6 min(H, W)/256 pixels, and a clip of T sampled frames moves if at least round(4 T/16) pairs
    count (at least one, where VBench would call any clip of two frames moving). Flow over flat regions is taken as 0.

    Raises:
        ConfigError: ``fps`` is not positive.
    """

    fps: float = 8.0

    def __post_init__(self) -> None:
        sampling_stride(self.fps)

    def __call__(self, videos: Tensor) -> Tensor:
        """``[B, T, C, H, W]`` in [0, 1] -> 0 or 1 ``[B]``."""
        # A clip shorter than the stride still offers its first and last frame.
        stride = min(sampling_stride(self.fps), videos.shape[1] - 1)
        return torch.tensor([float(_moves(video[::stride])) for video in videos])


@register_metric(
    "motion.smoothness",
    version="1",
    value_range=(0, 1),
    minimum_frames=3,
    requires=("cv2",),
    cheats=("still", "grey"),
)
@dataclass(frozen=True)
class Smoothness:
    """(255 - MAE)/255 of every odd frame against its interpolation from the even frames beside it; 1 is smooth.

    A variant of VBench's motion smoothness, which interpolates with AMT-S and whose values differ. ``interpolation``
    is ``"flow"`` (both neighbours warped half-way along the DIS flow between them, then averaged) or ``"average"``
    (averaged where they are, which takes any motion for roughness).

    Raises:
        ConfigError: another interpolation.
    """

    interpolation: str = "flow"

    def __post_init__(self) -> None:
        if self.interpolation not in ("flow", "average"):
            raise ConfigError(f"interpolation must be 'flow' or 'average'; got {self.interpolation!r}")

    def __call__(self, videos: Tensor) -> Tensor:
        """``[B, T, C, H, W]`` in [0, 1] -> ``[B]`` in [0, 1]."""
        even, odd = videos[:, ::2], videos[:, 1::2]
        odd = odd[:, : even.shape[1] - 1]
        if self.interpolation == "average":
            between = (even[:, :-1] + even[:, 1:]) / 2
        else:
            between = torch.stack([_halfway(video) for video in even])
        return 1 - (between.to(odd) - odd).abs().flatten(1).mean(dim=1)


@register_metric("motion.flow_direction", version="1", value_range=(-1, 1), minimum_frames=2, requires=("cv2",))
@dataclass(frozen=True)
class FlowDirection:
    """Cosine between the mean DIS flow of what is textured and a direction; 1 moves there, 0 not at all or across.

    ``direction`` is "right", "left", "up" or "down", or an angle in degrees, anticlockwise from the right. A clip whose
    mean flow is below ``still`` pixels per frame has no direction and scores 0.

    Raises:
        ConfigError: another direction, or a negative ``still``.
    """

    direction: str | float = "right"
    still: float = 0.05

    def __post_init__(self) -> None:
        if isinstance(self.direction, str) and self.direction not in DIRECTIONS:
            raise ConfigError(unknown_name("direction", self.direction, DIRECTIONS))
        if not self.still >= 0:
            raise ConfigError(f"still must not be negative; got {self.still!r}")

    def __call__(self, videos: Tensor) -> Tensor:
        """``[B, T, C, H, W]`` in [0, 1] -> ``[B]`` in [-1, 1]."""
        degrees = DIRECTIONS[self.direction] if isinstance(self.direction, str) else self.direction
        # Rows of an image are counted downwards.
        wanted = np.array([math.cos(math.radians(degrees)), -math.sin(math.radians(degrees))])
        cosines = []
        for video in videos:
            weight = np.stack([_textured(frame) for frame in video[:-1]])
            mean = (dis_flow(video) * weight).sum(axis=(0, 1, 2)) / max(float(weight.sum()), 1.0)
            speed = float(np.linalg.norm(mean))
            cosines.append(float(mean @ wanted) / speed if speed > self.still else 0.0)
        return torch.tensor(cosines).clamp(-1, 1)


@register_metric(
    "motion.warping_error",
    version="1",
    value_range=(0, 1),
    higher_is_better=False,
    minimum_frames=2,
    may_be_nan=True,
    requires=("cv2",),
    cheats=("still", "grey"),
)
def warping_error(videos: Tensor) -> Tensor:
    """Mean squared difference of each frame and the next one warped back onto it along the DIS flow; 0 is consistent.

    After Lai et al. (2018), whose flow is FlowNet2's. Pixels that leave the frame, or where the flows there and back
    disagree (Sundaram et al. 2010), take no part; a clip without any other has no value (NaN).
    """
    return torch.tensor([_warping_error(video) for video in videos])


def _warping_error(video: Tensor) -> float:
    pixels = np.ascontiguousarray(video.detach().cpu().permute(0, 2, 3, 1).numpy())
    there, back = dis_flow(video), dis_flow(video.flip(0))[::-1]
    rows, columns = np.mgrid[: video.shape[-2], : video.shape[-1]].astype(np.float32)
    total, count = 0.0, 0
    for index, (flow, reverse) in enumerate(zip(there, back, strict=True)):
        x, y = columns + flow[..., 0], rows + flow[..., 1]
        returned = _remap(reverse, x, y)
        apart = np.square(flow + returned).sum(axis=-1)
        allowed = 0.01 * (np.square(flow) + np.square(returned)).sum(axis=-1) + 0.5
        inside = (x >= 0) & (x <= video.shape[-1] - 1) & (y >= 0) & (y <= video.shape[-2] - 1)
        valid = inside & (apart <= allowed)
        difference = np.square(pixels[index] - _remap(pixels[index + 1], x, y)).mean(axis=-1)
        total, count = total + float(difference[valid].sum()), count + int(valid.sum())
    return min(total / count, 1.0) if count else float("nan")


def _remap(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return ``image [H, W, K]`` at the positions (x, y), each ``[H, W]``, bilinearly."""
    cv2 = require("cv2")
    with _one_thread(cv2):
        warped = cv2.remap(np.ascontiguousarray(image), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return warped.reshape(image.shape)


def _moves(video: Tensor) -> bool:
    height, width = video.shape[-2:]
    frames = _enlarge(video)
    magnitudes = (
        top_magnitude(_pair_flow(frames[index], frames[index + 1], height, width) * _textured(video[index]))
        for index in range(len(video) - 1)
    )
    return moves(magnitudes, frames=len(video), shorter_side=min(height, width), least=1)


def _textured(frame: Tensor) -> np.ndarray:
    """Return where a frame ``[C, H, W]`` has texture, float32 ``[H, W, 1]`` of 0 and 1."""
    cv2 = require("cv2")
    grey = (255 * luma(frame.detach().cpu()[None])[0]).numpy().astype(np.float32)
    window = (TEXTURE_WINDOW, TEXTURE_WINDOW)
    with _one_thread(cv2):
        variance = cv2.blur(grey * grey, window) - cv2.blur(grey, window) ** 2
    return (variance >= MIN_TEXTURE**2).astype(np.float32)[..., None]


def _halfway(video: Tensor) -> Tensor:
    """Interpolate between neighbouring frames ``[T, C, H, W]`` -> ``[T - 1, C, H, W]``."""
    cv2 = require("cv2")
    half = dis_flow(video) / 2
    pixels = np.ascontiguousarray(video.detach().cpu().permute(0, 2, 3, 1).numpy())
    rows, columns = np.mgrid[: video.shape[-2], : video.shape[-1]].astype(np.float32)
    between = []
    with _one_thread(cv2):
        for index, step in enumerate(half):
            x, y = step[..., 0], step[..., 1]
            before = cv2.remap(pixels[index], columns - x, rows - y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
            after = cv2.remap(
                pixels[index + 1], columns + x, rows + y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
            )
            between.append(((before + after) / 2).clip(0, 1).reshape(pixels[index].shape))
    return torch.from_numpy(np.stack(between)).permute(0, 3, 1, 2)


def _enlarge(video: Tensor) -> list[np.ndarray]:
    """Return the 8-bit luma of each frame, its shorter side at least :data:`SHORTER_SIDE`."""
    cv2 = require("cv2")
    height, width = video.shape[-2:]
    factor = -(-SHORTER_SIDE // min(height, width))
    frames = (255 * luma(video.detach().cpu())).round().clamp(0, 255).to(torch.uint8).numpy()
    if factor <= 1:
        return list(frames)
    size = (width * factor, height * factor)
    with _one_thread(cv2):
        return [cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC) for frame in frames]


def _pair_flow(first: np.ndarray, second: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the flow ``[H, W, 2]`` between enlarged frames in pixels of the original ``height`` and ``width``."""
    cv2 = require("cv2")
    with _one_thread(cv2):
        flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST).calc(first, second, None)
        factor = first.shape[0] // height
        return flow if factor == 1 else cv2.resize(flow, (width, height), interpolation=cv2.INTER_AREA) / factor


@contextmanager
def _one_thread(cv2: Any) -> Iterator[None]:  # noqa: ANN401 - a module imported on use
    """Compute on one thread (frames this small lose by sharing) and restore the caller's setting."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)
