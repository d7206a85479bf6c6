"""Spread, cosine and slope of gradients whose mean and covariance are known."""

import json
import sys

import pytest
import torch

from benchmarks import estimators
from benchmarks.estimators import EXACT, Moments, make_estimators, table
from latent_rewards.contracts import ConfigError


def test_moments_are_those_of_known_gradients():
    """b ~ N(m, s^2 I), a = half of b plus noise of its own: dependent in each update, and biased by one half."""
    source = torch.Generator().manual_seed(0)
    dim, count, mean, std = 200, 4000, 0.5, 2.0
    exact, half = Moments(), Moments()
    for _ in range(count):
        b = mean + std * torch.randn(dim, generator=source, dtype=torch.float64)
        a = 0.5 * b + torch.randn(dim, generator=source, dtype=torch.float64)
        exact.add(b, b, 0.5)
        half.add(a, b, 0.25)
    told = half.told(exact)
    size = dim * mean**2
    assert told["slope"] == pytest.approx(0.5, abs=0.01)
    assert told["cosine"] == pytest.approx(1.0, abs=0.01)
    assert told["spread"] == pytest.approx((dim * (0.25 * std**2 + 1) / size) ** 0.5, rel=0.01)
    assert told["seconds"] == 0.25
    own = exact.told(exact)
    assert own["slope"] == pytest.approx(1) and own["spread"] == pytest.approx((dim * std**2 / size) ** 0.5, rel=0.01)


def test_noise_alone_has_no_direction():
    """With few updates the plain mean of noise would look like a gradient; products of different updates do not."""
    source = torch.Generator().manual_seed(1)
    exact, noise = Moments(), Moments()
    b = torch.ones(1000, dtype=torch.float64)
    for _ in range(10):
        exact.add(b, b, 0.0)
        noise.add(5 * torch.randn(1000, generator=source, dtype=torch.float64), b, 0.0)
    told = noise.told(exact)
    assert abs(told["slope"]) < 0.2 and told["spread"] == pytest.approx(5, rel=0.03)


def test_the_exact_estimator_comes_first_and_tables_name_all():
    made = make_estimators((8, 32))
    assert next(iter(made)) == EXACT and len(made) == 4 + 2 * 3
    assert (
        table({name: dict.fromkeys(("spread", "cosine", "slope", "seconds"), 1.0) for name in made}).count("\n") == 12
    )


def test_where_noise_leaves_no_size_of_the_exact_gradient_nothing_is_told_of_it():
    told = Moments()
    for sign in (1, -1):
        told.add(sign * torch.ones(4), sign * torch.ones(4), 0.5)
    assert told.told(told) == {"spread": None, "cosine": None, "slope": None, "seconds": 0.5}
    assert "| a | – | – | – | 0.5 |" in table(json.loads(json.dumps({"a": told.told(told)})))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--updates", "1"), "updates must be at least 2, whose gradients are multiplied; got 1"),
        (("--draws", "8", "7"), "give even numbers; got 7"),
        (("--draws", "0"), "give even numbers; got 0"),
    ],
)
def test_what_cannot_be_told_is_refused_before_anything_is_loaded(asked, said, monkeypatch):
    monkeypatch.setattr(estimators, "open_samples", lambda options: pytest.fail("loaded"))
    monkeypatch.setattr(sys, "argv", ["estimators", "--student", "folder", *asked])
    with pytest.raises(ConfigError, match=said):
        estimators.main()
