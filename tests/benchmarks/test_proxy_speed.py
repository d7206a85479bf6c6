"""Ratios, what is left out for want of memory or time, and a memory meter that sees what a call takes."""

import json
import subprocess
import sys

import pytest

from benchmarks.proxy_speed import Side, compare_members, grow, measure, pooled, prepare, ratios


def side(seconds, weights, work, peak):
    return {"seconds": seconds, "weights": weights, "work": work, "peak": peak}


def test_ratios_are_of_medians_and_of_weights_with_work():
    told = ratios(proxy=side([1.0, 9.0, 2.0], 2.0, 8.0, 400.0), oracle=side([60.0, 100.0, 90.0], 50.0, 150.0, 800.0))
    assert told == {"times_faster": 45.0, "memory_ratio": 0.05, "peak_ratio": 0.5}


def test_interpreters_are_pooled_by_the_medians_of_their_memory():
    told = pooled([side([1.0, 2.0], 3.0, work, 10 * work) for work in (5.0, 9.0, 6.0)])
    assert told == side([1.0, 2.0] * 3, 3.0, 6.0, 60.0) | {"each_work": [5.0, 9.0, 6.0]}


def compare_at(size):
    return {"oracle": side([size[0] * size[1] * size[2] / 1e4], 500.0, size[1] * size[2] / 100, 0.0)}


SIZES = ((5, 100, 100), (5, 200, 100), (9, 200, 200), (81, 200, 200))


@pytest.mark.parametrize(
    ("free", "limit", "measured", "said"),
    [
        (1e6, 1e6, 4, None),
        (1000.0, 1e6, 2, "904 MiB expected, 1000 free"),
        (1e6, 100.0, 3, "324 s a run expected, 100 allowed"),
    ],
)
def test_growth_ends_where_the_next_size_is_expected_to_take_too_much(free, limit, measured, said):
    results = grow(SIZES, compare_at, lambda: free, limit)
    assert [result["size"] for result in results if "oracle" in result] == list(SIZES[:measured])
    assert results[-1].get("left_out") == said


METER = """
import json, torch
from benchmarks.proxy_speed import memory, settle
torch.ones(96 * 2**18).sum()
held = settle("cpu")
before = memory("VmHWM", "cpu") - held
torch.ones(48 * 2**18).sum()
taken = memory("VmHWM", "cpu") - held
print(json.dumps([before, taken, settle("cpu") - held]))
"""


def test_the_meter_sees_memory_that_was_freed_again_but_not_what_came_before():
    # In an interpreter of its own, as the sides are measured: the heap of a long one has room for much.
    done = subprocess.run([sys.executable, "-c", METER], capture_output=True, text=True, check=True)
    before, taken, after = json.loads(done.stdout)
    assert before < 16 and taken == pytest.approx(48, abs=12) and after < 16


def test_all_members_in_one_call_score_as_they_do_one_by_one():
    (result,) = compare_members((3,), 1, "cpu")
    assert result["batch"] == 3 and result["difference"] < 1e-6
    assert all(result[name] > 0 for name in ("loop", "vmap", "loop_gradient", "vmap_gradient"))


def test_a_side_is_measured_in_an_interpreter_of_its_own(tmp_path):
    prepare(tmp_path, (16, 5, 8, 8), 4, "cpu", scale=4)
    told = measure(Side("proxy", str(tmp_path), "", "", 2, "cpu"))
    assert len(told["seconds"]) == 2 and min(told["seconds"]) > 0
    assert 0 < told["weights"] < 10 and 0 <= told["work"] < told["peak"]


def test_a_side_that_fails_says_which_and_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"the oracle ended with status 1(.|\n)*latents.safetensors"):
        measure(Side("oracle", str(tmp_path), "wan", "digits.legibility", 1, "cpu"))
