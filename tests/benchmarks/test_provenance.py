"""A result says how it was made, and nothing of the machine's folders."""

import sys
from pathlib import Path

from benchmarks.provenance import provenance


def test_the_command_has_no_folder_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    inside, outside = tmp_path / "runs" / "student", Path(tmp_path.parent) / "elsewhere" / "samples"
    monkeypatch.setattr(sys, "argv", ["x", "--student", str(inside), f"--runs={outside}", "--seeds", "0"])
    told = provenance()
    assert told["command"].endswith(" --student runs/student --runs=samples --seeds 0")
    assert str(tmp_path.parent) not in told["command"] and told["versions"]["torch"]


def test_a_machine_without_git_knows_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance()["commit"] is None
