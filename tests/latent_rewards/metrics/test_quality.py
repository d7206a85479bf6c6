"""Values by hand, and what cheating clips score."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from latent_rewards.contracts import MetricError
from latent_rewards.metrics import create_metric
from latent_rewards.metrics.quality import luma


def score(name: str, videos: Tensor, **options: object) -> Tensor:
    return create_metric(f"quality.{name}", **options)(videos)


def test_luma_is_weighted_and_grey_passes_through() -> None:
    colours = torch.eye(3)[:, :, None, None]
    torch.testing.assert_close(luma(colours)[:, 0, 0], torch.tensor([0.299, 0.587, 0.114]))
    assert torch.equal(luma(colours[:, :1]), colours[:, 0])


def test_flickering_is_one_minus_the_mean_difference() -> None:
    video = torch.zeros(1, 3, 3, 4, 4)
    video[:, 1] = 51 / 255
    # Differences of 51 levels both times: (255 - 51)/255.
    assert score("temporal_flickering", video).item() == pytest.approx(0.8, abs=1e-6)


def test_sharpness_of_a_checkerboard_is_its_bound() -> None:
    board = torch.tensor([[(x + y) % 2 for x in range(6)] for y in range(6)], dtype=torch.float32)
    assert score("sharpness", board.expand(1, 1, 3, 6, 6)).item() == pytest.approx(1020.0**2, rel=1e-5)
    ramp = torch.linspace(0, 1, 8).expand(1, 1, 3, 8, 8)
    assert score("sharpness", ramp).item() == pytest.approx(0, abs=1e-4)
    with pytest.raises(MetricError, match="3 x 3"):
        score("sharpness", torch.zeros(1, 1, 3, 2, 2))


def test_sharpness_falls_as_a_clip_is_blurred(textures: Tensor) -> None:
    flat = textures.flatten(0, 1)
    values = [score("sharpness", textures)]
    for size in (3, 5):
        blurred = torch.nn.functional.avg_pool2d(flat, size, 1, size // 2, count_include_pad=False)
        values.append(score("sharpness", blurred.reshape(textures.shape)))
    assert (values[0] > values[1]).all() and (values[1] > values[2]).all()


def test_colourfulness_of_two_colours_by_hand() -> None:
    video = torch.zeros(1, 1, 3, 1, 2)
    video[0, 0, 0, 0, 0] = 1.0  # one red pixel beside a black one
    # rg is 255 and 0, yb 127.5 and 0: spread sqrt(127.5^2 + 63.75^2), offset the same.
    expected = 1.3 * (127.5**2 + 63.75**2) ** 0.5
    assert score("colourfulness", video).item() == pytest.approx(expected, rel=1e-5)
    assert score("colourfulness", video[:, :, :1]).item() == 0


def test_exposure_is_one_at_mid_grey_and_falls_on_both_sides() -> None:
    levels = torch.tensor([0.0, 0.3, 0.5, 0.7, 1.0])[:, None, None, None, None].expand(5, 1, 3, 2, 2)
    values = score("exposure", levels)
    expected = torch.exp(-3 * (levels[:, 0, 0, 0, 0] - 0.5) ** 2 / (2 * 0.04))
    torch.testing.assert_close(values, expected)
    assert score("exposure", levels, spread=0.4)[0] > values[0]


def test_what_cheating_clips_score(textures: Tensor, cheats: dict[str, Tensor]) -> None:
    assert (score("temporal_flickering", cheats["still"]) == 1).all()
    assert (score("temporal_flickering", cheats["grey"]) == 1).all()
    assert (score("temporal_flickering", cheats["noise"]) < 0.7).all()
    assert (score("sharpness", cheats["noise"]) > 50 * score("sharpness", textures)).all()
    assert (score("sharpness", cheats["grey"]) < 1e-6).all()
    assert (score("colourfulness", cheats["grey"]) == 0).all()
    assert (score("colourfulness", cheats["noise"]) > score("colourfulness", textures)).all()
    assert (score("exposure", cheats["grey"]) == 1).all()


def test_blur_rises_as_a_clip_is_blurred_and_does_not_see_contrast(textures: Tensor, cheats: dict[str, Tensor]) -> None:
    soft = textures
    values = []
    for _ in range(3):
        values.append(score("blur", soft))
        soft = functional.avg_pool2d(soft.flatten(0, 1), 3, stride=1, padding=1).view_as(textures)
    assert (values[0] < values[1]).all() and (values[1] < values[2]).all()
    torch.testing.assert_close(score("blur", 0.5 * textures), values[0], atol=1e-5, rtol=0)
    assert (score("blur", cheats["noise"]) < values[0]).all()
    assert (score("blur", torch.full((1, 2, 3, 16, 16), 0.5)) == 1).all()


def test_frame_ssim_is_one_for_still_clips_and_equals_its_formula_on_one_window(cheats: dict[str, Tensor]) -> None:
    torch.testing.assert_close(score("frame_ssim", cheats["still"]), torch.ones(len(cheats["still"])))
    assert (score("frame_ssim", cheats["noise"]) < 0.2).all()
    pair = torch.rand(1, 2, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    a, b = pair[0, :, 0].double().flatten(1)
    covariance = torch.cov(torch.stack([a, b]))
    expected = (2 * a.mean() * b.mean() + 0.01**2) * (2 * covariance[0, 1] + 0.03**2)
    expected /= (a.mean() ** 2 + b.mean() ** 2 + 0.01**2) * (covariance[0, 0] + covariance[1, 1] + 0.03**2)
    assert float(score("frame_ssim", pair)) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize(("name", "size"), [("blur", 2), ("frame_ssim", 6)])
def test_frames_too_small_are_refused(name: str, size: int) -> None:
    with pytest.raises(MetricError, match="at least"):
        score(name, torch.zeros(1, 2, 3, size, size))
