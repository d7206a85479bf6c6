"""Image-text towers of the CLIP family: open_clip's models with weights from a file, frozen, in bounded parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from latent_rewards.contracts import ConfigError, unknown_name
from latent_rewards.metrics.frames import FrameTransform
from latent_rewards.metrics.weights import WeightsFile, load_weights

_CONFIG_KEYS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")


class ImageTextTower(nn.Module):
    """A frozen image-text model of open_clip's, between videos and texts on one side and unit vectors on the other.

    Args:
        config: of the model, as :func:`tower_config` returns it.
        transform: of the frames; its ``size`` is the model's.
        frames_per_batch: how many frames, or texts, go through the model at once, which bounds memory.
        clean: what is done to a text before it is split into tokens, instead of what open_clip does: mend its encoding
            (ftfy), replace HTML entities, collapse white space, lower the case.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        transform: FrameTransform,
        *,
        frames_per_batch: int,
        clean: Callable[[str], str] | None = None,
    ) -> None:
        super().__init__()
        open_clip = import_open_clip()
        self.model = open_clip.CLIP(**config)
        self.transform = transform
        self.frames_per_batch = frames_per_batch
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.model.context_length)
        if clean is not None:
            self.tokenizer.clean_fn = clean

    def embed_videos(self, videos: Tensor) -> Tensor:
        """``[B, T, C, H, W]`` in [0, 1] -> ``[B, T, D]``, one vector of length 1 for each frame."""
        device = self.model.logit_scale.device
        parts = [
            self.model.encode_image(self.transform(frames.to(device)))
            for frames in videos.flatten(0, 1).split(self.frames_per_batch)
        ]
        return normalize(torch.cat(parts), dim=-1).unflatten(0, videos.shape[:2])

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """B texts -> ``[B, D]`` of length 1; a text too long for the model is cut, and keeps its end token."""
        unique = list(dict.fromkeys(texts))
        tokens = self.tokenizer(unique).to(self.model.logit_scale.device)
        parts = [self.model.encode_text(part) for part in tokens.split(self.frames_per_batch)]
        rows = [unique.index(text) for text in texts]
        return normalize(torch.cat(parts), dim=-1)[rows]

    def cosines(self, videos: Tensor, texts: Sequence[str]) -> Tensor:
        """``[B, T, C, H, W]`` in [0, 1] and B texts -> cosine of each frame and its video's text, ``[B, T]``."""
        return (self.embed_videos(videos) * self.embed_texts(texts)[:, None]).sum(dim=-1)


def load_tower(
    file: WeightsFile,
    weights: str | Path | None,
    *,
    model: str | Mapping[str, Any],
    device: str,
    frames_per_batch: int,
    sha256: str | None = None,
    resize: str = "pillow",
    crop: str = "torchvision",
    clean: Callable[[str], str] | None = None,
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> ImageTextTower:
    """Return a tower with the weights of a file, on a device.

    Args:
        file: the one that is wanted.
        weights: where it is, see :meth:`WeightsFile.locate`.
        model: name of an open_clip architecture, or its configuration.
        device: to compute on.
        frames_per_batch: how many frames, or texts, go through the model at once.
        sha256: that the file must have, or its beginning.
        resize: how frames are resized, see :class:`FrameTransform`.
        crop: where they are cropped, see there.
        clean: what is done to texts, see :class:`ImageTextTower`.
        rename: brings the file's tensors under open_clip's names, if they have others.

    Raises:
        DataError: the file is missing, damaged, another one, or of another model.
        ConfigError: no such model or device, or ``frames_per_batch`` below 1.
    """
    if not isinstance(frames_per_batch, int) or frames_per_batch < 1:
        raise ConfigError(f"frames_per_batch must be at least 1; got {frames_per_batch!r}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used: {error}") from error
    found = file.locate(weights)
    config = tower_config(model)
    tensors = file.read(found, sha256=sha256)
    transform = FrameTransform(config["vision_cfg"].get("image_size", 224), resize, crop)
    tower = ImageTextTower(config, transform, frames_per_batch=frames_per_batch, clean=clean)
    load_weights(tower.model, rename(tensors) if rename else tensors, name=str(found))
    return tower.eval().to(device)


def tower_config(model: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of an open_clip model, by its name or given as it is.

    Raises:
        ConfigError: no architecture has that name, or the model has parts that are not open_clip's own.
    """
    open_clip = import_open_clip()
    if isinstance(model, str) and model not in open_clip.list_models():
        raise ConfigError(unknown_name("open_clip architecture", model, open_clip.list_models()))
    config = open_clip.get_model_config(model) if isinstance(model, str) else dict(model)
    foreign = sorted(set(config) - set(_CONFIG_KEYS))
    towers = [tower for key in ("vision_cfg", "text_cfg") if isinstance(tower := config.get(key), dict)]
    if len(towers) < 2:
        raise ConfigError(f"the configuration of a model has vision_cfg and text_cfg; got {sorted(config)}")
    foreign += [key for tower in towers for key in tower if re.match("hf_|timm_", key)]
    if foreign:
        raise ConfigError(
            f"model {model!r}: {', '.join(foreign)} is not supported; use a plain CLIP of open_clip's, such as "
            "'ViT-L-14-quickgelu', or a configuration with embed_dim, vision_cfg, text_cfg and quick_gelu only"
        )
    return config


def import_open_clip() -> ModuleType:
    """Return the module ``open_clip``, imported on first use, for it takes seconds."""
    from latent_rewards.training.torchvision_guard import mend_torchvision

    mend_torchvision()
    import open_clip

    return open_clip
