"""Histograms count what they are given."""

import re

import pytest

from latent_rewards.charts import PALETTE, histogram, scatter_chart


def bars(markup: object) -> list[float]:
    """Heights of the filled rectangles, as shares of the highest."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: {PALETTE[0].lower()}', str(markup))
    tops = []
    for path in paths:
        rows = [float(y) for _, y in re.findall(r"[ML] ([-0-9.]+) ([-0-9.]+)", path)]
        tops.append(max(rows) - min(rows))
    return [height / max(tops) for height in tops]


def test_bars_are_as_high_as_their_counts() -> None:
    heights = bars(histogram("h", [0.0, 0.0, 0.0, 0.0, 0.5, 1.0, 1.0], "x", "clips", prefix="p-"))
    assert heights == pytest.approx([1.0, 0.0, 0.25, 0.0, 0.5], abs=0.01)


def test_equal_values_and_many_values_are_drawn() -> None:
    assert max(bars(histogram("h", [3.0], "x", "clips", prefix="p-"))) == 1.0
    assert len(bars(histogram("h", [float(i) for i in range(10_000)], "x", "clips", prefix="p-"))) == 40


def test_points_lie_where_they_are_given_on_equal_axes() -> None:
    svg = str(scatter_chart("s", [0.0, 1.0, 3.0], [0.0, 3.0, 1.0], "true", "said", prefix="p-"))
    drawn = re.findall(r'<use [^>]*x="([-0-9.]+)" y="([-0-9.]+)" style="[^"]*fill-opacity: 0.5"', svg)
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, pair)) for pair in drawn)
    assert (x1 - x0) * 3 == pytest.approx(x2 - x0, rel=1e-3) and (y0 - y2) * 3 == pytest.approx(y0 - y1, rel=1e-3)
    assert x2 - x0 == pytest.approx(y0 - y1, rel=1e-3)
    assert "stroke-dasharray" in svg and "true" in svg and "said" in svg
