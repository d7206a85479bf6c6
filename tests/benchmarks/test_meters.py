"""A memory meter that sees what a call takes, on the device that is asked for."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.meters import free_mib, memory, settle

METER = """
import json, torch
from benchmarks.meters import memory, settle
torch.ones(96 * 2**18).sum()
held = settle("cpu")
before = memory("VmHWM", "cpu") - held
torch.ones(48 * 2**18).sum()
taken = memory("VmHWM", "cpu") - held
print(json.dumps([before, taken, settle("cpu") - held]))
"""


def test_the_meter_sees_memory_that_was_freed_again_but_not_what_came_before():
    # In an interpreter of its own, as the sides are measured: the heap of a long one has room for much.
    done = subprocess.run([sys.executable, "-c", METER], capture_output=True, text=True, check=True)
    before, taken, after = json.loads(done.stdout)
    assert before < 16 and taken == pytest.approx(48, abs=12) and after < 16


def test_an_accelerator_is_asked_of_itself(monkeypatch):
    asked = []
    told = {"memory_allocated": 2**21, "max_memory_allocated": 2**22, "mem_get_info": (2**23, 2**24)}
    for name, value in {**told, "reset_peak_memory_stats": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name, value=value: asked.append(device) or value)
    assert memory("VmRSS", "cuda:1") == settle("cuda:1") == 2.0
    assert memory("VmHWM", "cuda:1") == 4.0 and free_mib("cuda:1") == 8.0
    assert asked == ["cuda:1"] * 5
