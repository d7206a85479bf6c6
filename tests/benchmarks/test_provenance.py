"""A result says how it was made, and nothing of the machine's folders."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.provenance import device_name, provenance
from latent_rewards.training.devices import DeviceError


def test_the_command_has_no_folder_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    inside, outside = tmp_path / "runs" / "student", Path(tmp_path.parent) / "elsewhere" / "samples"
    # A worker of xdist has no module that was started by its name.
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="benchmarks.race"), raising=False)
    monkeypatch.setattr(sys, "argv", ["x", "--student", str(inside), f"--runs={outside}", "--seeds", "0"])
    told = provenance()
    assert told["command"] == "python -m benchmarks.race --student runs/student --runs=samples --seeds 0"
    assert str(tmp_path.parent) not in told["command"] and told["versions"]["torch"]


def test_a_machine_without_git_knows_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance()["commit"] is None


def test_a_script_is_told_by_its_file_and_code_without_one_is_no_command(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").touch()
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py"), "--seeds", "0"])
    assert provenance()["command"] == "python script.py --seeds 0"
    for first in ("-c", ""):
        monkeypatch.setattr(sys, "argv", [first])
        assert provenance()["command"] is None


def test_a_device_is_asked_for_its_own_name_and_one_that_is_not_there_is_refused(monkeypatch):
    assert device_name("cpu") == "cpu"
    with pytest.raises(DeviceError, match="'cuda:7' cannot be used"):
        device_name("cuda:7")
    monkeypatch.setattr("benchmarks.provenance.choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"accelerator {device.index}")
    assert device_name("cuda:1") == "accelerator 1"
    assert device_name("mps") == "mps"
