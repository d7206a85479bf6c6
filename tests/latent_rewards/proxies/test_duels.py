"""Proxies of simulated duels come near Bayes' optimum, are divided without leaks and reproduce; misuse is refused."""

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch

from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.dataset import RewardDataset
from latent_rewards.proxies import Preferences, RewardProxy, format_report, train_proxy
from latent_rewards.proxies.duels import DuelReader, split_pairs, to_unit
from latent_rewards.proxies.ensemble import Reader
from latent_rewards.proxies.heads import NetworkMember
from latent_rewards.proxies.judgement import Duels, Judge, Judgement
from latent_rewards.proxies.objectives import split_outputs
from latent_rewards.proxies.preferences import bradley_terry, judgement_variance, thurstone
from latent_rewards.proxies.report import spearman
from latent_rewards.proxies.samples import gather_samples
from latent_rewards.proxies.text import PromptFeatures

NU, TAU = torch.tensor(0.6), torch.tensor(0.3)


def true_score(latents):
    """An even function of channel 0's mean, which no linear score follows."""
    return 2 * torch.cos(1.5 * latents[:, 0].double().mean(dim=(1, 2, 3)))


def foursomes(count):
    """Four duels among each four neighbours."""
    four = torch.arange(count).reshape(-1, 4)
    return torch.cat([four[:, list(pair)] for pair in ((0, 1), (2, 3), (0, 2), (1, 3))])


def judged(log_probabilities, seed):
    draws = torch.multinomial(log_probabilities.exp(), 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    return 1 - draws.double() / 2


def truth(objective, difference):
    if objective == "bradley_terry":
        return bradley_terry(difference, NU.log())
    return thurstone(difference, torch.ones(()), TAU)


@pytest.mark.parametrize("objective", ["bradley_terry", "thurstone"])
def test_a_proxy_recovers_scores_and_ties_from_duels(world, quick, objective):
    draw, _ = world
    latents, fresh = draw(1200, 0), draw(800, 1)
    pairs = foursomes(1200)
    scores = true_score(latents)
    outcome = judged(truth(objective, scores[pairs[:, 0]] - scores[pairs[:, 1]]), 2)
    settings = quick(objective=objective, ensemble_size=2, batch_size=32, num_updates=150, holdout_fraction=0.3)
    proxy = train_proxy(latents, Preferences(pairs[:, 0], pairs[:, 1], outcome), config=settings)

    expected, found = true_score(fresh), proxy(fresh).double()
    assert spearman(found, expected) > 0.9
    assert abs(float(proxy(latents).mean())) < 0.1
    slope = float(torch.cov(torch.stack([found, expected]))[0, 1] / found.var())
    # Shrunk by what it does not know, see the module; an uncalibrated unit would be off by more.
    assert 0.75 < slope < 1.8
    bayes = truth(objective, expected[::2] - expected[1::2]).exp()
    probabilities = proxy.compare(fresh[::2], fresh[1::2]).double()
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(400).double())
    assert float(((found[::2] > found[1::2]) == (bayes[:, 0] > bayes[:, 2])).double().mean()) > 0.85
    excess = (bayes * (bayes.clamp(min=1e-12).log() - probabilities.log())).sum(dim=1).mean()
    assert float(excess) < 0.15
    rate = float(bayes[:, 1].mean())
    assert abs(float(probabilities[:, 1].mean()) - rate) < 4.5 * math.sqrt(rate * (1 - rate) / 360)

    entry = proxy.report["preference"]
    assert entry["num_train"] == 840 and entry["num_holdout"] == 360
    deviation = math.sqrt(0.25 / (360 * (1 - entry["tie_rate"])))
    decisive = bayes[:, 0] + bayes[:, 2]
    best = float((bayes[:, [0, 2]].amax(dim=1)).sum() / decisive.sum())
    assert best - 0.08 - 4.5 * deviation < entry["pairwise_accuracy"] < best + 4.5 * deviation
    assert entry["ridge"]["pairwise_accuracy"] < 0.62 < entry["pairwise_accuracy"]
    assert entry["log_loss"] < entry["constant"]["log_loss"] - 0.05
    assert abs(entry["ridge"]["log_loss"] - entry["constant"]["log_loss"]) < 0.1
    assert "pairs right" in format_report(proxy.report)
    assert (proxy.predict(fresh).std["preference"] > 0).all()


def test_thurstone_learns_which_samples_split_the_judges_and_what_noise_costs(world, quick):
    """Judges of the score 2 mean_0 agree on dark samples (channel 1) and not on bright ones; noise adds kappa = 1."""
    draw, _ = world
    latents, fresh = draw(1600, 0), draw(500, 1)
    pairs = foursomes(1600)
    levels = 1.0 * (torch.rand(1600, generator=torch.Generator().manual_seed(4)) < 0.5)

    def variance(x):
        return (2 * x[:, 1].mean(dim=(1, 2, 3))).exp() / 2

    score = 2 * latents[:, 0].mean(dim=(1, 2, 3))
    spread = judgement_variance(variance(latents)[pairs].log(), levels[pairs], torch.tensor(1.0))
    outcome = judged(thurstone(score[pairs[:, 0]] - score[pairs[:, 1]], spread), 2)
    settings = quick(objective="thurstone", ensemble_size=2, num_updates=300, holdout_fraction=0.3)
    preferences = Preferences(pairs[:, 0], pairs[:, 1], outcome, noise=levels)
    proxy = train_proxy(latents, {"taste": preferences}, config=settings)
    assert proxy.reward_names == ("taste",) and proxy.report["taste"]["tie_rate"] == 0
    _, predicted = proxy.member_outputs(proxy.normalise(fresh), None)
    assert spearman(predicted[:, 0], variance(fresh)) > 0.6
    assert spearman(proxy(fresh), fresh[:, 0].mean(dim=(1, 2, 3))) > 0.9
    assert 0.25 < float(proxy.judgement.log_noise.exp()) < 4
    blurred = proxy.compare(fresh[::2], fresh[1::2], noise=torch.full((250, 2), 2.0))
    clear = proxy.compare(fresh[::2], fresh[1::2])
    assert ((blurred[:, 0] - 0.5).abs() < (clear[:, 0] - 0.5).abs()).all() and (clear[:, 1] == 0).all()


def small_world(draw, count=80, **changes):
    latents, pairs = draw(count, 0), foursomes(count)
    score = latents[:, 0].mean(dim=(1, 2, 3)).double()
    outcome = judged(bradley_terry(3 * (score[pairs[:, 0]] - score[pairs[:, 1]]), NU.log()), 2)
    prompts = [f"prompt {i // 4}" for i in range(count)]
    return latents, Preferences(pairs[:, 0], pairs[:, 1], outcome, **changes), prompts


def test_the_linear_proxy_is_the_logistic_baseline(world, quick):
    draw, _ = world
    latents, preferences, prompts = small_world(draw, 400)
    proxy = train_proxy(latents, preferences, config=quick(trunk="linear", objective="bradley_terry"))
    fresh = draw(200, 1)
    assert spearman(proxy(fresh), fresh[:, 0].mean(dim=(1, 2, 3))) > 0.9
    entry = proxy.report["preference"]
    assert entry["ridge"]["log_loss"] == entry["log_loss"] < entry["constant"]["log_loss"]
    conv = train_proxy(latents, preferences, config=quick(objective="bradley_terry", num_updates=2, ensemble_size=1))
    assert conv.report["preference"]["ridge"]["log_loss"] == pytest.approx(entry["log_loss"], abs=0.01)


@pytest.mark.parametrize("objective", ["bradley_terry", "thurstone"])
def test_same_seed_same_bits_and_a_saved_proxy_is_the_same(world, quick, tmp_path, objective):
    draw, _ = world
    latents, preferences, prompts = small_world(draw)
    proxies = []
    for seed, disturbance in [(0, 1), (0, 2), (1, 1)]:
        torch.manual_seed(disturbance)
        before = torch.get_rng_state()
        proxies.append(
            train_proxy(latents, preferences, prompts, config=quick(num_updates=5, seed=seed, objective=objective))
        )
        assert torch.equal(torch.get_rng_state(), before)
    first, second, other = (proxy.state_dict() for proxy in proxies)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())
    assert json.dumps(proxies[0].report) == json.dumps(proxies[1].report)
    assert not any(parameter.requires_grad for parameter in proxies[0].parameters())
    proxies[0].save_pretrained(tmp_path / "proxy")
    again = RewardProxy.from_pretrained(tmp_path / "proxy")
    one, two = latents[:8], latents[8:16]
    assert torch.equal(again.compare(one, two, prompts[:8]), proxies[0].compare(one, two, prompts[:8]))
    assert torch.equal(again(one, prompts[:8]), proxies[0](one, prompts[:8]))


def test_no_sample_and_no_prompt_of_a_held_out_pair_is_trained_on(world):
    draw, _ = world
    _, preferences, _ = small_world(draw, 200)
    for ids in (None, torch.arange(200) // 4, torch.arange(200) // 8):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            training, heldout, units = split_pairs(preferences, ids, 200, 0.2, 0)
        assert len(training) + len(heldout) == 200 and 30 <= len(heldout) <= 50
        seen, unseen = preferences.pairs[training].unique(), preferences.pairs[heldout].unique()
        assert not torch.isin(unseen, seen).any()
        if ids is not None:
            assert not torch.isin(ids[unseen], ids[seen]).any()
        groups = 25 if ids is not None and int(ids.max()) == 24 else 50
        assert (units[:, 0] == units[:, 1]).all() and len(units.unique()) == groups
    again = split_pairs(preferences, None, 200, 0.2, 0)
    other = split_pairs(preferences, None, 200, 0.2, 1)
    assert torch.equal(again[1], split_pairs(preferences, None, 200, 0.2, 0)[1])
    assert not torch.equal(again[1], other[1])


@pytest.mark.parametrize("prompts", [None, torch.arange(60) // 4])
def test_pairs_that_join_the_parts_are_left_out_with_a_warning(prompts):
    first = torch.randint(0, 60, (600,), generator=torch.Generator().manual_seed(0))
    second = (first + torch.randint(1, 60, (600,), generator=torch.Generator().manual_seed(1))) % 60
    preferences = Preferences(first, second, torch.ones(600), across_prompts=True)
    with pytest.warns(UserWarning, match="of 600 pairs are not used"):
        training, heldout, _ = split_pairs(preferences, prompts, 60, 0.2, 0)
    kind = torch.arange(60) if prompts is None else prompts
    assert not torch.isin(kind[preferences.pairs[heldout]], kind[preferences.pairs[training]]).any()
    assert len(heldout) > 40 and len(training) > 150


def test_pairs_are_read_interleaved_and_every_sample_once(world, quick):
    draw, _ = world
    latents, preferences, _ = small_world(draw, noise=torch.arange(80.0))
    proxy = train_proxy(latents, preferences, config=quick(objective="thurstone", num_updates=1, ensemble_size=1))
    unknown = torch.full((80, 1), math.nan)
    reader = DuelReader(Reader(proxy, gather_samples(latents, unknown, None)), preferences)
    rows = torch.tensor([3, 20, 3])
    read, prompts, targets = reader(rows)
    order = [12, 13, 2, 3, 12, 13]
    torch.testing.assert_close(read, proxy.normalise(latents[order]))
    assert prompts is None and targets[:, 1:].flatten().tolist() == order
    assert targets[:, 0].tolist() == preferences.outcome[rows].tolist()
    sizes = []

    def function(x, p):
        sizes.append(len(x))
        return x.mean(dim=(1, 2, 3, 4))[:, None]

    torch.testing.assert_close(reader.map(function, rows), read.mean(dim=(1, 2, 3, 4))[:, None])
    assert sizes == [4]


@pytest.mark.parametrize("objective", ["bradley_terry", "thurstone"])
def test_a_change_of_unit_changes_no_probability(objective):
    torch.manual_seed(0)
    outputs = 1 if objective == "bradley_terry" else 2
    member = NetworkMember((2, 3, 4, 4), PromptFeatures("none", 0), outputs, width=8, depth=1).double()
    judgement = Judgement(objective).double()
    judgement.start(0.2, noise=objective == "thurstone")
    judge = Judge(member, judgement).requires_grad_(False)
    with torch.no_grad():
        member.head.output.weight *= 5
        member.head.output.bias += 2
    latents = torch.randn(40, 2, 3, 4, 4, dtype=torch.float64)
    levels = torch.rand(20, 2, dtype=torch.float64)

    def log_probabilities():
        scores, log_variance = split_outputs(judge(latents, None), 1)
        paired = None if log_variance is None else log_variance.reshape(-1, 2)
        return judgement(Duels(scores.reshape(-1, 2), torch.ones(20), paired, levels))

    before = log_probabilities()
    to_unit(judge, judge(latents, None))
    torch.testing.assert_close(log_probabilities(), before)
    scores, log_variance = split_outputs(judge(latents, None), 1)
    assert abs(float(scores.mean())) < 1e-12
    if log_variance is not None:
        assert float(log_variance.mean()) == pytest.approx(math.log(0.5))


def test_a_dataset_serves_too_and_its_fingerprints_of_scores_do_not_stick(world, quick):
    draw, _ = world
    latents, preferences, prompts = small_world(draw)
    dataset = RewardDataset.from_tensors(
        latents, prompts, {"r": torch.arange(80.0)}, latent_space="vae", metric_fingerprints={"r": "m@1"}
    )
    settings = quick(num_updates=2, objective="bradley_terry")
    one, two = (
        train_proxy(dataset, preferences, config=settings),
        train_proxy(latents, preferences, prompts, config=settings),
    )
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert (one.latent_space, one.metric_fingerprints, one.reward_names) == ("vae", {}, ("preference",))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"noise_levels": (0.0, 0.5)}, "noise_levels"),
        ({"calibrate_mean": "isotonic"}, "calibrate_mean"),
        ({"learning_curve": True}, "learning_curve"),
        ({"trunk": "auto"}, "trunk='auto'"),
    ],
)
def test_what_preferences_cannot_be_combined_with_is_named(world, quick, changes, named):
    latents, preferences, prompts = small_world(world[0])
    config = quick(objective="bradley_terry", **changes)
    with pytest.raises(ConfigError, match=f"preferences cannot be combined with {named};"):
        train_proxy(latents, preferences, prompts, config=config)
    with pytest.raises(ConfigError, match="combined with a list of latents"):
        train_proxy([latents], preferences, prompts, config=quick(objective="bradley_terry"))


def test_data_and_objective_must_fit(world, quick):
    draw, _ = world
    latents, preferences, prompts = small_world(draw)
    with pytest.raises(
        ConfigError, match="objective 'mse' cannot be fitted to Preferences; choose one of bradley_terry"
    ):
        train_proxy(latents, preferences, config=quick())
    with pytest.raises(ConfigError, match="'thurstone' cannot be fitted to rewards that are numbers; choose"):
        train_proxy(latents, torch.arange(80.0), config=quick(objective="thurstone"))
    with pytest.raises(ConfigError, match="trunk 'linear' is fitted by"):
        quick(trunk="linear", objective="thurstone")
    mixed = Preferences(preferences.first, preferences.second.roll(1), preferences.outcome)
    settings = quick(objective="bradley_terry", use_prompts=False)
    with pytest.raises(DataError, match="different prompts"):
        train_proxy(latents, mixed, prompts, config=settings)
    deaf = train_proxy(latents, preferences, prompts, config=replace(settings, num_updates=1))
    assert deaf.prompt_features.kind == "none"
    with pytest.raises(DataError, match="pairs are too few"):
        train_proxy(latents, preferences, prompts, config=replace(settings, min_samples=81))
    outcome = torch.full((80,), 0.5)
    outcome[:3] = 1.0
    with pytest.raises(DataError, match="pairs with a winner"):
        train_proxy(latents, Preferences(preferences.first, preferences.second, outcome), prompts, config=settings)


def test_what_a_preference_proxy_cannot_do_is_refused(world, quick):
    draw, _ = world
    latents, preferences, _ = small_world(draw)
    proxy = train_proxy(latents, preferences, config=quick(num_updates=1, ensemble_size=1, objective="bradley_terry"))
    with pytest.raises(ConfigError, match="cannot be updated with scores"):
        proxy.update(latents, torch.arange(80.0))
    with pytest.raises(DataError, match="one shape"):
        proxy.compare(latents[:3], latents[:2])
    with pytest.raises(DataError, match=r"noise must be \[3, 2\]"):
        proxy.compare(latents[:3], latents[:3], noise=torch.ones(3))
    moving = latents[:3].clone().requires_grad_()
    proxy.scores(moving, pessimism=1.0)["preference"].sum().backward()
    assert torch.isfinite(moving.grad).all() and (moving.grad != 0).any()
    scores = train_proxy(latents, torch.arange(80.0), config=quick(num_updates=1, ensemble_size=1))
    with pytest.raises(DataError, match="knows no duels"):
        scores.compare(latents[:3], latents[3:6])
