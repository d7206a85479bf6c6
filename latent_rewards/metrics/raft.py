"""VBench's dynamic degree: does a clip move, by RAFT's optical flow?

RAFT (Teed and Deng, arXiv 2003.12039) is torchvision's port, with the weights of the original authors that VBench
(Huang et al., arXiv 2311.17982) uses. Every clip that moves scores 1, noise included: weigh it against a metric of
consistency. `motion.dynamic_degree` asks the same of a flow that needs no weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from latent_rewards.contracts import ConfigError, unknown_name
from latent_rewards.metrics.metric import require
from latent_rewards.metrics.motion import moves, sampling_stride, top_magnitude
from latent_rewards.metrics.registry import register_metric
from latent_rewards.metrics.weights import WeightsFile, load_weights

_CONVERT = "Read the .pth with torch.load(path, weights_only=True) and write it with safetensors.torch.save_file."
RAFT_FILES = {
    "raft_large": WeightsFile(
        "raft_large_C_T_V1.safetensors",
        "torchvision, Raft_Large_Weights.C_T_V1 (raft_large_C_T_V1-22a6c225.pth)",
        21,
        licence="BSD-3-Clause",
        note=_CONVERT,
    ),
    "raft_small": WeightsFile(
        "raft_small_C_T_V1.safetensors",
        "torchvision, Raft_Small_Weights.C_T_V1 (raft_small_C_T_V1-ad48884c.pth)",
        4,
        licence="BSD-3-Clause",
        note=_CONVERT,
    ),
}
"""torchvision's builder -> the original authors' weights (raft-things and raft-small) in torchvision's layout."""

UPDATES = 20
SMALLEST_SIDE = 121
"""Pixels of the shorter side; it is padded to 128, below which RAFT's correlation pyramid has no fourth level."""


@dataclass(frozen=True)
class RaftDynamicDegree:
    """Whether clips move by the flow of ``network``, sampled every ``stride`` frames.

    Attributes:
        network: torchvision's RAFT.
        stride: frames from one sampled frame to the next.
        device: where the network is.
    """

    network: nn.Module
    stride: int
    device: torch.device

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> Tensor:
        """``[B, T, C, H, W]`` in [0, 1] -> 0 or 1 ``[B]``."""
        return torch.tensor([float(self._moves(video[:: self.stride])) for video in videos])

    def _moves(self, video: Tensor) -> bool:
        frames = enlarged(video)
        return moves(self._magnitudes(frames), frames=len(frames), shorter_side=min(frames.shape[-2:]))

    def _magnitudes(self, frames: Tensor) -> Iterator[float]:
        # One pair at a time, as the correlation of a pair alone takes 5.3 (H W/64)^2 bytes: 0.2 GB at 480 x 832.
        for index in range(len(frames) - 1):
            flow = raft_flow(self.network, frames[index : index + 2].to(self.device))
            yield top_magnitude(flow.permute(1, 2, 0).cpu().numpy())


@register_metric(
    "vbench.dynamic_degree",
    version="1",
    value_range=(0, 1),
    minimum_frames=2,
    needs_fps=True,
    description="VBench's dynamic degree: 1 for a clip that moves by RAFT's optical flow, 0 for one that does not",
    licence="BSD-3-Clause (RAFT's weights)",
    weights=(RAFT_FILES["raft_large"],),
    cheats=("noise",),
)
def dynamic_degree(
    *, fps: float = 8.0, weights: str | Path | None = None, device: str = "cpu", model: str = "raft_large"
) -> RaftDynamicDegree:
    """Make VBench's dynamic degree.

    Frames are sampled to about 8 per second of ``fps``. A pair of them counts if the mean of the largest 5 % of its
    flow magnitudes (of the padded frames, as VBench takes it) exceeds 6 min(H, W)/256 pixels, and a clip of T sampled
    frames moves if at least round(4 T/16) pairs count: so a clip of two always moves, and a single one never does.
    Frames with a side below :data:`SMALLEST_SIDE`, which VBench cannot score, are enlarged by a whole factor first.

    Args:
        fps: frames per second of the videos.
        weights: file or folder of the file in :data:`RAFT_FILES`; see :meth:`WeightsFile.locate`.
        device: the network runs on.
        model: torchvision's "raft_large", which is VBench's, or "raft_small", which is a third of its cost.

    Raises:
        DataError: the weights are missing or do not fit the network.
        ConfigError: another model, or ``fps`` is not positive.
    """
    if model not in RAFT_FILES:
        raise ConfigError(unknown_name("model of metric 'vbench.dynamic_degree':", model, RAFT_FILES))
    stride = sampling_stride(fps)
    tensors = RAFT_FILES[model].read(weights)
    network = raft_network(model)
    # Batch normalisation's count of steps is used in training only, and not every file has it.
    counts = {name: value for name, value in network.state_dict().items() if name.endswith("num_batches_tracked")}
    load_weights(network, counts | tensors, name=RAFT_FILES[model].name)
    return RaftDynamicDegree(network.to(device), stride, torch.device(device))


def raft_network(model: str) -> nn.Module:
    """Return torchvision's RAFT of that name, untrained."""
    from latent_rewards.training.torchvision_guard import mend_torchvision  # slow to import, and needed only here

    mend_torchvision()
    made: nn.Module = getattr(require("torchvision.models.optical_flow"), model)(weights=None, progress=False)
    return made


def raft_flow(network: nn.Module, pair: Tensor) -> Tensor:
    """Return the optical flow from one frame to the next after 20 updates.

    Args:
        network: torchvision's RAFT.
        pair: ``[2, 3, H, W]`` in [0, 1]; it is padded to multiples of 8 by repeating its border, as much on the left as
            on the right.

    Returns:
        ``[2, H', W']``, (x, y) in pixels, of the padded frames.
    """
    bottom, right = (-side % 8 for side in pair.shape[-2:])
    edges = (right // 2, right - right // 2, bottom // 2, bottom - bottom // 2)
    first, second = functional.pad(2 * pair - 1, edges, mode="replicate").split(1)
    flow: Tensor = network(first, second, num_flow_updates=UPDATES)[-1][0]
    return flow


def enlarged(video: Tensor) -> Tensor:
    """Return a clip as RAFT can take it.

    Args:
        video: ``[T, C, H, W]`` in [0, 1], C of 1 or 3.

    Returns:
        ``[T, 3, k H, k W]`` in [0, 1], with the least whole k that brings the shorter side to :data:`SMALLEST_SIDE`.
    """
    video = video.expand(-1, 3, -1, -1)
    factor = -(-SMALLEST_SIDE // min(video.shape[-2:]))
    if factor == 1:
        return video
    return functional.interpolate(video, scale_factor=factor, mode="bicubic", align_corners=False).clamp(0, 1)
