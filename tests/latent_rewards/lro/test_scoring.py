from __future__ import annotations

import numpy as np
import pytest
import torch

from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.lro.scoring import ProxyReward, frozen
from latent_rewards.rewards import WeightedSum

LATENTS = torch.tensor([1.0, 2.0, -4.0], dtype=torch.float64).view(3, 1, 1, 1, 1)
PROMPTS = ["a", "b", "c"]


def scoring(proxy, reward=None, **settings):
    return ProxyReward(proxy, reward, **{"pessimism": 0.0, "cap": None, "micro_batch": 2, **settings})


def test_scores_are_pessimistic_then_capped(exact_proxy):
    proxy = exact_proxy(curvature=0.0, slope=1.0, spread=0.5)
    total, scores = scoring(proxy, pessimism=1.0, cap=0.75)(LATENTS, PROMPTS)
    assert scores["quality"].tolist() == [0.5, 0.75, -6.0]  # x - |x| / 2, at most 0.75; three samples in chunks of 2
    assert torch.equal(total, scores["quality"])


def test_a_reward_that_should_fall_is_scored_above_its_mean(exact_proxy):
    proxy = exact_proxy(curvature=0.0, slope=1.0, spread=0.5)
    proxy.reward_names = ("good", "bad")
    reward = WeightedSum({"good": 1.0, "bad": -1.0})
    total, scores = scoring(proxy, reward, pessimism=1.0)(LATENTS, PROMPTS)
    assert scores["good"].tolist() == [0.5, 1.0, -6.0] and scores["bad"].tolist() == [1.5, 3.0, -2.0]
    assert total.tolist() == [-1.0, -2.0, -4.0]
    _, capped = scoring(proxy, reward, pessimism=1.0, cap=0.0)(LATENTS, PROMPTS)
    assert capped["good"].tolist() == [0.0, 0.0, -6.0] and capped["bad"].tolist() == [1.5, 3.0, 0.0]


def test_several_rewards_need_to_be_combined(exact_proxy):
    proxy = exact_proxy()
    proxy.reward_names = ("good", "bad")
    with pytest.raises(ConfigError, match="'good': 1.0, 'bad': 1.0"):
        scoring(proxy)


def test_gradient_reaches_the_latents_and_not_the_proxy(exact_proxy):
    proxy = exact_proxy(target=3.0)
    latents = LATENTS.clone().requires_grad_()
    total, _ = scoring(proxy)(latents, PROMPTS)
    total.sum().backward()
    torch.testing.assert_close(latents.grad, 3 - LATENTS)
    assert proxy.target.grad is None and proxy.target.requires_grad


def test_frozen_restores_after_an_error(exact_proxy):
    proxy = exact_proxy()
    with pytest.raises(ZeroDivisionError), frozen(proxy):
        assert not proxy.target.requires_grad
        raise ZeroDivisionError
    assert proxy.target.requires_grad


@pytest.mark.parametrize(
    ("returned", "told"),
    [(0.5, "a float"), (np.zeros(3), "a ndarray"), (torch.zeros(()), r"shape \[\]"), (torch.zeros(2), r"shape \[2\]")],
)
def test_a_reward_that_is_not_one_number_per_sample_is_named(exact_proxy, returned, told):
    def mine(scores):
        return returned

    with pytest.raises(DataError, match=rf"mine must return a tensor with one number per sample, \[3\]; got {told}"):
        scoring(exact_proxy(), mine)(LATENTS, PROMPTS)
