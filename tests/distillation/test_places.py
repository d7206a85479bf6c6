"""Where a command may work."""

from __future__ import annotations

from distillation.places import begin_folder
from latent_rewards.training.run_folder import RunFolder


def test_the_folder_of_a_run_is_begun_once(tmp_path):
    assert begin_folder(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "new" / ".tmp-vsd-1").mkdir(parents=True)
    RunFolder(begin_folder(tmp_path / "new")).remember({})
    (tmp_path / "new" / "anything").mkdir()
    assert begin_folder(tmp_path / "new") == tmp_path / "new"
