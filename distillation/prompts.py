"""Prompts as files: one a line, or one for each video."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from distillation.errors import DistillationError


class PromptsError(DistillationError, ValueError):
    """A file of prompts is missing, is no text, or holds nothing that can be used."""


def read_prompts(path: str | Path) -> list[str]:
    """Return the lines of a UTF-8 text file that are not blank, stripped; one prompt a line.

    Raises:
        PromptsError: the file is missing, is not UTF-8 text, or holds no prompt.
    """
    file = Path(path)
    if not file.is_file():
        raise PromptsError(f"no prompts file {file}; give a text file with one prompt a line")
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors begin with a mark
    except UnicodeDecodeError as error:
        raise PromptsError(f"{file} is not UTF-8 text ({error.reason}); give one prompt a line") from error
    if "\0" in text:
        raise PromptsError(f"{file} holds NUL bytes, so it is no text; give one prompt a line")
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise PromptsError(f"{file} holds no prompts; write one a line")
    return prompts


def read_captions(path: str | Path) -> dict[str, str]:
    """Return ``{video: prompt}`` of a file whose lines are ``video<TAB>prompt``.

    Raises:
        PromptsError: see :func:`read_prompts`; or a line has no tab.
    """
    captions = {}
    for number, line in enumerate(read_prompts(path), start=1):
        video, tab, prompt = line.partition("\t")
        if not tab or not prompt.strip():
            raise PromptsError(f"{path}, prompt {number}: expected video<TAB>prompt; got {line!r}")
        captions[video.strip()] = prompt.strip()
    return captions


def caption_of(name: str, file: Path, captions: Mapping[str, str] | None) -> str:
    """Return the prompt of the video ``file``, called ``name``: from ``captions``, or else from the .txt beside it.

    Raises:
        PromptsError: there is none, or it cannot be read.
    """
    if captions is not None:
        if name not in captions:
            raise PromptsError(f"{name} has no line in the captions file")
        return captions[name]
    beside = file.with_suffix(".txt")
    if not beside.is_file():
        raise PromptsError(f"{name} has no {beside.name} beside it; write one, or pass --captions")
    return " ".join(read_prompts(beside))
