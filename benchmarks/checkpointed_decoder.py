"""Wan 2.1's decoder with its activations recomputed in the backward pass; diffusers' own class has no such switch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Cache = list[Any]
"""What each causal convolution keeps of the frames before: None, the word "Rep", or a tensor."""


class CheckpointedWan(nn.Module):
    """An ``AutoencoderKLWan`` (without patches or tiles) that decodes one latent frame a checkpoint.

    Between latent frames only the causal convolutions' caches are kept, and those of every ``segment``-th alone where a
    segment is a checkpoint too; within a frame ``blocks`` may be checkpoints. Each level costs one more forward pass.
    Values and gradients are those of the VAE.

    Args:
        vae: diffusers' ``AutoencoderKLWan``.
        segment: latent frames of the outer checkpoints; 1 for no outer ones, None for about the root of all.
        blocks: whether residual blocks and resamplers are checkpoints too; replaces them in ``vae``.
    """

    def __init__(self, vae: nn.Module, *, segment: int | None = 1, blocks: bool = False) -> None:
        super().__init__()
        self.vae: Any = vae
        self.segment = segment
        if blocks:
            decoder: Any = vae.decoder
            for part in (decoder.mid_block, *decoder.up_blocks):
                for parts in (part.resnets, getattr(part, "upsamplers", None) or []):
                    for number, block in enumerate(parts):
                        parts[number] = CheckpointedBlock(block)

    @property
    def config(self) -> Any:  # noqa: ANN401 - diffusers' dictionary
        """The VAE's configuration."""
        return self.vae.config

    @property
    def dtype(self) -> torch.dtype:
        """The VAE's dtype."""
        dtype: torch.dtype = self.vae.dtype
        return dtype

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Return videos ``[B, 3, 4 F - 3, 8 H, 8 W]`` in [-1, 1] of latents ``[B, C, F, H, W]``, in a tuple."""
        self.vae.clear_cache()
        cache: Cache = [None] * len(self.vae._feat_map)
        hidden, videos = self.vae.post_quant_conv(latents), []
        segment = self.segment or math.isqrt(hidden.shape[2])
        for number, frames in enumerate(hidden.split(segment, dim=2)):
            video, cache = _recomputed(self._segment, frames, cache, number == 0)
            videos.append(video)
        return (torch.cat(videos, dim=2).clamp(-1, 1),)

    def _segment(self, frames: Tensor, cache: Cache, first: bool) -> tuple[Tensor, Cache]:
        if frames.shape[2] == 1:
            return self._frame(frames, cache, first)
        videos = []
        for number, frame in enumerate(frames.split(1, dim=2)):
            video, cache = _recomputed(self._frame, frame, cache, first and number == 0)
            videos.append(video)
        return torch.cat(videos, dim=2), cache

    def _frame(self, frame: Tensor, cache: Cache, first: bool) -> tuple[Tensor, Cache]:
        # The decoder writes into the list it is given, and a checkpoint needs its own again.
        cache = list(cache)
        video = self.vae.decoder(frame, feat_cache=cache, feat_idx=[0], first_chunk=first)
        return video, cache


class CheckpointedBlock(nn.Module):
    """A block of the decoder that is a checkpoint.

    Args:
        block: takes ``(x, feat_cache=, feat_idx=)``, and writes into both lists.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, feat_cache: Cache, feat_idx: list[int]) -> Tensor:
        """Return what the block does, and write what it writes."""
        x, feat_cache[:], feat_idx[:] = _recomputed(self._run, x, list(feat_cache), list(feat_idx))
        return x

    def _run(self, x: Tensor, cache: Cache, index: list[int]) -> tuple[Tensor, Cache, list[int]]:
        cache, index = list(cache), list(index)
        return self.block(x, feat_cache=cache, feat_idx=index), cache, index


def _recomputed(function: Any, *arguments: Any) -> Any:  # noqa: ANN401 - torch's signature
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
