"""Metrics: pixel video -> reward. The contract, the registry, the checks, isolation, and the built-in metrics."""

from latent_rewards.metrics.checks import check_metric
from latent_rewards.metrics.command import command_metric
from latent_rewards.metrics.isolation import isolate
from latent_rewards.metrics.metric import Metric, MetricInfo
from latent_rewards.metrics.motion import dis_flow
from latent_rewards.metrics.registry import create_metric, list_metrics, metric_info, register_metric
from latent_rewards.metrics.remote import http_metric
from latent_rewards.metrics.reward_func import as_reward_func, from_reward_func
from latent_rewards.metrics.vbench import VBenchScore, vbench_score

__all__ = [
    "Metric",
    "MetricInfo",
    "VBenchScore",
    "as_reward_func",
    "check_metric",
    "command_metric",
    "create_metric",
    "dis_flow",
    "from_reward_func",
    "http_metric",
    "isolate",
    "list_metrics",
    "metric_info",
    "register_metric",
    "vbench_score",
]
