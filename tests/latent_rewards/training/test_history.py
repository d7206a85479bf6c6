import pytest

from latent_rewards.training.checkpoint import CheckpointError, save_checkpoint
from latent_rewards.training.history import read_history, write_history

HISTORY = [{"step": 0, "loss": 0.5}, {"step": 1, "loss": 0.25}]


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
