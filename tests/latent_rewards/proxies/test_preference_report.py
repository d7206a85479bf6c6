"""The report of preferences, by hand."""

import math

import pytest
import torch

from latent_rewards.proxies.preference_report import constant_log_loss, evaluate_preferences, pairwise_accuracy
from latent_rewards.proxies.report import evaluate, format_report

SCORES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [1.0, 0.0]])
OUTCOME = torch.tensor([1.0, 1.0, 0.0, 0.5])


def test_ties_are_left_out_and_equal_scores_are_half_right():
    assert pairwise_accuracy(SCORES, OUTCOME) == pytest.approx(1.5 / 3)
    assert pairwise_accuracy(-SCORES, 1 - OUTCOME) == pytest.approx(1.5 / 3)
    assert pairwise_accuracy(SCORES[:1], OUTCOME[:1]) == 1
    assert math.isnan(pairwise_accuracy(SCORES[3:], OUTCOME[3:]))


def test_the_constant_judge_does_not_know_who_stands_first():
    assert constant_log_loss(torch.ones(5), 0.0) == pytest.approx(math.log(2))
    assert constant_log_loss(OUTCOME, 0.2) == pytest.approx(-(3 * math.log(0.4) + math.log(0.2)) / 4)


def test_entry_and_table():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.5, 0.4], [0.25, 0.25, 0.5], [0.2, 0.6, 0.2]]).double()
    flat = torch.full((4, 3), 1 / 3).double()
    entry = evaluate_preferences(SCORES, probabilities.log(), (-SCORES, flat.log()), OUTCOME, 0.2, 7)
    assert entry["pairwise_accuracy"] == pytest.approx(0.5)
    assert entry["log_loss"] == pytest.approx(-(math.log(0.5 * 0.1 * 0.5 * 0.6)) / 4)
    assert entry["tie_rate"] == 0.25 and entry["predicted_tie_rate"] == pytest.approx(1.65 / 4)
    assert entry["ridge"]["log_loss"] == pytest.approx(math.log(3)) and entry["constant"]["pairwise_accuracy"] == 0.5
    assert (entry["num_train"], entry["num_holdout"]) == (7, 4) and math.isnan(entry["ridge"]["spearman"])
    lines = format_report({"taste": entry}).splitlines()
    assert lines[0].split()[:3] == ["preference", "pairs", "right"] and len(lines) == 2
    assert lines[1].split()[:3] == ["taste", "0.5", "0.5"] and lines[1].split()[-2:] == ["7", "4"]
    target = torch.arange(3.0)[:, None]
    both = evaluate(("r",), target, target, target, torch.ones(1), torch.ones(1)) | {"taste": entry}
    assert format_report(both).splitlines()[3].startswith("reward") and len(format_report(both).splitlines()) == 5
