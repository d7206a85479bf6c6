"""Plain features have the values their definitions say."""

import torch

from latent_rewards.proxies import features
from latent_rewards.proxies.features import latent_statistics, linear_features


def test_linear_features_are_the_values_beside_the_prompt():
    latents, prompts = torch.randn(3, 2, 2, 4, 4), torch.randn(3, 5)
    assert torch.equal(linear_features(latents, None), latents.flatten(1))
    assert torch.equal(linear_features(latents, prompts)[:, -5:], prompts)


def test_large_latents_are_pooled_over_positions(monkeypatch):
    monkeypatch.setattr(features, "MAX_LINEAR_FEATURES", 2 * 2 * 4)
    latents = torch.randn(3, 2, 2, 4, 4)
    pooled = linear_features(latents, None).reshape(3, 2, 2, 2, 2)
    torch.testing.assert_close(pooled[:, :, :, 0, 1], latents[:, :, :, :2, 2:].mean(dim=(3, 4)))


def test_statistics_are_mean_spread_and_change():
    latents = torch.zeros(1, 2, 3, 1, 2)
    latents[0, 1, :, 0, 0] = torch.tensor([0.0, 2.0, 4.0])
    mean, spread, change = latent_statistics(latents).reshape(3, 2)
    torch.testing.assert_close(mean, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(spread, torch.tensor([0.0, (20 / 6 - 1) ** 0.5]))
    torch.testing.assert_close(change, torch.tensor([0.0, 2**0.5]))
    assert torch.equal(latent_statistics(latents[:, :, :1])[:, 4:], torch.zeros(1, 2))


def test_the_gradient_of_still_and_flat_latents_is_finite():
    latents = torch.ones(1, 2, 3, 2, 2, requires_grad=True)
    latent_statistics(latents).sum().backward()
    torch.testing.assert_close(latents.grad, torch.full_like(latents, 1 / 12))
