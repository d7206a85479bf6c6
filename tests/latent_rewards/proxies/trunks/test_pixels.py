"""The window follows what differs from a frame's background, and shows it the same wherever it is."""

import pytest
import torch
from torch.nn import functional

from latent_rewards.proxies.trunks import pixels
from latent_rewards.proxies.trunks.pixels import (
    WINDOW,
    PixelTrunk,
    centre_of_mass,
    cut_window,
    difference,
    look,
    window_around,
)


def blot(x, y, size=16):
    """A frame with a 4 x 3 blot, brighter on one side, whose corner is at (x, y)."""
    frame = torch.zeros(1, 3, size, size, dtype=torch.float64)
    frame[:, :, y : y + 4, x : x + 3] = torch.tensor([1.0, 0.5, 0.25])[:, None, None]
    frame[:, :, y : y + 2, x] = 0.8
    return frame


def content_centre(frames):
    return centre_of_mass(difference(frames))


def test_the_centre_of_one_pixel_is_that_pixel_and_of_nothing_the_middle():
    frame = torch.zeros(2, 3, 12, 20, dtype=torch.float64)
    frame[0, :, 4, 13] = 1.0
    centres = content_centre(frame)
    torch.testing.assert_close(centres[0], torch.tensor([13.5, 4.5], dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(centres[1], torch.tensor([10.0, 6.0], dtype=torch.float64))


def test_dark_content_on_a_bright_ground_is_content_too():
    torch.testing.assert_close(content_centre(1 - blot(4, 9)), content_centre(blot(4, 9)))


def test_the_window_shows_moved_content_the_same():
    first, second = blot(4, 6), blot(9, 7)
    windows = [cut_window(frame, window_around(content_centre(frame), frame)) for frame in (first, second)]
    assert windows[0].shape == (1, 3, WINDOW, WINDOW)
    unmoved = cut_window(second, window_around(content_centre(first), second))
    assert (windows[1] - windows[0]).abs().max() < 1e-5 < 0.1 < (unmoved - windows[0]).abs().mean()


def test_the_difference_is_from_the_median_colour():
    ground = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)[:, None, None]
    frame = ground.expand(1, 3, 16, 16).clone()
    frame[0, :, 2:8, 3:9] = ground + torch.tensor([0.3, 0.0, -0.4], dtype=torch.float64)[:, None, None]
    expected = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    expected[..., 2:8, 3:9] = 0.25
    torch.testing.assert_close(difference(frame), expected)


def test_a_window_in_the_middle_of_a_frame_of_sixteen_is_nine_of_its_pixels():
    frame = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    window = cut_window(frame, window_around(torch.tensor([[7.5, 7.5]], dtype=torch.float64), frame))
    torch.testing.assert_close(window, frame[:, :, 3:12, 3:12])


def test_features_follow_place_and_speed_beside_the_window():
    trunk = PixelTrunk((4, 2, 8, 8), 8, 2, 0).double()
    still = blot(4, 6).repeat(3, 1, 1, 1)[None]
    moving = torch.cat([blot(4, 6), blot(5, 6), blot(6, 6)])[None]
    first, second = trunk(look(still), None), trunk(look(moving), None)
    assert first.shape == (1, 3, 18) and trunk.num_features == 18
    torch.testing.assert_close(first[..., :16], second[..., :16], atol=1e-4, rtol=0)
    torch.testing.assert_close(first[:, 0], second[:, 0])
    assert (first[:, 1, 16:] - second[:, 1, 16:]).abs().max() > 0.01


def test_any_frame_size_is_read_and_gradients_reach_the_pixels():
    trunk = PixelTrunk((4, 2, 8, 8), 8, 1, 0)
    frames = torch.rand(2, 4, 3, 15, 26, generator=torch.Generator().manual_seed(0)).requires_grad_()
    trunk(look(frames), None).square().sum().backward()
    assert frames.grad is not None and (frames.grad.abs().amax(dim=(1, 2, 3, 4)) > 0).all()


@pytest.mark.parametrize(("sides", "smallest"), [((8, 8), 1), ((60, 104), 4)])
def test_the_smallest_latents_are_those_of_one_stride(sides, smallest):
    assert PixelTrunk((4, 2, *sides), 8, 1, 0).smallest_side == smallest


@pytest.mark.parametrize("count", [64, 63, 1])
def test_the_median_is_torchs(count):
    values = torch.randn(5, 3, count, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pixels._median(values), values.median(dim=2).values)


@pytest.mark.parametrize("side", [(16, 16), (12, 20), (17, 30)])
def test_parts_are_averaged_as_adaptive_pooling_does(side):
    frames = torch.rand(2, 3, *side, dtype=torch.float64)
    parts = frames.flatten(2) @ pixels._shares(*side, 4)
    torch.testing.assert_close(parts, functional.adaptive_avg_pool2d(frames, 4).flatten(2))


def test_what_inference_mode_has_seen_first_can_be_climbed_later():
    frames = torch.rand(1, 2, 3, 14, 22, generator=torch.Generator().manual_seed(0))
    pixels._places.cache_clear()
    with torch.inference_mode():
        seen = look(frames)
    climbed = look(frames.requires_grad_())
    climbed.square().sum().backward()
    torch.testing.assert_close(climbed.detach(), seen.clone())
    assert frames.grad is not None and frames.grad.abs().sum() > 0


def test_looking_changes_no_frames():
    frames = torch.rand(1, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    before = frames.clone()
    with torch.no_grad():
        look(frames)
    assert torch.equal(frames, before)
