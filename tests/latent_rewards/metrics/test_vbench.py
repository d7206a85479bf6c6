"""VBench's totals: the published column of the DOLLAR paper's teacher, by hand, and what is refused."""

import math

import pytest

from latent_rewards.contracts import DataError
from latent_rewards.metrics.vbench import QUALITY, SEMANTIC, vbench_score

TEACHER = {
    "subject consistency": 83.99,
    "background consistency": 93.78,
    "temporal flickering": 96.42,
    "motion smoothness": 98.09,
    "dynamic degree": 99.44,
    "aesthetic quality": 61.21,
    "imaging quality": 63.87,
    "object class": 85.79,
    "multiple objects": 52.59,
    "human action": 99.60,
    "color": 77.00,
    "spatial relationship": 51.40,
    "scene": 49.99,
    "temporal style": 26.45,
    "appearance style": 24.83,
    "overall consistency": 27.89,
}


def test_the_published_teacher_has_its_published_totals():
    score = vbench_score(TEACHER)
    assert (round(score.quality, 2), round(score.semantic, 2), round(score.total, 2)) == (81.89, 73.71, 80.25)


def test_the_ends_of_every_range_give_zero_and_one_hundred():
    everything = QUALITY | SEMANTIC
    lowest = vbench_score({name: 100 * low for name, (low, _, _) in everything.items()})
    highest = vbench_score({name: 100 * high for name, (_, high, _) in everything.items()})
    assert lowest.total == pytest.approx(0, abs=1e-9)
    assert (highest.quality, highest.semantic, highest.total) == pytest.approx((100, 100, 100))


def test_dynamic_degree_counts_half():
    still = vbench_score(TEACHER | {"dynamic degree": 0.0})
    assert vbench_score(TEACHER).quality - still.quality == pytest.approx(0.5 * 99.44 / 6.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scene": None}, "missing: scene"),
        ({"scenes": 5.0}, "scenes.*scene"),
        ({"scene": 101.0}, "'scene' must be a percentage"),
        ({"scene": -0.1}, "'scene' must be a percentage"),
        ({"scene": math.nan}, "'scene' must be a percentage"),
        ({"scene": "50"}, "'scene' must be a percentage"),
        ({"Dynamic_Degree": 5.0}, "'dynamic_degree' is given twice"),
    ],
)
def test_what_is_missing_or_out_of_range_is_named(change, message):
    wrong = {name: value for name, value in (TEACHER | change).items() if value is not None}
    with pytest.raises(DataError, match=message):
        vbench_score(wrong)


def test_fractions_are_not_taken_for_percentages():
    with pytest.raises(DataError, match="multiply them by 100"):
        vbench_score({name: value / 100 for name, value in TEACHER.items()})
