import pytest

from distillation.errors import TimestepsError
from distillation.families.grids import build_scheduler, exportable, scheduler_folder
from distillation.schedule import RectifiedFlow

DEFAULT = {1: [1.0], 2: [1.0, 0.5], 4: [1.0, 0.75, 0.5, 0.25]}


def levels(configuration: dict, count: int) -> list[float]:
    scheduler = build_scheduler(configuration)
    scheduler.set_timesteps(count)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * sigma for sigma in scheduler.sigmas[:-1].tolist()])
    return scheduler.sigmas.tolist()


def test_default_grids_are_exact():
    configurations = exportable(DEFAULT, eta=1.0)
    for count, grid in DEFAULT.items():
        assert levels(configurations[count], count) == [*grid, 0.0]
        assert configurations[count]["_class_name"] == "FlowMatchLCMScheduler"
    assert configurations[4]["shift"] == 1.0
    assert "shift_terminal" not in configurations[1]


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 5.0])
def test_a_shifted_schedule_is_reached_by_another_shift(shift):
    grid = {3: [1.0, 2 / 3, 1 / 3], 4: DEFAULT[4], 8: [1 - i / 8 for i in range(8)]}
    configurations = exportable(grid, eta=0, shift=shift)
    for count, times in grid.items():
        expected = [float(RectifiedFlow(shift)(t)[1]) for t in times]
        assert levels(configurations[count], count) == pytest.approx([*expected, 0.0], abs=1e-6)
        assert configurations[count]["_class_name"] == "FlowMatchEulerDiscreteScheduler"


def test_any_two_and_three_levels_that_a_shift_can_space():
    for grid in ([1.0, 0.9], [1.0, 0.01], [1.0, 0.9, 0.6], [1.0, 0.3, 0.1]):
        configuration = exportable({len(grid): grid}, eta=1)[len(grid)]
        assert levels(configuration, len(grid)) == pytest.approx([*grid, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("grid", "eta", "message"),
    [
        (
            [1.0, 0.9, 0.5, 0.25],
            1,
            r"4-step grid with noise levels \[1.0, 0.9, 0.5, 0.25\] cannot be exported.*uniform",
        ),
        ([1.0, 0.99, 0.1], 1, "grow faster than any shift"),
        ([0.9], 1, "descend strictly from 1"),
        ([1.0, 1.0, 0.5], 1, "descend strictly from 1"),
        ([1.0, 0.5], 0.5, r"2-step grid with noise levels \[1.0, 0.5\].*not eta = 0.5"),
    ],
)
def test_what_cannot_be_exported_is_named(grid, eta, message):
    with pytest.raises(TimestepsError, match=message):
        exportable({len(grid): grid}, eta)


def test_eta_does_not_matter_for_one_step():
    assert levels(exportable({1: [1.0]}, eta=0.5)[1], 1) == [1.0, 0.0]


def test_folder_names():
    assert [scheduler_folder(n) for n in (1, 2, 4)] == ["scheduler_1_step", "scheduler_2_steps", "scheduler_4_steps"]
