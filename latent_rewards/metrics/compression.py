"""How few bytes a clip takes: the classic black-box rewards, neither of which has a gradient.

Compressibility is what DDPO (Black et al., arXiv 2305.13301) used to show reinforcement learning on a diffusion model.
A blank clip is the smallest of all; noise the largest.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from latent_rewards.contracts import ConfigError
from latent_rewards.metrics.metric import require
from latent_rewards.metrics.registry import register_metric


@register_metric(
    "compression.jpeg_size",
    version="1",
    value_range=(0, float("inf")),
    higher_is_better=False,
    requires=("cv2",),
    cheats=("grey",),
)
@dataclass(frozen=True)
class JpegSize:
    """Bytes per pixel of every frame as a JPEG file, mean over frames; ``quality`` is 1 to 100.

    The file's header counts: some 600 bytes, which is 0.6 bytes per pixel of a 32 x 32 frame.

    Raises:
        ConfigError: ``quality`` is out of range.
    """

    quality: int = 75

    def __post_init__(self) -> None:
        if not isinstance(self.quality, int) or not 1 <= self.quality <= 100:
            raise ConfigError(f"quality must be a whole number from 1 to 100; got {self.quality!r}")

    def __call__(self, videos: Tensor) -> Tensor:
        """``[B, T, C, H, W]`` in [0, 1] -> bytes per pixel ``[B]``."""
        cv2 = require("cv2")
        settings = [cv2.IMWRITE_JPEG_QUALITY, self.quality]
        pixels = _eight_bit(videos)[..., ::-1]  # OpenCV writes BGR
        sizes = [[len(cv2.imencode(".jpg", frame, settings)[1]) for frame in clip] for clip in pixels]
        return torch.tensor(sizes, dtype=torch.float32).mean(dim=1) / (videos.shape[-2] * videos.shape[-1])


@register_metric(
    "compression.h264_size",
    version="1",
    value_range=(0, float("inf")),
    higher_is_better=False,
    requires=("av",),
    cheats=("still", "grey"),
)
@dataclass(frozen=True)
class H264Size:
    """Bytes per pixel and frame of the clip as an H.264 stream at constant rate factor ``crf`` (0 to 51).

    Encoded in memory by libx264 through PyAV as yuv420p, without a container; the stream's headers count, some 900
    bytes in all. One thread and no look-ahead: with either, the size of a small clip differs from run to run. yuv420p
    holds even sizes only: an odd one is padded by repeating its border, which is not counted as pixels.

    Raises:
        ConfigError: ``crf`` is out of range.
    """

    crf: int = 23

    def __post_init__(self) -> None:
        if not isinstance(self.crf, int) or not 0 <= self.crf <= 51:
            raise ConfigError(f"crf must be a whole number from 0 to 51; got {self.crf!r}")

    def __call__(self, videos: Tensor) -> Tensor:
        """``[B, T, C, H, W]`` in [0, 1] -> bytes per pixel and frame ``[B]``."""
        av = require("av")
        padding = ((0, 0), (0, videos.shape[-2] % 2), (0, videos.shape[-1] % 2), (0, 0))
        sizes = []
        for pixels in _eight_bit(videos):
            clip = np.ascontiguousarray(np.pad(pixels, padding, mode="edge"))
            codec = av.CodecContext.create("libx264", "w")
            codec.height, codec.width, codec.pix_fmt = clip.shape[1], clip.shape[2], "yuv420p"
            codec.time_base, codec.thread_count = Fraction(1, 8), 1
            codec.options = {"crf": str(self.crf), "tune": "zerolatency"}
            frames = [av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p") for frame in clip]
            sizes.append(sum(packet.size for frame in [*frames, None] for packet in codec.encode(frame)))
        return torch.tensor(sizes, dtype=torch.float32) / (videos.shape[1] * videos.shape[-2] * videos.shape[-1])


def _eight_bit(videos: Tensor) -> np.ndarray:
    """``[B, T, C, H, W]`` in [0, 1] -> uint8 RGB ``[B, T, H, W, 3]``."""
    levels = (255 * videos).round().to(torch.uint8).expand(-1, -1, 3, -1, -1)
    return np.ascontiguousarray(levels.permute(0, 1, 3, 4, 2).cpu().numpy())
