"""VBench's subject and background consistency: do the frames of a clip resemble one another?

Each frame is compared, by the cosine between features of a vision transformer, with the frame before it and with the
first (Huang et al., arXiv 2311.17982): DINO's (Caron et al., arXiv 2104.14294) for the subject, CLIP's (Radford et al.,
arXiv 2103.00020) for the background. A still clip scores 1: weigh these against a metric of motion.

Two things differ from VBench's own runs. DINO's frames are not rounded to 8 bits first, and CLIP runs in float32, where
OpenAI's loader takes half precision on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from latent_rewards.contracts import ConfigError, DataError, unknown_name
from latent_rewards.metrics.clip import VIT_B_32
from latent_rewards.metrics.frames import FrameTransform
from latent_rewards.metrics.metric import require
from latent_rewards.metrics.registry import register_metric
from latent_rewards.metrics.weights import WeightsFile, load_weights

DINO_FILE = WeightsFile(
    "dino_vitbase16_pretrain.safetensors",
    "GitHub, facebookresearch/dino (dino_vitbase16_pretrain.pth)",
    343,
    licence="Apache-2.0",
    note="Read the .pth with torch.load(path, weights_only=True) and write it with safetensors.torch.save_file.",
)
DINO_SIZES = {"width": 768, "depth": 12, "heads": 12}
CLIP_SIZES = {"width": 768, "depth": 12, "heads": 12, "output": 512}
"""Of the published networks (ViT-B/16 and ViT-B/32)."""

IMAGE_SIZE = 224
FRAMES_AT_ONCE = 16
"""Frames go through the network in chunks of this many, which bounds its memory whatever the batch."""

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Consistency:
    """:func:`frame_consistency` of the features of a network.

    Attributes:
        network: what ``features`` calls.
        features: ``(network, frames [N, 3, H, W] in [0, 1])`` -> ``[N, D]``.
        device: where the network is.
    """

    network: nn.Module
    features: Callable[[nn.Module, Tensor], Tensor]
    device: torch.device

    def __call__(self, videos: Tensor) -> Tensor:
        """``[B, T, C, H, W]`` in [0, 1] -> ``[B]`` in [0, 1]; differentiable."""
        frames = videos.flatten(0, 1).expand(-1, 3, -1, -1)
        found = [self.features(self.network, chunk.to(self.device)) for chunk in frames.split(FRAMES_AT_ONCE)]
        return frame_consistency(torch.cat(found).unflatten(0, videos.shape[:2]))


def frame_consistency(features: Tensor) -> Tensor:
    """Return VBench's consistency of a clip's frames.

    Mean over the frames from the second on of (max(0, cos to the frame before) + max(0, cos to the first frame))/2.
    It is a clip's own value in VBench's results. VBench's totals of background consistency, and of subject consistency
    in a single process, are means over all frames of all clips, so that a clip counts by its length; they equal the
    mean of these values when all clips are equally long.

    Args:
        features: ``[..., T, D]``, T at least 2.

    Returns:
        ``[...]`` in [0, 1].

    Raises:
        DataError: fewer than two frames.
    """
    if features.ndim < 2 or features.shape[-2] < 2:
        raise DataError(f"consistency compares at least 2 frames [..., T, D]; got shape {tuple(features.shape)}")
    unit = functional.normalize(features, dim=-1)
    later = unit[..., 1:, :]
    previous = functional.cosine_similarity(unit[..., :-1, :], later, dim=-1)
    first = functional.cosine_similarity(unit[..., :1, :], later, dim=-1)
    return ((previous.clamp(0, 1) + first.clamp(0, 1)) / 2).mean(dim=-1)


@register_metric(
    "vbench.subject_consistency",
    version="1",
    value_range=(0, 1),
    minimum_frames=2,
    differentiable=True,
    description="VBench's subject consistency: cosine of DINO features to the previous and the first frame; 1 is still",
    licence="Apache-2.0 (DINO's weights)",
    weights=(DINO_FILE,),
    cheats=("still", "grey"),
)
def subject_consistency(
    *, weights: str | Path | None = None, device: str = "cpu", model: Mapping[str, int] | None = None
) -> Consistency:
    """Make VBench's subject consistency: :func:`frame_consistency` of DINO ViT-B/16 features.

    Args:
        weights: file or folder of :data:`DINO_FILE`; see :meth:`WeightsFile.locate`.
        device: the network runs on.
        model: sizes that differ from :data:`DINO_SIZES`, for weights of another network.

    Raises:
        DataError: the weights are missing or do not fit the network.
        ConfigError: an unknown size.
    """
    sizes = _sizes(model, DINO_SIZES)
    tensors = DINO_FILE.read(weights)
    network = dino_network(**sizes)
    load_weights(network, tensors, name=DINO_FILE.name)
    return Consistency(network.to(device), dino_features, torch.device(device))


@register_metric(
    "vbench.background_consistency",
    version="1",
    value_range=(0, 1),
    minimum_frames=2,
    differentiable=True,
    description="VBench's background consistency: cosine of CLIP features to the previous and first frame; 1 is still",
    licence="MIT (CLIP's weights)",
    weights=(VIT_B_32,),
    cheats=("still", "grey"),
)
def background_consistency(
    *, weights: str | Path | None = None, device: str = "cpu", model: Mapping[str, int] | None = None
) -> Consistency:
    """Make VBench's background consistency: :func:`frame_consistency` of CLIP ViT-B/32 image features.

    Args:
        weights: file or folder of :data:`VIT_B_32`; see :meth:`WeightsFile.locate`. Only its tensors ``visual.*`` are
            taken.
        device: the network runs on.
        model: sizes that differ from :data:`CLIP_SIZES`, for weights of another network.

    Raises:
        DataError: the weights are missing or do not fit the network.
        ConfigError: an unknown size.
    """
    sizes = _sizes(model, CLIP_SIZES)
    tensors = VIT_B_32.read(weights)
    network = clip_image_network(**sizes)
    prefix = "visual."
    image_tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    load_weights(network, image_tensors, name=VIT_B_32.name)
    return Consistency(network.to(device), clip_image_features, torch.device(device))


def dino_network(*, width: int, depth: int, heads: int) -> nn.Module:
    """Return DINO's vision transformer with 16-pixel patches, untrained; its tensors have the published names."""
    _mend_torchvision()
    made: nn.Module = require("timm.models.vision_transformer").VisionTransformer(
        img_size=IMAGE_SIZE, patch_size=16, embed_dim=width, depth=depth, num_heads=heads, num_classes=0
    )
    return made


def dino_features(network: nn.Module, frames: Tensor) -> Tensor:
    """Return DINO's class token of frames, prepared as VBench does.

    The shorter side becomes 224 pixels (bilinear, no antialiasing) and nothing is cropped, so frames that are not
    square have their position embedding interpolated.

    Args:
        network: of :func:`dino_network`.
        frames: ``[N, 3, H, W]`` in [0, 1].

    Returns:
        ``[N, D]``.
    """
    images = _normalised(_resized(frames))
    patches = network.get_submodule("patch_embed.proj")(images).flatten(2).transpose(1, 2)
    position = _dino_position(network.get_parameter("pos_embed"), *images.shape[-2:])
    tokens = torch.cat([network.get_parameter("cls_token").expand(len(frames), -1, -1), patches], dim=1) + position
    found: Tensor = network.get_submodule("norm")(network.get_submodule("blocks")(tokens))[:, 0]
    return found


def _dino_position(embedding: Tensor, height: int, width: int, patch: int = 16) -> Tensor:
    """Return the position embedding ``[1, 1 + N, D]`` for another image size, as DINO interpolates it."""
    count = embedding.shape[1] - 1
    rows, columns = height // patch, width // patch
    if rows * columns == count and height == width:
        return embedding
    side = int(count**0.5)
    grid = embedding[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    # DINO adds 0.1 against rounding and samples at that scale, which moves every value a little.
    scale = ((rows + 0.1) / side, (columns + 0.1) / side)
    grid = functional.interpolate(grid, scale_factor=scale, mode="bicubic")
    return torch.cat([embedding[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def clip_image_network(*, width: int, depth: int, heads: int, output: int) -> nn.Module:
    """Return CLIP's image tower with 32-pixel patches, untrained; its tensors have OpenAI's and open_clip's names."""
    _mend_torchvision()
    transformer = require("open_clip.transformer")
    made: nn.Module = transformer.VisionTransformer(
        image_size=IMAGE_SIZE,
        patch_size=32,
        width=width,
        layers=depth,
        heads=heads,
        mlp_ratio=4.0,
        output_dim=output,
        act_layer=transformer.QuickGELU,
    )
    return made


def clip_image_features(network: nn.Module, frames: Tensor) -> Tensor:
    """Return CLIP's image features, of frames prepared as VBench does.

    The shorter side becomes 224 pixels without smoothing, then the middle 224 x 224 are cut out.

    Args:
        network: of :func:`clip_image_network`.
        frames: ``[N, 3, H, W]`` in [0, 1].

    Returns:
        ``[N, D]``, not normalised.
    """
    found: Tensor = network(FrameTransform(IMAGE_SIZE, resize="plain")(frames))
    return found


def _resized(frames: Tensor) -> Tensor:
    """Bring the shorter side to 224 pixels; the longer side is rounded down."""
    height, width = frames.shape[-2:]
    shorter, longer = min(height, width), IMAGE_SIZE * max(height, width) // min(height, width)
    size = (IMAGE_SIZE, longer) if height == shorter else (longer, IMAGE_SIZE)
    return functional.interpolate(frames, size=size, mode="bilinear", align_corners=False)


def _normalised(images: Tensor) -> Tensor:
    mean, std = (images.new_tensor(values)[:, None, None] for values in _IMAGENET)
    return (images - mean) / std


def _sizes(changed: Mapping[str, int] | None, published: Mapping[str, int]) -> dict[str, int]:
    for name in changed or {}:
        if name not in published:
            raise ConfigError(unknown_name("size of `model`:", name, published))
    return {**published, **(changed or {})}


def _mend_torchvision() -> None:
    from latent_rewards.training.torchvision_guard import mend_torchvision  # slow to import, and needed only here

    mend_torchvision()
