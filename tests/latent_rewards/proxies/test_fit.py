"""A proxy recovers rewards it can know, beats a ridge regression, listens to prompts, and is reproducible."""

import math

import pytest
import torch

from latent_rewards.contracts import DataError
from latent_rewards.dataset import RewardDataset
from latent_rewards.proxies import settle as module, train_proxy
from latent_rewards.proxies.ood import DistanceQuantile
from latent_rewards.proxies.report import accuracy
from latent_rewards.training.devices import DeviceError


def test_it_recovers_a_nonlinear_reward_and_ridge_does_not(world, quick):
    draw, curved = world
    latents = draw(600, 0)
    proxy = train_proxy(latents, curved(latents) * 5 - 3, config=quick(num_updates=150))
    entry = proxy.report["reward"]
    assert entry["spearman"] > 0.85 and entry["ridge"]["spearman"] < 0.4
    assert entry["num_train"] == 510 and entry["num_holdout"] == 90
    fresh = draw(400, 1)
    prediction, target = proxy.predict(fresh), curved(fresh) * 5 - 3
    assert accuracy(prediction.mean["reward"], target)["spearman"] > 0.85
    inside = (prediction.mean["reward"] - target).abs() <= 1.645 * prediction.std["reward"]
    assert abs(float(inside.float().mean()) - 0.9) < 4.5 * math.sqrt(0.09 * (1 / 400 + 1 / 90))
    assert abs(float(prediction.ood["reward"].mean()) - 0.5) < 4.5 * math.sqrt((1 / 400 + 1 / 90) / 12)
    assert float(proxy.predict(fresh * 3).ood["reward"].mean()) > 0.99


@pytest.mark.parametrize("kind", ["text", "embedding"])
def test_a_reward_that_depends_on_the_prompt_needs_it(world, quick, kind):
    draw, _ = world
    latents = draw(500, 0)
    sign = 1 - 2 * (torch.arange(500) % 2)
    rewards = sign * latents[:, 0].mean(dim=(1, 2, 3))
    texts = [f"clip {i % 25} is {'bright' if i % 2 == 0 else 'dark'}" for i in range(500)]
    prompts = texts if kind == "text" else torch.stack([sign.float(), torch.ones(500)], dim=1)
    proxy = train_proxy(latents, rewards, prompts, config=quick(ensemble_size=1, num_updates=150))
    assert proxy.prompt_features.kind == kind
    assert proxy.report["reward"]["spearman"] > 0.8
    deaf = train_proxy(latents, rewards, prompts, config=quick(ensemble_size=1, use_prompts=False, num_updates=25))
    assert deaf.prompt_features.kind == "none" and deaf.report["reward"]["spearman"] < 0.5


def test_unknown_rewards_are_masked_and_the_known_ones_are_learned(world, quick):
    draw, curved = world
    latents = draw(400, 0)
    sparse = curved(latents)
    sparse[::2] = math.nan
    proxy = train_proxy(latents, {"sparse": sparse, "mean": latents.mean(dim=(1, 2, 3, 4))}, config=quick())
    assert proxy.report["sparse"]["num_train"] + proxy.report["sparse"]["num_holdout"] == 200
    assert proxy.report["mean"]["num_train"] + proxy.report["mean"]["num_holdout"] == 400
    assert proxy.report["sparse"]["spearman"] > 0.6 and proxy.report["mean"]["spearman"] > 0.8
    assert all(torch.isfinite(values).all() for values in proxy(draw(4, 1)).values())


def test_same_seed_same_bits_and_the_global_generator_is_left_alone(world, quick):
    draw, curved = world
    latents = draw(80, 0)
    rewards, prompts = curved(latents), [f"p {i % 20}" for i in range(80)]
    proxies = []
    for seed, disturbance in [(0, 1), (0, 2), (1, 1)]:
        torch.manual_seed(disturbance)
        before = torch.get_rng_state()
        proxies.append(train_proxy(latents, rewards, prompts, config=quick(num_updates=5, seed=seed)).state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, proxies[1][name]) for name, value in proxies[0].items())
    assert any(not torch.equal(value, proxies[2][name]) for name, value in proxies[0].items())


def test_a_dataset_and_its_tensors_give_the_same_proxy(world, quick):
    draw, curved = world
    latents, prompts = draw(64, 0), [f"clip {i}" for i in range(64)]
    dataset = RewardDataset.from_tensors(
        latents, prompts, {"r": curved(latents)}, latent_space="vae", metric_fingerprints={"r": "m@1"}
    )
    one = train_proxy(dataset, config=quick(num_updates=3))
    two = train_proxy(latents, {"r": curved(latents)}, prompts, config=quick(num_updates=3))
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert (one.latent_space, one.metric_fingerprints) == ("vae", {"r": "m@1"})
    assert (two.latent_space, two.metric_fingerprints) == (None, {})


def test_members_disagree_and_no_parameter_is_left_trainable(world, quick):
    draw, curved = world
    latents = draw(100, 0)
    proxy = train_proxy(latents, curved(latents), config=quick(num_updates=25))
    _, variance = proxy.ensemble(proxy.normalise(draw(10, 1)), None)
    assert (variance > 0).all()
    assert not any(parameter.requires_grad for parameter in proxy.parameters())
    assert not proxy.training


def test_bad_data_is_refused_before_training(world, quick):
    draw, _ = world
    with pytest.raises(DataError, match="constant"):
        train_proxy(draw(64, 0), torch.ones(64), config=quick())
    with pytest.raises(DataError, match="8 samples are too few"):
        train_proxy(draw(8, 0), torch.arange(8.0), config=quick())
    with pytest.raises(DeviceError, match="cuda:99"):
        train_proxy(draw(8, 0), torch.arange(8.0), config=quick(device="cuda:99"))


def test_a_large_dataset_is_read_in_small_pieces_and_gives_the_same_proxy(world, quick, tmp_path, monkeypatch):
    draw, curved = world
    latents = draw(700, 0)
    made = RewardDataset.from_tensors(latents, [f"clip {i // 4}" for i in range(700)], {"r": curved(latents)})
    made.save(tmp_path / "data")
    whole = train_proxy(RewardDataset.load(tmp_path / "data"), config=quick(num_updates=4))
    reads, read = [], RewardDataset.latents

    def counted(self, indices=None):
        reads.append(len(self) if indices is None else len(indices))
        return read(self, indices)

    monkeypatch.setattr(RewardDataset, "latents", counted)
    pieces = train_proxy(RewardDataset.load(tmp_path / "data"), config=quick(num_updates=4, in_memory_mib=0))
    assert max(reads) <= 256 and sum(reads) > 1400
    assert all(torch.equal(value, pieces.state_dict()[name]) for name, value in whole.state_dict().items())


def test_the_reference_of_the_distance_is_a_part_of_many_held_out_samples(world, quick, monkeypatch):
    draw, curved = world
    latents, sizes = draw(300, 0), []
    fit = DistanceQuantile.fit
    monkeypatch.setattr(DistanceQuantile, "fit", lambda s, x, y: sizes.append((len(x), len(y))) or fit(s, x, y))
    for limit in (4096, 20):
        monkeypatch.setattr(module, "_REFERENCE_ROWS", limit)
        train_proxy(latents, curved(latents), config=quick(num_updates=1))
    assert sizes == [(255, 45), (255, 20)]


def test_of_prompts_that_never_differed_another_is_read_as_the_one(world, quick):
    draw, curved = world
    latents, one = draw(80, 0), torch.tensor([0.3, -2.0, 0.7])
    for prompts, other in ((["clip"] * 80, ["another"] * 80), (one.expand(80, 3), (one * 2 - 1).expand(80, 3))):
        proxy = train_proxy(latents, curved(latents), prompts, config=quick(ensemble_size=1, num_updates=5))
        assert torch.equal(proxy(latents, prompts), proxy(latents, other))
        assert torch.isfinite(proxy(latents, other)).all()
