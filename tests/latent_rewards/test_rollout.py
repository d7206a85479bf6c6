from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

from latent_rewards.contracts import DataError
from latent_rewards.rollout import (
    Trajectory,
    gaussian_kl,
    gaussian_log_prob,
    gaussian_log_ratio,
    path_chain,
    path_kl,
    policy_transitions,
    rollout,
    trajectory_kl,
    trajectory_log_probs,
)

SIGMA = 0.5


class Linear(nn.Module):
    """mean = gain * x; std = SIGMA, 0 at the last step."""

    def __init__(self, gain: float, sigma: float = SIGMA, last: float = 0.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))
        self.sigma, self.last = sigma, last

    def transition(self, latents: Tensor, step: int, num_steps: int, condition: object) -> tuple[Tensor, Tensor]:
        std = self.last if step + 1 == num_steps else self.sigma
        return self.gain * latents, torch.tensor(std, dtype=torch.float64)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_states_follow_the_chain_and_the_last_step_injects_nothing():
    stack = noise(3, 2, 1, 1, 2, 2)
    trajectory = rollout(Linear(2.0), range(2), stack, 3)
    x1 = 2 * stack[0] + SIGMA * stack[1]
    x2 = 2 * x1 + SIGMA * stack[2]
    for state, expected in zip(trajectory.states, [stack[0], x1, x2, 2 * x2], strict=True):
        assert torch.equal(state, expected)
    assert trajectory.final is trajectory.states[-1] and trajectory.num_steps == 3
    assert torch.equal(trajectory.means[1], 2 * x1) and not trajectory.means[1].requires_grad
    assert trajectory.final.requires_grad  # recording a gradient is the caller's choice


def test_rollout_refuses_a_wrong_noise_stack_and_a_random_last_step():
    with pytest.raises(DataError, match=r"num_steps=2, B=3"):
        rollout(Linear(1.0), range(3), noise(2, 2, 1, 1, 1, 1), 2)
    with pytest.raises(DataError, match="deterministic"):
        rollout(Linear(1.0, last=0.1), range(2), noise(2, 2, 1, 1, 1, 1), 2)


def test_log_prob_is_the_sum_over_dimensions():  # row 11
    x, mean = noise(3, 2, 2, 1, 2), noise(3, 2, 2, 1, 2, seed=1)
    std = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64).view(3, 1, 1, 1, 1)
    expected = Independent(Normal(mean, std), 4).log_prob(x)
    torch.testing.assert_close(gaussian_log_prob(x, mean, std), expected, rtol=1e-12, atol=1e-12)
    assert gaussian_log_prob(x.bfloat16(), mean.bfloat16(), 1.0).dtype == torch.float32


def test_log_ratio_is_the_difference_of_log_probs_and_exactly_zero_for_equal_means():
    x, mean, old = (noise(4, 1, 1, 2, 3, seed=s) for s in range(3))
    expected = gaussian_log_prob(x, mean, 0.7) - gaussian_log_prob(x, old, 0.7)
    torch.testing.assert_close(gaussian_log_ratio(x, mean, old, 0.7), expected, rtol=1e-12, atol=1e-12)
    assert gaussian_log_ratio(x, mean, mean.clone(), 0.7).eq(0).all()
    mean.requires_grad_()
    (ratio,) = torch.autograd.grad(gaussian_log_ratio(x, mean, mean.detach(), 0.7).sum(), mean)
    (score,) = torch.autograd.grad(gaussian_log_prob(x, mean, 0.7).sum(), mean)
    torch.testing.assert_close(ratio, score, rtol=1e-12, atol=1e-12)


def test_kl_matches_torch_with_equal_and_unequal_std():  # row 14
    mean_p, mean_q = noise(3, 2, 1, 2, 2), noise(3, 2, 1, 2, 2, seed=1)
    for std_p, std_q in ((0.5, 0.5), (0.5, 2.0)):
        p = Independent(Normal(mean_p, std_p), 4)
        q = Independent(Normal(mean_q, std_q), 4)
        torch.testing.assert_close(gaussian_kl(mean_p, mean_q, std_p, std_q), kl_divergence(p, q), rtol=1e-12, atol=0)
    torch.testing.assert_close(gaussian_kl(mean_p, mean_q, 0.5), gaussian_kl(mean_p, mean_q, 0.5, 0.5))


def test_a_std_of_zero_has_no_density():
    x = noise(2, 1, 1, 1, 1)
    for call in (gaussian_log_prob, gaussian_kl):
        with pytest.raises(DataError, match="no density"):
            call(x, x, 0.0)
    with pytest.raises(DataError, match="no density"):
        trajectory_log_probs(Linear(1.0, sigma=0.0), Trajectory([x, x, x], range(2), 2))


def test_trajectory_log_probs_have_one_column_per_random_step():
    policy = Linear(1.5)
    trajectory = rollout(policy, range(2), noise(3, 2, 1, 1, 1, 2), 3)
    log_probs = trajectory_log_probs(policy, trajectory)
    assert log_probs.shape == (2, 2)
    expected = gaussian_log_prob(trajectory.states[2], 1.5 * trajectory.states[1], SIGMA)
    torch.testing.assert_close(log_probs[:, 1], expected)
    assert trajectory_log_probs(policy, rollout(policy, range(2), noise(1, 2, 1, 1, 1, 2), 1)).shape == (2, 0)


def test_trajectory_kl_is_per_state_and_measures_the_last_step_in_head_units():
    policy, reference, head = Linear(1.5), Linear(1.0), 0.2
    trajectory = rollout(policy, range(2), noise(2, 2, 1, 1, 1, 3), 2)
    x0, x1 = (state.detach().flatten(1) for state in trajectory.states[:2])
    kl = trajectory_kl(policy, reference, trajectory, head)
    expected = torch.stack([0.25 * x0.square().sum(1) / (2 * SIGMA**2), 0.25 * x1.square().sum(1) / (2 * head**2)], 1)
    torch.testing.assert_close(kl, expected, rtol=1e-12, atol=0)
    # Per-state: d/dgain of (gain - 1)^2 x^2 / (2 s^2) at fixed states, nothing through x1 = gain x0 + sigma eps.
    (gradient,) = torch.autograd.grad(kl[:, 1].sum(), policy.gain)
    torch.testing.assert_close(gradient, (0.5 * x1.square().sum() / head**2), rtol=1e-12, atol=0)
    assert reference.gain.grad is None


def test_the_kl_of_a_path_has_the_same_values_and_a_gradient_through_the_states():
    policy, reference, head = Linear(1.5), Linear(1.0), 0.2
    reference.requires_grad_(False)
    stack = noise(3, 2, 1, 1, 1, 3)
    with torch.no_grad():
        trajectory = rollout(policy, range(2), stack, 3)
    x = [state.flatten(1) for state in trajectory.states[:3]]
    kl = path_kl(path_chain(policy, trajectory), reference, trajectory, head)
    torch.testing.assert_close(kl, trajectory_kl(policy, reference, trajectory, head), rtol=1e-12, atol=0)
    # KL_k = (gain - 1)^2 x_k^2 / (2 s_k^2) with dx_1/dgain = x_0 and dx_2/dgain = x_1 + gain x_0.
    slopes = [0 * x[0], x[0], x[1] + 1.5 * x[0]]
    exact = [(0.5 * x[k] ** 2 + 0.25 * x[k] * slopes[k]).sum() / s**2 for k, s in enumerate((SIGMA, SIGMA, head))]
    for k in range(3):
        (gradient,) = torch.autograd.grad(kl[:, k].sum(), policy.gain, retain_graph=True)
        torch.testing.assert_close(gradient, exact[k], rtol=1e-12, atol=0)
    # Through the last two steps only: x_1 is a constant.
    chain = path_chain(policy, trajectory, last_k=2)
    (gradient,) = torch.autograd.grad(path_kl(chain, reference, trajectory, head)[:, 2].sum(), policy.gain)
    expected = (0.5 * x[2] ** 2 + 0.25 * x[2] * x[1]).sum() / head**2
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)
    assert [state.requires_grad for state in chain.states] == [False, False, True]
    assert torch.equal(chain.final, trajectory.final)


def test_per_state_kl_is_unbiased_for_the_kl_of_the_chains():
    # KL(p || q) of x_1 | x_0 = 1 and x_2 | x_1, Gaussian head on the last step: E sum_k KL_k in closed form.
    policy, reference, head, count = Linear(1.2), Linear(1.0), 0.5, 40_000
    stack = noise(2, count, 1, 1, 1, 1)
    stack[0] = 1.0
    with torch.no_grad():
        sums = trajectory_kl(policy, reference, rollout(policy, range(count), stack, 2), head).sum(1)
    exact = 0.04 / (2 * SIGMA**2) + 0.04 * (1.2**2 + SIGMA**2) / (2 * head**2)
    assert abs(float(sums.mean()) - exact) < 4.5 * float(sums.std()) / math.sqrt(count)


def test_shared_transitions_give_the_same_values():
    policy, reference = Linear(1.5), Linear(1.0)
    trajectory = rollout(policy, range(2), noise(3, 2, 1, 1, 1, 2), 3)
    steps = policy_transitions(policy, trajectory)
    assert torch.equal(trajectory_log_probs(policy, trajectory, steps), trajectory_log_probs(policy, trajectory))
    assert torch.equal(
        trajectory_kl(policy, reference, trajectory, 0.1, steps), trajectory_kl(policy, reference, trajectory, 0.1)
    )
