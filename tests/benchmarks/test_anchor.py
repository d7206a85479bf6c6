"""Only anchor and KL are left, a finished run is not touched, and one of other settings is not read."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import anchor
from benchmarks.digits import CONFIG, seeded
from latent_rewards.training.run_folder import RunFolder
from latent_rewards.training.settings import SettingsError

STUDENT, ANCHORED = "VSD→CD, 4 steps", "anchor alone, 4 steps"
TUNED_ROW = "VSD→CD→LRO (differentiable), 4 steps"


class Table:
    """Stands for the benchmark of a run that is finished."""

    def __init__(self):
        self.folder, self.rows = "of the run", {}

    def load_rows(self):
        self.rows |= {label: self.row(total) for label, total in ((STUDENT, 60.0), (TUNED_ROW, 70.0))}

    def add(self, label, sample, *, num_steps, network_evaluations):
        assert (sample, num_steps, network_evaluations) == ("anchored by 4", 4, 4)
        self.rows[label] = self.row(65.0)

    @staticmethod
    def row(total):
        return SimpleNamespace(evaluation=SimpleNamespace(scores={"total": total}))


class Pipeline:
    """Stands for the recipe's."""

    made = []

    def __init__(self, settings):
        self.settings, self.holdout, self.table = settings, "a classifier", Table()
        self.folder = RunFolder(Path(settings["run"].output_dir) / settings["run"].name)
        self.made.append(self)

    def remembered(self):
        run = dataclasses.replace(self.settings["run"], trainers=["reinforce"])
        return {**self.settings, "run": run}  # as the run was begun

    def load_student(self, path):
        return f"student of {path.name}"

    def collect(self, student):
        return "dataset"

    def fit(self, dataset):
        return "proxy"

    def benchmark(self):
        return self.table

    def tune(self, name, *parts):
        assert parts == ("student of student", "proxy", "dataset")
        self.tuned = name, self.settings["lro"], self.holdout, self.folder.path.name, self.table.folder
        return "anchored", {}

    def student_sampler(self, student, steps):
        return f"{student} by {steps}"


@pytest.fixture
def settings(tmp_path, monkeypatch):
    settings = seeded(CONFIG, 0)
    settings["run"].output_dir = str(tmp_path / "runs")
    monkeypatch.setattr(anchor, "seeded", lambda config, seed: settings)
    monkeypatch.setattr(anchor, "Dollar", Pipeline)
    monkeypatch.setattr(anchor, "DigitsBenchmark", Table)
    scores = {STUDENT: 60.0, ANCHORED: 65.0, TUNED_ROW: 70.0}
    monkeypatch.setattr(anchor, "paired", lambda table, base, label: scores[label] - scores[base])
    monkeypatch.setattr(sys, "argv", ["anchor", "--results", str(tmp_path / "told.json")])
    return settings


def test_no_reward_and_no_holdout_has_a_say_and_the_runs_own_folders_stay(settings, tmp_path):
    anchor.main()
    name, lro, holdout, folder, rows = Pipeline.made[-1].tuned
    assert (name, lro.reward_cap, holdout, folder) == (anchor.TRAINER, -10.0, None, "anchor_alone")
    assert lro.anchor_weight == settings["lro"].anchor_weight > 0 and settings["lro"].reward_cap != -10.0
    assert rows.parts[-2:] == ("anchor_alone", "evaluation")
    stored = json.loads((rows.parent / "settings" / "settings.json").read_text())
    assert stored["run"]["trainers"] == ["reinforce"], "those the run was begun with"
    assert stored["lro"]["reward_cap"] == -10.0, "one with another cap would be refused"
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["scores"] == {
        STUDENT: {"total": 60.0},
        ANCHORED: {"total": 65.0},
        TUNED_ROW: {"total": 70.0},
    }
    assert told["anchor alone minus student"] == told["tuned minus anchor alone"] == 5.0


def test_a_run_of_other_settings_is_not_read(settings, tmp_path, monkeypatch):
    begun = Pipeline(settings)
    begun.folder.remember(begun.remembered())
    settings["distillation"].vsd_steps += 1
    monkeypatch.setattr(Pipeline, "load_student", lambda *_: pytest.fail("read"))
    with pytest.raises(SettingsError, match="was begun with distillation.vsd_steps"):
        anchor.main()
