"""Charts as inline SVG that takes its ink from the page around it. matplotlib is imported when a chart is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, which colour-blind readers tell apart; line styles differ too."""

Series = tuple[Sequence[float] | Tensor, ...]
"""``(x, y)``, or ``(x, y, low, high)`` for a curve with a band."""

_LINES = ("-", "--", "-.", ":")
_INK = "#010203"
_MOST_BINS = 40
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "latent-rewards",
    "text.parse_math": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def line_chart(title: str, series: Mapping[str, Series], x_label: str, y_label: str, *, prefix: str) -> object:
    """Return markup of ``{label: (x, y)}`` or ``{label: (x, y, low, high)}``; NaN leaves a gap.

    ``prefix`` begins every id in it, so that charts on one page share none.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.add_subplot()
        for i, (label, (x, y, *band)) in enumerate(series.items()):
            xs, colour = [float(v) for v in x], PALETTE[i % len(PALETTE)]
            (line,) = axes.plot(xs, [float(v) for v in y], color=colour, linestyle=_LINES[i % len(_LINES)], linewidth=2)
            line.set_marker("o" if len(xs) <= 20 else "")
            line.set_markersize(4)
            # matplotlib leaves names that begin with an underscore out of the legend.
            line.set_label(label if not label.startswith("_") else "\u200b" + label)
            if band:
                low, high = ([float(v) for v in edge] for edge in band)
                axes.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)
        if all(float(v).is_integer() for x, *_ in series.values() for v in x):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        columns = max(1, min(4, len(series), 84 // (6 + max(map(len, series)))))
        figure.legend(loc="outside upper left", ncols=columns, frameon=False, handlelength=2.6)
        return _markup(title, figure, axes, x_label, y_label, prefix)


def histogram(title: str, values: Sequence[float], x_label: str, y_label: str, *, prefix: str) -> object:
    """Return markup of how many of the finite ``values`` fall into each of up to 40 equal bins."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(8, 2.4), layout="constrained")
        axes = figure.add_subplot()
        axes.hist(values, bins=min(_MOST_BINS, max(5, round(2 * len(values) ** 0.5))), color=PALETTE[0], alpha=0.85)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        return _markup(title, figure, axes, x_label, y_label, prefix)


def scatter_chart(
    title: str, x: Sequence[float] | Tensor, y: Sequence[float] | Tensor, x_label: str, y_label: str, *, prefix: str
) -> object:
    """Return markup of points on square axes of one range, with the line on which y is x."""
    import matplotlib
    from matplotlib.figure import Figure

    xs, ys = [float(v) for v in x], [float(v) for v in y]
    low, high = min(*xs, *ys), max(*xs, *ys)
    margin = 0.04 * (high - low) or 1.0
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        axes.axline((low, low), slope=1, color=_INK, alpha=0.45, linewidth=1, linestyle="--")
        axes.scatter(xs, ys, s=12, color=PALETTE[0], alpha=0.5, linewidths=0)
        axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal")
        return _markup(title, figure, axes, x_label, y_label, prefix)


def _markup(title: str, figure: Any, axes: Any, x_label: str, y_label: str, prefix: str) -> object:  # noqa: ANN401 - matplotlib's
    from markupsafe import Markup, escape

    axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.8)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    for mark in ('id="', "url(#", 'href="#'):
        svg = svg.replace(mark, mark + prefix)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))  # noqa: S704 (title escaped, matplotlib escapes the rest)
