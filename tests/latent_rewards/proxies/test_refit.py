"""In the end a proxy learns from what was held out, and what it says of itself stays what it said before."""

import math
from types import SimpleNamespace

import pytest
import torch

from latent_rewards.contracts import ConfigError
from latent_rewards.proxies import ProxyConfig, refit as module, train_proxy
from latent_rewards.proxies.card import model_card
from latent_rewards.proxies.ensemble import Reader
from latent_rewards.proxies.judgement import Judgement


@pytest.fixture(scope="module")
def pair(world, quick):
    """A proxy whose held-out samples taught it in the end, and the same one before."""
    draw, curved = world
    latents = draw(120, 0)
    proxies = [
        train_proxy(latents, curved(latents), config=quick(num_updates=150, refit_fraction=fraction))
        for fraction in (0.5, 0.0)
    ]
    return *proxies, latents


def test_the_report_and_the_calibration_are_of_the_networks_that_had_not_seen_what_judges_them(pair):
    refitted, before, _ = pair
    assert refitted.report == before.report
    for name, value in refitted.heldout.tensors().items():
        assert torch.equal(value, before.heldout.tensors()[name]), name
    assert torch.equal(refitted.calibration.ratios, before.calibration.ratios)
    assert torch.equal(refitted.calibration.temperature, before.calibration.temperature)
    assert torch.equal(refitted.ood_score.disagreements, before.ood_score.disagreements)
    assert not torch.equal(refitted.distance.mean, before.distance.mean), (
        "features have moved, and usual ones with them"
    )


def test_it_predicts_new_samples_better(pair, world):
    draw, curved = world
    refitted, before, _ = pair
    fresh = draw(1000, 1)
    errors = [float((proxy(fresh) - curved(fresh)).abs().mean()) for proxy in (refitted, before)]
    assert errors[0] < 0.95 * errors[1]


def test_new_samples_are_as_strange_as_held_out_ones_were(pair, world):
    draw, _ = world
    for proxy in pair[:2]:
        prediction = proxy.predict(draw(1000, 1)).ood["reward"]
        assert float((prediction > proxy.ood_threshold(0.2)).float().mean()) < 0.3
        assert float(proxy.predict(draw(200, 1) * 3).ood["reward"].mean()) > 0.99


def test_every_sample_is_learnt_from_for_a_part_of_the_updates(world, quick, monkeypatch):
    draw, curved = world
    latents, drawn, batches = draw(64, 0), [], Reader.batches
    monkeypatch.setattr(
        Reader,
        "batches",
        lambda self, rows, size, count, source: drawn.append((rows, count)) or batches(self, rows, size, count, source),
    )
    train_proxy(latents, curved(latents), config=quick(num_updates=80, refit_fraction=0.25, ensemble_size=2))
    assert [count for _, count in drawn] == [80, 80, 20, 20]
    assert all(len(rows) < 55 for rows, _ in drawn[:2])
    assert all(torch.equal(rows, torch.arange(64)) for rows, _ in drawn[2:])


def test_a_network_that_learnt_nothing_is_left_alone_and_nothing_else_is_said_of_it(world, quick):
    latents, luck = world[0](120, 0), torch.randn(120, generator=torch.Generator().manual_seed(1))
    refitted, before = (train_proxy(latents, luck, config=quick(refit_fraction=share)) for share in (0.5, 0.0))
    assert before.report["reward"]["r2"] <= 0 and not module.learnt_heldout(refitted)
    for name, value in refitted.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]), name
    assert module.LEARNT_HELDOUT not in model_card(refitted)


@pytest.mark.parametrize(
    ("changes", "learns"),
    [
        ({}, True),
        ({"report": {"a": {"r2": 0.0}, "b": {"r2": 0.1}}}, True),
        ({"report": {"a": {"r2": 0.0}, "b": {"r2": math.nan}}}, False),
        ({"is_linear": True}, False),
        ({"judgement": Judgement("bradley_terry")}, False),
        ({"config": ProxyConfig(refit_fraction=0.0)}, False),
    ],
)
def test_what_learns_from_held_out_samples(changes, learns):
    proxy = {
        "is_linear": False,
        "judgement": None,
        "config": ProxyConfig(),
        "reward_names": ("a", "b"),
        "report": {"a": {"r2": 0.9}, "b": {"r2": 0.9}},
    }
    assert module.learnt_heldout(SimpleNamespace(**{**proxy, **changes})) is learns


def test_the_smallest_part_of_the_updates_is_one(world, quick):
    draw, curved = world
    latents = draw(64, 0)
    refitted, before = (
        train_proxy(latents, curved(latents), config=quick(refit_fraction=share)) for share in (1e-9, 0.0)
    )
    assert module.learnt_heldout(refitted) and not module.learnt_heldout(before)
    for new, old in zip(refitted.members, before.members, strict=True):
        assert not torch.equal(new.head.output.weight, old.head.output.weight)


def test_what_is_solved_in_closed_form_stays(world, quick, monkeypatch):
    latents = world[0](64, 0)
    monkeypatch.setattr(module, "continue_training", lambda *args, **settings: pytest.fail("nothing is trained"))
    solved = train_proxy(latents, latents.mean(dim=(1, 2, 3, 4)), config=quick(trunk="linear"))
    assert solved.report["reward"]["r2"] > 0.9
    for share in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"refit_fraction must be .*finite.*; got {share}"):
            quick(refit_fraction=share)
