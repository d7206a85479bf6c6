import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.digits import SCORES, TUNED, seeded, summarise, told_rows, untuned, write_seed
from recipes.moving_digits.benchmark import Row

STUDENT = "VSD→CD, 4 steps"


def result(seed, total, tuned, steps="4 steps"):
    """One seed: the student has legibility 0.4, real clips 0.8, the tuned student what is given."""
    legible = {"real clips": 0.8, f"VSD→CD, {steps}": 0.4, f"VSD→CD→LRO (reinforce), {steps}": tuned}
    point = {"proxy": {TUNED: 0.7}, "true": {TUNED: 0.6}, "mae": {TUNED: 0.15}}
    return {
        "seed": seed,
        "rows": {
            label: {"scores": dict.fromkeys(SCORES, 0.5) | {"total": total, TUNED: value}}
            for label, value in legible.items()
        },
        "differences": {"a minus b": {score: {"difference": total - 60.0} for score in SCORES}},
        "proxy": {TUNED: {"spearman": 0.8, "r2": 0.7, "mae": 0.1, "ridge": {"spearman": 0.5}}},
        "tuning": {"reinforce": {"num_queries": 640, "best_step": 40, "seconds": 100.0, "true_curve": [point]}},
    }


def test_summary_is_mean_and_standard_deviation_over_seeds():
    summary, markdown = summarise([result(0, 60.0, 0.6), result(1, 70.0, 0.8)])
    assert summary["rows"][STUDENT]["total"] == {"mean": 65.0, "std": pytest.approx(50**0.5)}
    assert summary["differences"]["a minus b"]["total"]["mean"] == 5.0
    assert f"| {STUDENT} | 65.0 ± 7.1 | 0.5 |" in markdown and "| 40.0 |" in markdown
    json.dumps(summary)


def test_tuning_is_judged_by_the_share_of_the_gap_it_closes():
    summary, markdown = summarise([result(0, 60.0, 0.6), result(1, 60.0, 0.8)])
    told = summary["tuning"]["reinforce"]
    assert told["gap_closed"]["mean"] == pytest.approx(0.75)
    assert told["proxy_gap"]["mean"] == pytest.approx(0.1)
    assert "| reinforce | 75 ± 35 | 640 | 100 | 0.100 | 0.150 |" in markdown


def test_what_is_tuned_is_the_student_at_the_most_steps_it_was_scored_at():
    assert (
        untuned(["teacher, 50 steps", "VSD, 8 steps", "VSD→CD, 1 step", STUDENT, "VSD→CD→LRO (x), 8 steps"]) == STUDENT
    )
    one = result(0, 60.0, 0.6, "1 step")
    pairs = ["VSD, 1 step minus VSD→CD, 1 step", f"VSD, 1 step minus {STUDENT}", f"VSD, 4 steps minus {STUDENT}"]
    for told, kept in ((one, pairs), (result(0, 60.0, 0.6), [pairs[0], pairs[2]])):
        told["differences"] = {pair: {score: {"difference": 0.0} for score in SCORES} for pair in pairs}
        summary, markdown = summarise([told])
        assert summary["tuning"]["reinforce"]["gap_closed"]["mean"] == pytest.approx(0.5)
        assert [pair for pair in pairs if f"| {pair} |" in markdown] == kept


def test_each_seed_has_a_run_of_its_own():
    config = "recipes/configs/moving_digits_full.yaml"
    assert [seeded(config, seed)["run"].name for seed in (0, 2)] == ["digits", "digits-seed2"]
    assert seeded(config, 2)["run"].seed == 2


def test_a_seed_that_is_there_keeps_the_provenance_of_its_measurement(tmp_path):
    told = {"seed": 0, "rows": {"real clips": {"seconds": float("nan"), "scores": {"total": 60.0}}}}
    write_seed(tmp_path / "seed0.json", {**told, "commit": "1234567", "command": "make demo"})
    before = (tmp_path / "seed0.json").read_text()
    write_seed(tmp_path / "seed0.json", {**told, "commit": "89abcde", "command": "python -m benchmarks.digits"})
    assert (tmp_path / "seed0.json").read_text() == before
    write_seed(tmp_path / "seed0.json", {**told, "seed": 1, "commit": "89abcde"})
    assert json.loads((tmp_path / "seed0.json").read_text())["commit"] == "89abcde"


def test_rows_are_told_with_the_commit_that_measured_them_where_it_is_known():
    made = {"first": "1234567", "old": None}
    evaluation = SimpleNamespace(scores={"total": 60.0})
    rows = {label: Row(label, evaluation, 1.5, 4, torch.zeros(1), commit) for label, commit in made.items()}
    told = told_rows(SimpleNamespace(rows=rows))
    known = {"scores": {"total": 60.0}, "seconds": 1.5, "network_evaluations": 4}
    assert told == {"first": {**known, "commit": "1234567"}, "old": known}
