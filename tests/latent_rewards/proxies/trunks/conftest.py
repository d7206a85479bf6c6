"""A Wan transformer small enough to build in a moment, without a hub."""

import pytest
import torch

SHAPE = (4, 3, 4, 6)
TEXT_DIM = 12


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
            "in_channels": SHAPE[0],
            "out_channels": SHAPE[0],
            "text_dim": TEXT_DIM,
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
