import json

import pytest

from benchmarks.digits import SCORES, seeded, summarise


def result(seed, total):
    scores = dict.fromkeys(SCORES, 0.5) | {"total": total}
    return {"seed": seed, "rows": {"teacher, 50 steps": {"scores": scores}}}


def test_summary_is_mean_and_standard_deviation_over_seeds():
    summary, markdown = summarise([result(0, 60.0), result(1, 70.0)])
    total = summary["rows"]["teacher, 50 steps"]["total"]
    assert total == {"mean": 65.0, "std": pytest.approx(50**0.5)}
    assert "| teacher, 50 steps | 65.0 ± 7.1 | 0.5 |" in markdown and "| 50.0 |" in markdown
    json.dumps(summary)


def test_each_seed_has_a_run_of_its_own():
    config = "recipes/configs/moving_digits_full.yaml"
    assert [seeded(config, seed)["run"].name for seed in (0, 2)] == ["digits", "digits-seed2"]
    assert seeded(config, 2)["run"].seed == 2
