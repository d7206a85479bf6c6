import math

from latent_rewards.report import Report
from latent_rewards.tuning_page import add_tuning

RESULT = {"true_curve": [], "holdout_curve": [], "best_step": None, "num_queries": 0}


def titles(history):
    report = Report("page")
    add_tuning(report, "reinforce", {**RESULT, "history": history})
    return [block["title"].partition(": ")[2] for block in report.blocks], report.render()


def test_what_several_rewards_logged_is_drawn():
    history = [
        {"step": step, "reward": 1.0, "multiplier/a": 0.1 * step, "violation/a": -0.1, "conflict": math.nan}
        for step in range(3)
    ]
    drawn, page = titles(history)
    assert drawn == [
        "metrics while tuning", "prices of the floors", "violations of the floors", "conflict of the rewards"
    ]  # fmt: skip
    assert "multiplier/a" in page and "violation/a" in page
    assert titles([{"step": 0, "reward": 1.0}])[0] == ["metrics while tuning"]
