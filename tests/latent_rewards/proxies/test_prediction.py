"""Intervals are the mean and a held-out quantile of standard deviations."""

import math

import pytest
import torch

from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.proxies.conformal import conformal_quantiles
from latent_rewards.proxies.prediction import ProxyPrediction


def test_interval_by_hand():
    ratios = conformal_quantiles(torch.arange(1.0, 20.0), math.inf)
    prediction = ProxyPrediction(
        {"a": torch.tensor([0.0, 5.0])}, {"a": torch.tensor([1.0, 2.0])}, {"a": torch.zeros(2)}, {"a": ratios}
    )
    low, high = prediction.interval(0.9)
    assert (low["a"].tolist(), high["a"].tolist()) == ([-18.0, -31.0], [18.0, 41.0])
    low, high = prediction.interval(0.5)
    assert (low["a"].tolist(), high["a"].tolist()) == ([-10.0, -15.0], [10.0, 25.0])
    assert prediction.interval(0.96)[1]["a"].isinf().all()
    with pytest.raises(ConfigError, match="level must lie in"):
        prediction.interval(1.0)
    with pytest.raises(DataError, match="no ratios"):
        ProxyPrediction(prediction.mean, prediction.std, prediction.ood).interval(0.9)
