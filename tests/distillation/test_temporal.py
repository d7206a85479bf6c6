import pytest
import torch

from distillation.errors import NoiseError
from distillation.temporal import frame_differences, temporal_consistency_loss, temporal_vsd_loss


def clip(*frames):
    return torch.tensor(frames, dtype=torch.float64).view(1, 1, -1, 1, 1)


def test_differences_and_the_causal_mask():
    assert frame_differences(clip(1, 3, 6, 10)).flatten().tolist() == [2, 3, 4]
    assert frame_differences(clip(1, 3, 6, 10), mask_first=True).flatten().tolist() == [3, 4]


def test_consistency_term_matches_motion_and_not_position():
    still, moving = clip(0, 0, 0), clip(5, 6, 8)
    assert float(temporal_consistency_loss(moving + 3, moving)) == 0
    assert float(temporal_consistency_loss(still, moving)) == pytest.approx((1 + 4) / 2)
    assert float(temporal_consistency_loss(still, moving, mask_first=True)) == pytest.approx(4)


def test_consistency_target_gets_no_gradient():
    prediction, target = clip(0, 1).requires_grad_(), clip(0, 3).requires_grad_()
    temporal_consistency_loss(prediction, target).backward()
    assert target.grad is None
    assert prediction.grad.flatten().tolist() == [4, -4]  # d/dx (x1 - x0 - 3)^2 at 1 - 3 = -2


def test_vsd_term_vanishes_where_g_does_not_change_over_time():
    x = clip(0, 5, -2).requires_grad_()
    temporal_vsd_loss(x, clip(2, 2, 2)).backward()
    assert x.grad.abs().max() == 0


def test_vsd_term_has_the_gradient_of_its_definition():
    # 0.5 mean |dx - sg(dx - dg)|^2: the gradient in dx is dg / 2, and in x its transpose difference.
    x, g = clip(0, 5, -2).requires_grad_(), clip(1, 4, 9)
    loss = temporal_vsd_loss(x, g)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.5 * (9 + 25) / 2)
    assert torch.allclose(x.grad.flatten(), torch.tensor([-3, 3 - 5, 5], dtype=torch.float64) / 2, rtol=0, atol=1e-14)


def test_too_few_frames_are_an_error():
    with pytest.raises(NoiseError, match="F >= 2"):
        frame_differences(clip(1))
    with pytest.raises(NoiseError, match="F >= 3"):
        frame_differences(clip(1, 2), mask_first=True)
