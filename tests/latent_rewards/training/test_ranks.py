import json
import os

import pytest
import torch

from latent_rewards.training import ranks as module
from latent_rewards.training.ranks import Ranks, current_ranks

SCRIPT = """
import json, os, sys, time
from pathlib import Path
import torch
from latent_rewards.training.ranks import OutOfStepError, Ranks, current_ranks
root, ranks = Path(sys.argv[1]), current_ranks()
made = []
def double(item):
    made.append(item)
    return 2 * item
told = {"ranks": [ranks.index, ranks.count], "share": ranks.share(range(5), double), "made": made}
told["nothing"] = ranks.share([], double)
told["gather"] = ranks.gather("ab"[ranks.index])
told["agree"] = [ranks.agree(True), ranks.agree(ranks.index == 0)]
told["threads"] = ranks.once(torch.get_num_threads)
told["afterwards"] = torch.get_num_threads()
tensors = [torch.full((2, 2), float(ranks.index)), torch.full((3,), 4.0 * ranks.index, dtype=torch.float64)]
ranks.average(tensors)
told["mean"] = [tensor.flatten().tolist() for tensor in tensors]
parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
parameters[1].grad = torch.full((2,), 1.0 + 2 * ranks.index)
if ranks.index == 0:
    parameters[2].grad = torch.full((2,), 6.0)  # an expert that only one process called
ranks.average_gradients(parameters)
kinds = (torch.float32, torch.bfloat16, torch.bool, torch.int64)
tensors = [torch.full((2, 2), 3 * (1 - ranks.index), dtype=kind) for kind in kinds]
ranks.broadcast(tensors)
told["broadcast"] = [tensor.flatten().tolist() for tensor in tensors]
try:
    ranks.gather(0, at=f"place {ranks.index}")
except OutOfStepError as error:
    told["out of step"] = str(error)
told["gradients"] = [None if p.grad is None else p.grad.tolist() for p in parameters]
if ranks.index == 0:
    time.sleep(0.5)
    (root / "there").touch()
ranks.wait_for((root / "there").is_file)
told["waited"] = (root / "there").is_file()
ranks.leave()
(root / f"told-{told['ranks'][0]}.json").write_text(json.dumps(told))
"""


def test_two_processes_share_gather_agree_and_wait(launch, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = launch(tmp_path / "script.py", tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1))
    assert (first.pop("ranks"), second.pop("ranks")) == ([0, 2], [1, 2])
    assert (first.pop("made"), second.pop("made")) == ([0, 2, 4], [1, 3])
    assert first == second
    assert (first["share"], first["nothing"], first["gather"]) == ([0, 2, 4, 6, 8], [], ["a", "b"])
    assert first["agree"] == [True, False]
    assert (first["threads"], first["afterwards"]) == (min(2, os.cpu_count()), 1)
    assert first["mean"] == [[0.5] * 4, [2.0] * 3] and first["waited"]
    assert first["broadcast"] == [[3] * 4, [3] * 4, [True] * 4, [3] * 4]
    assert "not in step: process 0 at place 0, process 1 at place 1; let what decides" in first["out of step"]
    assert first["gradients"] == [None, [2.0, 2.0], [3.0, 3.0]]


def test_one_process_does_everything_itself(capsys):
    ranks, tensor = current_ranks(), torch.tensor([3.0])
    assert ranks == Ranks(0, 1)
    assert ranks.share("ab", str.upper, progress="letters") == ["A", "B"] and "letters" in capsys.readouterr().err
    assert (ranks.gather(5), ranks.once(lambda: 6), ranks.agree(False)) == ([5], 6, False)
    ranks.average([tensor])
    ranks.broadcast([tensor])
    assert tensor.item() == 3.0


@pytest.mark.parametrize(("count", "processes"), [(12, 2), (7, 3), (2, 4)])
def test_the_parts_are_neighbours_and_make_the_whole(count, processes):
    parts = [Ranks(index, processes).part(count) for index in range(processes)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_buckets_hold_one_type_and_are_closed_when_full(monkeypatch):
    monkeypatch.setattr(module, "_BUCKET", 4)
    sizes = [(3, torch.float32), (1, torch.float64), (2, torch.float32), (1, torch.float32), (9, torch.float64)]
    tensors = [torch.zeros(size, dtype=dtype) for size, dtype in sizes]
    found = [[(len(tensor), tensor.dtype) for tensor in bucket] for bucket in module._buckets(tensors)]
    assert sorted(found, key=str) == sorted([[sizes[0], sizes[2]], [sizes[1], sizes[4]], [sizes[3]]], key=str)
