"""Metrics that were trained on people's choices between images of one prompt: HPS v2.1 and PickScore.

Both are defined on images, and a video's value is the mean over its frames. Only differences between videos of the same
prompt mean something. The originals' half precision on a GPU is float32 here.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latent_rewards.metrics.registry import register_metric
from latent_rewards.metrics.towers import load_tower
from latent_rewards.metrics.weights import WeightsFile

HPS_V2_1 = WeightsFile(
    "HPS_v2.1_compressed.safetensors",
    "Hugging Face, xswu/HPSv2",
    1970,
    "Apache-2.0",
    "Save the tensors in the entry 'state_dict' of its HPS_v2.1_compressed.pt under this name.",
)
PICKSCORE_V1 = WeightsFile(
    "PickScore_v1.safetensors",
    "Hugging Face, yuvalkirstain/PickScore_v1",
    3940,
    "code under MIT",
    "Save its model.safetensors under this name.",
)


@register_metric(
    "preference.hps",
    version="1",
    value_range=(-1, 1),
    needs_prompt=True,
    differentiable=True,
    licence="Apache-2.0",
    weights=(HPS_V2_1,),
)
class HumanPreference:
    """HPS v2.1 (Wu et al., arXiv 2306.09341): cosine of a frame and its prompt in a ViT-H/14, mean over frames.

    Its authors' tables show 100 times this: 14 to 33 for the image generators of 2023. Their code leaves it to
    torchvision whether an image is smoothed while it shrinks: versions before 0.17 do not, later ones do.

    Args:
        weights: file or folder of :data:`HPS_V2_1`.
        model: open_clip architecture or configuration that fits the weights.
        device: to compute on.
        frames_per_batch: frames that go through the model at once.
        antialias: smooth frames while they shrink.
        sha256: that the file of weights must have, or its beginning.

    Raises:
        DataError: the weights are missing, damaged, or of another model.
        ConfigError: an option is not what it may be.
    """

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        model: str | dict[str, Any] = "ViT-H-14",
        device: str = "cpu",
        frames_per_batch: int = 16,
        antialias: bool = True,
        sha256: str | None = None,
    ) -> None:
        self.tower = load_tower(
            HPS_V2_1,
            weights,
            model=model,
            device=device,
            frames_per_batch=frames_per_batch,
            sha256=sha256,
            resize="antialias" if antialias else "plain",
        )

    def __call__(self, videos: Tensor, *, prompts: list[str]) -> Tensor:
        """``[B, T, C, H, W]`` in [0, 1] and B prompts -> ``[B]`` in [-1, 1]."""
        return self.tower.cosines(videos, prompts).mean(dim=1)


@register_metric(
    "preference.pickscore",
    version="1",
    needs_prompt=True,
    differentiable=True,
    licence="code under MIT",
    weights=(PICKSCORE_V1,),
)
class PickScore:
    """PickScore v1 (Kirstain et al., arXiv 2305.01569): exp(logit_scale) cos of frame and prompt, mean over frames.

    The published scale is about 100. Frames and prompts are prepared as transformers 4.27 does it, which is
    what the authors pin: Pillow's resizing, and prompts in lower case whose encoding is not mended.

    Args:
        weights: file or folder of :data:`PICKSCORE_V1`, under transformers' names.
        model: open_clip architecture or configuration that fits the weights.
        device: to compute on.
        frames_per_batch: frames that go through the model at once.
        sha256: that the file of weights must have, or its beginning.

    Raises:
        DataError: the weights are missing, damaged, or of another model.
        ConfigError: an option is not what it may be.
    """

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        model: str | dict[str, Any] = "ViT-H-14",
        device: str = "cpu",
        frames_per_batch: int = 16,
        sha256: str | None = None,
    ) -> None:
        self.tower = load_tower(
            PICKSCORE_V1,
            weights,
            model=model,
            device=device,
            frames_per_batch=frames_per_batch,
            sha256=sha256,
            crop="transformers",
            clean=clean_as_transformers,
            rename=rename_from_transformers,
        )

    def __call__(self, videos: Tensor, *, prompts: list[str]) -> Tensor:
        """``[B, T, C, H, W]`` in [0, 1] and B prompts -> ``[B]``."""
        return self.tower.model.logit_scale.exp() * self.tower.cosines(videos, prompts).mean(dim=1)


def clean_as_transformers(text: str) -> str:
    """Return a text as transformers' fast CLIP tokenizer normalises it: NFC, single spaces, lower case.

    Unlike open_clip and OpenAI it keeps curly quotes, mis-decoded letters and HTML entities as they are. Each letter is
    lowered by itself, so that a final sigma is like any other.
    """
    composed = re.sub(r"\s+", " ", unicodedata.normalize("NFC", text))
    return "".join(letter.lower() for letter in composed)


_RENAMED = (
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    # The missing letter is in the published names.
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"\.self_attn\.", ".attn."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
_TRANSPOSED = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}


def rename_from_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of transformers' ``CLIPModel`` under the names and in the shapes of open_clip's ``CLIP``.

    Projections are transposed, queries, keys and values stacked, and the counters ``position_ids`` that older versions
    stored left out. A name that is not known is kept, for the comparison with the model to report.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".position_ids"):
            continue
        if name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = tensor.T
            continue
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    for first in [name for name in renamed if re.search(r"\.attn\.q_proj\.(weight|bias)$", name)]:
        parts = [first.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
        if all(part in renamed for part in parts):
            stacked = torch.cat([renamed.pop(part) for part in parts])
            renamed[first.replace(".q_proj.", ".in_proj_")] = stacked
    return renamed
