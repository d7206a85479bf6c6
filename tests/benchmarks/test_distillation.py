import dataclasses
import json

import pytest

from benchmarks.digits import SCORES, TEACHER, seeded
from benchmarks.distillation import ONE_STEP, run_seed, summarise
from latent_rewards.training.settings import SettingsError
from recipes.dollar import Dollar


def result(seed, total):
    scores = dict.fromkeys(SCORES, 0.5) | {"total": total}
    difference = {score: {"difference": scores[score] - 50.0, "low": -1.0, "high": 1.0} for score in SCORES}
    return {
        "seed": seed,
        "rows": {TEACHER: dict.fromkeys(SCORES, 0.5) | {"total": 50.0}, "VSD, 4 steps": scores},
        "differences": {f"VSD, 4 steps minus {TEACHER}": difference},
    }


def test_summary_is_mean_and_standard_deviation_over_seeds():
    summary, markdown = summarise([result(0, 60.0), result(1, 70.0)])
    assert summary["seeds"] == [0, 1]
    assert summary["rows"]["VSD, 4 steps"]["total"] == {"mean": 65.0, "std": pytest.approx(50**0.5)}
    assert summary["differences"][f"VSD, 4 steps minus {TEACHER}"]["total"]["mean"] == 15.0
    assert "| VSD, 4 steps | 65.0 ± 7.1 | 0.5 |" in markdown and f"| {TEACHER} | 50.0 |" in markdown
    json.dumps(summary)


def test_a_run_that_was_begun_with_other_settings_is_not_reported(tmp_path, monkeypatch):
    def distil(self, name, **overrides):
        raise InterruptedError

    monkeypatch.setattr(Dollar, "distil", distil)
    settings = seeded(ONE_STEP, 0)
    settings["run"].output_dir = str(tmp_path)
    with pytest.raises(InterruptedError):
        run_seed(settings)
    settings["distillation"] = dataclasses.replace(settings["distillation"], learning_rate=0.05)
    with pytest.raises(SettingsError, match=r"begun with distillation.learning_rate = .*, now 0.05"):
        run_seed(settings)
