"""Teaching a tiny decoder to draw, small, what a codec decodes; no reward is needed."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from latent_rewards.contracts import Codec, DataError, FingerprintMismatchError
from latent_rewards.proxies.config import ProxyConfig
from latent_rewards.proxies.ensemble import Batch, bucketed_batches, train_member
from latent_rewards.proxies.samples import Samples
from latent_rewards.proxies.trunks.tiny_decoder import TinyDecoder
from latent_rewards.training.devices import choose_device
from latent_rewards.training.randomness import derive_seed, generator

_BATCH, _SCALE_ROWS, _DECODED_AT_ONCE = 24, 64, 4
_LEARNING_RATE, _WEIGHT_DECAY, _ABSOLUTE = 6e-3, 0.01, 0.2
_LEAST_EXPLAINED = 0.25
"""Below this share of the frames' variance the user is told: training went wrong, or was too short."""


def distil_decoder(codec: Codec, samples: Samples, rows: Tensor, config: ProxyConfig) -> TinyDecoder:
    """Decode some of the samples and return a tiny decoder that draws the like, small, from latents; frozen.

    It is trained with half the input noise the members are trained with, so that what it draws does not hang on
    details of latents that no decoder shows.

    Args:
        codec: decodes.
        samples: their latents are read, of every bucket; no reward is.
        rows: int64 ``[n]``, the samples that may be looked at.
        config: number of clips and updates, seed, input noise, device, and whether to draw a progress bar.

    Raises:
        FingerprintMismatchError: the codec is of another latent space than the samples; the message names both.
        DataError: the codec decodes to something else than videos ``[B, T, 3, H, W]``, to NaN, or to another number of
            frames per latent frame for some of the shapes.
    """
    if samples.latent_space not in (None, codec.fingerprint):
        raise FingerprintMismatchError(
            f"the latents belong to {samples.latent_space!r} and the codec is {codec.fingerprint!r}; pass the codec "
            "they were collected with"
        )
    order = torch.randperm(len(rows), generator=generator(config.seed, "decoder/clips", 0))
    rows = rows[order[: config.decoder_clips]].sort().values
    decoder = _untrained(codec, samples, rows, config)
    thumbnails = _thumbnails(codec, samples, rows, decoder, config)
    decoder = _train(decoder.to(choose_device(config.device)), samples, rows, thumbnails, config)
    explained = _explained(decoder, samples, rows[:: -(-len(rows) // _SCALE_ROWS)], thumbnails)
    if not explained >= _LEAST_EXPLAINED:
        warnings.warn(
            f"the tiny decoder explains {explained:.0%} of the variance of small frames, and a proxy sees no more than "
            "it draws; raise decoder_updates or decoder_clips, or leave out codec= for a trunk that reads latents",
            stacklevel=3,
        )
    return decoder.cpu()


@torch.no_grad()
def _untrained(codec: Codec, samples: Samples, rows: Tensor, config: ProxyConfig) -> TinyDecoder:
    """Return a decoder of the right geometry for the first of ``rows``, its scales set from a few more."""
    _, first = next(samples.chunks(rows, _SCALE_ROWS))
    latents = samples.latents(first)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "decoder/init", 0))
        decoder = TinyDecoder.like(latents[:1], codec.decode(latents[:1]))
    decoder.fit_scales(latents.cpu())
    return decoder


@torch.no_grad()
def _thumbnails(
    codec: Codec, samples: Samples, rows: Tensor, decoder: TinyDecoder, config: ProxyConfig
) -> dict[int, Tensor]:
    """Return what the codec decodes each of ``rows`` to, shrunk to what ``decoder`` draws: float16 ``[T, 3, h, w]``."""
    found: dict[int, Tensor] = {}
    with tqdm(total=len(rows), desc="decode clips", disable=not config.progress, dynamic_ncols=True) as bar:
        for _, chunk in samples.chunks(rows, _DECODED_AT_ONCE):
            latents = samples.latents(chunk)
            videos = codec.decode(latents)
            wanted = decoder(latents[:1].cpu()).shape[1:]
            if videos.shape[1:3] != wanted[:2] or not bool(torch.isfinite(videos).all()):
                raise DataError(
                    f"the codec decodes latents {tuple(latents.shape)} to {tuple(videos.shape)}; expected finite "
                    f"[B, {wanted[0]}, {wanted[1]}, H, W], as many frames per latent frame as for the first sample"
                )
            small = functional.adaptive_avg_pool2d(videos.flatten(0, 1).float(), wanted[2:])
            found |= dict(zip(chunk.tolist(), small.unflatten(0, videos.shape[:2]).cpu().half(), strict=True))
            bar.update(len(chunk))
    return found


class _Drawing(nn.Module):
    """A tiny decoder as a member that :func:`train_member` trains: it reads normalised latents and no prompts."""

    def __init__(self, decoder: TinyDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: Tensor, prompts: None) -> Tensor:
        return self.decoder.draw(latents)


def _pixel_error(drawn: Tensor, target: Tensor) -> Tensor:
    error = drawn - target
    return error.square().mean() + _ABSOLUTE * error.abs().mean()


@torch.no_grad()
def _explained(decoder: TinyDecoder, samples: Samples, rows: Tensor, thumbnails: dict[int, Tensor]) -> float:
    """Return the share of the variance of ``rows``' small frames that ``decoder`` draws; negative: worse than grey."""
    error = total = 0.0
    mean = torch.stack([thumbnails[row].float().mean() for row in rows.tolist()]).mean()
    for _, chunk in samples.chunks(rows, _DECODED_AT_ONCE):
        target = torch.stack([thumbnails[row] for row in chunk.tolist()]).float()
        error += float((decoder(samples.latents(chunk)).float().cpu() - target).square().sum())
        total += float((target - mean).square().sum())
    return 1 - error / max(total, 1e-12)


def _train(
    decoder: TinyDecoder, samples: Samples, rows: Tensor, thumbnails: dict[int, Tensor], config: ProxyConfig
) -> TinyDecoder:
    def read(indices: Tensor) -> Batch:
        target = torch.stack([thumbnails[index] for index in indices.tolist()]).to(decoder.latent_mean)
        return decoder.normalise(samples.latents(indices)), None, target

    def advance(number: int) -> bool:
        bar.update()
        return False

    source = generator(config.seed, "decoder/batches", 0)
    batches = bucketed_batches(rows, samples.buckets(rows), _BATCH, config.decoder_updates, source)
    with tqdm(
        total=config.decoder_updates, desc="tiny decoder", disable=not config.progress, dynamic_ncols=True
    ) as bar:
        train_member(
            _Drawing(decoder),
            read,
            batches,
            learning_rate=_LEARNING_RATE,
            weight_decay=_WEIGHT_DECAY,
            warmup=0.15,
            stop=advance,
            input_noise=0.5 * config.input_noise,
            source=source,
            loss=_pixel_error,
        )
    return decoder
