"""The report's numbers are the textbook ones."""

import math

import pytest
import torch

from latent_rewards.proxies.report import accuracy, evaluate, format_report, spearman


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
