"""A stored proxy is the same proxy; it is differentiable, and refuses what it was not trained for."""

import copy
import json

import pytest
import torch

from latent_rewards.contracts import DataError, FingerprintMismatchError
from latent_rewards.dataset import RewardDataset
from latent_rewards.lro.refresh import check_fingerprints
from latent_rewards.proxies import ProxyConfig, RewardProxy, train_proxy
from latent_rewards.proxies.text import PromptFeatures
from latent_rewards.training.checkpoint import CheckpointError

PROMPTS = [f"clip {i % 16}" for i in range(96)]


@pytest.fixture(scope="module")
def proxy(world, quick):
    draw, curved = world
    latents = draw(96, 0)
    rewards = {"curve": curved(latents), "mean": latents.mean(dim=(1, 2, 3, 4))}
    return train_proxy(latents, rewards, PROMPTS, latent_space="vae-a", config=quick(num_updates=10))


@pytest.fixture(scope="module", params=["conv3d", "linear"])
def stored(request, world, quick):
    draw, curved = world
    latents = draw(64, 0)
    return train_proxy(latents, curved(latents), PROMPTS[:64], config=quick(trunk=request.param, num_updates=5))


def test_save_and_load_predict_the_same_bits(stored, world, tmp_path):
    draw, _ = world
    stored.save_pretrained(tmp_path / "proxy")
    loaded = RewardProxy.from_pretrained(tmp_path / "proxy")
    mine, theirs = stored.predict(draw(5, 1), PROMPTS[:5]), loaded.predict(draw(5, 1), PROMPTS[:5])
    for name in ("mean", "std", "ood"):
        assert torch.equal(getattr(mine, name)["reward"], getattr(theirs, name)["reward"])
    assert (loaded.report, loaded.config, loaded.latent_shape) == (stored.report, stored.config, stored.latent_shape)
    assert loaded.reward_names == ("reward",) and loaded.prompt_features == stored.prompt_features
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert {p.suffix for p in (tmp_path / "proxy").iterdir()} == {".json", ".safetensors", ".md"}


def test_a_damaged_or_foreign_folder_is_named(proxy, tmp_path):
    proxy.save_pretrained(tmp_path / "proxy")
    weights = tmp_path / "proxy" / "proxy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="proxy.safetensors"):
        RewardProxy.from_pretrained(tmp_path / "proxy")
    with pytest.raises(CheckpointError, match="holds no proxy.json: it is not a saved reward proxy"):
        RewardProxy.from_pretrained(tmp_path)


def test_one_reward_is_a_tensor_and_several_are_a_dict(proxy, stored, world):
    draw, _ = world
    assert stored(draw(3, 1), PROMPTS[:3]).shape == (3,)
    scores = proxy(draw(3, 1), PROMPTS[:3])
    assert list(scores) == ["curve", "mean"] == list(proxy.reward_names) and scores["mean"].shape == (3,)
    assert list(stored.scores(draw(3, 1), PROMPTS[:3])) == ["reward"]
    assert proxy.predict(draw(300, 1), [PROMPTS[0]] * 300).std["curve"].shape == (300,)


def test_pessimism_subtracts_standard_deviations(proxy, world):
    draw, _ = world
    prediction = proxy.predict(draw(4, 1), PROMPTS[:4])
    scores = proxy.scores(draw(4, 1), PROMPTS[:4], pessimism=0.5)
    for name in proxy.reward_names:
        torch.testing.assert_close(scores[name], prediction.mean[name] - 0.5 * prediction.std[name])
        assert (prediction.std[name] > 0).all()


def test_gradient_equals_finite_differences(world, tmp_path):
    config = ProxyConfig(width=8, depth=1, ensemble_size=2)
    torch.manual_seed(0)
    proxy = RewardProxy(config, (2, 3, 4, 4), ("a", "b"), PromptFeatures("text", 32)).double()
    latents = world[0](2, 3).double().requires_grad_()

    def total(x):
        scores = proxy.scores(x, ["one", "two"], pessimism=0.7)
        return scores["a"].sum() + 2 * scores["b"].sum()

    total(latents).backward()
    direction = world[0](2, 4).double()
    numeric = (total(latents + 1e-5 * direction) - total(latents - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((latents.grad * direction).sum(), numeric.detach(), rtol=1e-6, atol=1e-9)


def test_bfloat16_latents_are_read_in_full_precision(proxy, world):
    latents = world[0](3, 1).bfloat16()
    scores = proxy(latents, PROMPTS[:3])["curve"]
    assert scores.dtype == torch.float32
    assert torch.equal(scores, proxy(latents.float(), PROMPTS[:3])["curve"])


def test_what_it_was_not_trained_for_is_refused(proxy, world):
    latents = world[0](2, 1)
    with pytest.raises(DataError, match="fitted with prompts"):
        proxy(latents)
    with pytest.raises(DataError, match=r"reads latents \[B, 2, 3, 4, 4\]; got \(2, 2, 3, 4, 2\)"):
        proxy(latents[..., :2], PROMPTS[:2])
    with pytest.raises(DataError, match="NaN"):
        proxy.predict(latents / 0 * 0, PROMPTS[:2])
    proxy.check_latent_space("vae-a")
    proxy.check_latent_space(None)
    with pytest.raises(FingerprintMismatchError, match="'vae-a'.*'vae-b'"):
        proxy.check_latent_space("vae-b")


def test_metric_fingerprints_are_compared_where_both_are_known():
    proxy = RewardProxy(
        ProxyConfig(trunk="linear"), (1, 1, 2, 2), ("a",), PromptFeatures("none", 0), metric_fingerprints={"a": "m@1"}
    )
    proxy.check_metrics({"a": "m@1", "b": "x"})
    proxy.check_metrics({})
    with pytest.raises(FingerprintMismatchError, match="'m@1'.*'m@2'"):
        proxy.check_metrics({"a": "m@2"})


def test_what_is_stored_is_json_and_safetensors_only(proxy, tmp_path):
    proxy.save_pretrained(tmp_path / "proxy")
    description = json.loads((tmp_path / "proxy" / "proxy.json").read_text())
    assert description["latent_space"] == "vae-a" and description["reward_names"] == ["curve", "mean"]


def _embed(texts):
    """One token per word: a one where the word is "minus", else a two; padded to 4."""
    tokens = torch.zeros(len(texts), 4, 2)
    for row, text in enumerate(texts):
        for column, word in enumerate(text.split()):
            tokens[row, column, 0 if word == "minus" else 1] = 1.0
    return tokens


@pytest.mark.parametrize("trunk", ["conv3d", "linear"])
def test_a_proxy_with_a_prompt_encoder_keeps_no_encoder_and_asks_for_it(world, quick, tmp_path, trunk):
    draw, _ = world
    latents = draw(200, 0)
    prompts = ["some minus words" if i % 2 else "some words" for i in range(200)]
    sign = torch.tensor([-1.0 if i % 2 else 1.0 for i in range(200)])
    rewards = sign * latents[:, 0].mean(dim=(1, 2, 3))
    proxy = train_proxy(latents, rewards, prompts, config=quick(trunk=trunk), encode=_embed)
    assert proxy.prompt_features == PromptFeatures("tokens", 2, encoded=True)
    if trunk == "conv3d":
        assert proxy.report["reward"]["spearman"] > 0.8
    proxy.save_pretrained(tmp_path / "proxy")
    loaded = RewardProxy.from_pretrained(tmp_path / "proxy", encode=_embed)
    assert torch.equal(loaded(latents[:5], prompts[:5]), proxy(latents[:5], prompts[:5]))
    with pytest.raises(DataError, match="encode="):
        RewardProxy.from_pretrained(tmp_path / "proxy")(latents[:5], prompts[:5])
    assert torch.equal(loaded(latents[:5], _embed(prompts[:5])), proxy(latents[:5], prompts[:5]))
    assert "minus" not in (tmp_path / "proxy" / "proxy.json").read_text()


def test_an_encoder_that_is_a_module_is_neither_copied_nor_stored(world, quick):
    draw, curved = world
    encoder = torch.nn.Linear(1, 3)
    latents = draw(64, 0)

    def size(texts):
        return torch.tensor([[float(len(text))] for text in texts])

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = encoder

        def forward(self, texts):
            return self.layer(size(texts))

    proxy = train_proxy(latents, curved(latents), PROMPTS[:64], config=quick(num_updates=5), encode=Encoder())
    assert not any("layer" in name for name in proxy.state_dict())
    copied = copy.deepcopy(proxy)
    before = copied(latents[:3], PROMPTS[:3])
    with torch.no_grad():
        encoder.weight.add_(1.0)
    assert not torch.equal(copied(latents[:3], PROMPTS[:3]), before)


def test_a_dataset_is_predicted_in_its_own_latent_space_only(proxy, world):
    latents = world[0](150, 1)
    prompts = [PROMPTS[i % 16] for i in range(150)]
    rewards = {"curve": torch.zeros(150)}
    known = RewardDataset.from_tensors(latents, prompts, rewards, latent_space="vae-a")
    mine, theirs = proxy.predict(known), proxy.predict(latents, prompts)
    for name in proxy.reward_names:
        assert torch.equal(mine.mean[name], theirs.mean[name]) and torch.equal(mine.ood[name], theirs.ood[name])
    foreign = RewardDataset.from_tensors(latents, prompts, rewards, latent_space="vae-b")
    with pytest.raises(FingerprintMismatchError, match="'vae-a'.*'vae-b'"):
        proxy.predict(foreign)
    with pytest.raises(DataError, match="brings its own prompts"):
        proxy.predict(known, prompts)
    with pytest.raises(FingerprintMismatchError, match="'vae-b'.*'vae-a'"):
        train_proxy(foreign, latent_space="vae-a")


def test_a_trained_proxy_is_refused_by_a_trainer_on_another_codec(proxy):
    class Oracle:
        latent_space = "vae-b"

    with pytest.raises(FingerprintMismatchError, match="'vae-a'.*'vae-b'"):
        check_fingerprints(Oracle(), proxy, None)


def test_an_isotonic_mean_is_differentiable_and_pessimism_still_subtracts(world, quick):
    draw, curved = world
    latents = draw(300, 0)
    trained = train_proxy(
        latents, curved(latents).exp().clamp(max=3), config=quick(calibrate_mean="isotonic", trunk="linear")
    )
    fresh = draw(20, 1).double().requires_grad_()
    mean, cautious = trained.scores(fresh)["reward"], trained.scores(fresh, pessimism=2.0)["reward"]
    std = trained.predict(fresh.detach()).std["reward"]
    torch.testing.assert_close(mean - cautious, 2 * std)
    assert torch.equal(mean.detach(), trained.predict(fresh.detach()).mean["reward"])
    (slope,) = torch.autograd.grad(mean.sum(), fresh)
    direction = draw(20, 2).double()
    numeric = (trained(fresh + 1e-6 * direction) - trained(fresh - 1e-6 * direction)).sum() / 2e-6
    assert float((slope * direction).sum()) == pytest.approx(float(numeric.detach()), rel=1e-5)
    assert (slope.flatten(1).norm(dim=1) > 0).all()


def test_intervals_and_alarms_of_a_trained_proxy_hold_on_fresh_samples(world, quick):
    draw, curved = world
    noise = torch.randn(5000, generator=torch.Generator().manual_seed(5)).abs() ** 3
    latents = draw(1200, 0)
    trained = train_proxy(
        latents, curved(latents) + noise[:1200], config=quick(num_updates=25, ensemble_size=2, holdout_fraction=0.5)
    )
    fresh = draw(3000, 1)
    prediction, truth = trained.predict(fresh), curved(fresh) + noise[1200:4200]
    for level in (0.5, 0.8, 0.9):
        low, high = prediction.interval(level)
        inside = ((truth >= low["reward"]) & (truth <= high["reward"])).float().mean()
        assert abs(float(inside) - level) < 4.5 * (level * (1 - level) * (1 / 3000 + 1 / 600)) ** 0.5
    above = (prediction.ood["reward"] > trained.ood_threshold(0.1)).float().mean()
    assert abs(float(above) - 0.1) < 4.5 * (0.09 * (1 / 3000 + 1 / 600)) ** 0.5
    assert float((trained.predict(3 * fresh).ood["reward"] > trained.ood_threshold(0.01)).float().mean()) > 0.95
