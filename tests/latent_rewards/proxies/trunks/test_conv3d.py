"""The conv3d trunk takes any latent size, and the prompt modulates it."""

import pytest
import torch

from latent_rewards.proxies.trunks import Conv3dTrunk


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (3, 2, 5, 4), (16, 5, 8, 8), (4, 3, 7, 9), (4, 2, 33, 40)])
def test_any_latent_size_gives_two_features_per_channel_and_frame(shape):
    trunk = Conv3dTrunk(shape, 8, 1, 0)
    latents = torch.randn(2, *shape, requires_grad=True)
    features = trunk(latents, None)
    assert features.shape == (2, shape[1], trunk.num_features) == (2, shape[1], 16)
    features.sum().backward()
    assert torch.isfinite(latents.grad).all() and (latents.grad != 0).any()


def test_features_depend_on_prompt_and_on_frame_order():
    torch.manual_seed(0)
    trunk = Conv3dTrunk((2, 4, 4, 4), 8, 2, 3)
    latents, prompt = torch.randn(1, 2, 4, 4, 4), torch.randn(1, 3)
    assert not torch.allclose(trunk(latents, prompt), trunk(latents, -prompt))
    assert not torch.allclose(trunk(latents, prompt).mean(1), trunk(latents.flip(2), prompt).mean(1))
