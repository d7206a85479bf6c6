"""Sizes of Wan transformers that :mod:`benchmarks.roles` measures, from the moving digits' to Wan 2.1 14B."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distillation.condition import TextCondition
from latent_rewards.training.randomness import sample_noise


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make tensors of a dtype where none is named."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Size:
    """A Wan transformer and what it reads.

    Attributes:
        num_layers: blocks.
        num_heads: of attention.
        head_dim: channels of a head.
        ffn_dim: width of the blocks' feed-forward part.
        text: tokens and channels of a prompt's embedding.
        latents: (C, F, H, W).
        batch_size: samples of an update.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    text: tuple[int, int]
    latents: tuple[int, int, int, int]
    batch_size: int = 1

    @property
    def tokens(self) -> int:
        """How many the transformer reads of a sample."""
        _, frames, height, width = self.latents
        return frames * (height // 2) * (width // 2)

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the transformer, with the random weights of a seed, in ``dtype`` but for what is to be in float32."""
        from distillation.families import import_diffusers
        from distillation.families.parts import kept_in_float32

        with torch.random.fork_rng(), default_dtype(dtype):
            torch.manual_seed(0)
            network: nn.Module = import_diffusers().WanTransformer3DModel(
                num_layers=self.num_layers,
                num_attention_heads=self.num_heads,
                attention_head_dim=self.head_dim,
                ffn_dim=self.ffn_dim,
                text_dim=self.text[1],
                in_channels=self.latents[0],
                out_channels=self.latents[0],
            )
        for name, parameter in network.named_parameters():
            if kept_in_float32(network, name):
                parameter.data = parameter.data.float()
        return network

    def texts(self, prompts: Sequence[Any]) -> TextCondition:
        """Return made-up embeddings [B, L, D]; an encoder has no part in an update."""
        return TextCondition(sample_noise(0, "roles/text", 0, [len(prompt) for prompt in prompts], self.text))


TINIEST = Size(1, 2, 12, 16, (2, 8), (4, 2, 4, 4))
SIZES = {
    "tiniest": TINIEST,
    "digits": Size(4, 4, 32, 384, (16, 64), (16, 5, 8, 8), batch_size=24),
    "narrow": Size(8, 6, 64, 1536, (32, 256), (16, 3, 16, 16), batch_size=2),
    "narrow, long": Size(8, 6, 64, 1536, (32, 256), (16, 6, 32, 32)),
    "middle": Size(12, 12, 64, 3072, (32, 256), (16, 3, 16, 16)),
    "wide": Size(12, 16, 64, 4096, (32, 256), (16, 3, 16, 16)),
    "wan-1.3b": Size(30, 12, 128, 8960, (512, 4096), (16, 6, 60, 104)),
    "wan-14b": Size(40, 40, 128, 13824, (512, 4096), (16, 6, 60, 104)),
}
"""The moving digits' teacher; wider and deeper ones; and Wan 2.1 1.3B and 14B on 21 frames of 480 x 832."""
