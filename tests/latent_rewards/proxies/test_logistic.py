"""The linear fit of pairs is the minimum of the penalised Bradley-Terry likelihood."""

import pytest
import torch

from latent_rewards.proxies.logistic import fit_logistic
from latent_rewards.proxies.preferences import bradley_terry


def world(count, seed, ties=True):
    source = torch.Generator().manual_seed(seed)
    differences = torch.randn(count, 3, generator=source, dtype=torch.float64)
    weight = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    outcome = torch.bernoulli(torch.sigmoid(differences @ weight), generator=source)
    if ties:
        outcome[::5] = 0.5
    return differences, outcome


@pytest.mark.parametrize(("ties", "one_class"), [(True, False), (False, False), (True, True)])
def test_the_gradient_vanishes_at_the_fit(ties, one_class):
    differences, outcome = world(300, 0, ties)
    if one_class:
        sign = torch.where(outcome == 0, -1.0, 1.0)[:, None]
        differences, outcome = differences * sign, torch.where(outcome == 0, 1.0, outcome)
    weight = fit_logistic(differences, outcome, 0.7, torch.zeros(300, dtype=torch.bool)).requires_grad_()
    log_probabilities = bradley_terry(differences @ weight)
    first, second = log_probabilities[:, 0], log_probabilities[:, 2]
    loss = -(outcome * first + (1 - outcome) * second).sum() + 0.35 * weight.square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < 1e-3 and weight.abs().max() > 0.5
    if not one_class:
        flipped = fit_logistic(-differences, 1 - outcome, 0.7, torch.zeros(300, dtype=torch.bool))
        torch.testing.assert_close(flipped, weight.detach(), rtol=0, atol=1e-4)


def test_the_penalty_is_chosen_on_the_validation_rows():
    """A useless feature in many dimensions asks for a strong penalty, a clear one for a weak penalty."""
    source = torch.Generator().manual_seed(1)
    validation = torch.arange(200) % 4 == 0
    noise = torch.randn(200, 100, generator=source, dtype=torch.float64)
    coins = torch.bernoulli(torch.full((200,), 0.5, dtype=torch.float64), generator=source)
    assert (
        fit_logistic(noise, coins, None, validation).norm() < 0.2 * fit_logistic(noise, coins, 0.1, validation).norm()
    )
    clear, outcome = noise[:, :1], (noise[:, 0] > 0).double()
    assert fit_logistic(clear, outcome, None, validation).norm() > 10


def test_a_single_winner_is_enough():
    differences = torch.tensor([[2.0], [1.0]], dtype=torch.float64)
    for outcome in ([1.0, 0.5], [0.5, 0.0]):
        weight = fit_logistic(differences, torch.tensor(outcome), 1.0, torch.zeros(2, dtype=torch.bool))
        assert float(weight) * (1 if outcome[0] == 1 else -1) > 0
    assert float(fit_logistic(differences[:1], torch.ones(1), 1.0, torch.zeros(1, dtype=torch.bool))) > 0
