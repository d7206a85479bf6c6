"""Train the embedded VAE on rendered clips, from nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from latent_rewards.training.loop import LoopConfig, TrainingLoop, set_learning_rate, warmup_cosine
from latent_rewards.training.randomness import sample_noise
from recipes.moving_digits.components import LATENT_SHAPE, AutoencoderKLWan, build_vae
from recipes.moving_digits.world import draw_specs, render


@dataclass
class VaeConfig:
    """Settings of the VAE's training.

    Attributes:
        num_steps: updates; the first 40 % see 5 frames, the next 40 % 9 and the rest all 17, which is what a causal VAE
            allows and costs half as much.
        batch_size: clips per update.
        learning_rate: peak of a warm-up and cosine schedule (AdamW).
        kl_weight: weight of the mean KL per latent dimension.
        seed: root of all randomness.
        output_dir: checkpoints.
    """

    num_steps: int = 2400
    batch_size: int = 8
    learning_rate: float = 2e-3
    kl_weight: float = 1e-4
    seed: int = 0
    output_dir: str | None = None


def channels_last(module: nn.Module) -> None:
    """Store 3-D convolution weights channels-last, which is several times faster on a CPU."""
    for parameter in module.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)


def decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decode without the final clamp to [-1, 1], which passes no gradient to a black background and never recovers."""
    chunks: list[Tensor] = []
    handle = vae.decoder.register_forward_hook(lambda module, inputs, output: chunks.append(output))
    try:
        vae.decode(latents)
    finally:
        handle.remove()
    return torch.cat(chunks, dim=2)


def vae_loss(vae: AutoencoderKLWan, videos: Tensor, noise: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
    """Return the training loss and the L1 reconstruction error (pixels in [-1, 1]).

    Args:
        vae: the autoencoder.
        videos: ``[B, T, 3, H, W]`` in [0, 1].
        noise: ``[B, 16, F, h, w]`` for the posterior's sample.
        kl_weight: see :class:`VaeConfig`.
    """
    pixels = (videos.transpose(1, 2) * 2 - 1).contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = vae.encode(pixels).latent_dist
        reconstruction = decode_unclamped(vae, posterior.mean + posterior.std * noise)
    error = reconstruction.float() - pixels
    kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    l1 = error.abs().mean()
    return l1 + error.square().mean() + kl_weight * kl, l1.detach()


def train_vae(config: VaeConfig) -> AutoencoderKLWan:
    """Train the VAE and store the latents' mean and standard deviation per channel in its config."""
    vae = build_vae(config.seed)
    channels_last(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.learning_rate, weight_decay=1e-4)
    loop = TrainingLoop(
        LoopConfig(
            config.num_steps, seed=config.seed, output_dir=config.output_dir, checkpoint_every=200, device="cpu"
        ),
        name="vae",
        modules={"vae": vae},
        optimizers={"vae": optimizer},
    )
    channels, _, height, width = LATENT_SHAPE

    def step(index: int) -> dict[str, float]:
        frames = 5 if index < 0.4 * config.num_steps else 9 if index < 0.8 * config.num_steps else 17
        first = index * config.batch_size
        clips = range(first, first + config.batch_size)
        videos = render(draw_specs(config.batch_size, seed=config.seed + first), seed=config.seed, start_index=first)
        noise = sample_noise(config.seed, "vae", 0, clips, (channels, (frames + 3) // 4, height, width))
        set_learning_rate(optimizer, config.learning_rate * warmup_cosine(index, config.num_steps, warmup=50))
        # A window at a random place, so that short windows see every part of the motion.
        start = index % (18 - frames)
        loss, l1 = vae_loss(vae, videos[:, start : start + frames], noise, config.kl_weight)
        return {"loss": float(loss.detach()), "l1": float(l1), "grad_norm": loop.update("vae", loss)}

    loop.run(step)
    return normalise(vae.eval(), config.seed, num_clips=min(512, 4 * config.num_steps))


def normalise(vae: AutoencoderKLWan, seed: int, num_clips: int = 512) -> AutoencoderKLWan:
    """Write ``latents_mean`` and ``latents_std``, measured on training clips, into the VAE's config."""
    latents = encode_clips(vae, draw_specs(num_clips, seed=seed), seed=seed + 1)
    vae.register_to_config(
        latents_mean=latents.mean(dim=(0, 2, 3, 4)).tolist(), latents_std=latents.std(dim=(0, 2, 3, 4)).tolist()
    )
    return vae


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, specs: list, *, seed: int, batch_size: int = 32) -> Tensor:
    """Render and encode training clips; returns raw (not normalised) posterior means ``[N, 16, 5, 8, 8]``."""
    chunks = []
    for first in tqdm(range(0, len(specs), batch_size), desc="encode", dynamic_ncols=True):
        videos = render(specs[first : first + batch_size], seed=seed, start_index=first)
        chunks.append(vae.encode(videos.transpose(1, 2) * 2 - 1).latent_dist.mode())
    return torch.cat(chunks)
