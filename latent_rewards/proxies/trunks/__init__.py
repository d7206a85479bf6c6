"""Trunks: latents (and a condition vector) -> features; one file each, one registry.

A trunk of the ensemble is a module ``trunk(latents [B, C, F, H, W], condition [B, P] or None) -> [B, F', K]``, one
vector per frame, with the attribute ``num_features`` = K. What all members share is made before them: the features of a
frozen video transformer (:mod:`latent_rewards.proxies.trunks.backbone`), or the frames of a tiny decoder
(:mod:`latent_rewards.proxies.trunks.tiny_decoder`), which the trunk "pixels" reads in place of latents. The registry
also lists ridge regressions, which are no modules and solved in closed form (:mod:`latent_rewards.proxies.linear`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from latent_rewards.contracts import ConfigError, unknown_name
from latent_rewards.proxies.trunks.conv3d import Conv3dTrunk
from latent_rewards.proxies.trunks.pixels import PixelTrunk
from latent_rewards.proxies.trunks.transformer import TransformerTrunk

AUTO = "auto"
"""Not a trunk: the choice among the registered ones is left to cross-validation."""

Builder = Callable[[tuple[int, ...], int, int, int], nn.Module]
"""``(latent_shape, width, depth, condition width)`` -> trunk; the condition is the prompt's vector and the time's."""


@dataclass(frozen=True)
class TrunkKind:
    """One entry of the registry.

    Attributes:
        name: what ``ProxyConfig(trunk=...)`` says.
        build: makes the trunk of one member; None for closed forms and for those that share a backbone.
        closed_form: a ridge regression; it has one member, no sample updates and no notion of time.
        needs_backbone: reads ``train_proxy(..., backbone=...)``.
        needs_codec: reads frames that a tiny decoder draws, distilled from ``train_proxy(..., codec=...)``.
        network_per_reward: every reward has a trunk and a head of its own in each member; for trunks that cost little
            beside what all share, since rewards that are learned together disturb each other.
        depth: blocks, where the config does not say how many.
        passes: over the training data, where the config does not say how many updates there are.
        most_updates: likewise.
    """

    name: str
    build: Builder | None = None
    closed_form: bool = False
    needs_backbone: bool = False
    needs_codec: bool = False
    network_per_reward: bool = False
    depth: int = 2
    passes: int = 18
    most_updates: int = 600


_KINDS: dict[str, TrunkKind] = {}


def register_trunk(kind: TrunkKind) -> None:
    """Add a trunk to the registry, so that ``ProxyConfig(trunk=kind.name)`` finds it and ``"auto"`` tries it.

    A proxy is saved with the name only: register the same trunk before loading it.

    Raises:
        ConfigError: the name is taken, or there is nothing that builds it.
    """
    if kind.name in _KINDS or kind.name == AUTO:
        raise ConfigError(f"a trunk named {kind.name!r} exists; choose another name")
    if kind.build is None and not (kind.closed_form or kind.needs_backbone):
        raise ConfigError(f"trunk {kind.name!r} has no build; give a callable (latent_shape, width, depth, condition)")
    _KINDS[kind.name] = kind


def trunk_kind(name: str) -> TrunkKind:
    """Return the entry of that name.

    Raises:
        ConfigError: there is none; the message lists close names.
    """
    if name not in _KINDS:
        raise ConfigError(unknown_name("trunk", name, [*_KINDS, AUTO]))
    return _KINDS[name]


def list_trunks() -> tuple[str, ...]:
    """Return the registered names, cheapest first, as they were registered."""
    return tuple(_KINDS)


for _kind in (
    TrunkKind("linear", closed_form=True),
    TrunkKind("conv3d", Conv3dTrunk),
    TrunkKind("transformer", TransformerTrunk),
    TrunkKind("backbone_linear", closed_form=True, needs_backbone=True),
    TrunkKind("backbone", needs_backbone=True),
    TrunkKind("pixels", PixelTrunk, needs_codec=True, network_per_reward=True, depth=1, passes=90, most_updates=2500),
):
    register_trunk(_kind)

__all__ = [
    "AUTO",
    "Conv3dTrunk",
    "PixelTrunk",
    "TransformerTrunk",
    "TrunkKind",
    "list_trunks",
    "register_trunk",
    "trunk_kind",
]
