"""Files of results: written whole, kept with the settings they were measured with, never continued with others."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from distillation.config import FREE_SETTINGS
from latent_rewards.contracts import ConfigError

RESULTS = Path(__file__).parent / "results"

_IDLE = FREE_SETTINGS | {"name", "seed"}
"""Settings that change no result, or that its file is named after."""


def add_results(parser: argparse.ArgumentParser, default: Path | None, said: str = "where results are written") -> None:
    """Add ``--results``: a folder, or the file of a benchmark that has only one."""
    parser.add_argument("--results", type=Path, default=default, help=said)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is the old one or the new one, whatever happens meanwhile; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(text)
    partial.replace(path)


def write_result(path: Path, result: Mapping[Any, Any]) -> None:
    """Write a result as JSON; see :func:`write_whole`."""
    write_whole(path, json.dumps(result, indent=1) + "\n")


def read_result(path: Path) -> dict[str, Any]:
    """Return what a file holds.

    Raises:
        ConfigError: it is no JSON object.
    """
    try:
        held = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read ({error}); restore it, or remove it to measure again") from error
    if not isinstance(held, dict):
        raise ConfigError(f"{path} holds no result, but {type(held).__name__}; remove it to measure again")
    return held


def read_results(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """Return the results of the files of a folder whose names match, in their order.

    Raises:
        ConfigError: there is none, or one is no result.
    """
    found = [read_result(file) for file in sorted(folder.glob(pattern))]
    if not found:
        raise ConfigError(f"{folder} holds no results ({pattern}); measure first, without --summary")
    return found


def write_summary(folder: Path, summary: Mapping[str, Any], markdown: str) -> None:
    """Write ``summary.json`` and ``summary.md`` of a folder's results, and print the latter."""
    write_result(folder / "summary.json", summary)
    write_whole(folder / "summary.md", markdown)
    print(markdown)


def flat(**sections: Any) -> dict[str, Any]:  # noqa: ANN401 - dataclasses
    """Return the settings of dataclasses as ``{"section.name": value}``, without those that change no result."""
    return {
        f"{section}.{name}": value
        for section, held in sections.items()
        for name, value in dataclasses.asdict(held).items()
        if name not in _IDLE
    }


def check_settings(
    path: Path,
    known: Mapping[str, Any],
    settings: Mapping[str, Any],
    remedy: str = "remove it to measure again, or give another --results",
) -> None:
    """Check that a file was measured with ``settings``; what it does not know of is not compared.

    Raises:
        ConfigError: it was measured with others; the message names the first that differs, and the remedy.
    """
    for name, value in json.loads(json.dumps(settings)).items():
        if name in known and (was := known[name]) != value:
            raise ConfigError(f"{path} was measured with {name} = {was!r}, now {value!r}; {remedy}")


@dataclass(frozen=True)
class Cell:
    """One result to measure.

    Attributes:
        path: its file.
        settings: what it is measured with; JSON-able.
        measure: makes it, with ``seconds``.
        told: its value that is printed.
    """

    path: Path
    settings: Mapping[str, Any]
    measure: Callable[[], dict[str, Any]]
    told: str = "seconds"


def seed_cells(
    folder: Path,
    names: Sequence[str],
    seeds: Sequence[int],
    settings: Callable[[str], Mapping[str, Any]],
    measure: Callable[[str, int], dict[str, Any]],
    told: str = "seconds",
) -> list[Cell]:
    """Return the cells ``<name>-seed<k>.json`` of a folder, seed by seed; see :class:`Cell`."""
    return [
        Cell(folder / f"{name}-seed{seed}.json", settings(name), partial(measure, name, seed), told)
        for seed, name in product(seeds, names)
    ]


def keep(cells: Sequence[Cell]) -> None:
    """Measure the cells that have no file yet, and write each with its settings; nothing is measured before all fit.

    Raises:
        ConfigError: see :func:`check_settings`.
    """
    for cell in cells:
        if cell.path.is_file():
            check_settings(cell.path, read_result(cell.path).get("settings", {}), cell.settings)
    for cell in cells:
        if cell.path.is_file():
            continue
        measured = cell.measure()
        write_result(cell.path, {**measured, "settings": cell.settings})
        print(f"{cell.path.stem}: {measured[cell.told]}, {measured['seconds']:.0f} s", flush=True)


class Curve:
    """Points of a run, kept in a file as they come, so that a killed run goes on with those it had.

    Args:
        path: JSON file in the folder of the run.
        settings: of the run; JSON-able.

    Raises:
        ConfigError: its points are of a run with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.points: dict[int, dict[str, float]] = {}
        if path.is_file():
            held = read_result(path)
            # Files of before settings were kept hold the points alone, and nobody knows what they were made with.
            self.settings, points = (held["settings"], held["points"]) if "points" in held else ({}, held)
            remedy = f"remove {path.parent} to run again, or give another --runs"
            check_settings(path, self.settings, settings, remedy)
            self.points = {int(step): point for step, point in points.items()}

    def record(self, step: int, make: Callable[[], dict[str, float]]) -> None:
        """Keep the point after ``step`` updates; one that is there already is not made again."""
        if step not in self.points:
            self.points[step] = make()
            write_result(self.path, {"settings": self.settings, "points": self.points})

    def listed(self) -> list[dict[str, float]]:
        """Return the points in order, each with its ``updates``."""
        return [{"updates": step, **self.points[step]} for step in sorted(self.points)]


class Sections:
    """A file of sections, of which some are measured now and the others are kept as they are.

    Args:
        path: JSON file. It is read before anything is measured, so that a broken one costs no work.

    Raises:
        ConfigError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read()

    def read(self) -> dict[str, Any]:
        """Return what the file holds now."""
        return read_result(self.path) if self.path.is_file() else {}

    def write(self, sections: Mapping[str, Any]) -> None:
        """Put sections into the file, in the place of those of the same names."""
        write_result(self.path, {**self.read(), **sections})
