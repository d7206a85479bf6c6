from __future__ import annotations

import pytest
import torch

from latent_rewards.lro.checks import OffPolicyError, check_finite, check_on_policy, describe
from latent_rewards.lro.sampling import Batch
from latent_rewards.rollout import policy_transitions, rollout
from latent_rewards.training.loop import NonFiniteError


def batch(count: int = 3) -> Batch:
    return Batch(range(count), [f"prompt {i}" for i in range(count)], [10 + i for i in range(count)], torch.zeros(1), 1)


def test_non_finite_values_are_named_by_step_and_sample():
    check_finite("reward", torch.zeros(3), 4, batch())
    values = torch.tensor([0.0, float("nan"), float("inf")])
    with pytest.raises(
        NonFiniteError, match=r"reward not finite at step 4, samples 11 \('prompt 1'\), 12 \('prompt 2'\)"
    ):
        check_finite("reward", values, 4, batch())


def test_long_lists_are_cut():
    assert describe(batch(11), list(range(11))).endswith("17 ('prompt 7') and 3 more")


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_policy_that_moved_since_its_rollout_is_off_policy(linear_policy, num_steps):
    policy = linear_policy(dim=2)
    noise = torch.ones(num_steps, 3, 2, 1, 1, 1, dtype=torch.float64)
    trajectory = rollout(policy, range(3), noise, num_steps)
    check_on_policy(0, trajectory, policy_transitions(policy, trajectory), 0.1)
    with torch.no_grad():
        policy.shift += 0.1
    with pytest.raises(OffPolicyError, match="at update 5 the policy gives another mean for step 0"):
        check_on_policy(5, trajectory, policy_transitions(policy, trajectory), 0.1)
