"""One HTML page that shows what a run made: videos side by side, curves, tables and settings.

The page is a single file: styles, vector charts and H.264 clips are inside it, and a content security policy forbids it
to ask for anything else. So it opens offline, from a mail or a folder, and still does in ten years. It takes the
optional packages of the ``report`` extra (jinja2, matplotlib, av), which are imported when first used.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from latent_rewards.charts import Series, histogram, line_chart, scatter_chart
from latent_rewards.contracts import ConfigError, DataError, Prompt, prompt_text
from latent_rewards.metrics.metric import require
from latent_rewards.training.checkpoint import write_whole
from latent_rewards.video import encode_mp4

Cell = str | float | int | None
_SMALL = 128
_TEMPLATE = Path(__file__).with_name("report_template.html")


@dataclass(frozen=True)
class ShownClip:
    """A clip and what to print below it.

    Attributes:
        video: ``[T, 3, H, W]`` in [0, 1].
        fps: frames per second.
        name: of the clip.
        value: a short text beside the name, such as its score.
        text: such as its prompt.
    """

    video: Tensor
    fps: float
    name: str
    value: str = ""
    text: str = ""


def check_page(file: str | Path | None, *, clips: bool = True) -> None:
    """Check, before any work, that a page can be drawn and written; None is no page.

    Args:
        file: where it goes.
        clips: it will show videos.

    Raises:
        ImportError: a package of the ``report`` extra is not installed.
        ConfigError: see :func:`check_file`.
    """
    if file is None:
        return
    for module in ("jinja2", "matplotlib", *(["av"] if clips else [])):
        require(module, extra="report")
    check_file(file)


def check_file(file: str | Path) -> None:
    """Check that a file can be written there.

    Raises:
        ConfigError: a folder is there, or a file where its folder would be.
    """
    path = Path(file)
    if path.is_dir():
        raise ConfigError(f"{file} is a folder; name a file in it, such as {path / 'result'}{path.suffix or '.html'}")
    if taken := [parent for parent in path.parents if parent.is_file()]:
        raise ConfigError(f"{file} cannot be written: {taken[0]} is a file")


def write_file(file: str | Path, text: str) -> Path:
    """Write a file that a reader never sees half of, below folders that are made, and return its path."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return path


class Report:
    """Builds a page from the top; every ``add_*`` returns the report, so calls can be chained.

    Args:
        title: the page's heading.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.blocks: list[dict[str, Any]] = []

    def add_heading(self, text: str) -> Report:
        """Start a section."""
        return self._add("heading", text=text)

    def add_text(self, text: str) -> Report:
        """Add paragraphs of plain text, separated by blank lines."""
        return self._add("text", paragraphs=[part.strip() for part in text.split("\n\n") if part.strip()])

    def add_table(
        self,
        headers: Sequence[str],
        rows: Sequence[Sequence[Cell]],
        caption: str = "",
        *,
        best: Mapping[str, Literal["max", "min"]] | None = None,
        unranked: Collection[str] = (),
        decimals: int = 2,
    ) -> Report:
        """Add a table whose first column names the rows.

        Args:
            headers: one per column.
            rows: cells; ``None`` and NaN show as a dash. Columns of numbers are right-aligned.
            caption: what the numbers are.
            best: columns in which to mark the best value, and whether that is the largest or the smallest.
            unranked: first cells of rows that do not compete (ceilings, teachers).
            decimals: digits after the point of floats; integers are shown as they are.

        Raises:
            DataError: a row is not as long as ``headers``, or ``best`` names no column.
        """
        for row in rows:
            if len(row) != len(headers):
                raise DataError(f"row {list(row)} has {len(row)} cells for {len(headers)} headers")
        if unknown := set(best or {}) - set(headers):
            raise DataError(f"best names {sorted(unknown)}, which is no column of {list(headers)}")
        numeric = [all(_is_number(row[i]) or row[i] is None for row in rows) for i in range(len(headers))]
        winners = {
            headers.index(name): _winner([row[headers.index(name)] for row in rows if row[0] not in unranked], way)
            for name, way in (best or {}).items()
        }
        shown = [
            {
                "unranked": row[0] in unranked,
                "cells": [
                    {
                        "text": _show(cell, decimals),
                        "numeric": numeric[i],
                        "best": i in winners and row[0] not in unranked and _is_number(cell) and cell == winners[i],
                    }
                    for i, cell in enumerate(row)
                ],
            }
            for row in rows
        ]
        named = [{"text": header, "numeric": numeric[i]} for i, header in enumerate(headers)]
        return self._add("table", headers=named, rows=shown, caption=caption)

    def add_curves(
        self, title: str, series: Mapping[str, Series], x_label: str, y_label: str, caption: str = ""
    ) -> Report:
        """Add a line chart of ``{label: (x, y)}`` or ``{label: (x, y, low, high)}``; NaN leaves a gap.

        Raises:
            DataError: there is no series, or the parts of one differ in length.
        """
        if not series:
            raise DataError(f"chart {title!r} has no series")
        for label, parts in series.items():
            if len(parts) not in (2, 4) or len({len(part) for part in parts}) != 1:
                raise DataError(f"series {label!r} must be (x, y) or (x, y, low, high) of one length")
        svg = line_chart(title, series, x_label, y_label, prefix=f"c{len(self.blocks)}-")
        return self._add("chart", title=title, svg=svg, caption=caption)

    def add_histogram(
        self, title: str, values: Sequence[float], x_label: str, y_label: str, caption: str = ""
    ) -> Report:
        """Add a histogram of finite values.

        Raises:
            DataError: there is no value, or one is not finite.
        """
        if not values or not all(map(math.isfinite, values)):
            raise DataError(f"histogram {title!r} needs finite values, at least one; got {len(values)} value(s)")
        svg = histogram(title, values, x_label, y_label, prefix=f"c{len(self.blocks)}-")
        return self._add("chart", title=title, svg=svg, caption=caption)

    def add_scatter(
        self,
        title: str,
        x: Sequence[float] | Tensor,
        y: Sequence[float] | Tensor,
        x_label: str,
        y_label: str,
        caption: str = "",
    ) -> Report:
        """Add points of finite x and y in the same units, with the line on which they are equal.

        Raises:
            DataError: there is no point, the two differ in length, or a value is not finite.
        """
        if not len(x) or len(x) != len(y) or not all(math.isfinite(float(value)) for value in (*x, *y)):
            raise DataError(f"scatter {title!r} needs finite x and y, as many of each; got {len(x)} and {len(y)}")
        svg = scatter_chart(title, x, y, x_label, y_label, prefix=f"c{len(self.blocks)}-")
        return self._add("chart", title=title, svg=svg, caption=caption)

    def add_videos(
        self,
        title: str,
        columns: Mapping[str, Tensor],
        row_labels: Sequence[Prompt],
        *,
        fps: float = 8,
        scale: int | None = None,
        caption: str = "",
    ) -> Report:
        """Add a grid of looping clips: a row per prompt, a column per method.

        Browsers stop at some 75 players on a page, so show a selection of rows.

        Args:
            title: heading of the grid.
            columns: ``{label: videos [N, T, 3, H, W] in [0, 1]}``; N as many as row labels, sizes equal throughout.
            row_labels: the prompts.
            fps: frames per second.
            scale: whole-number enlargement; default: the least that makes the shorter side 128 pixels.
            caption: what to look at.

        Raises:
            DataError: there is nothing to show, or shapes or values are wrong.
        """
        labels = [prompt_text(prompt) for prompt in row_labels]
        if not columns or not labels:
            raise DataError(f"video grid {title!r} needs at least one column and one row")
        for name, videos in columns.items():
            if videos.ndim != 5 or len(videos) != len(labels):
                raise DataError(
                    f"column {name!r} must be [N, T, 3, H, W] with N = {len(labels)} rows; got {tuple(videos.shape)}"
                )
        sizes = {name: tuple(videos.shape[-2:]) for name, videos in columns.items()}
        if len(set(sizes.values())) != 1:
            raise DataError(f"video grid {title!r} needs clips of one height and width; got {sizes}")
        height, width = next(iter(sizes.values()))
        factor = scale or _enlargement(height, width)
        rows = []
        for i, label in enumerate(labels):
            clips = [
                {
                    "label": f"{name}: {label}",
                    "data": base64.b64encode(encode_mp4(videos[i], fps=fps, scale=factor)).decode("ascii"),
                }
                for name, videos in columns.items()
            ]
            rows.append({"label": label, "clips": clips})
        shown = {"width": _even(width * factor), "height": _even(height * factor), "columns": [*columns]}
        return self._add("videos", title=title, rows=rows, caption=caption, **shown)

    def add_clips(self, title: str, clips: Sequence[ShownClip], caption: str = "") -> Report:
        """Add looping clips of any sizes and frame rates, each above its name and what is said of it.

        Args:
            title: heading.
            clips: at least one; those whose shorter side is below 128 pixels are enlarged by a whole number.
            caption: what to look at.

        Raises:
            DataError: there is no clip, or one cannot be encoded.
        """
        if not clips:
            raise DataError(f"gallery {title!r} needs at least one clip")
        shown = []
        for clip in clips:
            height, width = clip.video.shape[-2:]
            factor = _enlargement(height, width)
            data = base64.b64encode(encode_mp4(clip.video, fps=clip.fps, scale=factor)).decode("ascii")
            size = {"width": _even(width * factor), "height": _even(height * factor)}
            shown.append({"name": clip.name, "value": clip.value, "text": clip.text, "data": data, **size})
        return self._add("gallery", title=title, clips=shown, caption=caption)

    def add_settings(self, settings: Mapping[str, Any], title: str = "Settings") -> Report:
        """Add a (nested) mapping as a folded table with dotted names."""
        return self._add("settings", title=title, entries=_flatten(settings))

    def render(self) -> str:
        """Return the page as HTML."""
        import jinja2

        environment = jinja2.Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
        has_videos = any(block["kind"] in ("videos", "gallery") for block in self.blocks)
        return template.render(title=self.title, blocks=self.blocks, has_videos=has_videos)

    def save(self, path: Path | str) -> Path:
        """Write the page and return its path; a reader never sees half a file."""
        return write_file(path, self.render())

    def _add(self, kind: str, **content: object) -> Report:
        self.blocks.append({"kind": kind, **content})
        return self


def _even(size: int) -> int:
    return size + size % 2


def _enlargement(height: int, width: int) -> int:
    """Return the least whole number that makes the shorter side :data:`_SMALL` pixels."""
    return max(1, math.ceil(_SMALL / min(height, width)))


def _is_number(cell: object) -> bool:
    return isinstance(cell, (int, float)) and not isinstance(cell, bool)


def _show(cell: Cell, decimals: int) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "–"
    if isinstance(cell, float):
        return f"{cell:.{decimals}f}".replace("-", "\u2212") if math.isfinite(cell) else str(cell)
    return str(cell)


def _winner(cells: Sequence[Cell], way: Literal["max", "min"]) -> float | None:
    numbers = [float(cell) for cell in cells if _is_number(cell) and not math.isnan(float(cell))]  # type: ignore[arg-type]
    return (max if way == "max" else min)(numbers, default=None)


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    entries: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            entries += _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            entries.append((f"{prefix}{name}", ", ".join(map(str, value)) or "–"))
        else:
            entries.append((f"{prefix}{name}", str(value)))
    return entries
