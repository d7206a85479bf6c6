"""Judgements are fitted to what simulated pairs were drawn from, and each half of the pairs by the other."""

import math

import pytest
import torch
from torch import nn

from latent_rewards.proxies.judgement import PRIOR_STD, Duels, Judge, Judgement, calibrate, crossfit_log_probabilities
from latent_rewards.proxies.preferences import bradley_terry, judgement_variance, outcome_error, thurstone


def drawn(objective, count, seed, noise=False):
    """Pairs with known parameters: log-tie -0.5 and, with noise levels, kappa 0.5."""
    source = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, 2, generator=source, dtype=torch.float64)
    log_variance = 0.5 * torch.randn(count, 2, generator=source, dtype=torch.float64) - 0.7
    levels = torch.rand(count, 2, generator=source, dtype=torch.float64) * 2 * noise
    judgement = Judgement(objective).double()
    with torch.no_grad():
        judgement.log_tie.fill_(-0.5)
        if noise:
            judgement.log_noise.fill_(math.log(0.5))
    duels = Duels(scores, torch.empty(count), log_variance if objective == "thurstone" else None, levels)
    draws = torch.multinomial(judgement(duels).exp(), 1, generator=source)[:, 0]
    duels.outcome = 1 - draws.double() / 2
    return judgement, duels


@pytest.mark.parametrize(("objective", "noise"), [("bradley_terry", False), ("thurstone", False), ("thurstone", True)])
def test_calibration_recovers_scale_and_parameters_within_their_standard_errors(objective, noise):
    truth, duels = drawn(objective, 4000, 0, noise)
    judgement = Judgement(objective)
    judgement.start(0.2, noise)
    started = [float(p) for p in judgement.parameters() if math.isfinite(p)]
    wrong = Duels(duels.scores / 1.5, duels.outcome, duels.log_variance, duels.noise)
    found = [math.log(calibrate(judgement, wrong)), *(float(p) for p in judgement.parameters() if math.isfinite(p))]
    exact = torch.tensor([math.log(1.5), *(float(p) for p in truth.parameters() if math.isfinite(p))]).double()

    def loss(point):
        difference = (wrong.scores[:, 0] - wrong.scores[:, 1]) * point[0].exp()
        if objective == "bradley_terry":
            return outcome_error(bradley_terry(difference, point[1]), duels.outcome) * 4000
        kappa = point[2].exp() if noise else None
        variance = judgement_variance(duels.log_variance, duels.noise, kappa)
        return outcome_error(thurstone(difference, variance, point[1].exp()), duels.outcome) * 4000

    point = torch.tensor(found, dtype=torch.float64)
    information = torch.func.hessian(loss)(point)
    error = torch.linalg.inv(information).diagonal().sqrt()
    assert ((point - exact).abs() < 4.5 * error).all() and error[:2].max() < 0.12
    # The gradient of the likelihood balances that of the priors, around 0 and the starting point.
    pull = (point - torch.tensor([0.0, *started])) / PRIOR_STD**2
    torch.testing.assert_close(torch.func.grad(loss)(point), -pull, rtol=0, atol=1e-3)


def test_few_pairs_move_little_and_pairs_without_ties_stay_without():
    _, duels = drawn("bradley_terry", 2, 0)
    judgement = Judgement("bradley_terry")
    duels.outcome = torch.ones(2, dtype=torch.float64)
    factor = calibrate(judgement, duels)
    assert 0.5 < factor < 2 and judgement.log_tie == -math.inf
    assert judgement(duels)[0, 1] == -math.inf


@pytest.mark.parametrize("objective", ["bradley_terry", "thurstone"])
def test_a_start_gives_equal_samples_the_tie_rate(objective):
    judgement = Judgement(objective)
    judgement.start(0.3, noise=False)
    equal = Duels(torch.zeros(1, 2), torch.ones(1), torch.zeros(1, 2))
    assert float(judgement(equal).exp()[0, 1]) == pytest.approx(0.3, abs=1e-6)
    judgement.start(0.0, noise=True)
    assert float(judgement.log_noise) == 0


def test_rescaled_thurstone_gives_the_same_probabilities():
    judgement, duels = drawn("thurstone", 20, 1, noise=True)
    expected = judgement(duels)
    judgement.rescale(0.7)
    scaled = Duels(duels.scores * math.exp(0.7), duels.outcome, duels.log_variance + 1.4, duels.noise)
    torch.testing.assert_close(judgement(scaled), expected)
    other, pairs = drawn("bradley_terry", 20, 1)
    other.rescale(0.7)
    assert float(other.log_tie) == -0.5


def test_each_half_is_judged_by_what_the_other_calibrates():
    judgement, duels = drawn("bradley_terry", 60, 2)
    result = crossfit_log_probabilities(judgement, duels)
    own = Judgement("bradley_terry").double()
    own.load_state_dict(judgement.state_dict())
    factor = calibrate(own, duels[torch.arange(60) % 2 == 1])
    even = duels[torch.arange(60) % 2 == 0]
    expected = bradley_terry(factor * (even.scores[:, 0] - even.scores[:, 1]), own.log_tie)
    torch.testing.assert_close(result[::2], expected)
    assert float(judgement.log_tie) == -0.5


def test_a_judge_pairs_neighbouring_outputs():
    class Fixed(nn.Module):
        def forward(self, latents, prompt_features):
            return latents

    outputs = torch.tensor([[1.0, 0.1], [0.0, 0.2], [-1.0, 0.3], [2.0, 0.4]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 2.0]], dtype=torch.float64)
    judgement = Judgement("thurstone").double()
    judgement.start(0.2, noise=True)
    judge = Judge(Fixed(), judgement)
    variance = torch.tensor([math.exp(0.1) + 0.25 + math.exp(0.2), math.exp(0.3) + 1 + math.exp(0.4) + 4]).double()
    expected = thurstone(torch.tensor([1.0, -3.0]).double(), variance, judgement.log_tie.exp())
    torch.testing.assert_close(judge.loss(judge(outputs, None), targets), -(expected[0, 0] + expected[1, 1]) / 2)
