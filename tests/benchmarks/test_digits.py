import json

import pytest

from benchmarks.digits import SCORES, STUDENT, TUNED, seeded, summarise, write_summary


def result(seed, total, tuned):
    """One seed: the student has legibility 0.4, real clips 0.8, the tuned student what is given."""
    legible = {"real clips": 0.8, STUDENT: 0.4, "VSD→CD→LRO (reinforce), 4 steps": tuned}
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


def test_each_seed_has_a_run_of_its_own():
    config = "recipes/configs/moving_digits_full.yaml"
    assert [seeded(config, seed)["run"].name for seed in (0, 2)] == ["digits", "digits-seed2"]
    assert seeded(config, 2)["run"].seed == 2


def test_a_summary_is_written_of_a_folders_results_in_the_order_of_their_names(tmp_path, capsys):
    for name, value in (("seed1", 1), ("seed0", 0), ("other", 2)):
        (tmp_path / f"{name}.json").write_text(str(value))
    write_summary(tmp_path, "seed*.json", lambda results: ({"values": results}, f"| {results} |\n"))
    assert json.loads((tmp_path / "summary.json").read_text()) == {"values": [0, 1]}
    assert (tmp_path / "summary.md").read_text() == "| [0, 1] |\n" and "| [0, 1] |" in capsys.readouterr().out
