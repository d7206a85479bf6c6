"""The parts of a training that a checkpoint carries: all of them are looked at before any is loaded."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from latent_rewards.training.checkpoint import CheckpointError, latest_checkpoint, unpack_state


class HasStateDict(Protocol):
    """Anything whose state a checkpoint should carry."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state: Any) -> Any:  # noqa: ANN401 - torch's modules return what could not be matched
        """Restore the state."""
        ...


def pack_parts(parts: Mapping[str, HasStateDict]) -> dict[str, Any]:
    """Return the states of the parts, for :func:`load_parts`."""
    states = {f"{index}": part.state_dict() for index, part in enumerate(parts.values())}
    return {"parts": states, "names": list(parts)}


def stored_part(root: str | Path, name: str) -> Any:  # noqa: ANN401 - a state
    """Return the state of a part in the newest checkpoint under ``root``, tensors as None; no tensor is read.

    None where there is no checkpoint, or no such part in it.
    """
    folder = latest_checkpoint(root)
    if folder is None:
        return None
    tree = json.loads((folder / "state.json").read_text(encoding="utf-8"))["tree"]
    state = unpack_state(defaultdict(lambda: None), tree)
    return state["parts"].get(f"{state['names'].index(name)}") if name in state["names"] else None


def load_parts(
    parts: Mapping[str, HasStateDict], packed: Mapping[str, Any], source: Path, *, first: Collection[str] = ()
) -> None:
    """Load what :func:`pack_parts` returned. What does not fit is refused before any part is changed.

    Args:
        parts: by name.
        packed: the states.
        source: where they were read, for messages.
        first: names of the parts that may themselves refuse; they are loaded before the others.

    Raises:
        CheckpointError: these are other parts, or parts of other shapes.
    """
    states = {name: packed["parts"][f"{index}"] for index, name in enumerate(packed["names"])}
    if states.keys() != parts.keys():
        raise CheckpointError(f"{source} holds {list(states)}, this run has {list(parts)}; use another output_dir")
    for name, part in parts.items():
        if difference := _difference(part, states[name]):
            raise _another(name, source, difference)
    for name in sorted(parts, key=lambda name: name not in first):
        part, state = parts[name], states.pop(name)
        try:
            part.load_state_dict(state if isinstance(part, nn.Module) else _copied(state))
        except (RuntimeError, ValueError) as error:
            if type(error) not in (RuntimeError, ValueError):  # a part that says itself what is wrong
                raise
            raise _another(name, source, error) from error


def _another(name: str, source: Path, why: object) -> CheckpointError:
    return CheckpointError(f"{source} holds another {name} than this run has; use another output_dir ({why})")


def _difference(part: HasStateDict, state: Any) -> str:  # noqa: ANN401 - a state
    """Return why a state cannot be that of a network or an optimiser, or nothing."""
    if isinstance(part, Optimizer):
        counts, stored = ([len(group["params"]) for group in g] for g in (part.param_groups, state["param_groups"]))
        return "" if counts == stored else f"groups of {stored} parameters there, {counts} here"
    if not isinstance(part, nn.Module):
        return ""
    ours, theirs = (
        {key: tuple(getattr(value, "shape", ())) for key, value in s.items()} for s in (part.state_dict(), state)
    )
    for key in [*ours, *theirs]:
        if ours.get(key) != theirs.get(key):
            return f"{key} is of shape {theirs.get(key)} there, {ours.get(key)} here"
    return ""


def _copied(state: Any) -> Any:  # noqa: ANN401 - a state
    """Return a state whose tensors are in memory.

    Those that a checkpoint was read into are views of its file. An optimiser on the CPU would keep them, and with them
    the file, which is to be removed when newer ones are written.
    """
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return type(state)(map(_copied, state)) if isinstance(state, list | tuple) else state
