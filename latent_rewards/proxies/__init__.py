"""Proxies: latents -> rewards, learned from a few thousand true scores, differentiable and calibrated."""

from latent_rewards.proxies.config import ProxyConfig
from latent_rewards.proxies.fit import train_proxy
from latent_rewards.proxies.preferences import Preferences
from latent_rewards.proxies.proxy import ProxyPrediction, RewardProxy
from latent_rewards.proxies.refresh import update_proxy
from latent_rewards.proxies.report import format_report
from latent_rewards.proxies.trunks import TrunkKind, register_trunk
from latent_rewards.proxies.trunks.backbone import VideoBackbone, WanBackbone

__all__ = [
    "Preferences",
    "ProxyConfig",
    "ProxyPrediction",
    "RewardProxy",
    "TrunkKind",
    "VideoBackbone",
    "WanBackbone",
    "format_report",
    "register_trunk",
    "train_proxy",
    "update_proxy",
]
