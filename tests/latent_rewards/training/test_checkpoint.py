import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from latent_rewards.training import checkpoint
from latent_rewards.training.checkpoint import (
    MANIFEST,
    CheckpointError,
    FolderInUseError,
    check_target,
    commit_directory,
    latest_checkpoint,
    load_checkpoint,
    pack_state,
    save_checkpoint,
    unpack_state,
    verify_directory,
    write_whole,
)


def nested_state():
    module = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {"optimizer": optimizer.state_dict(), "list": [1, 2.5, None, True, "x"], "tuple": (torch.ones(2), {"a": 1})}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_pack_and_unpack_are_inverse_through_json():
    state = nested_state()
    tensors, tree = pack_state(state)
    assert equal(unpack_state(tensors, json.loads(json.dumps(tree))), state)


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(TypeError, match="set"):
        pack_state({"x": {1, 2}})


def test_save_load_and_keep(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"value": torch.tensor(float(step))}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    step, state = load_checkpoint(latest_checkpoint(tmp_path))
    assert step == 3 and state["value"] == 3


def test_what_killed_processes_left_is_removed_or_put_back(tmp_path):
    for name in (".tmp-step-00000009-0123abcd", "step-00000002", ".tmp-vsd-0123abcd", "step-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, 1, {"value": 1})
    (tmp_path / "step-00000001").rename(tmp_path / ".tmp-old-step-00000001-0123abcd")
    save_checkpoint(tmp_path, 3, {"value": 3})
    others = [".tmp-vsd-0123abcd", "step-2"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [others[0], "step-00000001", "step-00000003", others[1]]
    assert load_checkpoint(tmp_path / "step-00000001") == (1, {"value": 1})


def test_a_removal_that_is_cut_off_leaves_no_checkpoint_and_is_finished_later(tmp_path, monkeypatch):
    def cut_off(path, **options):
        if path.name == "step-00000001":
            assert not (path / MANIFEST).exists()
            raise KeyboardInterrupt

    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"value": step})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", cut_off)
        save_checkpoint(tmp_path, 3, {"value": 3})
    assert (tmp_path / "step-00000001").is_dir() and latest_checkpoint(tmp_path).name == "step-00000003"
    save_checkpoint(tmp_path, 4, {"value": 4})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_an_error_inside_leaves_the_old_folder_and_no_litter(tmp_path):
    target = tmp_path / "folder"
    with commit_directory(target) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(RuntimeError, match="boom"), commit_directory(target) as temporary:
        (temporary / "a").write_text("new")
        raise RuntimeError("boom")
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.fixture
def replaced(tmp_path):
    """Return a folder that is there, and a function that replaces it."""

    def commit(content):
        with commit_directory(tmp_path / "proxy") as temporary:
            (temporary / "a").write_text(content)

    commit("old")
    (tmp_path / ".tmp-old-proxy-2-0123abcd").mkdir()  # another one's
    return tmp_path / "proxy", commit


def second_rename(monkeypatch, act):
    """Let ``act`` happen in place of the second rename."""
    rename, calls = Path.rename, []

    def renamed(self, target):
        calls.append(target)
        return act() if len(calls) == 2 else rename(self, target)

    monkeypatch.setattr(Path, "rename", renamed)


def test_a_folder_that_could_not_be_replaced_is_back_in_its_place(replaced, monkeypatch):
    target, commit = replaced

    def fail():
        raise OSError(5, "I/O error")

    second_rename(monkeypatch, fail)
    with pytest.raises(OSError, match="I/O error"):
        commit("new")
    assert (target / "a").read_text() == "old"
    assert sorted(p.name for p in target.parent.iterdir()) == [".tmp-old-proxy-2-0123abcd", "proxy"]


def test_a_process_killed_between_the_renames_leaves_the_old_folder_where_it_is_found(replaced, monkeypatch):
    target, commit = replaced
    if (pid := os.fork()) == 0:
        second_rename(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
        try:
            commit("new")
        finally:
            os._exit(1)
    os.waitpid(pid, 0)
    assert not target.exists()
    with pytest.raises(CheckpointError, match=r"rename .*/\.tmp-old-proxy-[0-9a-f]{8} to proxy"):
        verify_directory(target)
    with pytest.raises(RuntimeError), commit_directory(target):
        raise RuntimeError
    assert (target / "a").read_text() == "old"
    verify_directory(target)


def test_what_was_replaced_goes_at_the_next_commit(replaced):
    target, commit = replaced
    (target.parent / ".tmp-old-proxy-0123abcd").mkdir()
    commit("new")
    assert sorted(p.name for p in target.parent.iterdir()) == [".tmp-old-proxy-2-0123abcd", "proxy"]
    assert (target / "a").read_text() == "new"


def test_every_folder_is_flushed_before_the_one_that_holds_it(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(checkpoint, "_fsync", lambda path: flushed.append(path))
    with commit_directory(tmp_path / "student") as temporary:
        (temporary / "a" / "b").mkdir(parents=True)
        (temporary / "a" / "b" / "weights").write_text("1")
    names = [str(path.relative_to(temporary)) for path in flushed[:-1]]
    assert names == ["a/b/weights", MANIFEST, "a/b", "a", "."] and flushed[-1] == tmp_path


def test_a_file_is_as_it_was_until_it_is_whole(tmp_path, monkeypatch):
    def stop(path):
        raise KeyboardInterrupt

    file = tmp_path / "summary.json"
    write_whole(file, "old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "_fsync", stop)
        write_whole(file, "new")
    assert file.read_text() == "old"
    write_whole(file, "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"summary.json": "new"}


def test_what_is_ignored_may_differ_and_a_broken_manifest_is_named(tmp_path):
    with commit_directory(tmp_path / "folder") as temporary:
        (temporary / "a").write_text("kept")
        (temporary / "b").write_text("free")
    (tmp_path / "folder" / "b").write_text("changed")
    verify_directory(tmp_path / "folder", ignoring=("b",))
    with pytest.raises(CheckpointError, match="b differs"):
        verify_directory(tmp_path / "folder", ignoring=("a",))
    for content in ('{"a": "12', "[1, 2]"):
        (tmp_path / "folder" / MANIFEST).write_text(content)
        with pytest.raises(CheckpointError, match=f"{MANIFEST} is no manifest"):
            verify_directory(tmp_path / "folder")


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_damage_is_named(tmp_path, damage):
    folder = save_checkpoint(tmp_path, 1, {"x": torch.ones(100)})
    victim = folder / "state.safetensors"
    if damage == "truncate":
        os.truncate(victim, 50)
    elif damage == "remove":
        victim.unlink()
    else:
        (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=MANIFEST if damage == "manifest" else "state.safetensors"):
        load_checkpoint(folder)


def test_a_process_killed_while_writing_leaves_a_whole_checkpoint(tmp_path):
    code = (
        "import sys, torch\n"
        "from latent_rewards.training.checkpoint import save_checkpoint\n"
        "step = 0\n"
        "while True:\n"
        "    step += 1\n"
        "    save_checkpoint(sys.argv[1], step, {'x': torch.full((200_000,), float(step))})\n"
    )
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
        deadline = time.monotonic() + 60
        while latest_checkpoint(tmp_path) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.13)
        process.send_signal(signal.SIGKILL)
        process.wait()
        step, state = load_checkpoint(latest_checkpoint(tmp_path))
        verify_directory(latest_checkpoint(tmp_path))
        assert bool((state["x"] == step).all())


def test_a_target_within_a_file_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    check_target(tmp_path / "new" / "folder", "marker")
    for place in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y"):
        with pytest.raises(FolderInUseError, match="cannot be made: .*file is no folder that may be written to"):
            check_target(place, "marker")
