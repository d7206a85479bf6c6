"""The card says what the proxy knows of itself, in the form the hub reads."""

import math

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from latent_rewards.proxies import Preferences, ProxyConfig, RewardProxy, train_proxy
from latent_rewards.proxies.card import model_card
from latent_rewards.proxies.refit import LEARNT_HELDOUT
from latent_rewards.proxies.text import PromptFeatures


@pytest.fixture(scope="module")
def proxy(world, quick):
    draw, curved = world
    latents = draw(300, 0)
    rewards = {"curve": curved(latents), "mean|2": latents.mean(dim=(1, 2, 3, 4))}
    return train_proxy(latents, rewards, latent_space="vae-a", config=quick(num_updates=5, ensemble_size=2))


def test_front_matter_has_tags_and_the_metrics_of_every_reward(proxy):
    card = ModelCard(model_card(proxy))
    assert (
        card.data.library_name == "latent-rewards" and "reward-proxy" in card.data.tags and "conv3d" in card.data.tags
    )
    found = {(result.dataset_config, result.metric_type): result.metric_value for result in card.data.eval_results}
    for name, entry in proxy.report.items():
        for metric in ("spearman", "r2", "mae", "pairwise_accuracy", "coverage", "calibration_error"):
            assert found[name, metric] == pytest.approx(entry[metric], abs=1e-6)
    assert len(found) == 12
    assert isinstance(yaml.safe_load(model_card(proxy).split("---\n")[1]), dict)


def test_the_text_has_report_range_threshold_and_fingerprints(proxy):
    text = model_card(proxy)
    rows = [line for line in text.splitlines() if line.startswith("| `curve` |")]
    assert [row.split(" | ")[1] for row in rows[:3]] == ["proxy", "ridge", "constant"]
    assert f"{proxy.report['curve']['spearman']:.4g}" in rows[0]
    assert f"| `curve` | {float(proxy.reward_mean[0]):.4g} | {float(proxy.reward_std[0]):.4g} |" in text
    assert "(2, 3, 4, 4)" in text and "| latent space | `vae-a` |" in text and "`mean\\|2`" in text
    assert f"above {proxy.ood_threshold(0.05):.4f} is out of distribution" in text
    assert "| metric of `curve` | not known |" in text and "Not on latents of another codec" in text


def test_it_says_whether_what_is_told_is_of_networks_that_learnt_more_since(proxy, world, quick):
    draw, curved = world
    assert LEARNT_HELDOUT in model_card(proxy)
    latents = draw(64, 0)
    for config in (quick(trunk="linear"), quick(num_updates=5, refit_fraction=0.0)):
        assert LEARNT_HELDOUT not in model_card(train_proxy(latents, curved(latents), config=config))


def test_a_proxy_without_a_report_says_so():
    bare = RewardProxy(ProxyConfig(trunk="linear"), (1, 1, 2, 2), ("a",), PromptFeatures("none", 0))
    card = ModelCard(model_card(bare))
    assert card.data.eval_results is None
    assert "not made by `train_proxy`" in card.text and "No out-of-distribution threshold" in card.text


def test_what_is_not_known_is_no_metric(proxy):
    entry = {**proxy.report["curve"], "spearman": math.nan}
    changed = RewardProxy(proxy.config, proxy.latent_shape, ("curve",), proxy.prompt_features, report={"curve": entry})
    names = [result.metric_type for result in ModelCard(model_card(changed)).data.eval_results]
    assert "spearman" not in names and "r2" in names


def test_a_card_of_preferences_counts_pairs(world, quick):
    draw, curved = world
    latents = draw(120, 0)
    scores = curved(latents)
    first, second = torch.arange(0, 120, 2), torch.arange(1, 120, 2)
    judged = Preferences(first, second, (scores[first] > scores[second]).double())
    proxy = train_proxy(latents, judged, config=quick(objective="bradley_terry", num_updates=5, ensemble_size=2))
    entry = proxy.report["preference"]
    card = model_card(proxy)
    counted = f"{entry['num_train']} training and {entry['num_holdout']} held-out pairs"
    assert f"{counted}; log-loss {entry['log_loss']:.4g} nats a pair, a constant's 0.6931" in card
    assert "interval covers" not in card and LEARNT_HELDOUT not in card
