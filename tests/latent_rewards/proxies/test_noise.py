"""Noisy latents: times are read and checked, and a proxy trained on them approaches the posterior mean."""

import math

import pytest
import torch

from latent_rewards.contracts import ConfigError, DataError, FingerprintMismatchError
from latent_rewards.proxies import RewardProxy, train_proxy
from latent_rewards.proxies.noise import (
    NoiseLevels,
    TimeEmbedding,
    fixed_draws,
    fresh_draws,
    probe_schedule,
    rectified_flow,
)

SHAPE, MEAN, STD = (2, 2, 4, 4), 0.5, 0.7


def preserving(t):
    """A variance-preserving schedule."""
    return torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)


def gaussian(count, seed):
    """Latents N(MEAN, STD^2), one value per sample and channel, and the reward channel 0's value - 2 channel 1's."""
    source = torch.Generator().manual_seed(seed)
    values = MEAN + STD * torch.randn(count, 2, generator=source)
    return values[:, :, None, None, None].expand(count, *SHAPE).contiguous(), values[:, 0] - 2 * values[:, 1]


def posterior(noisy, alpha, sigma):
    """E[r | x_t] and its standard deviation: each channel holds 32 equal values, so their mean has noise sigma^2/32."""
    observed, variance = noisy.mean(dim=(2, 3, 4)), sigma**2 / 32
    total = alpha**2 * STD**2 + variance
    means = MEAN + alpha * STD**2 / total * (observed - alpha * MEAN)
    return means[:, 0] - 2 * means[:, 1], math.sqrt(5 * STD**2 * variance / total)


@pytest.fixture(scope="module")
def noisy_proxy(quick):
    latents, rewards = gaussian(2000, 0)
    settings = quick(noise_levels=(0.0, 0.98), ensemble_size=1, num_updates=500, input_noise=0.0, width=32)
    return train_proxy(latents, rewards, config=settings)


@pytest.mark.parametrize("t", [0.0, 0.5, 0.8, 0.9, 0.95])
def test_it_comes_near_the_posterior_mean_at_every_level(noisy_proxy, t):
    latents, rewards = gaussian(2000, 1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    noisy = (1 - t) * latents + t * noise
    best, deviation = posterior(noisy, 1 - t, t)
    predicted = noisy_proxy.predict(noisy, t=t)
    mean = predicted.mean["reward"]
    # How much worse than the best predictor, in units of the reward's variance.
    excess = float((mean - best).square().mean() / rewards.var())
    assert excess < 0.03, excess
    error = float((mean - rewards).square().mean())
    assert error == pytest.approx(deviation**2 + float((mean - best).square().mean()), rel=0.15, abs=0.01)
    inside = ((mean - rewards).abs() <= 1.645 * predicted.std["reward"]).float().mean()
    # The standard error of 2,000 samples judged by 300 held-out ones, and what interpolation between levels may cost.
    assert abs(float(inside) - 0.9) < 4.5 * math.sqrt(0.09 * (1 / 2000 + 1 / 300)) + 0.03


def test_the_report_says_how_the_error_grows(noisy_proxy):
    entries = noisy_proxy.report["reward"]["noise"]
    assert [entry["t"] for entry in entries] == pytest.approx([0.0, 0.245, 0.49, 0.735, 0.98])
    errors = [entry["mae"] for entry in entries]
    assert errors == sorted(errors) and errors[4] > 3 * errors[0]
    assert noisy_proxy.report["reward"]["mae"] == errors[0]
    for entry in entries[3:]:
        floor = math.sqrt(2 / math.pi) * posterior(torch.zeros(1, *SHAPE), 1 - entry["t"], entry["t"])[1]
        assert entry["mae"] == pytest.approx(floor, rel=0.2)


def test_times_are_read_and_refused(noisy_proxy, quick):
    latents = gaussian(3, 3)[0]
    assert torch.equal(noisy_proxy(latents), noisy_proxy(latents, t=0.0))
    mixed = noisy_proxy(latents, t=torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(mixed[1:2], noisy_proxy(latents[1:2], t=0.5))
    with pytest.raises(DataError, match=r"t in \[0, 0.98\].*got t = 1"):
        noisy_proxy(latents, t=1.0)
    with pytest.raises(DataError, match=r"got shape \(2,\)"):
        noisy_proxy.predict(latents, t=torch.zeros(2))
    clean = train_proxy(*gaussian(64, 0), config=quick(num_updates=1, ensemble_size=1))
    assert torch.equal(clean(latents, t=0.0), clean(latents))
    with pytest.raises(DataError, match="clean latents"):
        clean(latents, t=0.5)


def test_a_range_without_clean_latents_has_no_default_time():
    noise = NoiseLevels((0.2, 0.8), 1)
    with pytest.raises(DataError, match=r"t in \[0.2, 0.8\].*got t = None \(clean, t = 0\)"):
        noise.read(None, 2)
    torch.testing.assert_close(noise.read(0.5, 2), torch.tensor([0.5, 0.5]))


def test_corruption_follows_the_schedule():
    noise = NoiseLevels((0.0, 1.0), 1, preserving)
    x0, eps = torch.randn(2, *SHAPE, dtype=torch.float64), torch.randn(2, *SHAPE, dtype=torch.float64)
    t = torch.tensor([0.0, 0.5], dtype=torch.float64)
    noisy = noise.corrupt(x0, t, eps)
    torch.testing.assert_close(noisy[0], x0[0])
    torch.testing.assert_close(noisy[1], math.sqrt(0.5) * (x0[1] + eps[1]), rtol=0, atol=1e-12)


def test_the_factor_is_conformal_at_the_levels_and_linear_between_them():
    noise = NoiseLevels((0.0, 0.8), 2)
    errors = [torch.stack([torch.arange(1.0, 20.0) * (i + 1), torch.full((19,), math.nan)], dim=1) for i in range(5)]
    noise.fit(errors, [torch.full((19, 2), 2.0)] * 5)
    # ceil(0.9 * 20) = 18th smallest of |e| / 2.
    exact = torch.tensor([18 * (i + 1) / 2 / 1.6448536269514722 for i in range(5)])
    torch.testing.assert_close(noise.factors[:, 0], exact)
    assert torch.equal(noise.factors[:, 1], torch.ones(5))
    torch.testing.assert_close(noise.factor(torch.tensor([0.0, 0.3, 0.8]))[:, 0], exact[[0, 1, 4]] + torch.tensor(
        [0.0, float(exact[2] - exact[1]) / 2, 0.0]
    ))  # fmt: skip


def test_draws_are_fixed_by_the_index_or_fresh():
    fixed = fixed_draws(0, (0.2, 0.6))
    t, noise = fixed(torch.tensor([3, 9]), SHAPE)
    again_t, again = fixed(torch.tensor([9]), SHAPE)
    assert torch.equal(t[1:], again_t) and torch.equal(noise[1:], again)
    at, same = fixed_draws(0, (0.2, 0.6), 0.5)(torch.tensor([3, 9]), SHAPE)
    assert at.tolist() == [0.5, 0.5] and torch.equal(same, noise)
    fresh = fresh_draws(torch.Generator().manual_seed(0), (0.2, 0.6))
    times = torch.cat([fresh(torch.arange(64), (1,))[0] for _ in range(20)])
    assert 0.2 <= float(times.min()) < 0.21 and 0.59 < float(times.max()) <= 0.6
    many = torch.cat([fixed(torch.tensor([i]), (1,))[0] for i in range(300)])
    assert 0.2 <= float(many.min()) < 0.22 and 0.58 < float(many.max()) <= 0.6


def test_schedules_are_told_apart_and_bad_ones_refused():
    assert probe_schedule(rectified_flow)[4] == [0.5, 0.5]
    with pytest.raises(ConfigError, match="must map t"):
        probe_schedule(lambda t: t)
    with pytest.raises(ConfigError, match="non-negative"):
        probe_schedule(lambda t: (1 - 2 * t, t))
    with pytest.raises(FingerprintMismatchError, match="same schedule"):
        NoiseLevels((0.0, 1.0), 1, rectified_flow, probe_schedule(preserving))


def test_a_stored_proxy_scores_without_its_schedule_and_is_updated_with_it(quick, tmp_path):
    latents, rewards = gaussian(100, 0)
    config = quick(noise_levels=(0.0, 1.0), num_updates=30)
    proxy = train_proxy(latents, rewards, config=config, schedule=preserving)
    with pytest.raises(ConfigError, match="without noise levels"):
        train_proxy(latents, rewards, config=quick(), schedule=preserving)
    proxy.save_pretrained(tmp_path / "p")
    bare = RewardProxy.from_pretrained(tmp_path / "p")
    expected, loaded = proxy.predict(latents[:5], t=0.3), bare.predict(latents[:5], t=0.3)
    assert torch.equal(loaded.mean["reward"], expected.mean["reward"])
    assert torch.equal(loaded.std["reward"], expected.std["reward"]) and bare.config == config
    with pytest.raises(DataError, match="schedule="):
        bare.update(latents[:40], rewards[:40], num_updates=1)
    with pytest.raises(FingerprintMismatchError, match="same schedule"):
        RewardProxy.from_pretrained(tmp_path / "p", schedule=rectified_flow)
    whole = RewardProxy.from_pretrained(tmp_path / "p", schedule=preserving)
    assert whole.update(latents[:40], rewards[:40], num_updates=30)["reward/mae_after"] > 0
    assert not torch.equal(whole(latents[:5], t=0.3), expected.mean["reward"])


def test_the_embedding_tells_times_apart():
    torch.manual_seed(0)
    embedding = TimeEmbedding(16).double()
    codes = embedding(torch.linspace(0, 1, 21, dtype=torch.float64)).detach()
    assert codes.shape == (21, 16)
    assert float(torch.cdist(codes, codes).fill_diagonal_(9.0).min()) > 1e-2
