"""Wan 2.1 and 2.2 14B, image to video (diffusers' ``WanImageToVideoPipeline``).

The denoiser is that of text to video; the image arrives in the condition. Its latents, followed by those of grey frames
and preceded by a mask of what is given, are concatenated to the noisy ones on the channels. The transformer of Wan 2.1
is given CLIP features of the image besides. A prompt is ``{"prompt": text, "image": PIL image or path}``; the unguided
prompt has an empty text and the same image.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distillation.condition import TextCondition
from distillation.denoiser import Denoiser
from distillation.errors import ConditionError, MissingPartError
from distillation.families import MODEL_INDEX, Teacher, TeacherError, import_diffusers, read_json
from distillation.families.codec import FRAMES_PER_LATENT
from distillation.families.parts import PipelineParts
from distillation.families.wan import (
    FAMILY,
    LONGEST_TEXT,
    WanCodec,
    WanParts,
    WanText,
    denoiser_of,
    fitting_wan_shape,
    read_wan,
    scale_of,
    teacher_of,
)
from distillation.student import LatentShape

__all__ = ["FAMILY", "WanImageParts", "WanImageText", "latent_shape_of", "load", "load_student", "parts_of", "scale_of"]


class WanImageText(WanText):
    """Prompts with images, as the stock pipeline encodes both.

    Args:
        tokenizer: the pipeline's tokenizer.
        text_encoder: ``UMT5EncoderModel``.
        codec: encodes the image as the first frame of a video.
        latent_shape: (C, F, H, W) of the videos; images are resized to their size.
        image_encoder: ``CLIPVisionModel`` of Wan 2.1, None for Wan 2.2; put into evaluation mode and frozen.
        image_processor: its preprocessing.
        max_sequence_length: see :class:`WanText`. With CLIP features it is 512: diffusers' transformer takes exactly
            the tokens before the last 512 for the image's.
        image_cache_size: images whose tensors are kept (on the CPU).

    Raises:
        ConditionError: another length than 512 beside CLIP features.
    """

    def __init__(
        self,
        tokenizer: Any,  # noqa: ANN401 - any transformers tokenizer
        text_encoder: nn.Module,
        *,
        codec: WanCodec,
        latent_shape: LatentShape,
        image_encoder: nn.Module | None = None,
        image_processor: Any = None,  # noqa: ANN401 - any transformers image processor
        max_sequence_length: int | None = None,
        image_cache_size: int = 16,
    ) -> None:
        if image_encoder is not None:
            max_sequence_length = max_sequence_length or LONGEST_TEXT
            if max_sequence_length != LONGEST_TEXT:
                raise ConditionError(
                    f"max_sequence_length must be {LONGEST_TEXT} beside image features; got {max_sequence_length}"
                )
            image_encoder.eval().requires_grad_(False)
        super().__init__(tokenizer, text_encoder, max_sequence_length=max_sequence_length)
        self.codec, self.latent_shape = codec, latent_shape
        self.image_encoder: Any = image_encoder
        self.image_processor = image_processor
        self.image_cache_size = image_cache_size
        self._images: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def __call__(self, prompts: Sequence[Any]) -> TextCondition:
        """Return text embeddings, ``image_latents`` [B, 4 + C, F, H, W] and, for Wan 2.1, ``image_embeds`` [B, N, D].

        Raises:
            ConditionError: a prompt has no text under "prompt", or no image under "image".
        """
        condition = super().__call__(prompts)
        images = [self._image(image_of(prompt)) for prompt in prompts]
        device = condition.embeddings.device
        extra = {name: torch.stack([image[name] for image in images]).to(device) for name in images[0]}
        return TextCondition(condition.embeddings, extra)

    @torch.no_grad()
    def _image(self, image: Any) -> dict[str, Tensor]:  # noqa: ANN401 - a PIL image
        key = hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()
        if key in self._images:
            self._images.move_to_end(key)
            return self._images[key]
        made = {"image_latents": self._latents(image)}
        if self.image_encoder is not None:
            pixels = self.image_processor(images=image, return_tensors="pt").pixel_values
            pixels = pixels.to(self.image_encoder.device, self.image_encoder.dtype)
            states = self.image_encoder(pixels, output_hidden_states=True).hidden_states[-2]
            made["image_embeds"] = states[0].cpu()
        self._images[key] = made
        while len(self._images) > self.image_cache_size:
            self._images.popitem(last=False)
        return made

    def _latents(self, image: Any) -> Tensor:  # noqa: ANN401 - a PIL image
        """Return [4 + C, F, H, W]: ones where a frame is given, then the latents of the image before grey frames."""
        import_diffusers()
        from diffusers.video_processor import VideoProcessor

        frames, height, width = self.codec.video_size(self.latent_shape)
        first = VideoProcessor(vae_scale_factor=self.codec.scale).preprocess(image, height=height, width=width)
        video = torch.full((1, frames, 3, height, width), 0.5)
        video[:, 0] = first.float() / 2 + 0.5
        latents = self.codec.encode(video).cpu()
        mask = latents.new_zeros(1, FRAMES_PER_LATENT, *latents.shape[2:])
        mask[:, :, 0] = 1
        return torch.cat([mask, latents], dim=1)[0]


def image_of(prompt: Any) -> Any:  # noqa: ANN401 - a PIL image
    """Return the image of a prompt in RGB and upright, as diffusers' ``load_image`` does; opened if it is a path.

    Raises:
        ConditionError: there is none, or it cannot be opened.
    """
    from PIL import Image, ImageOps

    image = prompt.get("image") if isinstance(prompt, dict) else None
    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image).convert("RGB")
    if not isinstance(image, str | Path):
        raise ConditionError(
            "a prompt of an image-to-video model is a mapping with a text under 'prompt' and a PIL image or a path "
            f"under 'image'; got {prompt!r}"
        )
    try:
        with Image.open(image) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except OSError as error:
        raise ConditionError(f"the image {image} of a prompt cannot be opened ({error})") from error


@dataclass(frozen=True)
class WanImageParts(WanParts):
    """An image-to-video pipeline without its denoiser."""

    pipeline_class: ClassVar[str] = "WanImageToVideoPipeline"
    task: ClassVar[str] = "image-to-video"
    inputs: ClassVar[str] = "image=image, prompt=prompt"

    def components(self, denoiser: Any) -> dict[str, Any]:  # noqa: ANN401 - a WanDenoiser
        """Return the arguments of the stock pipeline's constructor except the scheduler."""
        text: Any = self.encode
        images = {"image_encoder": text.image_encoder, "image_processor": text.image_processor}
        return {**super().components(denoiser), **images}


def parts_of(components: Mapping[str, Any], *, max_sequence_length: int | None = None) -> WanParts:
    """Refuse to make the parts of a pipeline from its bare components.

    Raises:
        MissingPartError: always: images are encoded at the size of the videos, which only a folder states.
    """
    raise MissingPartError(
        f"a WanImageToVideoPipeline cannot be written from {', '.join(components)}; write it with diffusers' "
        "save_pretrained, and load it with num_frames=, height= and width="
    )


def latent_shape_of(
    folder: Path, size: tuple[int | None, int | None, int | None], stated: Sequence[int] | None
) -> LatentShape:
    """Return (C, F, H, W) of videos of ``size``, or the ``stated`` shape; C is what the transformer returns.

    Raises:
        TeacherError: see :func:`~distillation.families.parts.fitting_shape`; or the transformer does not take an image.
    """
    index, transformer = read_json(folder / MODEL_INDEX), read_json(folder / "transformer" / "config.json")
    channels = transformer.get("out_channels", 16)
    if index.get("expand_timesteps"):
        raise TeacherError(
            f"{folder} has expand_timesteps, so its image replaces the first latent frame at every step; supported are "
            "image-to-video pipelines that concatenate it (Wan 2.1 and Wan 2.2 14B)"
        )
    if transformer.get("in_channels") != 2 * channels + FRAMES_PER_LATENT:
        raise TeacherError(
            f"the transformer in {folder} takes {transformer.get('in_channels')} channels; one for image to video "
            f"takes {2 * channels + FRAMES_PER_LATENT}: latents, mask and image"
        )
    return fitting_wan_shape(folder, size, stated, channels=channels)


def load(
    folder: Path, *, device: torch.device | str, dtype: torch.dtype, latent_shape: LatentShape, sidecar: dict[str, Any]
) -> Teacher:
    """Return the pipeline in ``folder`` as a teacher; its schedule has the shift of the stored scheduler.

    Raises:
        TeacherError: see :func:`distillation.families.wan.load`.
    """
    pipeline = read_wan(folder, WanImageParts.pipeline_class, device=device, dtype=dtype)
    return teacher_of(pipeline, _parts(pipeline, latent_shape, sidecar), folder, latent_shape)


def load_student(
    folder: Path, *, device: torch.device | str, dtype: torch.dtype, sidecar: dict[str, Any]
) -> tuple[Denoiser, PipelineParts]:
    """Return the denoiser of the student in ``folder``, and the other parts of its pipeline.

    Raises:
        TeacherError: see :func:`load`.
    """
    pipeline = read_wan(folder, WanImageParts.pipeline_class, device=device, dtype=dtype)
    channels, frames, height, width = sidecar["latent_shape"]
    parts = _parts(pipeline, (channels, frames, height, width), sidecar)
    return denoiser_of(pipeline, sidecar["shift"]), parts


def _parts(pipeline: Any, latent_shape: LatentShape, sidecar: dict[str, Any]) -> WanImageParts:  # noqa: ANN401
    codec = WanCodec(pipeline.vae)
    text = WanImageText(
        pipeline.tokenizer,
        pipeline.text_encoder,
        codec=codec,
        latent_shape=latent_shape,
        image_encoder=pipeline.image_encoder,
        image_processor=pipeline.image_processor,
        max_sequence_length=sidecar.get("max_sequence_length"),
    )
    return WanImageParts(codec, text)
