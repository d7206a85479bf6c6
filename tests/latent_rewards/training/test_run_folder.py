import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from latent_rewards.training.checkpoint import FolderInUseError, commit_directory
from latent_rewards.training.run_folder import RunFolder
from latent_rewards.training.settings import SettingsError


@dataclass
class Section:
    beta: float = 0.05


def save(value, path):
    with commit_directory(path) as temporary:
        (temporary / "value.json").write_text(json.dumps(value))


def load(path):
    return json.loads((path / "value.json").read_text())


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.remember({"lro": Section()})
    folder.remember({"lro": Section()})
    with pytest.raises(SettingsError, match=r"lro.beta = 0.05, now 0.7"):
        folder.remember({"lro": Section(beta=0.7)})


def test_somebody_elses_settings_are_left_alone_and_damaged_ones_named(tmp_path):
    mine = tmp_path / "run" / "settings" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.touch()
    with pytest.raises(FolderInUseError, match="settings exists and was not written by this library"):
        RunFolder(tmp_path / "run").remember({"lro": Section()})
    assert mine.is_file()
    RunFolder(tmp_path / "ours").remember({"lro": Section()})
    (tmp_path / "ours" / "settings" / "settings.json").write_text('{"lro": ')
    with pytest.raises(SettingsError, match=r"settings.json is damaged"):
        RunFolder(tmp_path / "ours").remember({"lro": Section()})


@dataclass
class Grown:
    """What a section of a later version is."""

    seed: int
    beta: float = 0.05
    inner: Section = field(default_factory=Section)
    counts: tuple[int, ...] = (1, 2)


@pytest.mark.parametrize("stored", [{"seed": 1}, {"beta": 0.05}, {"seed": 1, "gone": 3}])
def test_a_setting_that_the_folder_does_not_know_yet_had_its_default(tmp_path, stored):
    folder = RunFolder(tmp_path / "run")
    with commit_directory(folder.path / "settings") as temporary:
        (temporary / "settings.json").write_text(json.dumps({"lro": stored}))
    folder.remember({"lro": Grown(1)})
    folder.remember({"lro": Grown(1), "new": Section()})
    for changed, message in (({"beta": 0.7}, "beta = 0.05, now 0.7"), ({"counts": (4,)}, r"counts = \[1, 2\], now")):
        with pytest.raises(SettingsError, match=message):
            folder.remember({"lro": Grown(1, **changed)})
    with pytest.raises(SettingsError, match="new.beta = 0.05, now 0.7"):
        folder.remember({"lro": Grown(1), "new": Section(0.7)})
    with pytest.raises(SettingsError, match="other.seed = None, now 1"):  # the folder of something else
        folder.remember({"other": Grown(1)})


@pytest.mark.parametrize("alone", [False, True])
def test_what_is_there_is_not_made_again(tmp_path, alone):
    folder, made = RunFolder(tmp_path), []

    def make():
        made.append(len(made))
        return made[-1]

    assert [folder.cached("part", make, save, load, alone=alone) for _ in range(2)] == [0, 0]
    assert folder.cached("other", make, save, load, alone=alone) == 1


def test_a_part_that_was_not_finished_is_made_anew(tmp_path):
    folder = RunFolder(tmp_path)

    def broken(value, path):
        with commit_directory(path) as temporary:
            (temporary / "value.json").write_text("0")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.cached("part", lambda: 1, broken, load)
    assert folder.cached("part", lambda: 2, save, load) == 2


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.write("summary.json", [1])

    def cut_off(self, text, **options):
        self.write_bytes(text[:2].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(KeyboardInterrupt):
        folder.write("summary.json", [1, 2])
    assert json.loads((tmp_path / "summary.json").read_text()) == [1]


def test_the_history_of_a_stage_that_did_not_run_is_empty(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.history("distillation/vsd") == []
    (tmp_path / "distillation" / "vsd").mkdir(parents=True)
    (tmp_path / "distillation" / "vsd" / "history.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    assert folder.history("distillation/vsd") == [{"step": 0}, {"step": 1}]
