"""What the updates of a stage told: over all processes, and on disk in ``history.jsonl``, a JSON object a line each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latent_rewards.training.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, write_whole

_FILE = "history.jsonl"


def mean_logs(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means of what the processes of a launch told of one update.

    What only some told is the mean over these. What all told alike stays as it is, and of what is no number the first
    process's is taken.
    """
    if len(told) == 1:
        return dict(told[0])
    logs = {}
    for name in dict.fromkeys(name for part in told for name in part):
        values = [part[name] for part in told if name in part]
        alike = all(value == values[0] for value in values)
        numbers = all(isinstance(value, int | float) for value in values)
        logs[name] = values[0] if alike or not numbers else sum(values) / len(values)
    return logs


def write_history(folder: str | Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write the history of the stage in ``folder``, unless it is there already."""
    file, text = Path(folder) / _FILE, "".join(json.dumps(entry) + "\n" for entry in history)
    if not file.is_file() or file.read_bytes() != text.encode():
        write_whole(file, text)


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """Return the history of the stage in ``folder``, empty if it did not run.

    A process may be killed after its checkpoint and before its history, and a file may be cut off when it is copied:
    where there is none that can be read, the newest checkpoint's is returned.

    Raises:
        CheckpointError: a line is no JSON, and there is no checkpoint, or a damaged one.
    """
    file, newest = Path(folder) / _FILE, latest_checkpoint(folder)
    history = []
    for number, line in enumerate(file.read_bytes().splitlines() if file.is_file() else [], start=1):
        try:
            history.append(json.loads(line))
        except ValueError as error:
            if newest is None:
                raise CheckpointError(
                    f"{file}, line {number}, is no JSON ({error}); remove the file to go on without this history"
                ) from error
            history = []
            break
    if not history and newest is not None:
        history = load_checkpoint(newest)[1]["history"]
    return history
