"""Ratios, what is left out for want of memory or time, and sections that stand beside one another."""

import json
import sys

import pytest

from benchmarks import proxy_speed
from benchmarks.proxy_speed import Side, compare_members, grow, measure, pooled, prepare, ratios
from latent_rewards.contracts import ConfigError


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


def test_what_differs_has_a_section_of_its_own_and_a_broken_file_is_refused_at_once(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(proxy_speed, "measure_section", lambda options: asked.append(options) or len(asked))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["proxy_speed", "--results", str(tmp_path / "told.json"), *arguments])
        proxy_speed.main()

    run("--wan", "--note", "first")
    run("--wan", "--sizes", "5x64x64", "9x64x64")
    run("--samples", "4")
    run()
    run("--metric", "digits.direction")
    run("--ensemble", "--samples", "4")
    run("--wan", "--wan-metric", "quality.sharpness")
    told = json.loads((tmp_path / "told.json").read_text())
    assert {name: section["result"] for name, section in told.items()} == {
        "wan": 1,
        "wan_5x64x64_9x64x64": 2,
        "digits_4 samples": 3,
        "digits": 4,
        "digits_digits.direction": 5,
        "ensemble": 6,
        "wan_quality.sharpness": 7,
    }
    assert told["wan"]["note"] == "first" and told["wan"]["device"] == "cpu" and told["wan"]["versions"]
    (tmp_path / "told.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        run()
    assert len(asked) == 7
