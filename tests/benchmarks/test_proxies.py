"""Scores against independent computations, and results that are written, kept and not measured twice."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import latent_rewards as lr
from benchmarks.proxies import METHODS, Comparison, check_request, coverage, judge, open_result, run, separation
from benchmarks.proxy_samples import Amounts
from latent_rewards.contracts import ConfigError


def test_a_perfect_prediction_scores_one_and_a_constant_one_knows_no_order():
    true = np.array([0.1, 0.4, 0.2, 0.9])
    assert judge(true, true) == pytest.approx({"spearman": 1, "ceiling": 1, "pairwise": 1, "r2": 1, "mae": 0})
    constant = judge(np.full(4, 0.4), true)
    assert constant["spearman"] == 0 and constant["pairwise"] == 0.5
    assert constant["r2"] == pytest.approx(0) and constant["mae"] == pytest.approx(0.25)


def test_the_ceiling_of_yes_or_no_is_what_the_best_order_without_ties_reaches():
    true = np.repeat([0.0, 1.0], 50)
    scores = judge(np.linspace(0, 1, 100), true)
    assert scores["ceiling"] == pytest.approx(scores["spearman"]) == pytest.approx(np.sqrt(0.75 * 1e4 / (1e4 - 1)))
    assert scores["pairwise"] == 1


def test_pairs_in_order_are_the_area_under_the_curve_where_truth_is_yes_or_no():
    draw = np.random.default_rng(0)
    true, predicted = draw.integers(0, 2, 200), draw.integers(0, 6, 200) / 5
    assert judge(predicted, true.astype(float))["pairwise"] == pytest.approx(roc_auc_score(true, predicted))


def test_the_interval_of_coverage_is_as_wide_as_prompts_are_few():
    """All samples of a prompt in or out: P prompts are P coin tosses, however many samples they have."""
    inside = np.repeat(np.random.default_rng(0).random(400) < 0.8, 10)
    prompts = [f"prompt {i // 10}" for i in range(4000)]
    told = coverage(inside, prompts, seed=0)
    share = inside.mean()
    assert told["share"] == share
    assert told["high"] - told["low"] == pytest.approx(2 * 1.96 * np.sqrt(share * (1 - share) / 400), rel=0.08)
    assert told == coverage(inside, prompts, seed=0) != coverage(inside, prompts, seed=1)


def test_coverage_weighs_samples_not_prompts():
    """100 prompts of nine samples that are inside, and 100 of one sample that is not."""
    prompts = [f"inside {i // 9}" for i in range(900)] + [f"outside {i}" for i in range(100)]
    told = coverage(np.array([True] * 900 + [False] * 100), prompts, seed=0)
    assert told["share"] == 0.9 and 0.86 < told["low"] < 0.9 < told["high"] < 0.94


def test_separation_counts_equal_scores_half():
    assert separation(np.array([0.0, 0.5]), np.array([0.5, 1.0])) == (1 + 1 + 0.5 + 1) / 4


def entry(value):
    return {"rewards": {"legible": {"spearman": value}}, "fit_seconds": 1.0}


def test_what_was_measured_is_kept_when_the_next_size_fails_and_not_measured_again(tmp_path):
    asked = []

    def measure(method, seed, size):
        asked.append((method, seed, size))
        if size == 64 and len(asked) == 2:
            raise KeyboardInterrupt
        return entry(size / 100)

    wanted = {"methods": ["ridge"], "seeds": [0, 1], "sizes": [32, 64], "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        run(measure, {"student": "a"}, **wanted)
    assert json.loads((tmp_path / "ridge-seed0.json").read_text())["sizes"] == {"32": entry(0.32)}
    run(measure, {"student": "a"}, **wanted)
    assert asked[2:] == [("ridge", 0, 64), ("ridge", 1, 32), ("ridge", 1, 64)]
    kept = json.loads((tmp_path / "ridge-seed1.json").read_text())
    assert kept == {"method": "ridge", "seed": 1, "settings": {"student": "a"}, "sizes": kept["sizes"]}
    assert kept["sizes"] == {"32": entry(0.32), "64": entry(0.64)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ridge-seed0.json", "ridge-seed1.json"]


def test_results_of_another_student_are_not_continued(tmp_path):
    run(lambda *_: entry(0.5), {"student": "a"}, methods=["mlp"], seeds=[0], sizes=[32], folder=tmp_path)
    with pytest.raises(ConfigError, match="student = 'a', now 'b'"):
        open_result(tmp_path / "mlp-seed0.json", "mlp", 0, {"student": "b"})


def test_what_results_share_is_everything_that_changes_them():
    world = SimpleNamespace(
        student_digest="a",
        codec=SimpleNamespace(fingerprint="c"),
        oracle=SimpleNamespace(fingerprints={"legible": "1"}),
        amounts=Amounts(),
        heldout=lambda: None,
    )
    told = Comparison(world, 512).settings()
    some = {"student": "a", "hack_size": 512, "hack_updates": 120, "foreign": 1000, "hacked": 500}
    assert some.items() <= told.items()
    config = lr.ProxyConfig(width=16, progress=False)
    other = Comparison(SimpleNamespace(**{**vars(world), "amounts": Amounts(hack_rate=1.0)}), 512, config).settings()
    assert {name for name in told if told[name] != other[name]} == {"hack_rate", "proxy.width"}


def test_a_file_of_before_a_setting_was_kept_is_continued(tmp_path):
    run(lambda *_: entry(0.5), {"student": "a"}, methods=["mlp"], seeds=[0], sizes=[32], folder=tmp_path)
    settings = {"student": "a", "hack_rate": 0.1}
    run(lambda *_: entry(0.6), settings, methods=["mlp"], seeds=[0], sizes=[32, 64], folder=tmp_path)
    kept = json.loads((tmp_path / "mlp-seed0.json").read_text())
    assert kept["settings"] == {"student": "a"} and kept["sizes"] == {"32": entry(0.5), "64": entry(0.6)}


@pytest.mark.parametrize(
    ("methods", "sizes", "student", "said"),
    [
        (["rigde"], [32], "folder", "Did you mean 'ridge'"),
        (METHODS, [32, 128], "folder", "128 labels are more than the pool's 64"),
        (METHODS, [32], None, "pass --student"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(methods, sizes, student, said):
    with pytest.raises(ConfigError, match=said):
        check_request(methods, sizes, student, Amounts(pool=64))
