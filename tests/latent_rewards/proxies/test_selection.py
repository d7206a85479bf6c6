"""The trunk that errs least on prompts it has not seen is chosen, within the budget, and the same one every time."""

import math

import pytest
import torch

from latent_rewards.contracts import ConfigError
from latent_rewards.proxies import ProxyConfig, RewardProxy, WanBackbone, train_proxy, trunks
from latent_rewards.proxies.samples import gather_samples
from latent_rewards.proxies.selection import applicable, candidate, choose_trunk, remember, updates_each


def test_candidates_are_those_that_apply():
    config = ProxyConfig(trunk="auto")
    assert applicable(config, False) == ("linear", "conv3d", "transformer")
    assert applicable(config, False, has_codec=True) == ("linear", "conv3d", "transformer", "pixels")
    assert applicable(config, True, 2) == ("conv3d", "transformer", "backbone_linear", "backbone")
    assert applicable(config, True) == ("linear", "conv3d", "transformer", "backbone_linear", "backbone")
    noisy = ProxyConfig(trunk="auto", noise_levels=(0.0, 0.5))
    assert applicable(noisy, True) == ("conv3d", "transformer", "backbone")
    robust = ProxyConfig(trunk="auto", objective="huber")
    assert applicable(robust, True) == ("conv3d", "transformer", "backbone"), "ridge knows the squared error only"
    adapted = ProxyConfig(trunk="auto", adapter_rank=4)
    assert [candidate(adapted, name).adapter_rank for name in ("linear", "backbone")] == [0, 4]


def test_the_budget_is_shared_in_sample_updates():
    config = ProxyConfig(trunk="auto", batch_size=64)
    # By default as many as one training of three members of 450 updates of 64: a sixth each for 2 trunks in 3 folds.
    assert updates_each(config, 1600, 2) == 3 * 450 // 6
    assert updates_each(ProxyConfig(trunk="auto", selection_budget=64 * 6 * 30 + 1), 1600, 2) == 30
    assert updates_each(ProxyConfig(trunk="auto", selection_budget=10**9), 1600, 2) == 450
    assert updates_each(ProxyConfig(trunk="auto", selection_budget=6 * 20 * 30), 20, 2) == 30
    assert updates_each(config, 1600, 0) == 0
    assert updates_each(ProxyConfig(trunk="auto", ensemble_size=1, num_updates=30), 1600, 2) == 25
    with pytest.raises(ConfigError, match="selection_budget=9599 .* give at least 9600"):
        updates_each(ProxyConfig(trunk="auto", selection_budget=9599), 1600, 2)


def test_the_least_squared_error_over_all_folds_wins():
    prompts = [f"clip {i % 20}" for i in range(120)]
    rewards = torch.arange(120.0)
    rewards[5] = math.nan
    samples = gather_samples(torch.randn(120, 1, 1, 2, 2), {"a": rewards}, prompts)
    training = torch.arange(0, 120, 1)[torch.arange(120) % 20 != 3]
    errors, asked = {"linear": 0.5, "conv3d": 0.3, "transformer": 0.3}, []

    def judge(settings, rows, others):
        asked.append((settings.trunk, rows, others))
        assert (settings.ensemble_size, settings.num_updates, settings.progress) == (
            1,
            1 if settings.trunk == "linear" else 40,
            False,
        )
        return samples.rewards[others] + errors[settings.trunk], samples.rewards[others]

    config = ProxyConfig(trunk="auto", selection_budget=40 * 6 * 64, progress=False, width=32)
    chosen, found = choose_trunk(config, samples, training, judge, has_backbone=False)
    assert chosen == ProxyConfig(trunk="conv3d", selection_budget=40 * 6 * 64, progress=False, width=32)
    assert found["chosen"] == "conv3d" and found["sample_updates"] == 40 * 6 * 64 and found["num_samples"] == 114
    assert {name: entry["mse"] for name, entry in found["candidates"].items()} == pytest.approx(
        {name: error**2 for name, error in errors.items()}
    )
    assert found["candidates"]["linear"]["sample_updates"] == 0
    assert found["candidates"]["conv3d"]["rewards"]["a"]["mae"] == pytest.approx(0.3)
    for name in errors:
        judged = torch.cat([others for trunk, _, others in asked if trunk == name])
        assert torch.equal(judged.sort().values, training)
    for _, rows, others in asked:
        assert not {prompts[i] for i in rows.tolist()} & {prompts[i] for i in others.tolist()}


def test_auto_takes_ridge_for_a_linear_reward_and_says_so(world, quick, tmp_path):
    latents = world[0](200, 0)
    config = quick(trunk="auto", num_updates=30)
    proxy = train_proxy(latents, latents[:, 0].mean(dim=(1, 2, 3)), config=config)
    assert proxy.config.trunk == "linear" == proxy.selection["chosen"]
    assert list(proxy.selection["candidates"]) == ["linear", "conv3d", "transformer"]
    assert list(proxy.report) == ["reward"]
    proxy.save_pretrained(tmp_path / "p")
    assert RewardProxy.from_pretrained(tmp_path / "p").selection == proxy.selection


def test_auto_takes_a_network_for_a_curved_reward_and_is_reproducible(world, quick, monkeypatch):
    monkeypatch.setattr(trunks, "_KINDS", {name: trunks.trunk_kind(name) for name in ("linear", "conv3d")})
    draw, curved = world
    latents = draw(240, 0)
    config = quick(trunk="auto", num_updates=50, selection_budget=10**6, ensemble_size=1)
    proxy = train_proxy(latents, curved(latents), config=config)
    candidates = proxy.selection["candidates"]
    assert proxy.config.trunk == "conv3d"
    assert candidates["conv3d"]["mse"] < 0.8 * candidates["linear"]["mse"]
    again = train_proxy(latents, curved(latents), config=config)
    assert again.selection == proxy.selection and torch.equal(again(latents[:4]), proxy(latents[:4]))
    alone = train_proxy(
        latents, curved(latents), config=quick(trunk=proxy.config.trunk, num_updates=50, ensemble_size=1)
    )
    assert torch.equal(alone(latents[:4]), proxy(latents[:4])) and alone.selection == {}


def test_a_backbone_is_tried_where_there_is_one(make_wan, quick):
    source = torch.Generator().manual_seed(0)
    latents = torch.randn(90, 4, 1, 4, 4, generator=source)
    config = quick(trunk="auto", num_updates=25, selection_budget=10**6, ensemble_size=1)
    backbone = WanBackbone(make_wan(num_layers=1), num_blocks=1, text_length=2)
    proxy = train_proxy(latents, latents[:, 0].mean(dim=(1, 2, 3)), config=config, backbone=backbone)
    assert list(proxy.selection["candidates"]) == ["linear", "conv3d", "transformer", "backbone_linear", "backbone"]
    assert proxy.config.trunk in ("linear", "backbone_linear")
    assert (proxy.shared is None) == (proxy.config.trunk == "linear")


def test_the_short_form_is_auto_and_nothing_else(world):
    latents = world[0](64, 0)
    with pytest.raises(ConfigError, match="'auto'; got 'Auto'"):
        train_proxy(latents, latents[:, 0].mean(dim=(1, 2, 3)), config="Auto")


def test_candidates_share_what_an_encoder_said_and_the_proxy_keeps_the_encoder_itself(world, quick, monkeypatch):
    monkeypatch.setattr(trunks, "_KINDS", {"linear": trunks.trunk_kind("linear")})
    asked = []

    def encode(texts):
        asked.append(list(texts))
        return torch.tensor([[float(len(text)), 1.0] for text in texts])

    memory = remember(encode)
    assert torch.equal(memory(["a", "bb"]), memory(["a", "bb"])) and asked == [["a", "bb"]]
    assert memory(["bb"]).tolist() == [[2.0, 1.0]]
    asked.clear()
    latents = world[0](64, 0)
    proxy = train_proxy(latents, latents[:, 0].mean(dim=(1, 2, 3)), ["a", "bb"] * 32, config="auto", encode=encode)
    assert proxy._encoder.value is encode
    # A prompt to see the kind, and all of them to read them: once while choosing, once for the proxy that is kept.
    assert asked.count(["a", "bb"]) == 2 and asked.count(["a"]) == 2
