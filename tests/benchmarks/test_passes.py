import pytest

from benchmarks.passes import passes
from distillation.config import DistillationConfig


@pytest.mark.parametrize(
    ("objective", "changes", "expected"),
    [
        ("cd", {"guidance_scale": 1.0}, 1 + 3 + 1),
        ("cd", {"guidance_scale": 3.0, "solver_steps": 2}, 4 + 3 + 1),
        # Where the teacher is not guided one call of it is enough; the kept calls cost the reference's and a gradient.
        (
            "cd",
            {"solver_steps": 4, "cd_max_time": 0.25, "guidance_start": 0.35, "cd_keep_weight": 1.0},
            4 + 3 + 1 + 1 + 3,
        ),
        ("cd", {"guidance_scale": 1.0, "cd_on_samples": True, "step_counts": [4, 1]}, 4 + 1 + 3 + 1),
        ("vsd", {"step_counts": [1], "fake_updates": 1, "guidance_scale": 1.0}, 0 + 3 + 1 + 1 + 3),
        # Calls (1, 0), (2, 0), (2, 1), (4, 0..3): one step of the chain before the call that is trained, on average.
        ("vsd", {"step_counts": [1, 2, 4], "fake_updates": 3}, 1 + 3 + 2 + 1 + 3 + 2 * (1 + 1 + 3)),
        ("joint", {"step_counts": [1], "fake_updates": 1}, (3 + 2 + 1 + 3) + (2 + 3 + 1)),
        ("progressive", {}, 2 + 3),
    ],
)
def test_passes_of_an_update(objective, changes, expected):
    assert passes(DistillationConfig(**changes), objective) == expected


def test_an_image_costs_its_share_of_a_clip():
    config = DistillationConfig()
    assert passes(config, "image_cd", frames=5) == pytest.approx(passes(config, "cd") / 5)
