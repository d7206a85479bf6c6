"""Metrics on OpenAI's CLIP: how well frames fit the prompt, and how they are liked.

The originals ran CLIP in half precision on a GPU; here it is float32 everywhere. Both are defined on images, and a
video's value is the mean over its frames.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from latent_rewards.metrics.registry import register_metric
from latent_rewards.metrics.towers import load_tower
from latent_rewards.metrics.weights import WeightsFile, load_weights

_SAVE_AS = "Save its open_clip_model.safetensors under this name; it needs a '-quickgelu' architecture."
VIT_B_32 = WeightsFile(
    "ViT-B-32-openai.safetensors", "Hugging Face, timm/vit_base_patch32_clip_224.openai", 605, "MIT", _SAVE_AS
)
VIT_L_14 = WeightsFile(
    "ViT-L-14-openai.safetensors", "Hugging Face, timm/vit_large_patch14_clip_224.openai", 1710, "MIT", _SAVE_AS
)
AESTHETIC_HEAD = WeightsFile(
    "sa_0_4_vit_l_14_linear.safetensors",
    "GitHub, LAION-AI/aesthetic-predictor",
    1,
    "MIT",
    "Save the tensors weight and bias of its sa_0_4_vit_l_14_linear.pth under this name.",
)

CLIPSCORE_WEIGHT = 2.5
"""Hessel et al.'s w, which stretches the cosines that CLIP reaches to about [0, 1]."""


@register_metric(
    "clip.score",
    version="1",
    value_range=(0, CLIPSCORE_WEIGHT),
    needs_prompt=True,
    differentiable=True,
    licence="MIT",
    weights=(VIT_B_32,),
)
class ClipScore:
    """CLIPScore (Hessel et al., arXiv 2104.08718): 2.5 max(cos, 0) of a frame and its prompt, mean over frames.

    Cosines of images and captions seldom exceed 0.4, so values seldom exceed 1. Frames are resized as Pillow does it.

    Args:
        weights: file or folder of :data:`VIT_B_32`.
        model: open_clip architecture or configuration that fits the weights; OpenAI's need one with ``quick_gelu``.
        device: to compute on.
        frames_per_batch: frames that go through CLIP at once.
        prefix: put before each prompt, the paper's by default.
        sha256: that the file of weights must have, or its beginning.

    Raises:
        DataError: the weights are missing, damaged, or of another model.
        ConfigError: an option is not what it may be.
    """

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        model: str | dict[str, Any] = "ViT-B-32-quickgelu",
        device: str = "cpu",
        frames_per_batch: int = 64,
        prefix: str = "A photo depicts ",
        sha256: str | None = None,
    ) -> None:
        self.prefix = prefix
        self.tower = load_tower(
            VIT_B_32, weights, model=model, device=device, frames_per_batch=frames_per_batch, sha256=sha256
        )

    def __call__(self, videos: Tensor, *, prompts: list[str]) -> Tensor:
        """``[B, T, C, H, W]`` in [0, 1] and B prompts -> ``[B]`` in [0, 2.5]."""
        cosines = self.tower.cosines(videos, [self.prefix + prompt for prompt in prompts])
        return (CLIPSCORE_WEIGHT * cosines.clamp(min=0)).mean(dim=1)


@register_metric("clip.aesthetic", version="1", differentiable=True, licence="MIT", weights=(VIT_L_14, AESTHETIC_HEAD))
class Aesthetic:
    """VBench's aesthetic quality: LAION's linear predictor on CLIP ViT-L/14, over 10, mean over frames.

    Good videos reach about 0.6, which VBench's tables (Huang et al., arXiv 2311.17982) show as 60. Neither it nor the
    predictor clamps anything; with the published head values cannot leave [-2.5, 3.2]. As in VBench, frames are resized
    without smoothing.

    Args:
        weights: folder of :data:`VIT_L_14` and :data:`AESTHETIC_HEAD`, or the file of the first with the second beside.
        model: open_clip architecture or configuration that fits the weights; OpenAI's need one with ``quick_gelu``.
        device: to compute on.
        frames_per_batch: frames that go through CLIP at once.
        sha256: that CLIP's file must have, or its beginning.

    Raises:
        DataError: weights are missing, damaged, or of another model.
        ConfigError: an option is not what it may be.
    """

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        model: str | dict[str, Any] = "ViT-L-14-quickgelu",
        device: str = "cpu",
        frames_per_batch: int = 32,
        sha256: str | None = None,
    ) -> None:
        beside = VIT_L_14.locate(weights).parent
        head = AESTHETIC_HEAD.read(beside)
        self.tower = load_tower(
            VIT_L_14,
            weights,
            model=model,
            device=device,
            frames_per_batch=frames_per_batch,
            sha256=sha256,
            resize="plain",
        )
        self.head = nn.Linear(self.tower.model.visual.output_dim, 1)
        load_weights(self.head, head, name=str(beside / AESTHETIC_HEAD.name))
        self.head.to(device)

    def __call__(self, videos: Tensor) -> Tensor:
        """``[B, T, C, H, W]`` in [0, 1] -> ``[B]``."""
        return self.head(self.tower.embed_videos(videos)).squeeze(-1).mean(dim=1) / 10
