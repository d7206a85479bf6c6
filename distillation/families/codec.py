"""A diffusers video VAE as a codec: normalised latents <-> videos in [0, 1], and the name of the latent space.

Every family's VAE is causal: the first frame becomes one latent frame and every further four become another. Families
differ in how their latents are scaled and in which lengths their VAE takes without dropping or inventing frames.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distillation.errors import DistillationError
from distillation.fingerprints import add_weights
from distillation.student import LatentShape

FRAMES_PER_LATENT = 4


class CodecError(DistillationError, ValueError):
    """Videos or latents of a shape the VAE does not take."""


class VideoCodec:
    """A frozen, deterministic codec; a family says how its latents are scaled.

    Decoding is differentiable in the latents; call it under ``torch.no_grad()`` where no gradient is wanted, or the
    graph of every chunk is kept.

    Args:
        vae: the family's diffusers VAE; it is put into evaluation mode, frozen, and on a CPU its convolution weights
            are laid out channels last (in float32 measured 1.5 to 3 times as fast).
        chunk_size: samples encoded or decoded at once.

    Attributes:
        family: name of the family; begins the fingerprint.
        frame_period: videos have a multiple of this many frames and one more.

    Raises:
        CodecError: ``chunk_size`` is less than 1.
    """

    family: ClassVar[str]
    frame_period: ClassVar[int] = FRAMES_PER_LATENT

    def __init__(self, vae: nn.Module, *, chunk_size: int = 8) -> None:
        if chunk_size < 1:
            raise CodecError(f"chunk_size must be at least 1; got {chunk_size}")
        self.vae: Any = vae.eval().requires_grad_(False)
        self.chunk_size = chunk_size
        self._config: Any = self.vae.config
        for weight in self.vae.parameters():
            # module.to(memory_format=...) refuses modules that also hold weights of another rank.
            if weight.ndim == 5 and weight.device.type == "cpu":
                weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)

    @property
    def channels(self) -> int:
        """C of the latents."""
        raise NotImplementedError

    @property
    def scale(self) -> int:
        """Pixels a latent spans in height and in width."""
        raise NotImplementedError

    def scaling(self) -> tuple[Tensor, Tensor]:
        """Return mean and std that turn latents into the VAE's own, ``latents * std + mean``; on its device."""
        raise NotImplementedError

    def to(self, device: torch.device | str) -> VideoCodec:
        """Move the VAE to ``device`` and return the codec."""
        self.vae.to(device)
        return self

    @cached_property
    def fingerprint(self) -> str:
        """Family and sha256 of the configuration, the scaling and the weights rounded to bfloat16.

        The rounding makes the fingerprint of a VAE that was stored in bfloat16 equal to that of the original.
        """
        settings = {key: value for key, value in dict(self._config).items() if not key.startswith("_")}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        add_weights(digest, self.vae.state_dict())
        return f"{self.family}-vae-{digest.hexdigest()[:32]}"

    def video_size(self, latent_shape: LatentShape) -> tuple[int, int, int]:
        """Return frames, height and width, in pixels, of a video with latents (C, F, H, W)."""
        return video_size(latent_shape, self.scale)

    def decode(self, latents: Tensor) -> Tensor:
        """Return videos float32 [B, T, 3, H', W'] in [0, 1] of latents [B, C, F, H, W], with T = 4 F - 3.

        Raises:
            CodecError: the latents are not [B, C, F, H, W] with the VAE's number of channels, or the VAE would make
                another number of frames of them.
        """
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise CodecError(f"latents must be [B, {self.channels}, F, H, W] for this VAE; got {list(latents.shape)}")
        if FRAMES_PER_LATENT * (latents.shape[2] - 1) % self.frame_period:
            step = self.frame_period // FRAMES_PER_LATENT
            raise CodecError(
                f"this VAE decodes {step} n + 1 latent frames without inventing any; got {latents.shape[2]}"
            )
        return torch.cat([self._decode_chunk(chunk) for chunk in latents.split(self.chunk_size)])

    def encode(self, videos: Tensor) -> Tensor:
        """Return latents float32 [B, C, F, H, W], the posterior's mode, of videos [B, T, 3, H', W'] in [0, 1].

        Raises:
            CodecError: the videos are not [B, T, 3, H', W'], T is not 1 more than a multiple of ``frame_period`` (the
                VAE would drop or invent frames without a word), or a side is not a multiple of the VAE's scale.
        """
        if videos.ndim != 5 or videos.shape[2] != 3:
            raise CodecError(f"videos must be [B, T, 3, H, W] in [0, 1]; got {list(videos.shape)}")
        frames, height, width = videos.shape[1], *videos.shape[3:]
        if frames % self.frame_period != 1 or height % self.scale or width % self.scale:
            raise CodecError(
                f"this VAE takes {self.frame_period} n + 1 frames and sides that are multiples of {self.scale}; got "
                f"{frames} frames of {height} x {width}: cut or pad the videos"
            )
        return torch.cat([self._encode_chunk(chunk) for chunk in videos.split(self.chunk_size)])

    def _decode_chunk(self, latents: Tensor) -> Tensor:
        mean, std = self.scaling()
        unscaled = latents.to(mean.device, torch.float32) * std + mean
        video = self.vae.decode(unscaled.to(self.vae.dtype), return_dict=False)[0].float()
        return (video * 0.5 + 0.5).clamp(0, 1).transpose(1, 2)

    def _encode_chunk(self, videos: Tensor) -> Tensor:
        mean, std = self.scaling()
        pixels = videos.to(mean.device, torch.float32).transpose(1, 2) * 2 - 1
        posterior = self.vae.encode(pixels.to(self.vae.dtype), return_dict=False)[0]
        return (posterior.mode().float() - mean) / std


def video_size(latent_shape: Sequence[int], scale: int) -> tuple[int, int, int]:
    """Return frames, height and width, in pixels, of a video with latents (C, F, H, W) that span ``scale`` pixels."""
    _, frames, height, width = latent_shape
    return FRAMES_PER_LATENT * (frames - 1) + 1, height * scale, width * scale
