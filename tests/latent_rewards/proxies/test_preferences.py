"""Likelihoods of duels equal independent computations in float64, recover known scores, and bad pairs are named."""

import math

import pytest
import torch
from scipy import stats
from torch.distributions import Categorical, Normal

from latent_rewards.contracts import DataError
from latent_rewards.proxies import Preferences
from latent_rewards.proxies.preferences import (
    bradley_terry,
    check_preferences,
    judgement_variance,
    name_preferences,
    outcome_error,
    thurstone,
)

DIFFERENCE = torch.linspace(-6, 6, 41, dtype=torch.float64)
NU, TAU = torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)


def test_bradley_terry_with_ties_is_davidsons_ratio_of_strengths():
    first, second = (DIFFERENCE + 1).exp(), torch.full_like(DIFFERENCE, math.e)
    tie = NU * (first * second).sqrt()
    expected = torch.stack([first, tie, second], dim=1) / (first + tie + second)[:, None]
    torch.testing.assert_close(bradley_terry(DIFFERENCE, NU.log()).exp(), expected, rtol=0, atol=1e-14)
    plain = bradley_terry(DIFFERENCE)
    torch.testing.assert_close(plain[:, 0].exp(), first / (first + second), rtol=0, atol=1e-14)
    assert (plain[:, 1] == -math.inf).all()
    torch.testing.assert_close(plain[:, 2].exp(), second / (first + second), rtol=0, atol=1e-14)


def test_thurstone_with_ties_is_the_normal_distributions_mass():
    variance = 0.3 + DIFFERENCE.abs()
    difference = Normal(DIFFERENCE, variance.sqrt())
    below, above = difference.cdf(-TAU), 1 - difference.cdf(TAU)
    expected = torch.stack([above, 1 - above - below, below], dim=1)
    torch.testing.assert_close(thurstone(DIFFERENCE, variance, TAU).exp(), expected, rtol=0, atol=1e-14)
    plain = thurstone(DIFFERENCE, variance).exp()
    torch.testing.assert_close(plain[:, 0], 1 - difference.cdf(torch.zeros(())), rtol=0, atol=1e-14)
    assert (plain[:, 1] == 0).all()


def test_thurstone_stays_exact_in_the_tails():
    difference = torch.tensor([30.0, -30.0], dtype=torch.float64, requires_grad=True)
    log_probabilities = thurstone(difference, torch.ones(2, dtype=torch.float64), TAU)
    lose, tie = stats.norm.logcdf(-30.4), stats.norm.logcdf(-29.6)
    expected = [[0.0, tie + math.log1p(-math.exp(lose - tie)), lose]]
    torch.testing.assert_close(log_probabilities[:1].detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12,
                               atol=1e-14)  # fmt: skip
    log_probabilities.sum().backward()
    assert torch.isfinite(difference.grad).all() and difference.grad[0] == -difference.grad[1]
    assert torch.isfinite(thurstone(torch.tensor([40.0]).bfloat16(), torch.ones(1), TAU)).all()


def test_gradients_are_those_of_finite_differences():
    difference = DIFFERENCE[5:36:3].clone().requires_grad_()
    log_tie, log_variance = NU.log().requires_grad_(), torch.linspace(-1, 1, 11, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(bradley_terry, (difference, log_tie))
    assert torch.autograd.gradcheck(lambda d, v, t: thurstone(d, v.exp(), t.exp()), (difference, log_variance, log_tie))


def test_the_variance_of_a_judgement_is_the_sum_over_both_samples():
    log_variance = torch.tensor([[0.0, 1.0], [-1.0, 0.5]], dtype=torch.float64)
    noise = torch.tensor([[0.5, 2.0], [0.0, 1.0]], dtype=torch.float64)
    expected = [1 + 0.25 * 0.3 + math.e + 4 * 0.3, math.exp(-1) + math.exp(0.5) + 0.3]
    kappa = torch.tensor(0.3, dtype=torch.float64)
    assert judgement_variance(log_variance, noise, kappa).tolist() == pytest.approx(expected, abs=1e-14)
    assert judgement_variance(log_variance, noise).tolist() == judgement_variance(log_variance).tolist()


def test_the_error_is_torchs_categorical_and_unknown_outcomes_weigh_nothing():
    difference = (DIFFERENCE + 0.3).requires_grad_()
    log_probabilities = bradley_terry(difference, NU.log())
    outcome = torch.tensor([1.0, 0.5, 0.0, math.nan]).repeat(11)[:41].double()
    known = ~outcome.isnan()
    column = torch.tensor([0, 1, 2, 0]).repeat(11)[:41]
    expected = -Categorical(logits=log_probabilities[known]).log_prob(column[known]).mean()
    error = outcome_error(log_probabilities, outcome)
    torch.testing.assert_close(error, expected, rtol=0, atol=1e-14)
    error.backward()
    assert (difference.grad[~known] == 0).all() and torch.isfinite(difference.grad).all()
    plain = outcome_error(bradley_terry(difference), torch.where(outcome == 0.5, 1.0, outcome))
    assert math.isfinite(plain.item()) and outcome_error(log_probabilities, torch.full_like(outcome, math.nan)) == 0


def simulate(log_probabilities, seed):
    draws = torch.multinomial(log_probabilities.exp(), 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    return 1 - draws.double() / 2


def all_pairs(count, repeats):
    first, second = torch.combinations(torch.arange(count)).T.repeat(1, repeats)
    return first, second


def maximise(negative_log_likelihood, start):
    """Newton's method from ``start``; the optimum and the observed Fisher information there."""
    point = start.clone()
    for _ in range(50):
        gradient = torch.func.grad(negative_log_likelihood)(point)
        step = torch.linalg.solve(torch.func.hessian(negative_log_likelihood)(point), gradient)
        point = point - step / max(1.0, float(step.abs().max()))
        if float(step.abs().max()) < 1e-10:
            break
    assert float(torch.func.grad(negative_log_likelihood)(point).abs().max()) < 1e-6
    return point, torch.func.hessian(negative_log_likelihood)(point)


def check_recovery(found, information, truth):
    """Every parameter lies within 4.5 standard errors, and all together as far off as chi-square says (99.8 %)."""
    error = torch.linalg.inv(information).diagonal().sqrt()
    deviation = found - truth
    assert (deviation.abs() / error).max() < 4.5
    low, high = stats.chi2.ppf([0.001, 0.999], len(truth))
    assert low < float(deviation @ information @ deviation) < high
    return error


SCORES = torch.tensor([0.0, 0.7, -1.2, 0.3, 1.5, -0.4, 0.9, -0.8], dtype=torch.float64)


def free_scores(point):
    return torch.cat([point.new_zeros(1), point[:7]])


def test_bradley_terry_recovers_scores_and_tie_parameter_within_their_standard_errors():
    first, second = all_pairs(8, 150)
    outcome = simulate(bradley_terry(SCORES[first] - SCORES[second], NU.log()), 0)

    def loss(point):
        scores = free_scores(point)
        return outcome_error(bradley_terry(scores[first] - scores[second], point[7]), outcome) * len(outcome)

    found, information = maximise(loss, torch.zeros(8, dtype=torch.float64))
    error = check_recovery(found, information, torch.cat([SCORES[1:], NU.log()[None]]))
    assert error.max() < 0.12


def test_thurstone_recovers_scores_threshold_and_the_price_of_noise_within_their_standard_errors():
    """Items are seen at several noise levels; with v fixed at 1/2, which sets the scale, kappa and tau are free."""
    first, second = all_pairs(8, 300)
    source = torch.Generator().manual_seed(3)
    levels = torch.randint(0, 3, (len(first), 2), generator=source).double()
    half = torch.full_like(levels, math.log(0.5))
    kappa = torch.tensor(0.6, dtype=torch.float64)
    variance = judgement_variance(half, levels, kappa)
    outcome = simulate(thurstone(SCORES[first] - SCORES[second], variance, TAU), 1)

    def loss(point):
        scores = free_scores(point)
        spread = judgement_variance(half, levels, point[8].exp())
        return outcome_error(thurstone(scores[first] - scores[second], spread, point[7].exp()), outcome) * len(outcome)

    start = torch.zeros(9, dtype=torch.float64)
    start[7] = -1.0
    found, information = maximise(loss, start)
    error = check_recovery(found, information, torch.cat([SCORES[1:], TAU.log()[None], kappa.log()[None]]))
    assert error[:7].max() < 0.12 and error[8] < 0.3


def test_who_stands_first_does_not_matter():
    variance = 0.3 + DIFFERENCE.abs()
    torch.testing.assert_close(bradley_terry(-DIFFERENCE, NU.log()), bradley_terry(DIFFERENCE, NU.log()).flip(1))
    torch.testing.assert_close(thurstone(-DIFFERENCE, variance, TAU), thurstone(DIFFERENCE, variance, TAU).flip(1))


ROWS = torch.arange(20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outcome": torch.full((20,), 2.0)}, "outcome 2 of pair 0 is none of 1"),
        ({"outcome": torch.full((20,), math.nan)}, "outcome nan of pair 0"),
        ({"second": ROWS + (ROWS != 4).long()}, "pair 4 compares sample 4 with itself"),
        ({"outcome": torch.full((20,), 0.5)}, "all 20 pairs are ties"),
        ({"outcome": torch.ones(3)}, "one length"),
        ({"first": ROWS.double()}, "first must be whole numbers"),
        ({"first": ROWS[:, None]}, "first must be whole numbers"),
        ({"noise": torch.full((21,), -1.0)}, "not negative"),
    ],
)
def test_pairs_that_make_no_sense_are_named(change, message):
    with pytest.raises(DataError, match=message):
        Preferences(**{"first": ROWS, "second": ROWS + 1, "outcome": torch.ones(20), **change})


def test_pairs_are_checked_against_the_samples():
    pairs = Preferences(ROWS, ROWS + 1, torch.ones(20))
    check_preferences(pairs, 21, None, 16)
    with pytest.raises(DataError, match=r"pair 19 names samples \[19, 20\], but there are 20 latents"):
        check_preferences(pairs, 20, None, 16)
    with pytest.raises(DataError, match=r"pair 0 names samples \[-1, 0\]"):
        check_preferences(Preferences(ROWS - 1, ROWS, torch.ones(20)), 21, None, 16)
    with pytest.raises(DataError, match="20 pairs are too few to fit a proxy; at least 21"):
        check_preferences(pairs, 21, None, 21)
    prompts = (torch.arange(21) >= 7).long()
    with pytest.raises(DataError, match=r"pair 6 compares samples \[6, 7\] of different prompts \(1 such pairs\)"):
        check_preferences(pairs, 21, prompts, 16)
    check_preferences(Preferences(ROWS, ROWS + 1, torch.ones(20), across_prompts=True), 21, prompts, 16)
    with pytest.raises(DataError, match="noise has 20 values for 21"):
        check_preferences(Preferences(ROWS, ROWS + 1, torch.ones(20), noise=torch.ones(20)), 21, None, 16)


def test_preferences_are_told_from_scores_and_named():
    pairs = Preferences(ROWS, ROWS + 1, torch.ones(20))
    assert name_preferences(pairs) == ("preference", pairs) and name_preferences({"taste": pairs}) == ("taste", pairs)
    assert name_preferences(torch.ones(3)) is None and name_preferences({"r": torch.ones(3)}) is None
    assert name_preferences(None) is None
    with pytest.raises(DataError, match="one reward"):
        name_preferences({"taste": pairs, "r": torch.ones(3)})
