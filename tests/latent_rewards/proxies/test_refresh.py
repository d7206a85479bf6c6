"""A refresh makes a proxy good where the policy is now, without forgetting where it was."""

import math

import pytest
import torch

from latent_rewards.contracts import ConfigError, DataError, FingerprintMismatchError
from latent_rewards.dataset import RewardDataset
from latent_rewards.proxies import RewardProxy, train_proxy
from latent_rewards.proxies.report import accuracy


def dataset(draw, curved, count, seed, shift=0.0, **fingerprints):
    latents = draw(count, seed)
    latents[:, 0] += shift
    prompts = [f"clip {i % 20}" for i in range(count)]
    rewards = {"curve": curved(latents), "unused": torch.rand(count)}
    return RewardDataset.from_tensors(latents, prompts, rewards, **fingerprints)


@pytest.fixture(scope="module")
def trained(world, quick, tmp_path_factory):
    data = dataset(*world, 400, 0)
    rewards = {"curve": data.rewards["curve"]}
    proxy = train_proxy(data.latents(), rewards, data.prompts, latent_space="v", config=quick(num_updates=120))
    folder = tmp_path_factory.mktemp("proxy") / "p"
    proxy.save_pretrained(folder)
    return lambda: RewardProxy.from_pretrained(folder)


def test_it_learns_shifted_data_and_remembers_the_old(world, trained):
    proxy = trained()
    fresh, test = dataset(*world, 200, 1, shift=2.5), dataset(*world, 200, 2, shift=2.5)
    logs = proxy.update(fresh, replay=dataset(*world, 400, 0), num_updates=60, seed=3)
    assert logs["curve/mae_after"] < 0.6 * logs["curve/mae_before"]
    assert (logs["num_fresh"], logs["num_replay"], logs["num_updates"]) == (200, 400, 60)
    target = test.rewards["curve"]
    before, after = trained().predict(test.latents(), test.prompts), proxy.predict(test.latents(), test.prompts)
    assert accuracy(after.mean["curve"], target)["mae"] < 0.6 * accuracy(before.mean["curve"], target)["mae"]
    inside = (after.mean["curve"] - target).abs() <= 1.645 * after.std["curve"]
    assert abs(float(inside.float().mean()) - 0.9) < 4.5 * math.sqrt(0.09 * (1 / 200 + 1 / 30))
    assert float(before.ood["curve"].mean()) > 0.8 > float(after.ood["curve"].mean())
    forgetful = trained()
    forgetful.update(fresh, num_updates=60, seed=3)
    old = dataset(*world, 200, 5)
    kept, lost = (
        accuracy(p.scores(old.latents(), old.prompts)["curve"], old.rewards["curve"]) for p in (proxy, forgetful)
    )
    assert kept["mae"] < 0.8 * lost["mae"]
    assert not any(parameter.requires_grad for parameter in proxy.parameters())


def test_it_is_reproducible_and_zero_updates_keep_the_weights(world, trained):
    fresh = dataset(*world, 40, 1)
    states = []
    for seed in (3, 3, 4):
        proxy = trained()
        proxy.update(fresh, replay=fresh, num_updates=2, seed=seed)
        states.append(proxy.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert any(not torch.equal(value, states[2][name]) for name, value in states[0].items())
    proxy = trained()
    logs = proxy.update(fresh.latents(), {"curve": fresh.rewards["curve"]}, fresh.prompts, num_updates=0)
    assert all(
        torch.equal(a, b) for a, b in zip(proxy.members.parameters(), trained().members.parameters(), strict=True)
    )
    assert logs["num_replay"] == 0


def test_a_refresh_renews_the_map_the_intervals_and_the_threshold(world, quick):
    draw, curved = world
    proxy = train_proxy(
        draw(300, 0), curved(draw(300, 0)), config=quick(num_updates=25, ensemble_size=2, calibrate_mean="isotonic")
    )
    before = {name: value.clone() for name, value in proxy.state_dict().items()}
    shifted = draw(400, 1) + 1
    logs = proxy.update(shifted, curved(shifted), num_updates=0)
    after = proxy.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {"monotone.values", "calibration.ratios", "ood_score.distances", "distance.mean"} <= changed
    assert not any(name.startswith("members") for name in changed) and int(proxy.ood_score.count) == 60
    assert logs["reward/mae_after"] > 0
    low, high = proxy.predict(draw(300, 2) + 1).interval(0.8)
    truth = curved(draw(300, 2) + 1)
    inside = ((truth >= low["reward"]) & (truth <= high["reward"])).float().mean()
    assert abs(float(inside) - 0.8) < 4.5 * math.sqrt(0.16 * (1 / 300 + 1 / 60))


def test_a_linear_proxy_is_solved_again(world, quick):
    latents = world[0](120, 0)
    rewards = latents[:, 0].mean(dim=(1, 2, 3))
    proxy = train_proxy(latents, rewards, config=quick(trunk="linear"))
    shifted = -3 * rewards + 1
    logs = proxy.update(latents, shifted)
    assert logs["reward/spearman_before"] < -0.8 and logs["reward/spearman_after"] > 0.8


def test_foreign_data_is_refused(world, trained):
    proxy = trained()
    with pytest.raises(FingerprintMismatchError, match="'v'.*'other'"):
        proxy.update(dataset(*world, 20, 1, latent_space="other"))
    with pytest.raises(FingerprintMismatchError, match="'v'.*'other'"):
        proxy.update(dataset(*world, 20, 1), replay=dataset(*world, 20, 1, latent_space="other"))
    proxy.metric_fingerprints = {"curve": "m@1"}
    with pytest.raises(FingerprintMismatchError, match="'m@1'.*'m@2'"):
        proxy.update(dataset(*world, 20, 1, metric_fingerprints={"curve": "m@2"}))
    with pytest.raises(DataError, match=r"lack \['curve'\]"):
        proxy.update(world[0](20, 1), torch.arange(20.0), ["a"] * 20)
    with pytest.raises(DataError, match="4 fresh samples are too few"):
        proxy.update(dataset(*world, 4, 1))
    with pytest.raises(ConfigError, match="num_updates"):
        proxy.update(dataset(*world, 20, 1), num_updates=-1)
