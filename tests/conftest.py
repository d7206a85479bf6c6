"""Settings every test shares."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Run a script in two processes of one launch: what `accelerate launch` starts, whose `--cpu` needs MPI for it."""

    def run(script: Path, *arguments: object, paths: Sequence[Path] = ()) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*map(str, paths), *sys.path]),
            "ACCELERATE_USE_CPU": "1",
            "OMP_NUM_THREADS": "1",
        }
        command += [str(argument) for argument in arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)

    return run
