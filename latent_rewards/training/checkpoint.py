"""Folders on disk that are either whole or absent.

The commit protocol: write into a temporary sibling, write ``manifest.json`` with each file's sha256, fsync every file
and folder, rename, fsync the parent. A crash leaves the old folder or the new one, never a mixture. Tensors go into
safetensors and everything else into JSON; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"step-(\d{8})")
TEMPORARY_PREFIX = ".tmp-"
"""How the names of folders and files begin that are being written; what a crash leaves of them may be removed."""
_ASIDE_PREFIX = f"{TEMPORARY_PREFIX}old-"
_LEFTOVER = re.compile(re.escape(TEMPORARY_PREFIX) + r"step-\d{8}-[0-9a-f]{8}")
_ASIDE = re.compile(re.escape(_ASIDE_PREFIX) + r"(step-\d{8})-[0-9a-f]{8}")


class CheckpointError(RuntimeError):
    """A stored folder is missing, incomplete or altered; the message names the file and the remedy."""


class FolderInUseError(CheckpointError, FileExistsError):
    """The target holds something else, which writing there would remove."""


def check_target(path: str | Path, marker: str, error: type[Exception] = FolderInUseError) -> None:
    """Check that a folder may be written: it is new, empty, or was written as what is written now.

    Args:
        path: the folder.
        marker: name of a file that it then has.
        error: what is raised.

    Raises:
        FolderInUseError: it holds something else; the message names it and the remedy.
    """
    path = Path(path)
    place = next((parent for parent in path.absolute().parents if parent.exists()), path)
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise error(f"{path} cannot be made: {place} is no folder that may be written to; give another place")
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / marker).is_file()):
        raise error(
            f"{path} exists and was not written by this library (it has no {marker}); writing there would remove what "
            "it holds: give a new folder"
        )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def commit_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` when the block ends without an error, and vanishes otherwise.

    An existing ``path`` is replaced: it is renamed aside before the new folder takes its place and removed after. A
    process that is killed between these two renames leaves the old folder whole, but aside: the next commit to
    ``path`` puts it back first, and :func:`verify_directory` says where it lies.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _put_back(target)
    temporary = target.parent / f"{TEMPORARY_PREFIX}{target.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        manifest = {str(p.relative_to(temporary)): file_sha256(p) for p in files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        folders = [p for p in temporary.rglob("*") if p.is_dir()]
        deepest_first = sorted(folders, key=lambda folder: len(folder.parts), reverse=True)
        for written in [*files, temporary / MANIFEST, *deepest_first, temporary]:
            _fsync(written)
        _replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replace(temporary: Path, target: Path) -> None:
    previous = target.parent / f"{_ASIDE_PREFIX}{target.name}-{uuid.uuid4().hex[:8]}"
    try:
        if target.exists():
            target.rename(previous)
        temporary.rename(target)
    except BaseException:
        if previous.exists() and not target.exists():
            previous.rename(target)
        raise
    _fsync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _put_back(target: Path) -> None:
    """Put the folder back that a killed process had renamed aside, or remove it if it was replaced."""
    for previous in _aside(target):
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            previous.rename(target)


def _aside(target: Path) -> list[Path]:
    """Return the folders that were renamed aside to be replaced by ``target``, and are still there."""
    name = re.compile(re.escape(f"{_ASIDE_PREFIX}{target.name}-") + "[0-9a-f]{8}")
    return [p for p in target.parent.glob(f"{_ASIDE_PREFIX}*") if name.fullmatch(p.name)]


def write_whole(file: Path, text: str) -> None:
    """Write a file that after a crash holds the old text or the new one, never a part.

    Only one process may be writing it.
    """
    temporary = file.with_name(f"{TEMPORARY_PREFIX}{file.name}")
    temporary.write_text(text, encoding="utf-8")
    _fsync(temporary)
    temporary.replace(file)
    _fsync(file.parent)


def verify_directory(path: str | Path, *, ignoring: Collection[str] = ()) -> None:
    """Check every file of a committed folder against its manifest, but those whose names ``ignoring`` holds.

    Raises:
        CheckpointError: the folder or manifest is missing or cannot be read, or a file is missing or differs.
    """
    folder = Path(path)
    if not folder.exists() and (aside := _aside(folder)):
        raise CheckpointError(
            f"{folder} is not there: a process was killed while it replaced it; rename {aside[0]} to {folder.name}"
        )
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST}: it was not written whole; remove it and write it again")
    try:
        listed = dict(json.loads((folder / MANIFEST).read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is no manifest ({error}); write {folder} again") from error
    for name, expected in listed.items():
        file = folder / name
        if name in ignoring:
            continue
        if not file.is_file():
            raise CheckpointError(f"{file} is missing though the manifest lists it; restore it or write {folder} again")
        if file_sha256(file) != expected:
            raise CheckpointError(f"{file} differs from the manifest (truncated or altered); write {folder} again")


def pack_state(state: Any) -> tuple[dict[str, Tensor], Any]:  # noqa: ANN401 - any nest of containers and tensors
    """Split a nest of dicts, lists, tuples, tensors and plain values into named tensors and a JSON-able tree.

    Raises:
        TypeError: a leaf is neither a tensor nor a number, text, bool or None.
    """
    tensors: dict[str, Tensor] = {}

    def pack(node: Any) -> Any:  # noqa: ANN401
        if isinstance(node, Tensor):
            name = f"t{len(tensors)}"
            tensors[name] = node.detach().cpu().clone().contiguous()
            return {"tensor": name}
        if isinstance(node, dict):
            return {"dict": [[pack(key), pack(value)] for key, value in node.items()]}
        if isinstance(node, list | tuple):
            return {"list" if isinstance(node, list) else "tuple": [pack(value) for value in node]}
        if node is None or isinstance(node, bool | int | float | str):
            return node
        raise TypeError(
            f"cannot store a {type(node).__name__} in a checkpoint; use tensors, numbers, texts and containers"
        )

    return tensors, pack(state)


def unpack_state(tensors: Mapping[str, Tensor | None], tree: Any) -> Any:  # noqa: ANN401
    """Invert :func:`pack_state`."""
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {unpack_state(tensors, k): unpack_state(tensors, v) for k, v in value}
    items = [unpack_state(tensors, v) for v in value]
    return items if kind == "list" else tuple(items)


def save_checkpoint(root: str | Path, step: int, state: Any, *, keep: int = 2) -> Path:  # noqa: ANN401
    """Commit ``state`` (see :func:`pack_state`) as ``root/step-XXXXXXXX`` and remove all but the ``keep`` newest.

    Nobody else may be writing checkpoints there: what killed processes left is removed too.
    """
    folder = Path(root) / f"step-{step:08d}"
    tidy_checkpoints(root)
    tensors, tree = pack_state(state)
    with commit_directory(folder) as temporary:
        save_file(tensors or {"empty": torch.zeros(1)}, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, "tree": tree}))
    for old in _step_folders(Path(root))[:-keep]:
        (old / MANIFEST).unlink()  # first: what remains if this is cut off is seen to be no checkpoint
        shutil.rmtree(old, ignore_errors=True)
    return folder


def tidy_checkpoints(root: str | Path) -> None:
    """Remove what killed processes left half written or half removed under ``root``; put back what they had put aside.

    Nobody else may be writing checkpoints there.
    """
    for entry in list(Path(root).glob("*")):
        if leftover := _LEFTOVER.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)
        elif leftover := _ASIDE.fullmatch(entry.name):
            _put_back(entry.with_name(leftover[1]))
        elif _STEP_FOLDER.fullmatch(entry.name) and not (entry / MANIFEST).is_file():
            shutil.rmtree(entry, ignore_errors=True)


def load_checkpoint(path: str | Path) -> tuple[int, Any]:
    """Return the step and the state of a committed checkpoint.

    Raises:
        CheckpointError: see :func:`verify_directory`.
    """
    verify_directory(path)
    content = json.loads((Path(path) / "state.json").read_text())
    return content["step"], unpack_state(load_file(Path(path) / "state.safetensors"), content["tree"])


def load_latest(root: str | Path) -> tuple[Path, int, Any] | None:
    """Return the newest checkpoint under ``root``, its step and its state, or None if there is none.

    Raises:
        CheckpointError: it is damaged; the message says which one is left.
    """
    folders = _step_folders(Path(root))
    if not folders:
        return None
    try:
        return folders[-1], *load_checkpoint(folders[-1])
    except CheckpointError as error:
        instead = f"continue from the one before, {folders[-2].name}" if folders[:-1] else "begin anew"
        raise CheckpointError(f"{folders[-1]} is damaged: remove this folder to {instead} ({error})") from error


def latest_checkpoint(root: str | Path) -> Path | None:
    """Return the newest committed checkpoint under ``root``, or None; leftovers of a crash are ignored."""
    folders = _step_folders(Path(root))
    return folders[-1] if folders else None


def _step_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if _STEP_FOLDER.fullmatch(p.name) and (p / MANIFEST).is_file())
