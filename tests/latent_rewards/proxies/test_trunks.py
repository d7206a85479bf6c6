"""Every trunk is found by its name, an unknown one by its neighbours; one of the user's own is a trunk like any."""

import pytest
import torch
from torch import nn

from latent_rewards.contracts import ConfigError
from latent_rewards.proxies import ProxyConfig, RewardProxy, TrunkKind, register_trunk, train_proxy, trunks
from latent_rewards.proxies.text import PromptFeatures
from latent_rewards.proxies.trunks import Conv3dTrunk, TransformerTrunk, list_trunks, trunk_kind


def test_the_registry_knows_every_trunk_and_names_close_ones():
    assert list_trunks()[:5] == ("linear", "conv3d", "transformer", "backbone_linear", "backbone")
    assert list_trunks()[5] == "pixels" and [kind.needs_codec for kind in map(trunk_kind, list_trunks()[:6])] == [
        *[False] * 5,
        True,
    ]
    assert (trunk_kind("conv3d").build, trunk_kind("transformer").build) == (Conv3dTrunk, TransformerTrunk)
    assert [trunk_kind(name).closed_form for name in list_trunks()[:5]] == [True, False, False, True, False]
    assert [trunk_kind(name).needs_backbone for name in list_trunks()[:5]] == [False, False, False, True, True]
    with pytest.raises(ConfigError, match=r"unknown trunk 'transfomer'. Did you mean 'transformer'\?"):
        trunk_kind("transfomer")


def test_a_name_is_registered_once_and_needs_something_that_builds_it():
    with pytest.raises(ConfigError, match="'conv3d' exists"):
        register_trunk(TrunkKind("conv3d", Conv3dTrunk))
    with pytest.raises(ConfigError, match="'auto' exists"):
        register_trunk(TrunkKind("auto", Conv3dTrunk))
    with pytest.raises(ConfigError, match="'empty' has no build"):
        register_trunk(TrunkKind("empty"))


class FrameMeans(nn.Module):
    """A trunk of one's own: each frame's channel means, projected."""

    def __init__(self, latent_shape, width, depth, condition_width):
        super().__init__()
        self.num_features = width
        self.project = nn.Linear(latent_shape[0], width)

    def forward(self, latents, condition):
        return self.project(latents.mean(dim=(3, 4)).transpose(1, 2))


def test_a_trunk_of_ones_own_is_trained_stored_and_loaded(world, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(trunks, "_KINDS", dict(trunks._KINDS))
    register_trunk(TrunkKind("frame_means", FrameMeans))
    latents = world[0](200, 0)
    proxy = train_proxy(latents, latents[:, 0].mean(dim=(1, 2, 3)), config=quick(trunk="frame_means"))
    assert proxy.report["reward"]["spearman"] > 0.8
    proxy.save_pretrained(tmp_path / "p")
    loaded = RewardProxy.from_pretrained(tmp_path / "p")
    assert isinstance(loaded.members[0].trunk, FrameMeans)
    assert torch.equal(loaded(latents[:4]), proxy(latents[:4]))


def test_the_transformer_learns_what_ridge_cannot(world, quick):
    draw, curved = world
    latents = draw(600, 0)
    config = quick(trunk="transformer", num_updates=150, ensemble_size=1)
    entry = train_proxy(latents, curved(latents), config=config).report["reward"]
    assert entry["spearman"] > 0.8 and entry["ridge"]["spearman"] < 0.4


def test_a_proxy_has_one_trunk():
    with pytest.raises(ConfigError, match="one trunk"):
        RewardProxy(ProxyConfig(trunk="auto"), (1, 1, 2, 2), ("a",), PromptFeatures("none", 0))


def test_a_trunk_brings_its_own_depth_and_a_config_overrides_it():
    assert [ProxyConfig(trunk=name).blocks for name in ("conv3d", "transformer", "pixels")] == [2, 2, 1]
    assert ProxyConfig(trunk="pixels", depth=3).blocks == 3
