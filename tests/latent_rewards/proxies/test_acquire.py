"""On latents whose scores, uncertainties and places are known, each strategy chooses the known ones."""

import math

import pytest
import torch
from torch import nn

from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.proxies import ProxyConfig, RewardProxy, train_proxy
from latent_rewards.proxies.acquire import STRATEGIES, spread_out
from latent_rewards.proxies.linear import LinearMember
from latent_rewards.proxies.text import PromptFeatures

SHAPE = (2, 1, 1, 1)


def point(x, y):
    return torch.stack([torch.as_tensor(x).double(), torch.as_tensor(y).double()], dim=1)[..., None, None, None]


@pytest.fixture
def exact():
    """Two members y + x and y - x of the latents (x, y): the mean is y, the standard deviation of the members |x|."""
    proxy = RewardProxy(ProxyConfig(trunk="linear"), SHAPE, ("y",), PromptFeatures("none", 0))
    members = [LinearMember(2, 1), LinearMember(2, 1)]
    for member, sign in zip(members, (1.0, -1.0), strict=True):
        member.weight.copy_(torch.tensor([[sign], [1.0]]))
    proxy.members = nn.ModuleList(members)
    return proxy


GRID = torch.randperm(50, generator=torch.Generator().manual_seed(5)).double()
"""x; y is 49 - x shifted by a cycle of 20, so that the most uncertain are not the highest."""
LATENTS = point(GRID, (GRID + 20) % 50)


def test_the_uncertain_and_the_top_are_the_known_ones(exact):
    uncertain = exact.acquire(LATENTS, 5, strategy="uncertain")
    assert GRID[uncertain].tolist() == [49, 48, 47, 46, 45]
    top = exact.acquire(LATENTS, 5, strategy="top")
    assert GRID[top].tolist() == [29, 28, 27, 26, 25]
    assert top.dtype == torch.int64


def test_top_follows_the_reward_it_is_given_and_nan_comes_last(exact):
    lowest = exact.acquire(LATENTS, 3, strategy="top", reward=lambda means: -means["y"])
    assert GRID[lowest].tolist() == [30, 31, 32]
    partly = exact.acquire(
        LATENTS, 50, strategy="top", reward=lambda means: torch.where(means["y"] > 10, math.nan, means["y"])
    )
    assert GRID[partly[:3]].tolist() == [40, 39, 38]


def test_several_rewards_count_in_units_of_their_spread():
    proxy = RewardProxy(ProxyConfig(trunk="linear"), SHAPE, ("x", "y"), PromptFeatures("none", 0))
    proxy.members[0].weight.copy_(torch.eye(2))
    proxy.reward_std.copy_(torch.tensor([1000.0, 0.1]))
    latents = point([0.0, 3.0, 1.0], [0.0, -1.0, 3.0])  # standardised sums 0, 2, 4
    assert proxy.acquire(latents, 3, strategy="top").tolist() == [2, 1, 0]
    proxy.calibration.temperature.copy_(torch.tensor([1.0, 2.0]))
    proxy.members = nn.ModuleList([proxy.members[0], LinearMember(2, 2)])
    # disagreement: x / sqrt(2) and y / sqrt(2); std T sqrt(1 + d^2)
    expected = ((1 + latents[:, 0].flatten() ** 2 / 2).sqrt() + 2 * (1 + latents[:, 1].flatten() ** 2 / 2).sqrt()) / 2
    assert proxy.acquire(latents, 3, strategy="uncertain").tolist() == expected.argsort(descending=True).tolist()
    assert expected.argmax() == 2  # though sample 1 has the largest standard deviation in the units of x


@pytest.mark.parametrize("seed", range(5))
def test_the_diverse_are_one_of_each_cluster(exact, seed):
    clusters = torch.arange(6).repeat_interleave(8)
    jitter = 1e-4 * torch.rand(48, generator=torch.Generator().manual_seed(1))
    angle = clusters * math.pi / 3
    chosen = exact.acquire(point(angle.cos() + jitter, angle.sin()), 6, strategy="diverse", seed=seed)
    assert sorted(clusters[chosen].tolist()) == list(range(6))


def test_features_of_another_scale_do_not_decide_alone(exact):
    """x spans 1e6 times as much as y, and its noise a thousand times; four corners are still told apart."""
    corners = torch.arange(4).repeat_interleave(5)
    noise = 1e3 * torch.rand(20, generator=torch.Generator().manual_seed(0))
    latents = point(1e6 * (corners % 2).double() + noise, (corners // 2).double())
    chosen = exact.acquire(latents, 4, strategy="diverse")
    assert sorted(corners[chosen].tolist()) == [0, 1, 2, 3]


def test_equal_rows_are_filled_up_without_repeats():
    assert sorted(spread_out(torch.zeros(7, 3).double(), 7, 0).tolist()) == list(range(7))
    rows = torch.tensor([[0.0], [0.0], [0.0], [5.0]]).double()
    assert 3 in spread_out(rows, 2, 0).tolist() and len(set(spread_out(rows, 3, 0).tolist())) == 3


def test_mixed_is_a_quarter_of_each_and_its_random_quarter_is_drawn_from_all(exact):
    chosen = exact.acquire(LATENTS, 22, strategy="mixed", seed=4)
    quarter = exact.acquire(LATENTS, 5, strategy="random", seed=4)
    assert torch.equal(chosen[:5], quarter)
    left = [i for i in range(50) if i not in set(quarter.tolist())]
    uncertain = sorted(left, key=lambda i: -float(GRID[i]))[:6]
    assert chosen[5:11].tolist() == uncertain
    left = [i for i in left if i not in uncertain]
    assert chosen[11:17].tolist() == sorted(left, key=lambda i: -float((GRID[i] + 20) % 50))[:6]
    assert len(set(chosen.tolist())) == 22
    assert exact.acquire(LATENTS, 1).tolist() == exact.acquire(LATENTS, 1, strategy="uncertain").tolist()


def test_random_is_uniform(exact):
    counts = torch.zeros(50)
    for seed in range(400):
        counts[exact.acquire(LATENTS, 10, strategy="random", seed=seed)] += 1
    assert (counts - 80).abs().max() < 4.5 * math.sqrt(400 * 0.2 * 0.8)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_network_chooses_reproducibly_and_all_of_them_if_asked(world, quick, strategy):
    draw, curved = world
    latents, prompts = draw(64, 0), [f"clip {i % 16}" for i in range(64)]
    proxy = train_proxy(latents, curved(latents), prompts, config=quick(num_updates=3))
    first, again = (proxy.acquire(latents, 9, prompts, strategy=strategy, seed=1) for _ in range(2))
    assert torch.equal(first, again) and len(first.unique()) == 9
    other = proxy.acquire(latents, 9, prompts, strategy=strategy, seed=2)
    assert torch.equal(first, other) == (strategy in ("uncertain", "top"))
    assert sorted(proxy.acquire(latents, 64, prompts, strategy=strategy).tolist()) == list(range(64))


def test_what_cannot_be_chosen_is_refused(exact):
    with pytest.raises(DataError, match="51 of 50 candidates"):
        exact.acquire(LATENTS, 51)
    for k in (0, -1, 2.0, True):
        with pytest.raises(ConfigError, match="k must be an integer"):
            exact.acquire(LATENTS, k)
    with pytest.raises(ConfigError, match="acquisition strategy 'divers'.*'diverse'"):
        exact.acquire(LATENTS, 3, strategy="divers")
    with pytest.raises(DataError, match="NaN"):
        exact.acquire(LATENTS * math.nan, 3, strategy="random")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_proxy_of_noisy_latents_chooses_among_clean_ones(world, quick, strategy):
    draw, curved = world
    latents = draw(80, 0)
    config = quick(noise_levels=(0.0, 1.0), ensemble_size=2, num_updates=5)
    chosen = train_proxy(latents, curved(latents), config=config).acquire(latents, 8, strategy=strategy)
    assert len(chosen.unique()) == 8
