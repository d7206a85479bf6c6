"""One proxy for latents of several shapes: each batch of one shape, in proportion, and nothing mixed up."""

import math

import pytest
import torch

from latent_rewards.contracts import ConfigError, DataError, FingerprintMismatchError
from latent_rewards.dataset import RewardDataset
from latent_rewards.proxies import ProxyConfig, RewardProxy, train_proxy
from latent_rewards.proxies.buckets import check_readable, gather_buckets
from latent_rewards.proxies.ensemble import Reader
from latent_rewards.proxies.fit import _baseline, _folds
from latent_rewards.proxies.linear import fit_ridge
from latent_rewards.proxies.text import PromptFeatures

SMALL, LARGE = (2, 3, 4, 4), (2, 5, 8, 6)


def draw(count, shape, seed):
    source = torch.Generator().manual_seed(seed)
    offsets = torch.randn(count, shape[0], 1, 1, 1, generator=source)
    return offsets + 0.5 * torch.randn(count, *shape, generator=source)


def reward(latents):
    return latents[:, 0].mean(dim=(1, 2, 3)).square() - latents[:, 1].mean(dim=(1, 2, 3))


def prompts(count, kind="clip"):
    return [f"{kind} {i % 25}" for i in range(count)]


@pytest.fixture(scope="module")
def trained(quick):
    parts = [draw(400, SMALL, 0), draw(200, LARGE, 1)]
    return train_proxy(parts, [reward(part) for part in parts], config=quick(num_updates=150, ensemble_size=2))


def test_one_proxy_is_good_on_every_shape_it_was_trained_on(trained, quick):
    assert trained.latent_shape == SMALL and trained.latent_shapes == (SMALL, LARGE)
    assert trained.report["reward"]["num_train"] == 510 and trained.report["reward"]["num_holdout"] == 90
    only = train_proxy(draw(400, SMALL, 0), reward(draw(400, SMALL, 0)), config=quick(num_updates=20))
    for shape in (SMALL, LARGE):
        latents = draw(200, shape, 7)
        prediction = trained.predict(latents)
        error = (prediction.mean["reward"] - reward(latents)).abs()
        assert float(error.mean()) < 0.35 * float((reward(latents) - reward(latents).mean()).abs().mean())
        assert 0.8 < float((error <= 1.645 * prediction.std["reward"]).float().mean())
        assert abs(float(prediction.ood["reward"].mean()) - 0.5) < 0.2
    with pytest.raises(DataError, match=r"reads latents \[B, 2, 3, 4, 4\]; got \(2, 2, 5, 8, 6\); .*any_size=True"):
        only(draw(2, LARGE, 0))
    with pytest.raises(DataError, match=r"\[B, 2, 3, 4, 4\] or \[B, 2, 5, 8, 6\], the shapes it was trained on; got"):
        trained(draw(2, (2, 3, 8, 8), 0))


def test_the_shapes_are_stored_and_an_older_proxy_has_one(trained, tmp_path):
    trained.save_pretrained(tmp_path / "proxy")
    loaded = RewardProxy.from_pretrained(tmp_path / "proxy")
    assert loaded.latent_shapes == (SMALL, LARGE) and loaded.latent_shape == SMALL
    latents = draw(3, LARGE, 2)
    torch.testing.assert_close(loaded(latents), trained(latents))
    assert RewardProxy(ProxyConfig(width=8), SMALL, ("a",), PromptFeatures("none", 0)).latent_shapes == (SMALL,)


def test_any_size_reads_other_sizes_but_not_other_channels_or_too_small_ones(quick):
    latents = draw(64, LARGE, 0)
    proxy = train_proxy(latents, reward(latents), config=quick(num_updates=5, any_size=True))
    assert proxy(draw(3, (2, 1, 9, 12), 0)).shape == (3,)
    with pytest.raises(DataError, match=r"got \(2, 3, 5, 8, 6\) \(2 channels, any size\)"):
        proxy(draw(2, (3, 5, 8, 6), 0))
    with pytest.raises(DataError, match="too small.*at least 2.*smallest shape first"):
        proxy(draw(2, (2, 5, 1, 8), 0))
    check_readable((1, 2, 1, 2, 2), [LARGE], True, 2)
    with pytest.raises(ConfigError, match="any_size"):
        ProxyConfig(trunk="linear", any_size=True)


def test_a_bucket_the_trunk_cannot_read_is_refused_before_training(quick):
    parts = [draw(40, (2, 1, 40, 40), 0), draw(40, (2, 1, 3, 3), 0)]
    with pytest.raises(DataError, match=r"\(2, 1, 3, 3\) are too small"):
        train_proxy(parts, [reward(part) for part in parts], config=quick())
    assert train_proxy(parts[::-1], [reward(part) for part in parts[::-1]], config=quick(num_updates=1)).latent_shapes


def test_every_sample_keeps_its_latents_reward_and_prompt():
    parts = [draw(40, SMALL, 0), draw(24, LARGE, 1)]
    datasets = [
        RewardDataset.from_tensors(part, prompts(len(part), kind), columns, latent_space="v")
        for part, kind, columns in zip(
            parts,
            ("small", "large"),
            ({"r": reward(parts[0]), "s": torch.rand(40)}, {"s": torch.rand(24), "r": reward(parts[1])}),
            strict=True,
        )
    ]
    samples = gather_buckets(datasets, None, None)
    assert (len(samples), samples.latent_shapes, samples.latent_space) == (64, (SMALL, LARGE), "v")
    assert torch.equal(samples.latents(torch.tensor([63, 40])), parts[1][[23, 0]])
    assert torch.equal(samples.latents(torch.tensor([39, 0])), parts[0][[39, 0]])
    torch.testing.assert_close(samples.rewards[:, 0].float(), torch.cat([reward(part) for part in parts]))
    assert samples.prompts[39:41] == ["small 14", "large 0"]
    assert samples.buckets(torch.tensor([39, 40, 0, 63])).tolist() == [0, 1, 0, 1]
    with pytest.raises(DataError, match="two buckets"):
        samples.latents(torch.tensor([39, 40]))
    proxy = RewardProxy(
        ProxyConfig(width=8), SMALL, samples.reward_names, PromptFeatures("text", 16), latent_shapes=(SMALL, LARGE)
    )
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    means = Reader(proxy, samples).map(lambda latents, _: latents.mean(dim=(1, 2, 3, 4)), order)
    torch.testing.assert_close(means, torch.cat([part.mean(dim=(1, 2, 3, 4)) for part in parts])[order])
    features = Reader(proxy, samples).map(lambda _, read: read, order)
    texts = [samples.prompts[i] for i in order.tolist()]
    assert torch.equal(features, proxy.read_prompts(texts, 64))


def test_token_embeddings_of_other_lengths_are_padded():
    parts, tokens = [draw(8, SMALL, 0), draw(8, LARGE, 1)], [torch.ones(8, 3, 4), torch.ones(8, 5, 4)]
    samples = gather_buckets(parts, [torch.arange(8.0)] * 2, tokens)
    assert samples.prompts.shape == (16, 5, 4) and samples.prompts.sum(dim=(1, 2)).tolist() == [12] * 8 + [20] * 8
    with pytest.raises(DataError, match="one kind and dimension"):
        gather_buckets(parts, [torch.arange(8.0)] * 2, [torch.ones(8, 3, 4), torch.ones(8, 3, 5)])


def test_the_ridge_baseline_is_one_per_bucket():
    """The rewards are linear in each bucket with weights of their own, so that only separate regressions are exact."""
    shapes, source = [(2, 1, 2, 2), (2, 2, 2, 3)], torch.Generator().manual_seed(0)
    parts = [torch.randn(60, *shape, generator=source) for shape in shapes]
    weights = [torch.randn(math.prod(shape), generator=source) for shape in shapes]
    rewards = [part.flatten(1) @ weight + 3 * i for i, (part, weight) in enumerate(zip(parts, weights, strict=True))]
    samples = gather_buckets(parts, rewards, None)
    proxy = RewardProxy(
        ProxyConfig(width=8), shapes[0], ("reward",), PromptFeatures("none", 0), latent_shapes=tuple(shapes)
    )
    reader = Reader(proxy, samples)
    training, heldout = torch.cat([torch.arange(50), torch.arange(60, 110)]), torch.tensor([119, 50, 110, 59])
    validation = _folds(proxy.config, samples, training) == 0
    predicted = _baseline(reader, training, heldout, proxy.config)
    for bucket, rows in ((0, [1, 3]), (1, [0, 2])):
        features, mine = parts[bucket][:50].flatten(1), slice(50 * bucket, 50 * bucket + 50)
        weight, intercept = fit_ridge(features, rewards[bucket][:50, None], None, validation[mine])
        asked = parts[bucket].flatten(1)[heldout[rows] - 60 * bucket].double()
        torch.testing.assert_close(predicted[rows], asked @ weight + intercept)
    sparse = gather_buckets(parts, [rewards[0], torch.full((60,), math.nan)], None)
    assert _baseline(Reader(proxy, sparse), training, heldout, proxy.config)[[0, 2]].tolist() == [[0.0], [0.0]]


def test_lists_that_do_not_fit_together_are_refused():
    parts = [draw(40, SMALL, 0), draw(40, LARGE, 1)]
    rewards = [reward(part) for part in parts]
    with pytest.raises(ConfigError, match="linear trunk.*train a proxy for each"):
        train_proxy(parts, rewards, config=ProxyConfig(trunk="linear"))
    train_proxy([parts[0], parts[0]], [rewards[0]] * 2, config=ProxyConfig(trunk="linear"))
    for sources, columns, texts, message in (
        (parts, rewards[:1], None, "rewards must be a list of one entry for each of the 2 buckets; got 1"),
        (parts, torch.zeros(2, 40), None, "rewards must be a list.*got a Tensor"),
        (parts, rewards, ["a", "b", "c"], "prompts must be a list.*got 3"),
        (parts, [{"a": rewards[0]}, {"b": rewards[1]}], None, "same rewards"),
        ([parts[0], draw(40, (3, 5, 8, 6), 0)], rewards, None, "channels must agree"),
        ([parts[0], draw(7, LARGE, 0)], rewards, None, "bucket 1 has 7 samples"),
        ([parts[0], "x"], rewards, None, "bucket 1 is a str"),
        ([], None, None, "a list of such"),
        ("x", None, None, "a list of such"),
    ):
        with pytest.raises(DataError, match=message):
            gather_buckets(sources, columns, texts)
    datasets = [
        RewardDataset.from_tensors(part, prompts(40), {"r": values}, latent_space=space)
        for part, values, space in zip(parts, rewards, ("a", "b"), strict=True)
    ]
    with pytest.raises(FingerprintMismatchError, match="latent space differs: 'a' here, 'b' there"):
        gather_buckets(datasets, None, None)


def test_an_update_takes_any_of_the_shapes(trained, tmp_path):
    trained.save_pretrained(tmp_path / "proxy")
    proxy = RewardProxy.from_pretrained(tmp_path / "proxy")
    fresh = draw(100, LARGE, 3) + 1.5
    logs = proxy.update(fresh, reward(fresh), num_updates=60)
    assert logs["reward/mae_after"] < 0.8 * logs["reward/mae_before"]
    with pytest.raises(DataError, match="reads latents"):
        proxy.update(draw(20, (2, 3, 8, 8), 0), torch.arange(20.0))


def test_buckets_are_reproducible(quick):
    parts = [draw(40, SMALL, 0), draw(24, LARGE, 1)]
    rewards = [reward(part) for part in parts]
    first, again = (train_proxy(parts, rewards, config=quick(num_updates=5)).state_dict() for _ in range(2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
