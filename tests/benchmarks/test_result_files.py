"""A file of results is whole, is not measured twice, and is not taken for one with other settings."""

import json
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import pytest

from benchmarks.result_files import (
    Cell,
    Curve,
    Sections,
    flat,
    keep,
    read_results,
    seed_cells,
    write_summary,
    write_whole,
)
from latent_rewards.contracts import ConfigError


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "folder" / "result.json"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new, and then \ud800")
    assert path.read_text() == "old"
    write_whole(path, "new")
    assert path.read_text() == "new" and [file.name for file in path.parent.iterdir()] == ["result.json"]


def measured(asked, name, value=0.5):
    asked.append(name)
    return {"value": value, "seconds": 1.0}


def test_a_result_is_measured_once_and_stored_with_its_settings(tmp_path, capsys):
    asked = []
    cell = Cell(tmp_path / "results" / "a.json", {"rates": (1.0, 2.0)}, partial(measured, asked, "a"), "value")
    keep([cell])
    keep([cell])
    assert asked == ["a"] and capsys.readouterr().out == "a: 0.5, 1 s\n"
    told = {"value": 0.5, "seconds": 1.0, "settings": {"rates": [1.0, 2.0]}}
    assert json.loads(cell.path.read_text()) == told


def test_a_result_of_other_settings_is_refused_before_anything_is_measured(tmp_path):
    asked = []
    keep([Cell(tmp_path / "b.json", {"share": 0.1}, partial(measured, asked, "b"))])
    cells = [Cell(tmp_path / f"{name}.json", {"share": 1.0}, partial(measured, asked, name)) for name in "ab"]
    with pytest.raises(ConfigError, match=r"b\.json was measured with share = 0\.1, now 1\.0; remove it"):
        keep(cells)
    assert asked == ["b"]


def test_a_result_without_settings_is_kept_and_unknown_ones_are_not_compared(tmp_path):
    for name, held in (("old", {}), ("less", {"settings": {"share": 1.0}})):
        (tmp_path / f"{name}.json").write_text(json.dumps(held))
        keep([Cell(tmp_path / f"{name}.json", {"share": 1.0, "prompts": 2}, lambda: pytest.fail("measured again"))])


@pytest.mark.parametrize("written", ['{"value": 1', "[1]"])
def test_a_broken_result_is_named_before_anything_is_measured(tmp_path, written):
    (tmp_path / "b.json").write_text(written)
    cells = [Cell(tmp_path / f"{name}.json", {}, lambda: pytest.fail("measured")) for name in "ab"]
    with pytest.raises(ConfigError, match=r"b\.json .* remove it to measure again"):
        keep(cells)


def test_cells_are_one_for_each_seed_and_name(tmp_path):
    cells = seed_cells(tmp_path, ["x", "y"], [0, 2], lambda name: {"of": name}, lambda name, seed: {name: seed}, "v")
    assert [cell.path.name for cell in cells] == [f"{name}-seed{seed}.json" for seed, name in product((0, 2), "xy")]
    assert [cell.measure() for cell in cells] == [{"x": 0}, {"y": 0}, {"x": 2}, {"y": 2}]
    assert [cell.settings["of"] for cell in cells] == ["x", "y", "x", "y"] and {cell.told for cell in cells} == {"v"}


def test_a_curve_keeps_its_points(tmp_path):
    path = tmp_path / "run" / "curve.json"
    curve = Curve(path, {"updates": 4})
    curve.record(4, lambda: {"true": 0.5})
    curve.record(0, lambda: {"true": 0.25})
    again = Curve(path, {"updates": 4})
    again.record(4, lambda: pytest.fail("made twice"))
    assert again.listed() == [{"updates": 0, "true": 0.25}, {"updates": 4, "true": 0.5}]


def test_the_points_of_a_trial_are_not_those_of_a_full_run(tmp_path):
    path = tmp_path / "run" / "curve.json"
    Curve(path, {"updates": 2}).record(1, lambda: {"true": 0.1})
    with pytest.raises(ConfigError, match=r"updates = 2, now 160; remove .*run to run again, or give another --runs"):
        Curve(path, {"updates": 160})


def test_the_points_of_an_old_curve_are_kept_and_its_settings_stay_unknown(tmp_path):
    (tmp_path / "curve.json").write_text(json.dumps({"0": {"true": 0.25}}))
    curve = Curve(tmp_path / "curve.json", {"updates": 4})
    curve.record(4, lambda: {"true": 0.5})
    assert curve.listed() == [{"updates": 0, "true": 0.25}, {"updates": 4, "true": 0.5}]
    assert json.loads((tmp_path / "curve.json").read_text())["settings"] == {}


def test_settings_that_change_no_result_are_left_out():
    @dataclass
    class Section:
        learning_rate: float = 0.1
        sizes: list[int] = field(default_factory=lambda: [1, 2])
        device: str = "cuda"
        output_dir: str = "runs"
        seed: int = 3

    assert flat(lro=Section()) == {"lro.learning_rate": 0.1, "lro.sizes": [1, 2]}


def test_a_section_takes_the_place_of_its_own_alone(tmp_path):
    stored = Sections(tmp_path / "result.json")
    stored.write({"cpu": 1, "cuda": 2})
    stored.write({"cpu": 3})
    Sections(tmp_path / "result.json").write({"mps": 4})
    stored.write({"cpu": 5})  # what another one wrote meanwhile stays
    assert json.loads((tmp_path / "result.json").read_text()) == {"cpu": 5, "cuda": 2, "mps": 4}


def test_a_broken_file_of_sections_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "result.json").write_text('{"cpu": {"rows"')
    with pytest.raises(ConfigError, match=r"result\.json cannot be read .* restore it, or remove it"):
        Sections(tmp_path / "result.json")


def test_results_are_read_in_the_order_of_their_names_and_their_summary_is_written(tmp_path, capsys):
    for name, value in (("seed1", 1), ("seed0", 0), ("other", 2)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"value": value}))
    results = read_results(tmp_path, "seed*.json")
    assert results == [{"value": 0}, {"value": 1}]
    write_summary(tmp_path, {"values": results}, "| 0 | 1 |\n")
    assert json.loads((tmp_path / "summary.json").read_text()) == {"values": results}
    assert (tmp_path / "summary.md").read_text() == "| 0 | 1 |\n" and "| 0 | 1 |" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"holds no results \(vsd\*\.json\); measure first"):
        read_results(tmp_path, "vsd*.json")
