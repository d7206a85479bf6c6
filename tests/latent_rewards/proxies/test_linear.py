"""The closed form is scikit-learn's Ridge, and a linear proxy is exactly that."""

import math

import pytest
import torch
from sklearn.linear_model import Ridge

from latent_rewards.proxies import ProxyConfig, train_proxy
from latent_rewards.proxies.linear import RidgeSystem, choose_alpha, fit_ridge
from latent_rewards.proxies.samples import gather_samples, split_samples


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("count", "dim"), [(60, 12), (20, 50)])
def test_solution_equals_scikit_learn(count, dim):
    x, y = draw(count, dim) + 3, draw(count, 2, seed=1) - 5
    weight, intercept = RidgeSystem(x, y).solve(0.7)
    theirs = Ridge(alpha=0.7).fit(x.numpy(), y.numpy())
    torch.testing.assert_close(weight, torch.from_numpy(theirs.coef_).T, atol=1e-10, rtol=0)
    torch.testing.assert_close(intercept, torch.from_numpy(theirs.intercept_), atol=1e-10, rtol=0)


def test_a_linear_proxy_predicts_what_scikit_learn_predicts():
    latents, rewards = draw(64, 2, 2, 3, 3) * 2 + 1, draw(64, seed=2) * 7 - 4
    config = ProxyConfig(trunk="linear", ridge_alpha=2.5)
    proxy = train_proxy(latents, rewards, config=config)
    samples = gather_samples(latents, rewards, None)
    training, heldout = split_samples(samples, config.holdout_fraction, config.seed)
    theirs = Ridge(alpha=2.5).fit(latents[training].flatten(1).numpy(), rewards[training].numpy())
    expected = torch.from_numpy(theirs.predict(latents[heldout].flatten(1).numpy()))
    predicted = proxy(latents[heldout])
    assert predicted.dtype == torch.float64
    torch.testing.assert_close(predicted, expected, atol=1e-8, rtol=0)
    assert proxy(latents[heldout].float()).dtype == torch.float32


def test_each_reward_is_fitted_on_the_samples_it_has():
    x, y = draw(40, 5), draw(40, 3, seed=1)
    y[::2, 1] = math.nan
    weight, intercept = fit_ridge(x, y, 0.5, torch.zeros(40, dtype=torch.bool))
    for column, rows in [(0, slice(None)), (1, slice(1, None, 2)), (2, slice(None))]:
        expected = RidgeSystem(x[rows], y[rows, column : column + 1]).solve(0.5)
        torch.testing.assert_close(weight[:, column], expected[0][:, 0], atol=1e-12, rtol=0)
        torch.testing.assert_close(intercept[column], expected[1][0], atol=1e-12, rtol=0)


def test_noise_wants_a_large_penalty_and_signal_a_small_one():
    x, validation = draw(80, 40), torch.arange(80) % 4 == 0
    scale = RidgeSystem(x[~validation], x[~validation, :1]).scale
    assert choose_alpha(x, draw(80, 1, seed=1), validation) == pytest.approx(10 * scale)
    assert choose_alpha(x, x @ draw(40, 1, seed=2), validation) == pytest.approx(1e-3 * scale)
