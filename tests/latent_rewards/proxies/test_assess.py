"""The report of a proxy is of samples it has not seen, beside its baselines, and can ask for a learning curve."""

import json
import math

import pytest
import torch

from latent_rewards.contracts import DataError
from latent_rewards.proxies import fit, format_report, train_proxy
from latent_rewards.proxies.report import accuracy

NUMBERS = ("spearman", "r2", "mae", "pairwise_accuracy", "calibration_error", "coverage", "interval_width")


@pytest.fixture(scope="module")
def trained(world, quick):
    draw, curved = world
    latents = draw(400, 0)
    rewards = {"curve": 100 + 7 * curved(latents), "mean": latents.mean(dim=(1, 2, 3, 4))}
    rewards["mean"][::5] = math.nan
    prompts = [f"clip {i % 40}" for i in range(400)]
    return train_proxy(latents, rewards, prompts, config=quick(num_updates=75, ensemble_size=2, learning_curve=True))


def test_the_report_beside_ridge_and_constant(trained):
    for name, entry in trained.report.items():
        for values in (entry, entry["ridge"], entry["constant"]):
            assert all(
                math.isfinite(values[key]) for key in NUMBERS if (values is not entry["constant"] or key != "spearman")
            )
            low, high = values["coverage_interval"]
            assert 0 <= low <= values["coverage"] <= high <= 1 and 0 <= values["calibration_error"] < 0.5
        constant = entry["constant"]
        assert constant["spearman"] is None and constant["pairwise_accuracy"] == 0.5 and abs(constant["r2"]) < 0.3
        assert constant["pairwise_accuracy_within_prompt"] == 0.5 and 0 < entry["pairwise_accuracy_within_prompt"] <= 1
        assert name in trained.reward_names and entry["interval_width"] < constant["interval_width"]
    curve = trained.report["curve"]
    assert curve["pairwise_accuracy"] > 0.7 > curve["ridge"]["pairwise_accuracy"]
    assert json.loads(json.dumps(trained.report)) == trained.report


def test_held_out_predictions_are_those_the_report_is_about(trained):
    held = trained.heldout
    for column, name in enumerate(trained.reward_names):
        scores = accuracy(held.predicted[:, column], held.truth[:, column])
        assert {key: trained.report[name][key] for key in scores} == pytest.approx(scores)
    assert len(held.ood) == trained.report["curve"]["num_holdout"] and (held.ood >= 0).all() and (held.ood <= 1).all()
    assert float(held.truth[:, 0].mean()) > 90


def test_the_learning_curve_ends_where_the_report_is(trained):
    for entry in trained.report.values():
        curve = entry["learning_curve"]
        assert curve["num_train"][-1] == entry["num_train"] and curve["spearman"][-1] == pytest.approx(
            entry["spearman"]
        )
        assert curve["num_train"][0] < curve["num_train"][1] < curve["num_train"][2]
        assert curve["twice"]["num_train"] == 2 * entry["num_train"] and curve["twice"]["mae"] <= curve["mae"][-1]
    assert trained.report["mean"]["learning_curve"]["mae"][0] > trained.report["mean"]["mae"]
    text = format_report(trained.report)
    assert "within a prompt" in text and "curve: Spearman with" in text and "constant" in text


def test_too_few_samples_for_a_learning_curve_are_told_before_training(world, quick, monkeypatch):
    draw, curved = world
    with pytest.raises(DataError, match="learning_curve=False"):
        monkeypatch.setattr(fit, "_fit", lambda *given: pytest.fail("it was trained"))
        train_proxy(draw(60, 0), curved(draw(60, 0)), config=quick(learning_curve=True))


def test_it_changes_no_weight(trained, world, quick):
    draw, curved = world
    latents = draw(100, 0)
    plain = train_proxy(latents, curved(latents), config=quick(num_updates=5, ensemble_size=2))
    with_curve = train_proxy(
        latents, curved(latents), config=quick(num_updates=5, ensemble_size=2, learning_curve=True)
    )
    assert all(torch.equal(value, with_curve.state_dict()[name]) for name, value in plain.state_dict().items())
    report = {key: value for key, value in with_curve.report["reward"].items() if key != "learning_curve"}
    assert report == plain.report["reward"]
    linear = train_proxy(latents, curved(latents), config=quick(trunk="linear"))
    assert linear.report["reward"]["ridge"]["mae"] == pytest.approx(linear.report["reward"]["mae"], rel=1e-9)
