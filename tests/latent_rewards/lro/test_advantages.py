from __future__ import annotations

import math
from unittest.mock import MagicMock

import pytest
import torch
from accelerate import Accelerator

from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.lro.advantages import (
    group_normalized,
    leave_one_out,
    normalize_each,
    normalize_then_sum,
    reward_scale,
)

NAN = math.nan


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


REWARDS = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_leave_one_out_equals_the_textbook_formula():
    expected = []
    for group in REWARDS.view(3, 4).tolist():
        expected += [r - (sum(group) - r) / 3 for r in group]
    torch.testing.assert_close(leave_one_out(REWARDS, 4), tensor(*expected), rtol=1e-12, atol=1e-12)


def test_baseline_that_includes_the_sample_shrinks_by_one_minus_one_over_g():  # row 12
    groups = REWARDS.view(3, 4)
    included = (groups - groups.mean(1, keepdim=True)).view(-1)
    torch.testing.assert_close(included, (1 - 1 / 4) * leave_one_out(REWARDS, 4), rtol=1e-12, atol=1e-12)


def test_group_normalized_is_invariant_to_positive_affine_maps():  # row 12
    advantages = group_normalized(REWARDS, 4)
    torch.testing.assert_close(group_normalized(3e-6 * REWARDS + 5, 4), advantages, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(group_normalized(-REWARDS, 4), -advantages, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(advantages.view(3, 4).std(1), torch.ones(3, dtype=torch.float64))


def test_a_constant_group_has_no_advantage():
    assert group_normalized(tensor(2, 2, 1, 3), 2).tolist()[:2] == [0, 0]
    assert leave_one_out(tensor(2, 2, 1, 3), 2).tolist() == [0, 0, -2, 2]


def test_nan_enters_no_baseline_and_has_no_advantage():
    rewards = tensor(1, NAN, 3, NAN, NAN, 7)
    assert leave_one_out(rewards, 3).tolist() == [-2, 0, 2, 0, 0, 0]
    normal = group_normalized(rewards, 3)
    torch.testing.assert_close(normal, tensor(-1, 0, 1, 0, 0, 0) / math.sqrt(2), rtol=1e-12, atol=1e-12)


def test_normalize_then_sum_gives_rewards_of_any_range_the_same_say():
    small, large = REWARDS, REWARDS.flip(0)
    weights = {"small": 1.0, "large": 0.5}
    expected = group_normalized(small, 4) + 0.5 * group_normalized(large, 4)
    summed = normalize_then_sum({"small": 1e-3 * small, "large": 1e3 * large}, weights, 4)
    torch.testing.assert_close(summed, expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(DataError, match="'other'"):
        normalize_then_sum({"small": small}, {"other": 1.0}, 4)
    with pytest.raises(ConfigError, match="empty"):
        normalize_then_sum({"small": small}, {}, 4)


def test_the_sum_of_normalised_rewards_is_gdpos_and_its_statistics_constants():
    rewards = {"a": REWARDS.clone().requires_grad_(), "b": REWARDS.flip(0).exp()}
    each = normalize_each(rewards, ["a", "b"], 4)
    total = 2 * each["a"] - 0.5 * each["b"]
    torch.testing.assert_close(total, normalize_then_sum(rewards, {"a": 2.0, "b": -0.5}, 4), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(leave_one_out(total, 4), 4 / 3 * total, rtol=1e-12, atol=1e-12)
    (slope,) = torch.autograd.grad(each["a"].sum(), rewards["a"])
    stds = REWARDS.view(3, 4).std(1, keepdim=True)
    torch.testing.assert_close(slope, (1 / stds).expand(3, 4).reshape(-1), rtol=1e-12, atol=0)
    # Several draws per sample share the statistics of the samples' means.
    draws = torch.stack([REWARDS + 1, REWARDS - 1])
    several = normalize_each({"a": draws.flatten()}, ["a"], 4, repeats=2)["a"].view(2, 3, 4)
    torch.testing.assert_close(several.mean(0).view(-1), each["a"].detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(several[0] - several[1], (2 / stds).expand(3, 4), rtol=1e-12, atol=1e-12)
    constant = normalize_each({"a": tensor(1, NAN, 1, 5, 6, NAN)}, ["a"], 3)["a"]
    assert constant[[0, 2]].tolist() == [0, 0] and constant.isnan().tolist() == [False, True, False, False, False, True]
    with pytest.raises(DataError, match="'other'"):
        normalize_each(rewards, ["other"], 4)


def test_reward_scale():
    rewards = tensor(0, 2, 5, 5)
    assert reward_scale(rewards, 2, "none").tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(reward_scale(rewards, 2, "group"), tensor(math.sqrt(2), math.sqrt(2), 1, 1))
    torch.testing.assert_close(reward_scale(rewards, 2, "batch"), rewards.std().expand(4))
    with pytest.raises(ConfigError, match="'pair'"):
        reward_scale(rewards, 2, "pair")


@pytest.mark.parametrize("function", [leave_one_out, group_normalized])
def test_group_sizes_are_checked(function):
    with pytest.raises(ConfigError, match="at least 2"):
        function(REWARDS, 1)
    with pytest.raises(DataError, match="multiple of num_generations=5"):
        function(REWARDS, 5)


def test_leave_one_out_equals_trl():
    """TRL computes RLOO advantages inside a method of its trainer, which runs here on a stand-in for the trainer."""
    import latent_rewards.training  # noqa: F401 - lets torchvision, which TRL imports, load beside a CPU build of torch

    rloo = pytest.importorskip("trl.trainer.rloo_trainer")
    rewards = tensor(1, NAN, 3, 5, NAN, NAN, NAN, 7, 2, 2, -1, 0).float()
    ones = torch.ones(12, 1)
    trainer = MagicMock()
    trainer.accelerator = Accelerator(cpu=True)
    trainer.configure_mock(
        num_generations=4,
        beta=0.0,
        reward_clip_range=None,
        normalize_advantages=False,
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        reward_func_names=["r"],
        reward_weights=torch.ones(1),
        _pending_extra_logs={},
        _pending_metrics={},
    )
    trainer._tokenizer.pad_token_id = 0
    trainer._generate.return_value = ([[1]] * 12, [[2]] * 12, ["x"] * 12)
    trainer._get_per_token_logps_and_entropies.return_value = (ones, None, None)
    trainer._calculate_rewards.return_value = rewards[:, None]
    outputs = rloo.RLOOTrainer._generate_and_score_completions(trainer, [{"prompt": "p"}] * 12)
    torch.testing.assert_close(leave_one_out(rewards, 4), outputs["advantages"])
