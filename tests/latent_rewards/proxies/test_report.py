"""The report's numbers are the textbook ones."""

import math

import pytest
import torch

from latent_rewards.proxies.heldout import HeldOut
from latent_rewards.proxies.report import accuracy, evaluate, extend_report, format_report, honesty_rows, spearman


def test_accuracy_by_hand():
    target = torch.tensor([1.0, 2.0, 3.0, math.nan])
    scores = accuracy(torch.tensor([1.0, 3.0, 2.0, 9.0]), target)
    assert scores == pytest.approx({"spearman": 0.5, "r2": 0.0, "mae": 2 / 3})
    assert spearman(torch.ones(3), target[:3]) != spearman(torch.ones(3), target[:3])
    assert spearman(torch.tensor([1.0, 1.0, 2.0]), target[:3]) == pytest.approx(math.sqrt(3) / 2)


def test_report_and_table():
    target = torch.tensor([[1.0, 4.0], [2.0, math.nan], [3.0, 5.0]])
    report = evaluate(("a", "b"), target + 1, -target, target, torch.tensor([0.9, 0.8]), torch.tensor([7, 6]))
    assert report["a"]["spearman"] == 1 and report["a"]["ridge"]["spearman"] == -1
    assert report["a"]["mae"] == 1 and report["b"]["num_holdout"] == 2 and report["b"]["num_train"] == 6
    assert report["b"]["coverage"] == pytest.approx(0.8)
    lines = format_report(report).splitlines()
    assert len(lines) == 3 and lines[0].startswith("reward") and lines[1].split()[:3] == ["a", "1", "-1"]


def test_baselines_and_learning_curves_in_the_table():
    target = torch.tensor([[1.0], [2.0], [3.0], [4.0]]).double()
    report = evaluate(("a",), target, target, target, torch.tensor([0.9]), torch.tensor([7]))

    def heldout(predicted):
        return HeldOut(predicted, torch.ones_like(target), target, torch.zeros(4), torch.tensor([0, 0, 1, 1]))

    baselines = {"ridge": heldout(-target), "constant": heldout(0 * target)}
    entry = extend_report(report, heldout(target), baselines, seed=0)["a"]
    assert entry["pairwise_accuracy"] == entry["pairwise_accuracy_within_prompt"] == 1.0
    assert entry["ridge"]["pairwise_accuracy"] == 0.0 and entry["ridge"]["spearman"] == pytest.approx(-1)
    assert entry["constant"]["spearman"] is None and entry["constant"]["mae"] == 2.5
    assert entry["num_train"] == 7 and entry["coverage"] == 1.0 and entry["constant"]["coverage"] == 0.25
    rows = dict(honesty_rows(entry))
    assert list(rows) == ["proxy", "ridge", "constant"] and rows["constant"][0] is None
    entry["learning_curve"] = {
        "num_train": [1, 2, 4],
        "spearman": [0.5, None, 0.75],
        "mae": [1.0, 1.0, 0.5],
        "twice": {"num_train": 8, "spearman": 0.875, "mae": None},
    }
    text = format_report(report)
    assert "4 labels: 0.75 (MAE 0.5); expected with 8 labels: 0.875 (MAE -)" in text and "2 labels: - (MAE 1)" in text
    assert [line.split()[1] for line in text.splitlines()[4:7]] == ["proxy", "ridge", "constant"]
