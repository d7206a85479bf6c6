"""Where a command may work."""

from __future__ import annotations

from pathlib import Path

import pytest

from distillation.places import begin_folder
from latent_rewards.training.run_folder import RunFolder


def test_the_folder_of_a_run_is_begun_once(tmp_path):
    assert begin_folder(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "new" / ".tmp-vsd-1").mkdir(parents=True)
    RunFolder(begin_folder(tmp_path / "new")).remember({})
    (tmp_path / "new" / "anything").mkdir()
    assert begin_folder(tmp_path / "new") == tmp_path / "new"


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_folder_that_another_process_begins_meanwhile_is_the_runs_own(tmp_path, monkeypatch, at):
    folder = tmp_path / "new"
    folder.mkdir()
    looks = []

    def began_in_between(look):
        def looked(path):
            if path == folder or path.parent.parent == folder:
                looks.append(path)
                if len(looks) == at:
                    RunFolder(folder).remember({})
            return look(path)

        return looked

    for name in ("is_dir", "iterdir", "is_file"):
        monkeypatch.setattr(Path, name, began_in_between(getattr(Path, name)))
    assert begin_folder(folder) == folder
