"""A refresh makes a proxy good where the policy is now, without forgetting where it was."""

import math

import pytest
import torch

from latent_rewards.contracts import ConfigError, DataError, FingerprintMismatchError
from latent_rewards.dataset import RewardDataset
from latent_rewards.proxies import RewardProxy, train_proxy
from latent_rewards.proxies.refresh import _draw_replay, replay_probabilities
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


def test_after_many_small_refreshes_usual_samples_are_still_usual(world, trained):
    """Each holds out too few to calibrate on, and moves the features that strangeness is measured in."""
    proxy, replay = trained(), dataset(*world, 400, 0)
    usual, strange = dataset(*world, 300, 7, shift=1.0), dataset(*world, 300, 8, shift=6.0)
    ratios = proxy.calibration.ratios.clone()
    for step in range(8):
        fresh = dataset(*world, 60, 20 + step, shift=1.0)
        proxy.update(fresh, replay=replay, num_updates=24, seed=step)
        replay = replay.concatenate(fresh)
    told, other = (proxy.predict(data.latents(), data.prompts).ood["curve"] for data in (usual, strange))
    assert 0.3 < float(told.mean()) < 0.7 and float((told > 0.95).float().mean()) < 0.15
    assert float((other > 0.95).float().mean()) > 0.95
    assert torch.equal(proxy.calibration.ratios, ratios), "nine samples calibrate nothing"


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


def test_the_probability_of_a_replayed_sample_halves_with_each_half_life():
    ages = torch.tensor([0.0, 2.0, 4.0, 2.0, 1.0])
    weights = torch.tensor([1.0, 0.5, 0.25, 0.5, 2**-0.5], dtype=torch.float64)
    torch.testing.assert_close(replay_probabilities(ages, 2.0, 5), weights / weights.sum(), rtol=1e-14, atol=0)
    torch.testing.assert_close(replay_probabilities(ages + 5000, 2.0, 5), weights / weights.sum(), rtol=1e-9, atol=0)
    assert replay_probabilities(ages[:0], 2.0, 0).shape == (0,)


def test_replayed_samples_are_drawn_with_these_probabilities(world, trained):
    proxy, count = trained(), 400
    data = dataset(*world, 40, 7)
    ages = torch.arange(40) // 10
    probabilities = replay_probabilities(ages, 0.5, 40)  # ages 0, 1, 2, 3: weights 1, 1/4, 1/16, 1/64
    samples, draws = _draw_replay(proxy, data, probabilities, count, seed=1)
    total = 32 * count * len(proxy.members)
    assert len(draws) == total
    # each row is read once, and the draws point at it
    source = {float(value): row for row, value in enumerate(data.rewards["curve"].tolist())}
    rows = torch.tensor([source[float(value)] for value in samples.rewards[:, 0].float()])
    assert len(rows.unique()) == len(rows) <= 40
    frequencies = torch.bincount(rows[draws], minlength=40) / total
    sigma = (probabilities * (1 - probabilities) / total).sqrt()
    assert ((frequencies - probabilities).abs() < 4.5 * sigma).all()
    assert torch.equal(samples.latents(torch.arange(len(rows))), data.latents(rows))


def test_what_is_too_old_is_never_trained_on(world, trained):
    """With a half life of 1/100 an old sample has probability 2^-100: another old reward changes no weight."""
    states = []
    for poison in (0.0, 100.0):
        proxy, data = trained(), dataset(*world, 40, 7)
        data.rewards["curve"][20:] += poison
        ages = torch.arange(40) // 20
        proxy.update(dataset(*world, 24, 1), replay=data, replay_ages=ages, half_life=0.01, num_updates=2, seed=3)
        states.append(proxy.members.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    uniform = trained()
    uniform.update(dataset(*world, 24, 1), replay=data, num_updates=2, seed=3)
    assert any(not torch.equal(value, states[0][name]) for name, value in uniform.members.state_dict().items())


def test_a_linear_proxy_forgets_old_samples_too(world, quick):
    latents = world[0](200, 0)
    rewards = latents[:, 0].mean(dim=(1, 2, 3))
    replay = RewardDataset.from_tensors(latents, ["p"] * 200, {"reward": torch.cat([5 * rewards[:100], rewards[100:]])})
    ages = torch.tensor([9] * 100 + [1] * 100)
    fresh = world[0](40, 1)
    errors = []
    for extra in ({}, {"half_life": 0.2, "replay_ages": ages}):
        proxy = train_proxy(latents, rewards, config=quick(trunk="linear"))
        logs = proxy.update(fresh, fresh[:, 0].mean(dim=(1, 2, 3)), replay=replay, **extra)
        errors.append(logs["reward/mae_after"])
    assert errors[1] < 0.1 * errors[0]


def test_only_randomly_drawn_samples_are_held_out_and_judged(world, trained):
    """The chosen samples have absurd rewards, which neither the accuracies nor the calibration may see."""
    honest, chosen = dataset(*world, 200, 1), dataset(*world, 100, 2)
    chosen.rewards["curve"] += 1000
    alone, both = trained(), trained()
    expected = alone.update(honest, num_updates=0, seed=3)
    logs = both.update(honest.concatenate(chosen), num_updates=0, num_random=200, seed=3)
    assert logs["curve/mae_before"] == pytest.approx(expected["curve/mae_before"], rel=1e-5)
    assert logs["curve/mae_after"] < 10 * expected["curve/mae_after"] and logs["num_fresh"] == 300
    prediction = both.predict(honest.latents(), honest.prompts)
    assert float(prediction.std["curve"].max()) < 50
    careless = trained()
    careless.update(honest.concatenate(chosen), num_updates=0, seed=3)
    assert float(careless.predict(honest.latents(), honest.prompts).std["curve"].min()) > 50


def test_ages_and_half_life_are_checked(world, trained):
    proxy, fresh = trained(), dataset(*world, 20, 1)
    for settings, error, message in (
        ({"half_life": 2.0}, ConfigError, "belong together"),
        ({"replay_ages": torch.zeros(20)}, ConfigError, "belong together"),
        ({"half_life": 0.0, "replay_ages": torch.zeros(20)}, ConfigError, "half_life must be positive"),
        ({"half_life": 2.0, "replay_ages": torch.zeros(3)}, DataError, r"shape \(3,\); expected \[20\]"),
        ({"half_life": 2.0, "replay_ages": -torch.ones(20)}, DataError, r"replay_ages\[0\] is -1"),
        ({"num_random": 0}, ConfigError, r"num_random must lie in \[1, 20\]"),
        ({"num_random": 21}, ConfigError, "got 21"),
    ):
        with pytest.raises(error, match=message):
            proxy.update(fresh, replay=fresh, **settings)
