from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from latent_rewards.contracts import DataError
from latent_rewards.lro.constraints import Lagrangian
from latent_rewards.lro.guard import Guard, RefreshSchedule
from latent_rewards.rewards import WeightedSum


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def guard(patience: int | None = 2, **settings) -> Guard:
    return Guard(nn.Linear(1, 1), RefreshSchedule(5, 8), patience=patience, **settings)


def test_refreshes_come_every_so_often_within_the_budget():
    schedule = RefreshSchedule(every=5, queries=16, max_queries=40)
    assert [schedule.due(step, 0) for step in range(11)] == [0] * 5 + [16] + [0] * 4 + [16]
    assert [schedule.due(5, spent) for spent in (16, 32, 33, 50)] == [16, 8, 0, 0]


def test_a_spent_budget_warns_once():
    watched = Guard(nn.Linear(1, 1), RefreshSchedule(5, 8, max_queries=8), num_queries=8)
    with pytest.warns(UserWarning, match="budget of 8 true queries is spent at update 5"):
        assert watched.queries_due(5) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert watched.queries_due(10) == 0


def test_gap_is_proxy_minus_true_over_the_samples_the_metric_applies_to():
    watched = guard()
    logs = watched.record_gap(5, {"a": tensor(4, 0, 9)}, {"a": tensor(0, 1, math.nan)})
    assert logs == {"true/a": 0.5, "gap/a": 1.5, "queries": 3.0}
    assert watched.gaps == [{"step": 5, "proxy": {"a": 2.0}, "true": {"a": 0.5}, "mae": {"a": 2.5}}]


def test_queries_that_are_not_given_count_too():
    watched = guard()
    assert watched.record_gap(5, {"a": tensor(4, 0)}, {"a": tensor(0, 1)}, num_queries=5)["queries"] == 5
    assert watched.num_queries == 5


def test_stops_after_patience_evaluations_without_a_new_best_and_returns_to_it():
    watched = guard(patience=2)
    weight = watched.policy.weight
    for step, value in enumerate([0.1, 0.5, 0.4, 0.5]):
        assert not watched.stopped
        with torch.no_grad():
            weight.fill_(step)
        assert watched.record_holdout(step, {"a": tensor(value, math.nan)}) == {"holdout/a": value}
    assert watched.stopped and watched.best_step == 1
    assert watched.rollback() and float(weight.detach()) == 1.0


def test_improvements_below_the_minimum_do_not_count():
    watched = guard(patience=1, min_improvement=0.2)
    watched.record_holdout(0, {"a": tensor(0.0)})
    watched.record_holdout(1, {"a": tensor(0.1)})
    assert watched.stopped and watched.best_step == 0


def test_without_patience_it_never_stops_and_without_an_evaluation_nothing_is_rolled_back():
    watched = guard(patience=None)
    assert not watched.rollback()
    for step in range(9):
        watched.record_holdout(step, {"a": tensor(-step)})
    assert not watched.stopped


def test_an_evaluation_that_keeps_the_floors_is_better_than_any_that_does_not():
    floors = Lagrangian(WeightedSum({"a": 1.0}), {"b": 0.4}, units={"b": 2.0}, baselines={"b": 0.5})
    watched, best = guard(patience=None, floors=floors), []
    # On these samples the start has 0.7, so the floor lies at 0.6.
    for step, (a, b) in enumerate([(0.1, 0.7), (0.3, 0.62), (0.9, 0.5), (0.4, 0.6), (0.2, 0.9)]):
        watched.record_holdout(step, {"a": tensor(a), "b": tensor(b)})
        best.append(watched.best_step)
    assert best == [0, 1, 1, 3, 3] and [entry["score"] for entry in watched.holdout] == [0.1, 0.3, 0.9, 0.4, 0.2]
    assert floors.shortfall({"b": 0.5}, {"b": 0.7}) == pytest.approx(0.05, abs=1e-15)
    assert floors.shortfall({"a": 0.0}, {}) == 0.0


def test_a_missed_floor_is_no_reason_to_stop_while_there_is_a_policy_that_kept_it():
    watched = guard(patience=2, floors=Lagrangian(WeightedSum({"a": 1.0}), {"b": 0.4}))
    for step, b in enumerate((0.5, 0.3, 0.2, 0.3, 0.45)):
        watched.record_holdout(step, {"a": tensor(step), "b": tensor(b)})
    assert watched.best_step == 4 and not watched.stopped
    for step in (5, 6):
        watched.record_holdout(step, {"a": tensor(0.0), "b": tensor(0.5)})
    assert watched.stopped


def test_checkpoints_from_before_floors_were_followed_can_be_continued():
    watched, other = guard(), guard()
    watched.record_holdout(5, {"a": tensor(0.3)})
    state = {name: value for name, value in watched.state_dict().items() if name != "_best_shortfall"}
    other.load_state_dict(state)
    other.record_holdout(6, {"a": tensor(0.2)})
    assert other.best_step == 5


def test_where_no_evaluation_keeps_the_floors_the_nearest_remains():
    floors = Lagrangian(WeightedSum({"a": 1.0}), {"b": 0.4, "c": 0.0})
    watched, best = guard(patience=2, floors=floors), []
    for step, (a, b, c) in enumerate([(0.9, 0.1, 0.0), (0.1, 0.3, 0.0), (0.9, 0.3, -0.2), (0.9, 0.2, 0.0)]):
        watched.record_holdout(step, {"a": tensor(a), "b": tensor(b), "c": tensor(c)})
        best.append(watched.best_step)
    assert best == [0, 1, 1, 1] and watched.stopped
    other = guard(floors=floors)
    other.load_state_dict(watched.state_dict())
    other.record_holdout(9, {"b": tensor(0.5), "c": tensor(0.0)})
    assert other.best_step == 9 and other.holdout[-1]["score"] == 0.25  # nothing else to judge by


def test_frozen_parameters_are_not_kept():
    watched = guard()
    watched.policy.bias.requires_grad_(False)
    watched.record_holdout(0, {"a": tensor(1.0)})
    assert list(watched.state_dict()["_best_parameters"]) == ["weight"]


def test_state_round_trips():
    watched, other = guard(), guard()
    watched.record_gap(5, {"a": tensor(1)}, {"a": tensor(0)})
    watched.record_holdout(5, {"a": tensor(0.3), "b": tensor(0.5)})
    watched.record_holdout(6, {"a": tensor(0.2), "b": tensor(0.5)})
    other.load_state_dict(watched.state_dict())
    assert other.state_dict() == watched.state_dict() and other.holdout[0]["score"] == 0.4
    other.record_holdout(7, {"a": tensor(0.2), "b": tensor(0.5)})
    assert other.stopped and other.best_step == 5
    other.rollback()
    assert torch.equal(other.policy.weight, watched._best_parameters["weight"])


def test_a_holdout_that_applies_to_nothing_is_an_error():
    with pytest.raises(DataError, match="'a' has mean nan at step 3"):
        guard().record_holdout(3, {"a": tensor(math.nan)})


def test_of_a_metric_that_should_fall_the_lowest_is_the_best():
    watched = guard(patience=2, lower_is_better=frozenset({"blur"}))
    for step, (blur, sharp) in enumerate([(0.3, 0.5), (0.1, 0.5), (0.2, 0.5), (0.3, 0.5)]):
        watched.record_holdout(step, {"blur": tensor(blur), "sharp": tensor(sharp)})
    assert watched.best_step == 1 and watched.stopped
    assert [entry["score"] for entry in watched.holdout] == pytest.approx([0.1, 0.2, 0.15, 0.1])
    assert watched.holdout[0]["values"] == {"blur": 0.3, "sharp": 0.5}
