"""A measurement in an interpreter of its own, whose memory is that of the measurement alone."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

KILLED = -9


def run_apart(module: str, name: str, task: dict[str, Any]) -> dict[str, Any]:
    """Run ``python -m MODULE --run TASK`` and return what its last line of output tells, read as JSON.

    Args:
        module: of the benchmark.
        name: what its errors call it.
        task: JSON-able.

    Returns:
        What it told; of one that was killed for its memory, or said that it had too little, ``out_of_memory`` alone.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", module, "--run", json.dumps(task)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a benchmark of ours
    if ended.returncode == KILLED:
        return {"out_of_memory": "the interpreter was killed"}
    # Some of CUDA's libraries have errors of their own.
    if ended.returncode and "out of memory" in ended.stderr.lower():
        return {"out_of_memory": ended.stderr.strip().splitlines()[-1]}
    if ended.returncode:
        raise RuntimeError(f"{name} ended with status {ended.returncode}: {ended.stderr[-2000:]}")
    told: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return told


def run_apart_whole(module: str, name: str, task: dict[str, Any]) -> dict[str, Any]:
    """Do what :func:`run_apart` does where too little memory is a failure like any other.

    Raises:
        RuntimeError: it failed, or had too little memory.
    """
    told = run_apart(module, name, task)
    if "out_of_memory" in told:
        raise RuntimeError(f"{name} ran out of memory: {told['out_of_memory']}")
    return told
