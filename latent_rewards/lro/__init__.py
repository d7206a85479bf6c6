"""Latent reward optimisation: advantages, gradient estimators, the guard and the trainers."""

from latent_rewards.lro.advantages import group_normalized, leave_one_out, normalize_then_sum
from latent_rewards.lro.checks import OffPolicyError
from latent_rewards.lro.config import LROConfig
from latent_rewards.lro.constraints import Lagrangian, relative_floors, true_means
from latent_rewards.lro.estimators import hybrid, pathwise, reinforce, smoothed
from latent_rewards.lro.guard import Guard, RefreshSchedule
from latent_rewards.lro.pareto import PreferredReward, WeightConditioned
from latent_rewards.lro.result import TrainResult
from latent_rewards.lro.trainers import DifferentiableRewardTrainer, ReinforceTrainer
from latent_rewards.lro.true_reward import DecodedReward, TrueReward

__all__ = [
    "DecodedReward",
    "DifferentiableRewardTrainer",
    "Guard",
    "LROConfig",
    "Lagrangian",
    "OffPolicyError",
    "PreferredReward",
    "RefreshSchedule",
    "ReinforceTrainer",
    "TrainResult",
    "TrueReward",
    "WeightConditioned",
    "group_normalized",
    "hybrid",
    "leave_one_out",
    "normalize_then_sum",
    "pathwise",
    "reinforce",
    "relative_floors",
    "smoothed",
    "true_means",
]
