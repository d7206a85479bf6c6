"""Proxies: latents -> rewards, learned from a few thousand true scores, differentiable and calibrated."""

from latent_rewards.proxies.config import ProxyConfig
from latent_rewards.proxies.fit import train_proxy
from latent_rewards.proxies.preferences import Preferences
from latent_rewards.proxies.proxy import ProxyPrediction, RewardProxy
from latent_rewards.proxies.refresh import update_proxy
from latent_rewards.proxies.report import format_report

__all__ = [
    "Preferences",
    "ProxyConfig",
    "ProxyPrediction",
    "RewardProxy",
    "format_report",
    "train_proxy",
    "update_proxy",
]
