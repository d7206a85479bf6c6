"""Small worlds the proxy's tests share, each with a known reward."""

import pytest
import torch

from latent_rewards.proxies import ProxyConfig

SHAPE = (2, 3, 4, 4)


def draw_latents(count, seed, scale=1.0):
    """Noise around an offset per sample and channel."""
    source = torch.Generator().manual_seed(seed)
    offsets = torch.randn(count, SHAPE[0], 1, 1, 1, generator=source)
    return scale * (offsets + 0.5 * torch.randn(count, *SHAPE, generator=source))


def curved(latents):
    """A reward no linear function follows: the mean of channel 0, squared, less the energy of channel 1's changes."""
    change = latents[:, 1].diff(dim=1).square().mean(dim=(1, 2, 3))
    return latents[:, 0].mean(dim=(1, 2, 3)).square() - change


@pytest.fixture(scope="session")
def world():
    """``draw_latents(count, seed, scale)`` and ``curved(latents)``."""
    return draw_latents, curved


@pytest.fixture(scope="session")
def quick():
    """A function that makes the settings of a training of about a second."""

    def settings(**changes):
        return ProxyConfig(**{"width": 16, "depth": 1, "num_updates": 60, "progress": False, **changes})

    return settings


def build_wan(seed=0, **changes):
    from latent_rewards.training.torchvision_guard import mend_torchvision

    mend_torchvision()
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 12,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 3,
            "rope_max_seq_len": 32,
        }
        return WanTransformer3DModel(**{**settings, **changes}).eval()


@pytest.fixture(scope="session")
def make_wan():
    """``make_wan(seed, **config)`` -> a tiny WanTransformer3DModel for latents of ``(4, F, H, W)``."""
    return build_wan
