"""A decoder small enough for a proxy: latents -> the frames a codec would decode, a dozen or two pixels a side.

Rewards of pixels are easier to learn from pixels. Full decoding is what a proxy is there to avoid, but frames this
small take a few convolutions, which learn from any decoded clips, without a reward (in the manner of the tiny
autoencoders that preview latents, Bohan 2023).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from latent_rewards.contracts import DataError
from latent_rewards.proxies.trunks.conv3d import strided_kernel

CHANNELS = 3
_TARGET_SIDE = 16
_WIDTH, _DEPTH = 32, 3


def drawing_scale(height: int, width: int) -> tuple[int, int]:
    """Return (stride, zoom): latents of that size are drawn ``zoom / stride`` times as large, near 16 pixels a side."""
    shorter = min(height, width)
    zoom = max(1, _TARGET_SIDE // shorter)
    stride = 1 if shorter < 24 else 2 if shorter < 48 else 4
    return stride, zoom


class TinyDecoder(nn.Module):
    """Latents ``[B, C, F, H, W]`` in the codec's space -> frames ``[B, T, 3, h, w]``, near [0, 1].

    Each latent frame becomes ``frames_per_latent`` frames, from itself and its neighbours in time. The first
    ``dropped`` are left out: causal codecs make their first latent frame from a single one. T is
    ``frames_per_latent F - dropped``, whatever F is; the grid of positions is that of the latents times zoom / stride.

    Args:
        channels: C.
        stride: of the first convolution over positions.
        zoom: pixels a side of what is drawn for each position then.
        frames_per_latent: see above.
        dropped: see above.

    Attributes:
        geometry: the arguments, to make another one like it.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, channels: int, *, stride: int, zoom: int, frames_per_latent: int, dropped: int) -> None:
        super().__init__()
        self.geometry: dict[str, Any] = {
            "channels": channels,
            "stride": stride,
            "zoom": zoom,
            "frames_per_latent": frames_per_latent,
            "dropped": dropped,
        }
        self.zoom, self.frames_per_latent, self.dropped = zoom, frames_per_latent, dropped
        self.register_buffer("latent_mean", torch.zeros(channels, 1, 1, 1))
        self.register_buffer("latent_std", torch.ones(channels, 1, 1, 1))
        kernel, padding = strided_kernel(stride)
        # Frames meet in the blocks; a stem that mixes them too cost a fifth of the work and drew worse.
        self.stem = nn.Conv2d(channels, _WIDTH, kernel, stride=stride, padding=padding)
        self.blocks = nn.ModuleList(
            # Without the norm some trainings diverge.
            nn.Sequential(
                nn.LayerNorm(_WIDTH),
                nn.Conv3d(_WIDTH, _WIDTH, (1, 3, 3), padding=(0, 1, 1)),
                nn.GELU(),
                nn.Conv3d(_WIDTH, _WIDTH, (3, 1, 1), padding=(1, 0, 0)),
            )
            for _ in range(_DEPTH)
        )
        self.output = nn.Linear(_WIDTH, frames_per_latent * CHANNELS * zoom**2)

    @classmethod
    def like(cls, latents: Tensor, videos: Tensor) -> TinyDecoder:
        """Return an untrained one for latents ``[B, C, F, H, W]`` that a codec decodes to ``[B, T, 3, H', W']``.

        Raises:
            DataError: the videos have another number of channels, or fewer frames than the latents.
        """
        frames, length = latents.shape[2], videos.shape[1]
        if videos.ndim != 5 or videos.shape[2] != CHANNELS or length < frames:
            raise DataError(
                f"the codec decodes latents {tuple(latents.shape)} to {tuple(videos.shape)}; expected [B, T, 3, H, W] "
                "with at least as many frames"
            )
        ratio = -(-length // frames)
        stride, zoom = drawing_scale(latents.shape[3], latents.shape[4])
        return cls(latents.shape[1], stride=stride, zoom=zoom, frames_per_latent=ratio, dropped=ratio * frames - length)

    def forward(self, latents: Tensor, scale: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return ``[B, T, 3, h, w]``.

        Args:
            latents: ``[B, C, F, H, W]``.
            scale: mean and deviation ``[C, 1, 1, 1]`` if ``latents`` are those of the codec less the one, by the other.
        """
        if scale is None:
            return self.draw(self.normalise(latents))
        mean, std = scale
        return self.draw(torch.addcmul((mean - self.latent_mean) / self.latent_std, latents, std / self.latent_std))

    def normalise(self, latents: Tensor) -> Tensor:
        """Return latents of mean 0 and deviation 1 in each channel."""
        return (latents.to(self.latent_mean) - self.latent_mean) / self.latent_std

    def draw(self, normalised: Tensor) -> Tensor:
        """Return the frames of normalised latents."""
        batch = len(normalised), normalised.shape[2]
        images = normalised.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)
        x = self.stem(images).permute(0, 2, 3, 1).unflatten(0, batch)
        del images
        for block in self.blocks:
            made = _apply(cast(nn.Sequential, block), x)
            x = x + made if torch.is_grad_enabled() else x.add_(made)
            del made
        x = self.output(_gelu(x)).flatten(0, 1).permute(0, 3, 1, 2)
        x = functional.pixel_shuffle(x, self.zoom).unflatten(0, batch)
        return x.unflatten(2, (self.frames_per_latent, CHANNELS)).flatten(1, 2)[:, self.dropped :].contiguous()

    @torch.no_grad()
    def fit_scales(self, latents: Tensor) -> None:
        """Set the mean and deviation of each channel from latents ``[n, C, F, H, W]``."""
        flat = latents.double().transpose(0, 1).flatten(1)
        spread = flat.std(dim=1, unbiased=False)
        self.latent_mean.copy_(flat.mean(dim=1)[:, None, None, None])
        self.latent_std.copy_(spread.clamp(min=1e-6 * float(spread.max()) + 1e-12)[:, None, None, None])


def _apply(block: nn.Sequential, x: Tensor) -> Tensor:
    """Return what a block makes of ``[B, F, H, W, C]``.

    Its convolutions are those over positions and over frames, which in this layout read the same numbers as two of
    images would; a few samples then take less time and memory than as ``[B, C, F, H, W]``.
    """
    norm, spatial, _, temporal = cast(tuple[nn.LayerNorm, nn.Conv3d, nn.GELU, nn.Conv3d], tuple(block))
    hidden = norm(x).flatten(0, 1).permute(0, 3, 1, 2)
    hidden = functional.conv2d(hidden, spatial.weight[:, :, 0], spatial.bias, padding=1)
    hidden = _gelu(hidden.permute(0, 2, 3, 1)).unflatten(0, x.shape[:2]).flatten(2, 3).permute(0, 3, 1, 2)
    hidden = functional.conv2d(hidden, temporal.weight[..., 0], temporal.bias, padding=(1, 0))
    return hidden.permute(0, 2, 3, 1).reshape(x.shape)


def _gelu(x: Tensor) -> Tensor:
    """Return ``gelu(x)``, in the place of ``x`` where no gradient is asked for."""
    return functional.gelu(x) if torch.is_grad_enabled() else cast(Tensor, torch.ops.aten.gelu_(x))
