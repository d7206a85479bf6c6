import math

import pytest

from latent_rewards.training.checkpoint import CheckpointError, save_checkpoint
from latent_rewards.training.history import mean_logs, read_history, write_history

HISTORY = [{"step": 0, "loss": 0.5}, {"step": 1, "loss": 0.25}]


def test_the_processes_means_are_those_of_what_each_told():
    first = {"loss": 1.0, "num_steps": 4, "kind": "a", "rate": math.nan, "holdout": 3.0}
    second = {"loss": 2.0, "num_steps": 4, "kind": "b", "rate": 1.0, "lag": 5}
    logs = mean_logs([first, second])
    assert math.isnan(logs.pop("rate")) and type(logs["num_steps"]) is int
    assert logs == {"loss": 1.5, "num_steps": 4, "kind": "a", "holdout": 3.0, "lag": 5}
    assert mean_logs([first]) == first


def test_what_is_written_is_read(tmp_path):
    assert read_history(tmp_path / "nowhere") == []
    write_history(tmp_path, HISTORY)
    before = (tmp_path / "history.jsonl").stat().st_mtime_ns
    write_history(tmp_path, HISTORY)
    assert read_history(tmp_path) == HISTORY
    assert (tmp_path / "history.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("left", [None, b"", b'{"step": 0, "loss": 0.5}\n{"step": 1, "lo', b"\xff\xfe\n"])
def test_the_newest_checkpoint_knows_a_history_that_cannot_be_read(tmp_path, left):
    save_checkpoint(tmp_path, 2, {"history": HISTORY})
    if left is not None:
        (tmp_path / "history.jsonl").write_bytes(left)
    assert read_history(tmp_path) == HISTORY


def test_a_damaged_history_without_a_checkpoint_names_the_line_and_the_remedy(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"step": 0}\n{"st')
    with pytest.raises(CheckpointError, match=r"history.jsonl, line 2, is no JSON .*; remove the file"):
        read_history(tmp_path)
