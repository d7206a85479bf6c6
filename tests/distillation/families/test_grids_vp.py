import pytest
import torch

from distillation.errors import TimestepsError
from distillation.families.grids import build_scheduler
from distillation.families.grids_vp import exportable_vp
from distillation.schedule import VariancePreserving

COGVIDEOX = VariancePreserving("scaled_linear", zero_snr=True, snr_shift=3.0)
DEFAULT = {1: [1.0], 2: [1.0, 0.5], 4: [1.0, 0.75, 0.5, 0.25]}


def visited(configuration: dict, count: int) -> list[int]:
    scheduler = build_scheduler(configuration)
    scheduler.set_timesteps(count)
    return scheduler.timesteps.tolist()


def sampled(configuration: dict, count: int, noise: torch.Tensor) -> torch.Tensor:
    """Run a scheduler on a network that returns half its input."""
    scheduler = build_scheduler(configuration)
    scheduler.set_timesteps(count)
    x = noise[0]
    torch.manual_seed(0)
    for t in scheduler.timesteps:
        x = scheduler.step(0.5 * x, t, x, return_dict=False)[0]
    return x


def expected(grid: list[float], eta: float, noise: torch.Tensor, native: str = "v") -> torch.Tensor:
    """The same by hand, from the formulas of the transition."""
    x = noise[0].double()
    for step, t in enumerate(grid):
        alpha, sigma = COGVIDEOX(t)
        output = 0.5 * x
        x0 = {"v": alpha * x - sigma * output, "x0": output}[native]
        eps = (x - alpha * x0) / sigma
        if step + 1 == len(grid):
            return x0
        alpha, sigma = COGVIDEOX(grid[step + 1])
        x = alpha * x0 + sigma * (eps if eta == 0 else noise[step + 1])
    raise AssertionError


def drawn(count: int) -> torch.Tensor:
    torch.manual_seed(0)
    injected = [torch.randn(64) for _ in range(count - 1)]
    return torch.stack([torch.randn(64, generator=torch.Generator().manual_seed(9)), *injected])


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("native", ["v", "x0"])
def test_default_grids_are_exact(eta, native):
    configurations = exportable_vp(DEFAULT, eta, schedule=COGVIDEOX, native=native)
    for count, grid in DEFAULT.items():
        assert visited(configurations[count], count) == [999, 749, 499, 249][:: 4 // count]
        noise = drawn(count)
        actual = sampled(configurations[count], count, noise)
        torch.testing.assert_close(actual.double(), expected(grid, eta, noise, native), rtol=0, atol=2e-6)


@pytest.mark.parametrize("grid", [[1.0, 0.9], [1.0, 0.4], [1.0, 0.001], [1.0, 0.667, 0.334], [0.8, 0.7, 0.6, 0.5]])
def test_deterministic_students_may_take_any_equal_steps(grid):
    """Wherever the last step would end above the data, the table says data there."""
    configuration = exportable_vp({len(grid): grid}, 0, schedule=COGVIDEOX)[len(grid)]
    assert configuration["_class_name"] == "CogVideoXDDIMScheduler"
    noise = drawn(len(grid))
    actual = sampled(configuration, len(grid), noise)
    torch.testing.assert_close(actual.double(), expected(grid, 0, noise), rtol=0, atol=2e-6)


@pytest.mark.parametrize("grid", [[0.9], [1.0, 0.6], [1.0, 0.667, 0.334], [1.0, 0.8, 0.4], [0.9, 0.45]])
def test_noisy_students_may_divide_the_levels_evenly(grid):
    configuration = exportable_vp({len(grid): grid}, 1, schedule=COGVIDEOX)[len(grid)]
    assert configuration["_class_name"] == "LCMScheduler"
    noise = drawn(len(grid))
    actual = sampled(configuration, len(grid), noise)
    torch.testing.assert_close(actual.double(), expected(grid, 1, noise), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["cosine", "linear", "scaled_linear"])
def test_the_table_is_the_schedules(kind):
    schedule = VariancePreserving(kind, snr_shift=2.0)
    for eta in (0, 1):
        scheduler = build_scheduler(exportable_vp({2: [1.0, 0.5]}, eta, schedule=schedule)[2])
        times = torch.arange(1, 1001, dtype=torch.float64) / 1000
        torch.testing.assert_close(
            scheduler.alphas_cumprod.double(), schedule(times)[0] ** 2, rtol=0, atol=1e-6, msg=f"{kind}, eta = {eta}"
        )


@pytest.mark.parametrize(
    ("grid", "eta", "message"),
    [
        ([1.0, 0.9, 0.5], 0, r"3-step grid \[1.0, 0.9, 0.5\] cannot be exported.*\[100, 400\] noise levels.*uniform"),
        ([1.0, 0.9, 0.5], 1, r"3-step grid \[1.0, 0.9, 0.5\] cannot be exported.*evenly"),
        ([1.0, 2 / 3, 1 / 3], 1, "t = 0.666.* lies between two of the 1000 noise levels.*use 0.667"),
        ([0.0002], 0, "lies between two"),
        ([1.0, 0.5], 0.3, r"2-step grid \[1.0, 0.5\] cannot be exported.*not eta = 0.3"),
        ([0.002, 0.001], 1, "returns its input at the lowest level"),
    ],
)
def test_what_cannot_be_exported_is_named(grid, eta, message):
    with pytest.raises(TimestepsError, match=message):
        exportable_vp({len(grid): grid}, eta, schedule=COGVIDEOX)


def test_eta_does_not_matter_for_one_step():
    for eta in (0, 0.5, 1):
        assert visited(exportable_vp({1: [1.0]}, eta, schedule=COGVIDEOX)[1], 1) == [999]


def test_a_scheduler_that_walks_elsewhere_is_noticed(monkeypatch):
    from distillation.families import import_diffusers

    def off_by_one(self, count, device=None):
        self.timesteps = torch.tensor([998])

    monkeypatch.setattr(import_diffusers().LCMScheduler, "set_timesteps", off_by_one)
    with pytest.raises(TimestepsError, match=r"comes to the indices \[998\] instead of \[999\]"):
        exportable_vp({1: [1.0]}, 1, schedule=COGVIDEOX)
