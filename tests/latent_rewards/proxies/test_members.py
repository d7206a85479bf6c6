"""A prediction runs every trunk once and says what the parts say one by one."""

import pytest
import torch

from latent_rewards.proxies import RewardProxy
from latent_rewards.proxies.features import latent_statistics
from latent_rewards.proxies.members import combine, combine_and_describe, describe
from latent_rewards.proxies.text import PromptFeatures


def make(quick, **changes):
    torch.manual_seed(0)
    return RewardProxy(quick(**changes), (2, 3, 4, 4), ("a", "b"), PromptFeatures("embedding", 5))


@pytest.mark.parametrize("changes", [{}, {"objective": "gaussian"}, {"trunk": "linear"}])
def test_together_they_are_what_they_are_apart(quick, world, changes):
    proxy = make(quick, **changes)
    latents = proxy.normalise(world[0](6, 0))
    inputs = proxy.member_inputs(latents, torch.randn(6, 5).to(latents))
    mean, variance, description = combine_and_describe(proxy, latent_statistics(latents), inputs)
    expected = combine(proxy, inputs)
    assert torch.equal(mean, expected[0]) and torch.equal(variance, expected[1])
    assert torch.equal(description, describe(proxy.members[0], latents, inputs))


def test_a_prediction_runs_each_trunk_once_for_a_chunk(quick, world):
    proxy = make(quick)
    calls = []
    for number, member in enumerate(proxy.members):
        member.trunk.register_forward_hook(lambda module, inputs, output, number=number: calls.append(number))
    proxy.predict(world[0](150, 0), torch.zeros(150, 5))
    assert calls == [0, 1, 2, 0, 1, 2]


def test_large_latents_are_scored_fewer_at_a_time_and_alike(quick, world, monkeypatch):
    proxy, latents, prompts, sizes = make(quick), world[0](9, 0), torch.zeros(9, 5), []
    whole = proxy.predict(latents, prompts)
    proxy.members[0].trunk.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    monkeypatch.setattr("latent_rewards.proxies.prediction._NUMBERS_ON_CPU", 4 * latents[0].numel())
    parts = proxy.predict(latents, prompts)
    assert sizes == [3, 3, 3]
    for name, mean in whole.mean.items():
        torch.testing.assert_close(parts.mean[name], mean)
